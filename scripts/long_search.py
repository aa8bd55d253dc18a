"""A tiny search of very many generations: memory, checkpoints and the time of a generation must not grow with their number.

    python scripts/long_search.py --generations 100000

A linear model of 640 weights on 60 random images, 8 masks a generation. Prints a row every so many generations and writes
results/long_search/table.csv: masks measured so far, milliseconds a generation since the last row (saving included), MiB of
this process, KiB of the newest checkpoint, of all that lies in checkpoint/, and written there a second.
"""

from __future__ import annotations

import argparse
import csv
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from deap import base

import evoprune
from evoprune.config import Config
from evoprune.evolution import default_toolbox
from evoprune.evolution.generations import State
from evoprune.masks.layout import Layout

OUT = Path(__file__).resolve().parent.parent / "results" / "long_search" / "table.csv"
ROWS = 20
COLUMNS = ("generation", "masks", "ms_a_generation", "process_mib", "newest_kib", "checkpoint_kib", "written_kib_a_second")


def written() -> int:
    """Return the bytes that this process has written to files."""
    return int(Path("/proc/self/io").read_text().split("wchar: ")[1].split()[0])


def measure(state: State, folder: Path, last: tuple[int, float, int]) -> dict[str, Any]:
    """Return a row; `last` has the generation, time and bytes written of the row before."""
    files = [path for path in folder.iterdir() if path.is_file()]
    newest = max((path for path in files if path.suffix == ".npz"), default=None)
    seconds = time.perf_counter() - last[1]
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return dict(zip(COLUMNS, (
        state.generation, state.evaluations, round(1000 * seconds / max(1, state.generation - last[0]), 3),
        round(pages * os.sysconf("SC_PAGE_SIZE") / 2**20, 1), round(newest.stat().st_size / 1024, 1) if newest else 0.0,
        round(sum(path.stat().st_size for path in files) / 1024, 1), round((written() - last[2]) / 1024 / seconds, 1))))


def main() -> int:
    """Search and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--generations", type=int, default=100_000)
    parser.add_argument("--out", type=Path, default=OUT)
    given = parser.parse_args()
    rows: list[dict[str, Any]] = []
    last = [0, time.perf_counter(), written()]

    def toolbox(evaluate: Any, layout: Layout, config: Config) -> base.Toolbox:
        made = default_toolbox(evaluate, layout, config)
        usual = made.breed

        def breed(state: State, rng: np.random.Generator) -> Any:
            if state.generation and state.generation % (given.generations // ROWS) == 0:
                rows.append(measure(state, Path(str(config.out), "checkpoint"), (last[0], last[1], last[2])))
                print(rows[-1], flush=True)
                last[:] = state.generation, time.perf_counter(), written()
            return usual(state, rng=rng)

        made.register("breed", breed)
        return made

    torch.manual_seed(0)
    images, labels = torch.randn(60, 64), torch.arange(60) % 10
    with tempfile.TemporaryDirectory() as folder:
        front = evoprune.prune(torch.nn.Linear(64, 10), (images, labels), out=f"{folder}/run", population=8, threads=1,
                               generations=given.generations, toolbox=toolbox)
        print(f"{len(front)} points; log.csv has {(front.path / 'log.csv').read_text().count(chr(10)) - 1:,} rows")
    given.out.parent.mkdir(parents=True, exist_ok=True)
    with open(given.out, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
