#!/usr/bin/env bash
# The published ResNet-56, adapted to CIFAR-10 (JPEG), 32x32 pixels: evolution and gradual Fisher pruning with 20 epochs in all, one
# seed. Rebuilds results/resnet56_cifar10/ in some four hours of one core each; what is there already stays.
# usage: scripts/resnet56_cifar10.sh FOLDER WEIGHTS
#   FOLDER has train/CLASS/* and test/CLASS/*;  WEIGHTS is resnet56-jpeg.safetensors
set -euo pipefail
usage="usage: scripts/resnet56_cifar10.sh FOLDER WEIGHTS"
folder=$(realpath "${1:?$usage}") weights=$(realpath "${2:?$usage}")
cd "$(dirname "${BASH_SOURCE[0]}")/.."
results=results/resnet56_cifar10
common=(--model scripts/resnet_cifar.py:resnet56 --weights data/resnet56-jpeg.safetensors --data folder:data/cifar10_jpeg
        --mean 0.485,0.456,0.406 --std 0.229,0.224,0.225 --search-images 5000)
targets=0.85,0.9,0.95,0.98
. scripts/rules_runs.sh

link "$folder" cifar10_jpeg
link "$weights" resnet56-jpeg.safetensors
program=(-m evoprune.main)
run evolve 0 --total-epochs 20 --targets $targets --train-precision bf16
run gradual-fisher 0 --method gradual:fisher --total-epochs 20 --targets $targets --train-precision bf16
python scripts/rules_table.py $results 85 90 95 98 | tee $results/table.txt
