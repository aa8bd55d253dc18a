"""How fast two checkouts evaluate masks: measures of scripts/bench_evaluation.py of both, in turns, medians side by side.

    python scripts/before_after.py OLD NEW [--rounds 4] [--repeats 1]

Milliseconds of CPU, one thread: 5,000 images through LeNet-5 and 256 through ResNet-18 under a mask and under none, a child of
11 M genes, a selection. Writes results/bench_evaluation/before_after.txt. Take checkouts with the same versions of everything
else, and an idle machine.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

PROGRAM = """
import sys
import torch
from bench_evaluation import Clock, LeNet5, find_layers, images, one_child, resnet18, selection, whole_model
torch.set_num_threads(1)
torch.manual_seed(0)
clock, cpu = Clock(torch.device("cpu"), int(sys.argv[1])), torch.device("cpu")
lenet = whole_model(clock, LeNet5(), images(5000, 1, 28, 10, cpu), (32,), bf16=False)
resnet = whole_model(clock, resnet18(), images(256, 3, 32, 10, cpu), (32,), bf16=False)
rows = {"LeNet-5, a mask, 5,000 images": lenet["ours"], "LeNet-5, dense forward": lenet["dense"],
        "ResNet-18, a mask, 256 images": resnet["ours"], "ResNet-18, dense forward": resnet["dense"],
        "a child of 11 M genes": one_child(find_layers(resnet18())), "NSGA-II, 1,000 of 2,000": selection(2000)}
for name, seconds in rows.items():
    print(f"{name}\\t{1000 * seconds}")
"""


def measured(checkout: Path, repeats: int) -> dict[str, float]:
    """Return milliseconds by measure, from the checkout's own benchmark and package."""
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(repeats)], cwd=checkout, check=True, stdout=subprocess.PIPE,
                          text=True, env={**os.environ, "PYTHONPATH": f"{checkout / 'scripts'}:{checkout}"})
    return {name: float(number) for name, number in (line.split("\t") for line in done.stdout.splitlines())}


def commit(checkout: Path) -> str:
    """Return the commit that is checked out."""
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=checkout, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def main() -> None:
    """Measure in turns, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=1)
    given = parser.parse_args()
    sides: dict[Path, list[dict[str, float]]] = {given.old.resolve(): [], given.new.resolve(): []}
    for i in range(given.rounds):
        for side in list(sides)[::-1 if i % 2 else 1]:  # each goes first as often
            sides[side].append(measured(side, given.repeats))
    old, new = ({key: float(np.median([found[key] for found in rounds])) for key in rounds[0]} for rounds in sides.values())
    lines = [f"{commit(given.old):>12} {commit(given.new):>12}  new/old, medians of {given.rounds} rounds in turns, one thread"]
    lines += [f"{old[key]:12,.2f} {new[key]:12,.2f} {new[key] / old[key]:6.2f}  ms  {key}" for key in old]
    print("\n".join(lines))
    Path("results/bench_evaluation/before_after.txt").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
