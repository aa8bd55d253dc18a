"""What the points of a run weigh packed, and what they score as loaded again: in fp32, fp16 and int8, a row each.

    python scripts/bench_packed.py RUN [SPARSITY...]      the point nearest above each, 0.95 and 0.97 unless given

RUN is the folder of a finished run on named data. The table, results/bench_export/packed.csv unless `--out` says otherwise, is
written anew, and the run's own tables go into the folder `lenet5` beside it.
"""

from __future__ import annotations

import argparse
import csv
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

import evoprune
from evoprune.files import to_safetensors
from evoprune.inputs.sources import load_data
from evoprune.masks.packed import BITS
from evoprune.results.machine import versions
from evoprune.results.written import CONFIG, DENSE, DONE, FRONT, LAYERS, LOG

OUT = Path(__file__).resolve().parent.parent / "results" / "bench_export" / "packed.csv"
COLUMNS = ("point", "sparsity", "kept", "bits", "bytes", "dense_bytes", "test_accuracy", "test_accuracy_in_front", "commit")


def rows(front: evoprune.Front, sparsity: float) -> list[dict[str, Any]]:
    """Return a row for each way to pack the point nearest above a sparsity."""
    point = min((p for p in front if p.sparsity >= sparsity), key=lambda p: p.sparsity)
    test, structure, found = load_data(front.record.config, None).test, front.structure(), []
    with tempfile.TemporaryDirectory() as folder:
        for bits in BITS:
            path = point.export(Path(folder) / f"{bits}.packed.safetensors", bits=bits)
            model = evoprune.load_packed(path, structure)
            score = evoprune.accuracy(model, test, front.record.batch_size, front.record.config.task)
            found.append({"point": point.id, "sparsity": point.sparsity, "kept": point.kept, "bits": bits,
                          "bytes": path.stat().st_size, "dense_bytes": len(to_safetensors(front.written.tensors(DENSE))),
                          "test_accuracy": score, "test_accuracy_in_front": point.test, "commit": versions()["commit"]})
    return found


def main() -> int:
    """Write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("sparsities", nargs="*", type=float, default=[0.95, 0.97], metavar="SPARSITY")
    parser.add_argument("--out", type=Path, default=OUT)
    given = parser.parse_args()
    torch.set_num_threads(1)
    front = evoprune.load_front(given.run)
    kept = given.out.parent / "lenet5"
    kept.mkdir(parents=True, exist_ok=True)
    for name in (CONFIG, FRONT, LAYERS, LOG, DONE):
        shutil.copy(given.run / name, kept)
    with given.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for sparsity in given.sparsities:
            for found in rows(front, sparsity):
                writer.writerow(found)
                print(found, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
