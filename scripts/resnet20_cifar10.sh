#!/usr/bin/env bash
# A real pretrained net at full size: the published ResNet-20, adapted to CIFAR-10 (JPEG), 32x32 pixels, 45,000 images to train on.
# Without training, a path and evolution from it; with 40 epochs in all, evolution and rules. Rebuilds results/resnet20_cifar10/; what
# is there already stays. A run without training takes some two hours of one core, one with training more.
# usage: scripts/resnet20_cifar10.sh FOLDER WEIGHTS [SEED...]
#   FOLDER has train/CLASS/* and test/CLASS/*;  WEIGHTS is resnet20-jpeg.safetensors
set -euo pipefail
usage="usage: scripts/resnet20_cifar10.sh FOLDER WEIGHTS [SEED...]"
folder=$(realpath "${1:?$usage}") weights=$(realpath "${2:?$usage}")
cd "$(dirname "${BASH_SOURCE[0]}")/.."
results=results/resnet20_cifar10
common=(--model scripts/resnet_cifar.py:resnet20 --weights data/resnet20-jpeg.safetensors --data folder:data/cifar10_jpeg
        --mean 0.485,0.456,0.406 --std 0.229,0.224,0.225 --search-images 5000)
untrained=0.6,0.7,0.8,0.9,0.95,0.98 trained=0.8,0.9,0.95,0.97,0.98,0.99
. scripts/rules_runs.sh

link "$folder" cifar10_jpeg
link "$weights" resnet20-jpeg.safetensors
seeds=${*:3}
for seed in ${seeds:-0 1 2}; do
  program=(-m evoprune.main)
  run multishot-obs-repaired $seed --method multishot:obs --repair least-squares --targets $untrained
  run evolve-untrained $seed --repair least-squares --population 32 --generations 10
done
for seed in ${seeds:-0 1 2}; do
  program=(-m evoprune.main)
  run evolve-40 $seed --total-epochs 40 --targets $trained --train-precision bf16
  run gradual-fisher-40 $seed --method gradual:fisher --total-epochs 40 --targets $trained --train-precision bf16
  program=(scripts/gradual_variants.py paced)
  run gradual-fisher-40-paced $seed --method gradual:fisher --total-epochs 40 --targets $trained --train-precision bf16
done
python scripts/rules_table.py $results 60 70 80 90 95 97 98 99 | tee $results/table.txt
