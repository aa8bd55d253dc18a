#!/usr/bin/env bash
# Evolution, from repaired masks and without, against gradual magnitude pruning with the same training: a real task of each kind, three seeds; no download.
# Rebuilds results/real_tasks/ in some half an hour on 2 cores; runs that are there already are kept.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
targets=0.8,0.9,0.95,0.97,0.99
. scripts/rules_runs.sh

program=(-m evoprune.main)
while read -r name dense epochs; do
  results=results/real_tasks/$name
  common=(--model "scripts/real_tasks.py:${name}_net" --data "scripts/real_tasks.py:$name")
  dense "$name" "$dense" --threads 1
  for seed in 0 1 2; do
    run refined $seed --repair least-squares --population 32 --generations 2 --refine-epochs "$epochs" --targets $targets
    run evolve $seed --total-epochs "$epochs" --targets $targets
    run gradual-magnitude $seed --method gradual:magnitude --total-epochs "$epochs" --targets $targets
  done
  python scripts/rules_table.py "$results" 80 90 95 97 99 | tee "$results/table.txt"
done << 'END'
digits 60 400
cancer 30 800
diabetes 20 800
angles 60 200
attributes 60 400
mosaic 60 600
END
