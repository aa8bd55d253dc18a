#!/usr/bin/env bash
# The comparison of lenet5_mnist_rules.sh with a dense model that never saw the search images: trained on the 55,000 others.
# Rebuilds results/lenet5_mnist_heldout/ in some 40 minutes on 2 cores; runs that are there already are kept.
# usage: scripts/lenet5_mnist_heldout.sh DATA_DIR    DATA_DIR has MNIST/raw/*-ubyte, as torchvision lays it out
set -euo pipefail
data=$(realpath "${1:?usage: scripts/lenet5_mnist_heldout.sh DATA_DIR}")
cd "$(dirname "${BASH_SOURCE[0]}")/.."
results=results/lenet5_mnist_heldout
targets=0.9,0.95,0.97,0.98,0.985,0.99,0.993,0.995
common=(--model lenet5 --data mnist --data-dir data/lenet5_mnist --search-images 5000)
. scripts/rules_runs.sh

link "$data" lenet5_mnist
dense lenet5_55000 30 --learning-rate 0.003 --threads 1
for seed in 0 1 2; do
  program=(-m evoprune.main)
  run evolve-80 $seed --total-epochs 80 --targets $targets
  run gradual-fisher-80 $seed --method gradual:fisher --total-epochs 80 --targets $targets
  (( seed < 2 )) || continue
  program=(scripts/gradual_variants.py paced)
  run gradual-fisher-80-paced $seed --method gradual:fisher --total-epochs 80 --targets $targets
done
python scripts/rules_table.py $results 90 95 97 98 98.5 99 99.3 99.5 | tee $results/table.txt
