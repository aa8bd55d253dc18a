#!/usr/bin/env bash
# Evolution against rules on the inspiration's LeNet-5, MNIST: five seeds a method, three a variant of one, the same data, training and files.
# Rebuilds results/lenet5_mnist_rules/ in some three to six hours on 2 cores; runs that are there already are kept.
# usage: scripts/lenet5_mnist_rules.sh DATA_DIR WEIGHTS [RESULTS]    RESULTS: another folder, to run them again
#   DATA_DIR  has MNIST/raw/*-ubyte, as torchvision lays it out;  WEIGHTS  the trained LeNet-5, a state dict
set -euo pipefail
data=$(realpath "${1:?usage: scripts/lenet5_mnist_rules.sh DATA_DIR WEIGHTS}")
weights=$(realpath "${2:?usage: scripts/lenet5_mnist_rules.sh DATA_DIR WEIGHTS}")
cd "$(dirname "${BASH_SOURCE[0]}")/.."
results=${3:-results/lenet5_mnist_rules}
targets=0.9,0.95,0.97,0.98,0.985,0.99,0.993,0.995

common=(--model lenet5 --data mnist --data-dir data/lenet5_mnist --weights data/lenet5.pth --search-images 5000)
. scripts/rules_runs.sh

link "$data" lenet5_mnist
link "$weights" lenet5.pth
program=(-m evoprune.main)
run oneshot-lamp 0 --method oneshot:lamp --repair none --targets 0.5,0.6,0.7,0.8,$targets
run multishot-lamp-repaired 0 --method multishot:lamp --repair least-squares --targets 0.5,0.6,0.7,0.8,$targets
run multishot-obs-repaired 0 --method multishot:obs --repair least-squares --targets 0.5,0.6,0.7,0.8,$targets
for seed in 0 1 2 3 4; do
  run evolve-80 $seed --total-epochs 80 --targets $targets
  run gradual-fisher-80 $seed --method gradual:fisher --total-epochs 80 --targets $targets
done
for seed in 0 1 2 3 4; do
  run gradual-fisher-24 $seed --method gradual:fisher --total-epochs 24 --targets $targets
  run evolve-48 $seed --total-epochs 48 --targets $targets
done
for seed in 0 1 2 3 4; do
  program=(scripts/without_selection.py niche)
  run evolve-80-without-selection $seed --total-epochs 80 --targets $targets
  program=(scripts/without_selection.py any)
  run evolve-80-random-parents $seed --total-epochs 80 --targets $targets
  program=(scripts/gradual_variants.py paced)
  run gradual-fisher-80-paced $seed --method gradual:fisher --total-epochs 80 --targets $targets
done
for seed in 0 1 2; do
  program=(scripts/gradual_variants.py rate=1.0)
  run gradual-fisher-80-rate-1 $seed --method gradual:fisher --total-epochs 80 --targets $targets
  program=(scripts/gradual_variants.py rate=0.5)
  run gradual-fisher-24-rate-half $seed --method gradual:fisher --total-epochs 24 --targets $targets
  program=(scripts/without_selection.py targets)
  run evolve-80-random-targets $seed --total-epochs 80 --targets $targets
done
program=(-m evoprune.main)
run starts-lamp-erk 0 --start lamp,erk --repair least-squares --population 64 --generations 0
for seed in 0 1 2 3 4; do
  run evolve-untrained $seed --repair least-squares --population 64 --generations 30
  run evolve-blind $seed --knowledge none --repair least-squares --population 64 --generations 30
done
python scripts/rules_table.py $results 80 90 95 97 98 98.5 99 99.3 99.5 | tee $results/table.txt
