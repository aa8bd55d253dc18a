#!/usr/bin/env bash
# At which learning rate, over the usual one, are published weights adapted? ResNet-20, trained on CIFAR-10, to CIFAR-10 (JPEG): one
# epoch of 10,000 images. Rebuilds results/adapting/, some 5 minutes a run on one core; what is there stays.
# usage: scripts/adapting.sh FOLDER WEIGHTS    FOLDER has train/CLASS/* and test/CLASS/*; WEIGHTS is resnet20.safetensors
set -euo pipefail
folder=$(realpath "${1:?usage: scripts/adapting.sh FOLDER WEIGHTS}") weights=$(realpath "${2:?usage: scripts/adapting.sh FOLDER WEIGHTS}")
cd "$(dirname "${BASH_SOURCE[0]}")/.."
results=results/adapting
program=(-m evoprune.main)
. scripts/rules_runs.sh

link "$folder" cifar10_jpeg
link "$weights" resnet20-published.safetensors
common=(--model scripts/resnet_cifar.py:resnet20 --weights data/resnet20-published.safetensors --data folder:data/cifar10_jpeg
        --mean 0.485,0.456,0.406 --std 0.229,0.224,0.225 --train-images 10000 --search-images 5000 --test-images 2000
        --train-epochs 1 --method oneshot:magnitude --targets 0.5 --repair none)
run published 0 --train-epochs 0
for seed in 0 1 2; do
  for factor in 1 0.3 0.1 0.03 0.01; do
    run rate-$factor $seed --learning-rate "$(python -c "print(0.01 * $factor)")"
  done
  run bf16-0.1 $seed --learning-rate 0.001 --train-precision bf16
done
python scripts/rules_table.py $results 0 | tee $results/table.txt
