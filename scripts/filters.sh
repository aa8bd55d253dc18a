#!/usr/bin/env bash
# Whole filters instead of weights: digits, evolution against uniform random filters, filter norms and gradual Fisher pruning with the
# same training, eight seeds; LeNet-5 on MNIST in two minutes. Rebuilds results/filters/ in some twenty minutes on 2 cores; runs that
# are there already are kept.
# usage: scripts/filters.sh DATA_DIR WEIGHTS
#   DATA_DIR  has MNIST/raw/*-ubyte, as torchvision lays it out;  WEIGHTS  the trained LeNet-5, a state dict
set -euo pipefail
data=$(realpath "${1:?usage: scripts/filters.sh DATA_DIR WEIGHTS}")
weights=$(realpath "${2:?usage: scripts/filters.sh DATA_DIR WEIGHTS}")
cd "$(dirname "${BASH_SOURCE[0]}")/.."

results=results/filters/digits
common=(--model lenet --data digits)
. scripts/rules_runs.sh
dense digits-lenet 30
common+=(--unit filter --skip fc2 --total-epochs 300 --targets 0.3,0.5,0.6,0.7,0.8,0.85,0.9)
for seed in 0 1 2 3 4 5 6 7; do
  program=(-m evoprune.main)
  run evolve $seed
  run filter-norm $seed --method oneshot:magnitude
  run gradual-fisher $seed --method gradual:fisher
  program=(scripts/filter_masks.py uniform)
  run uniform-random $seed --method oneshot:random
  program=(scripts/filter_masks.py norm)
  run filter-norm-over-mean $seed --method oneshot:random
done
python scripts/rules_table.py $results 30 50 60 70 80 85 90 | tee $results/table.txt

results=results/filters/lenet5-mnist
link "$data" lenet5_mnist
link "$weights" lenet5.pth
program=(-m evoprune.main)
common=(--model lenet5 --data mnist --data-dir data/lenet5_mnist --weights data/lenet5.pth --search-images 5000 --unit filter
  --skip classifier.5 --total-epochs 24 --targets 0.5,0.7,0.8,0.85,0.9,0.93,0.95,0.96)
run evolve 0
program=(scripts/filter_masks.py norm)
run filter-norm-over-mean 0 --method oneshot:random
python scripts/rules_table.py $results 50 70 80 85 90 93 95 96 | tee $results/table.txt
for method in evolve filter-norm-over-mean; do
  python scripts/filters_kept.py $results/$method/seed-0 0 50 70 80 85 90 93 95 96 | tee $results/$method/filters.txt
done
