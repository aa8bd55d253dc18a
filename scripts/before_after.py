"""How fast two checkouts evaluate masks: scripts/bench_evaluation.py of both, in turns, medians side by side.

    python scripts/before_after.py OLD NEW [--rounds 2] [--repeats 2]

Writes results/bench_evaluation/before_after.txt. Take checkouts with the same versions of everything else.
"""

from __future__ import annotations

import argparse
import csv
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np


def measured(checkout: Path, repeats: int) -> dict[tuple[str, str], float]:
    """Return the number of each (measure, unit), from the checkout's own benchmark and package."""
    with tempfile.TemporaryDirectory() as out:
        subprocess.run([sys.executable, checkout / "scripts" / "bench_evaluation.py", "--repeats", str(repeats), "--out", out],
                       env={**os.environ, "PYTHONPATH": str(checkout)}, check=True, stdout=subprocess.DEVNULL)
        with open(f"{out}/cpu.csv", newline="") as file:
            return {(row["measure"], row["unit"]): float(row["number"]) for row in csv.DictReader(file)}


def commit(checkout: Path) -> str:
    """Return the commit that is checked out."""
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=checkout, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def main() -> None:
    """Measure in turns, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=2)
    given = parser.parse_args()
    sides: dict[Path, list[dict[tuple[str, str], float]]] = {given.old.resolve(): [], given.new.resolve(): []}
    for i in range(given.rounds):
        for side in list(sides)[::-1 if i % 2 else 1]:  # each goes first as often
            sides[side].append(measured(side, given.repeats))
    old, new = ({key: float(np.median([found[key] for found in rounds])) for key in rounds[0]} for rounds in sides.values())
    lines = [f"{commit(given.old):>12} {commit(given.new):>12}  new/old, medians of {given.rounds} rounds in turns, one thread"]
    lines += [f"{old[key]:12,.2f} {new[key]:12,.2f} {new[key] / old[key]:6.2f}  {key[1]:4}  {key[0]}" for key in old]
    print("\n".join(lines))
    Path("results/bench_evaluation/before_after.txt").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
