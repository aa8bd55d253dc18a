#!/usr/bin/env bash
# How lucky is what a search finds, by the number of its search images? Without training, three seeds: the multi-shot path alone at
# eight sparsities, a search that starts from it, and one that keeps training images back to compare points on in the end; with 300
# images also both and then training. Rebuilds results/search_images/ in two hours of one core, five minutes of them for digits; runs
# that are there already are kept.
# usage: scripts/search_images.sh [DATA_DIR WEIGHTS]    digits alone, or LeNet-5 on MNIST too (see lenet5_mnist_rules.sh)
set -euo pipefail
data=${1:+$(realpath "$1")} weights=${2:+$(realpath "$2")}
cd "$(dirname "${BASH_SOURCE[0]}")/.."
targets=0.8,0.9,0.95,0.97,0.98,0.985,0.99,0.995
program=(-m evoprune.main)
. scripts/rules_runs.sh

compare() {  # NAME, how many training images are kept back, and epochs of training, if there is any
  results=results/search_images/$1
  for seed in ${seeds:-0 1 2}; do
    run path $seed --repair least-squares --method multishot:obs --targets $targets
    run search $seed --repair least-squares --population 32 --generations 10
    run chosen $seed --repair least-squares --population 32 --generations 10 --choice-images "$2"
    if ((${3:-0})); then
      run trained $seed --repair least-squares --population 32 --generations 3 --refine-epochs "$3" --targets $targets
      run trained-chosen $seed --repair least-squares --population 32 --generations 3 --refine-epochs "$3" --targets $targets \
        --choice-images "$2"
    fi
  done
  python scripts/rules_table.py "$results" 80 90 95 97 98 98.5 99 99.5 | tee "$results/table.txt"
  python scripts/luck.py "$results" | tee -a "$results/table.txt"
}

common=(--model lenet --data digits --train-epochs 30)
compare digits 287
if [[ -n $weights ]]; then
  link "$data" lenet5_mnist
  link "$weights" lenet5.pth
  for images in 300 1000 5000; do
    common=(--model lenet5 --weights data/lenet5.pth --data mnist --data-dir data/lenet5_mnist --search-images $images)
    compare lenet5-mnist-$images 4096 $((images == 300 ? 8 : 0))
  done
fi
