#!/usr/bin/env bash
# The inspiration's second task: ResNet-18 on CIFAR-10 (JPEG): a dense model, masks without training by a path and by evolution, and
# a search of masks and training of what it finds, and two rules, with the same epochs: 10 on two cores of a CPU, 60 on a GPU.
# Rebuilds results/resnet18_cifar10/, or resnet18_cifar10_gpu/; what is there stays, and dense training goes on where it stopped.
# usage: scripts/resnet18_cifar10.sh FOLDER [cpu|cuda]    FOLDER has train/CLASS/* and test/CLASS/*
set -euo pipefail
folder=$(realpath "${1:?usage: scripts/resnet18_cifar10.sh FOLDER [cpu|cuda]}") device=${2:-cpu}
cd "$(dirname "${BASH_SOURCE[0]}")/.."
results=results/resnet18_cifar10
common=(--model resnet18 --data folder:data/cifar10_jpeg --mean 0.4914,0.4822,0.4465 --std 0.2470,0.2435,0.2616
        --search-images 5000 --device "$device")
program=(-m evoprune.main)
if [[ $device == cpu ]]; then
  first=10 epochs=10 shots=20 generations=2 workers=2
else
  results+=_gpu first=60 epochs=60 shots=160 generations=20 workers=1
fi
untrained=(--repair least-squares --shots $shots) trained=(--total-epochs $epochs --train-precision bf16)
line=(--repair bn --precision bf16 --population 8 --generations $generations --refine-epochs $epochs --train-precision bf16)
targets=0.7891,0.9,0.95,0.98
. scripts/rules_runs.sh

link "$folder" cifar10_jpeg
dense resnet18${device#cpu} $first --train-precision bf16
run multishot-obs-repaired 0 "${untrained[@]}" --method multishot:obs --targets 0.6,0.7,$targets
run evolve-untrained 0 "${untrained[@]}" --population 32 --generations $generations
run evolve 0 "${line[@]}" --targets $targets
run gradual-fisher 0 "${trained[@]}" --method gradual:fisher --targets $targets
run oneshot-lamp 0 "${trained[@]}" --method oneshot:lamp --targets $targets
python scripts/rules_table.py $results 60 70 78.91 90 95 98 | tee $results/table.txt
