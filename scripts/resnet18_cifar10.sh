#!/usr/bin/env bash
# The inspiration's second task: ResNet-18 on CIFAR-10 (JPEG): a dense model, masks without training by a path and by evolution, and
# a tuned run and two rules with the same epochs. On two cores of a CPU 10 epochs, on a GPU 60. Rebuilds
# results/resnet18_cifar10/, or resnet18_cifar10_gpu/; what is there already stays, and dense training goes on where it stopped.
# Every run starts from what dense.packed.safetensors there holds: the trained weights in 8 bits.
# usage: scripts/resnet18_cifar10.sh FOLDER [cpu|cuda]    FOLDER has train/CLASS/* and test/CLASS/*
set -euo pipefail
folder=$(realpath "${1:?usage: scripts/resnet18_cifar10.sh FOLDER [cpu|cuda]}") device=${2:-cpu}
cd "$(dirname "${BASH_SOURCE[0]}")/.."
results=results/resnet18_cifar10
common=(--model resnet18 --data folder:data/cifar10_jpeg --mean 0.4914,0.4822,0.4465 --std 0.2470,0.2435,0.2616
        --search-images 5000 --device "$device")
program=(-m evoprune.main)
if [[ $device == cpu ]]; then
  first=10 epochs=10 shots=60 generations=2 workers=2
else
  results+=_gpu first=60 epochs=60 shots=160 generations=20 workers=1
fi
untrained=(--repair least-squares --shots $shots) trained=(--total-epochs $epochs --train-precision bf16)
targets=0.7891,0.9,0.95,0.98
. scripts/rules_runs.sh

pack() {  # FROM TO
  python -c '
import sys
from safetensors.numpy import save_file
from evoprune.inputs.weights import read_weights
from evoprune.masks.packed import pack
entries, metadata = pack(read_weights(sys.argv[1]), bits=8)
save_file(entries, sys.argv[2], metadata)' "$@"
}

unpack() {  # FROM TO
  python -c '
import sys
from safetensors.torch import save_file
import evoprune
from evoprune.inputs.models import resnet18
save_file(evoprune.load_packed(sys.argv[1], resnet18()).state_dict(), sys.argv[2])' "$@"
}

link "$folder" cifar10_jpeg
packed=$results/dense.packed.safetensors whole=$(basename $results)-trained
if [[ ! -e $packed ]]; then
  (dense "$whole" $first --train-precision bf16)
  pack "data/$whole.safetensors" "$packed"
fi
unpack "$packed" data/resnet18.safetensors
common+=(--weights data/resnet18.safetensors)
run multishot-obs-repaired 0 "${untrained[@]}" --method multishot:obs --targets 0.6,0.7,$targets
run evolve-untrained 0 "${untrained[@]}" --population 32 --generations $generations
run evolve 0 "${trained[@]}" --targets $targets
run gradual-fisher 0 "${trained[@]}" --method gradual:fisher --targets $targets
run oneshot-lamp 0 "${trained[@]}" --method oneshot:lamp --targets $targets
python scripts/rules_table.py $results 60 70 78.91 90 95 98 | tee $results/table.txt
