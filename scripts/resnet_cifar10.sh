#!/usr/bin/env bash
# Real pretrained nets at full size: the published ResNet-20 or ResNet-56, adapted to CIFAR-10 (JPEG), 32x32 pixels, 45,000 images to
# train on. ResNet-20 without training, by a path and by evolution from it, and with 40 epochs in all, by masks from NSGA-II that are
# then trained, by evolution that trains its children, and by rules; ResNet-56 with 20. Rebuilds results/NET_cifar10/; what is there
# already stays.
# usage: scripts/resnet_cifar10.sh NET FOLDER WEIGHTS [SEED...]
#   NET is resnet20 or resnet56;  FOLDER has train/CLASS/* and test/CLASS/*;  WEIGHTS is NET-jpeg.safetensors;  seeds are 0 1 2, or 0
set -euo pipefail
usage="usage: scripts/resnet_cifar10.sh NET FOLDER WEIGHTS [SEED...]"
net=${1:?$usage} folder=$(realpath "${2:?$usage}") weights=$(realpath "${3:?$usage}") seeds=${*:4}
cd "$(dirname "${BASH_SOURCE[0]}")/.."
results=results/${net}_cifar10
common=(--model "scripts/resnet_cifar.py:$net" --weights "data/$net-jpeg.safetensors" --data folder:data/cifar10_jpeg
        --mean 0.485,0.456,0.406 --std 0.229,0.224,0.225 --search-images 5000)
. scripts/rules_runs.sh

untrained() {
  program=(-m evoprune.main)
  run multishot-obs-repaired "$1" --method multishot:obs --repair least-squares --targets 0.6,0.7,0.8,0.9,0.95,0.98
  run evolve-untrained "$1" --repair least-squares --population 32 --generations 10
}

trained() {  # SEED EPOCHS TARGETS
  local training=(--total-epochs "$2" --targets "$3" --train-precision bf16)
  program=(-m evoprune.main)
  run refined "$1" --repair bn --precision bf16 --population 16 --generations 4 --refine-epochs "$2" "${training[@]:2}"
  run evolve "$1" "${training[@]}"
  run gradual-fisher "$1" --method gradual:fisher "${training[@]}"
  program=(scripts/gradual_variants.py paced)
  run gradual-fisher-paced "$1" --method gradual:fisher "${training[@]}"
}

link "$folder" cifar10_jpeg
link "$weights" "$net-jpeg.safetensors"
if [[ $net == resnet20 ]]; then
  for seed in ${seeds:-0 1 2}; do untrained $seed; done
  for seed in ${seeds:-0 1 2}; do trained $seed 40 0.8,0.9,0.95,0.97,0.98,0.99; done
  python scripts/rules_table.py $results 60 70 80 90 95 97 98 99 | tee $results/table.txt
else
  for seed in ${seeds:-0}; do trained $seed 20 0.85,0.9,0.95,0.98; done
  python scripts/rules_table.py $results 85 90 95 98 | tee $results/table.txt
fi
