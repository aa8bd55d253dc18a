#!/usr/bin/env bash
# A second task, with the settings of the first: a ResNet-20 on CIFAR-10 (JPEG), made small enough for a CPU: 16x16 pixels,
# 10,000 images to train on. Rebuilds results/resnet20_cifar10_rules/; runs that are there already are kept.
# usage: scripts/resnet20_cifar10_rules.sh FOLDER    FOLDER has train/CLASS/* and test/CLASS/*
set -euo pipefail
folder=$(realpath "${1:?usage: scripts/resnet20_cifar10_rules.sh FOLDER}")
cd "$(dirname "${BASH_SOURCE[0]}")/.."
results=results/resnet20_cifar10_rules
common=(--model scripts/resnet20.py:resnet20 --data folder:data/cifar10_jpeg --image-size 16 --mean 0.49,0.48,0.45
        --std 0.25,0.24,0.26 --train-images 10000 --search-images 2500)
targets=0.9,0.95,0.97,0.98,0.985,0.99,0.993,0.995
. scripts/rules_runs.sh

link "$folder" cifar10_jpeg
dense resnet20 30 --threads 1
for seed in 0 1 2; do
  program=(-m evoprune.main)
  run evolve-40 $seed --total-epochs 40 --targets $targets
  run line-40 $seed --total-epochs 40 --targets $targets --generations 1
  run gradual-fisher-40 $seed --method gradual:fisher --total-epochs 40 --targets $targets
  program=(scripts/gradual_variants.py paced)
  run gradual-fisher-40-paced $seed --method gradual:fisher --total-epochs 40 --targets $targets
done
python scripts/rules_table.py $results 90 95 97 98 98.5 99 99.3 99.5 | tee $results/table.txt
