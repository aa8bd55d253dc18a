#!/usr/bin/env bash
# One button against each of its parts alone, and against gradual:fisher with evolution's pace, for the same time, three seeds.
# Rebuilds results/one_button/; runs that are there already are kept. Plans read a clock: run it on an idle machine.
# usage: scripts/one_button.sh [DATA_DIR WEIGHTS [FOLDER]]
#   digits alone, or nets on MNIST too (see lenet5_mnist_rules.sh), or also the small ResNet-20 of resnet20_cifar10_rules.sh
set -euo pipefail
data=${1:+$(realpath "$1")} weights=${2:+$(realpath "$2")} folder=${3:+$(realpath "$3")}
cd "$(dirname "${BASH_SOURCE[0]}")/.."
targets=0.8,0.9,0.95,0.97,0.98,0.985,0.99,0.995
. scripts/rules_runs.sh
timed=1

compare() {  # NAME MINUTES GENERATIONS EPOCHS [POPULATION [SHOTS]]: of a search, a path and rules, so many that they take as long
  results=results/one_button/$1 shots=(--shots "${6:-160}")
  for seed in ${seeds:-0 1 2}; do
    program=(-m evoprune.main)
    run plan $seed --minutes "$2"
    [[ ${common[*]} == *--weights* && $seed != 0 ]] ||  # from given weights a path looks at no seed
      run path $seed --repair least-squares --method multishot:obs --targets $targets "${shots[@]}"
    run search $seed --repair least-squares --population "${5:-32}" --generations "$3" "${shots[@]}"
    run gradual-fisher $seed --method gradual:fisher --total-epochs "$4" --targets $targets
    program=(scripts/gradual_variants.py paced)
    run gradual-fisher-paced $seed --method gradual:fisher --total-epochs "$4" --targets $targets
  done
  python scripts/rules_table.py "$results" 80 90 95 97 98 98.5 99 99.5 | tee "$results/table.txt"
}

trained() {  # NAME EPOCHS: every run starts from this dense model
  results=results/one_button/$1
  dense "$1" "$2" --threads 1
}

common=(--model lenet --data digits --train-epochs 30)
compare digits 1 10 550
if [[ -n $weights ]]; then
  link "$data" lenet5_mnist
  link "$weights" lenet5.pth
  mnist=(--data mnist --data-dir data/lenet5_mnist --search-images 5000)
  common=(--model lenet5 --weights data/lenet5.pth "${mnist[@]}")
  compare lenet5-mnist 10 25 50
  common=(--model scripts/mlp.py:mlp "${mnist[@]}")
  trained mlp-mnist 10
  compare mlp-mnist 5 20 50
  common=(--model scripts/vit_mnist.py:vit "${mnist[@]}")
  trained vit-mnist 15
  compare vit-mnist 10 2 19 16
fi
if [[ -n $folder ]]; then
  link "$folder" cifar10_jpeg
  common=(--model scripts/resnet20.py:resnet20 --data folder:data/cifar10_jpeg --image-size 16 --mean 0.49,0.48,0.45
          --std 0.25,0.24,0.26 --train-images 10000 --search-images 2500)
  trained resnet20-cifar10 30
  compare resnet20-cifar10 5 1 25 16 20
fi
