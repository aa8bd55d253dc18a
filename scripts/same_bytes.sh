#!/usr/bin/env bash
# Do two checkouts give the same results? Small runs of both with every method, start, repair, kind of knowledge and engine; layer by
# layer, trained, tuned, with a floor, in bf16, killed and resumed. Compares front.csv, masks.npz, layers.csv and models/ byte for byte,
# and log.csv but for its seconds, hvlog beyond 12 places and, in tuned runs, evaluations (equal masks count once). Exit status 1 if
# anything differs.
# usage: scripts/same_bytes.sh OLD NEW [WORK]    some 8 minutes a checkout; runs that are in the folder WORK already are kept
set -euo pipefail
old=$(realpath "${1:?usage: scripts/same_bytes.sh OLD NEW [WORK]}") new=$(realpath "${2:?usage: scripts/same_bytes.sh OLD NEW [WORK]}")
work=${3:-$(mktemp -d)}
mkdir -p "$work"
cd "$work"

cat > bn.py <<'END'
import torch
from torch import nn


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2),
                         nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 10))
END
small=(--train-epochs 3 --train-images 400 --search-images 100 --threads 1)
masks=("${small[@]}" --population 12 --generations 4)
tuned=("${small[@]}" --targets 0.8,0.9,0.95)
names=()

run() {  # NAME FLAGS...: the run in both checkouts
  names+=("$1")
  for side in old new; do
    local out=$side/$1
    [[ -e $out/done.json ]] && continue
    rm -rf "$out"
    PYTHONPATH=${!side} python -m evoprune.main --out "$out" "${@:2}" > "$side-$1.txt" 2>&1 || { cat "$side-$1.txt"; exit 1; }
  done
}

killed() {  # NAME FLAGS...: the same, killed when a generation after the first, or a trained mask, has been saved, and resumed
  names+=("$1")
  for side in old new; do
    local out=$side/$1
    [[ -e $out/done.json ]] && continue
    rm -rf "$out"
    PYTHONPATH=${!side} python -m evoprune.main --out "$out" "${@:2}" > "$side-$1.txt" 2>&1 &
    local pid=$!
    until find "$out/checkpoint" \( -path '*/trained/*' -o -name '0*[1-9].npz' \) 2> /dev/null | grep -q . ||
      ! kill -0 $pid 2> /dev/null; do sleep 0.02; done
    kill -9 $pid 2> /dev/null || echo "$side/$1 ended before it could be killed" >&2
    wait $pid 2> /dev/null || true
    PYTHONPATH=${!side} python -m evoprune.main --resume "$out" >> "$side-$1.txt" 2>&1
  done
}

run default "${masks[@]}"
run starts "${masks[@]}" --start random,narrow,magnitude,erk,lamp,fisher,multishot --skip fc2 --seed 3
run least-squares "${masks[@]}" --repair least-squares
run knows-weights "${masks[@]}" --repair least-squares --knowledge weights
run knows-nothing "${masks[@]}" --repair least-squares --knowledge none
run batch-norm --model bn.py:net "${masks[@]}"
run batch-norm-solved --model bn.py:net "${masks[@]}" --repair least-squares --include '*.bias'
run floor-bf16 "${masks[@]}" --accuracy-floor 0.3 --precision bf16 --batch-size 32
run finetuned "${masks[@]}" --finetune-epochs 2 --front 4
run repaired-finetuned "${masks[@]}" --repair least-squares --finetune-epochs 1 --front 3
run layerwise "${masks[@]}" --layerwise --rounds 2 --caps 0.6,1.0 --finetune-epochs 1
run layerwise-floor "${masks[@]}" --layerwise --layer-rule floor --accuracy-floor 0.4 --engine processes --workers 2
run tuned "${tuned[@]}" --total-epochs 12 --generations 4
run tuned-batch-norm --model bn.py:net "${tuned[@]}" --total-epochs 9
run gradual-fisher "${tuned[@]}" --total-epochs 9 --method gradual:fisher
run gradual-lamp "${tuned[@]}" --total-epochs 40 --method gradual:lamp --engine processes --workers 2
run oneshot-fisher-trained "${tuned[@]}" --total-epochs 6 --method oneshot:fisher
run multishot-magnitude-trained "${tuned[@]}" --total-epochs 6 --method multishot:magnitude
run multishot-obs "${tuned[@]}" --repair least-squares --method multishot:obs
run multishot-lamp "${tuned[@]}" --method multishot:lamp --knowledge weights
run oneshot-erk "${tuned[@]}" --method oneshot:erk --repair least-squares
run oneshot-narrow "${tuned[@]}" --method oneshot:narrow --knowledge none --finetune-epochs 1
run processes "${masks[@]}" --engine processes --workers 2 --repair least-squares --finetune-epochs 1 --front 3
run scoop "${masks[@]}" --engine scoop --workers 2
run scoop-tuned "${tuned[@]}" --total-epochs 9 --engine scoop --workers 2
run dask "${masks[@]}" --engine dask --workers 2 --finetune-epochs 1 --front 3
killed killed "${small[@]}" --population 12 --generations 400
killed killed-tuned "${tuned[@]}" --total-epochs 150 --generations 9
killed killed-layerwise "${small[@]}" --population 12 --generations 30 --layerwise --finetune-epochs 1

python - "${names[@]}" <<'END'
import csv
import sys
from pathlib import Path


def log(path):
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    left_out = {"seconds"} | ({"evaluations"} if any(float(row["epochs"]) for row in rows) else set())
    return [{name: round(float(value), 12) if name == "hvlog" else value for name, value in row.items() if name not in left_out}
            for row in rows]


wrong = 0
for name in sys.argv[1:]:
    old, new = Path("old", name), Path("new", name)
    files = ["front.csv", "masks.npz", "layers.csv", "dominated.csv"]
    files += sorted({str(path.relative_to(side)) for side in (old, new) for path in (side / "models").glob("*")})
    differ = [file for file in files if (old / file).exists() != (new / file).exists()
              or ((old / file).exists() and (old / file).read_bytes() != (new / file).read_bytes())]
    differ += ["log.csv"] * (log(old / "log.csv") != log(new / "log.csv"))
    print(f"{name:30s} {'the same' if not differ else 'DIFFERENT: ' + ', '.join(differ)}")
    wrong += bool(differ)
print(f"{len(sys.argv) - 1} runs, {wrong} different")
sys.exit(wrong > 0)
END
