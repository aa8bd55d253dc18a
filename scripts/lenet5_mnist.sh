#!/usr/bin/env bash
# The inspiration's first task: its own LeNet-5 on MNIST. Rebuilds results/lenet5_mnist/ in at most 12 minutes on 2 cores.
# usage: scripts/lenet5_mnist.sh DATA_DIR WEIGHTS
#   DATA_DIR  has MNIST/raw/*-ubyte, as torchvision lays it out;  WEIGHTS  the trained LeNet-5, a state dict
set -euo pipefail
data=$(realpath "${1:?usage: scripts/lenet5_mnist.sh DATA_DIR WEIGHTS}")
weights=$(realpath "${2:?usage: scripts/lenet5_mnist.sh DATA_DIR WEIGHTS}")
cd "$(dirname "${BASH_SOURCE[0]}")/.."
mkdir -p data
[[ -e data/lenet5_mnist ]] || ln -s "$data" data/lenet5_mnist  # so that no path of this machine is recorded
ln -sf "$weights" data/lenet5.pth
SECONDS=0
python -m evoprune.main --model lenet5 --data mnist --data-dir data/lenet5_mnist --weights data/lenet5.pth \
  --search-images 5000 --generations 40 --finetune-epochs 3 --front 24 --seed 0 --out results/lenet5_mnist --overwrite
rm -r results/lenet5_mnist/checkpoint
python scripts/at_sparsity.py results/lenet5_mnist 80 90 93.16 95 97 98 99 | tee results/lenet5_mnist/at_sparsity.txt
echo "rebuilt in $SECONDS s"
