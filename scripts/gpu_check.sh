#!/usr/bin/env bash
# What CI cannot check: the tests marked gpu, small runs, and the benchmark, on the GPU of this machine. Under 5 minutes.
# usage: scripts/gpu_check.sh [FOLDER for the benchmark's table, default results/bench_evaluation]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python -c 'import torch; assert torch.cuda.is_available(), "torch sees no CUDA device"; print(torch.cuda.get_device_name())'
python -m pytest -q -o addopts= -m gpu
run=$(mktemp -d)
trap 'rm -rf "$run"' EXIT
python -m evoprune.main --device cuda --generations 20 --finetune-epochs 1 --front 4 --out "$run/digits"
python -m evoprune.main --device cuda --precision bf16 --generations 5 --accuracy-floor 0.5 --out "$run/bf16"
python -m evoprune.main --device cuda --generations 3 --repair least-squares --choice-images 200 --out "$run/repaired"
python -m evoprune.main --device cuda --generations 2 --layerwise --finetune-epochs 1 --out "$run/layerwise"
python -m evoprune.main --device cuda --total-epochs 30 --targets 0.8,0.9,0.95 --out "$run/tuned"
python -m evoprune.main --device cuda --total-epochs 30 --targets 0.8,0.9,0.95 --engine processes --workers 2 --threads 1 \
  --out "$run/workers"
cmp "$run"/{tuned,workers}/front.csv
python -m evoprune.main --device cuda --resume "$run/repaired" --finetune-epochs 2
python -m evoprune.main --device cuda --repair least-squares --shots 20 --generations 2 --refine-epochs 30 --targets 0.8,0.9,0.95 \
  --out "$run/line"
python -m evoprune.main --device cuda --model resnet18 --train-epochs 2 --train-precision bf16 --generations 1 \
  --population 8 --finetune-epochs 1 --front 2 --out "$run/bf16-trained"
python -m evoprune.main --device cuda --unit filter --skip fc2 --generations 3 --repair least-squares --out "$run/filters"
python -m evoprune.main --device cuda --unit filter --skip fc2 --total-epochs 30 --targets 0.5,0.8 --out "$run/filters-tuned"
for task in cancer diabetes attributes mosaic; do  # binary, regression, multi-label, segmentation
  python -m evoprune.main --device cuda --model "scripts/real_tasks.py:${task}_net" --data "scripts/real_tasks.py:$task" \
    --total-epochs 10 --targets 0.5,0.8 --out "$run/$task"
done
PYTHONPATH=scripts python - << 'END'
import any_network

any_network.TINY["device"] = "cuda"
for name in ("lstm", "tied", "two inputs", "transformer encoder"):
    row = any_network.one(name)
    assert all(row[way] == "yes" for way in any_network.WAYS), row
END
python - "$run/filters-tuned" << 'END'
import sys

import torch

import evoprune

x = torch.rand(64, 1, 8, 8, device="cuda")
for point in evoprune.load_front(sys.argv[1]):
    expected = point.model().cuda()(x)
    assert torch.allclose(point.model(slim=True).cuda()(x), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
END
before=$(cd "$run/digits" && find . -type f ! -name lock -exec sha256sum {} + | sort)
python -m evoprune.main --device cuda --out "$run/digits" --overwrite --total-epochs 0.00001 && exit 1
[[ $before == "$(cd "$run/digits" && find . -type f ! -name lock -exec sha256sum {} + | sort)" ]]  # a refused run replaces nothing
python scripts/bench_evaluation.py --device cuda --repeats 3 --out "${1:-results/bench_evaluation}"
