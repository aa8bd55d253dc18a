#!/usr/bin/env bash
# The inspiration's second task: ResNet-18 on CIFAR-10 (JPEG), for one GPU: a dense model, one tuned run, and two rules with the
# same training. Rebuilds results/resnet18_cifar10/; what is there already stays.
# usage: scripts/resnet18_cifar10.sh FOLDER    FOLDER has train/CLASS/* and test/CLASS/*
set -euo pipefail
folder=$(realpath "${1:?usage: scripts/resnet18_cifar10.sh FOLDER}")
cd "$(dirname "${BASH_SOURCE[0]}")/.."
results=results/resnet18_cifar10
common=(--model resnet18 --data folder:data/cifar10_jpeg --mean 0.4914,0.4822,0.4465 --std 0.2470,0.2435,0.2616
        --search-images 5000 --device cuda)
program=(-m evoprune.main) workers=1
targets=0.7891,0.9,0.95,0.98
. scripts/rules_runs.sh

link "$folder" cifar10_jpeg
dense resnet18 60
run evolve-60 0 --total-epochs 60 --targets $targets
run gradual-fisher-60 0 --method gradual:fisher --total-epochs 60 --targets $targets
run oneshot-lamp-60 0 --method oneshot:lamp --total-epochs 60 --targets $targets
python scripts/rules_table.py $results 78.91 90 95 98 | tee $results/table.txt
