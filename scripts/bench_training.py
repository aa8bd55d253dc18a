"""Training steps of evoprune against the same loop in plain torch, fp32: images/s, and how many times as fast.

    python scripts/bench_training.py

ResNet-20 and ResNet-18 on random images of 32x32, batches of 128, one thread unless said; the ways take turns in one process, CPU
time, medians. The plain loop has the images as one normalised tensor, the same optimizer and schedule, and no augmentation, which
neither has. Prints a row a model and writes results/bench_training/table.csv.
"""

from __future__ import annotations

import argparse
import copy
import csv
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

from resnet20 import resnet20  # noqa: E402

from evoprune.inputs.models import resnet18  # noqa: E402
from evoprune.inputs.splits import as_split  # noqa: E402
from evoprune.results.machine import device_name, versions  # noqa: E402
from evoprune.values.training import Recipe, recipe_for, schedule, tune  # noqa: E402

MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {"resnet20": (resnet20, 3), "resnet18": (resnet18, 1)}  # steps a turn


def plainly(model: nn.Module, images: Tensor, labels: Tensor, recipe: Recipe, steps: int) -> None:
    """Train in the usual loop."""
    optimizer = torch.optim.SGD(model.parameters(), recipe.learning_rate, momentum=0.9, weight_decay=5e-4, nesterov=True)
    model.train()
    for step in range(steps):
        batch = torch.arange(step * recipe.batch_size, (step + 1) * recipe.batch_size) % len(labels)
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * schedule(step, steps)
        loss = F.cross_entropy(model(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def measure(name: str, rounds: int) -> dict[str, float | str | int]:
    """Return a row of the table."""
    make, steps = MODELS[name]
    torch.manual_seed(0)
    model, size = make(), 128
    images, labels = torch.randn(steps * size, 3, 32, 32), torch.randint(10, (steps * size,))
    split = as_split((images, labels), "train")
    took: dict[str, list[float]] = {"plain": [], "fp32": [], "bf16": []}
    for turn in range(rounds + 1):
        for way, times in took.items():
            recipe = Recipe(1, "sgd", recipe_for(model, 1, 0).learning_rate, size, 0, False, "bf16" if way == "bf16" else "fp32")
            trained = copy.deepcopy(model)
            began = time.process_time()
            if way == "plain":
                plainly(trained, images, labels, recipe, steps)
            else:
                tune(trained, split, recipe)
            times += [(time.process_time() - began) / steps] * (turn > 0)
    medians = {way: statistics.median(times) for way, times in took.items()}
    return {"model": name, "threads": torch.get_num_threads(), **{f"{way}_images_s": round(size / each, 1) for way, each in
            medians.items()}, **{f"{way}_times": round(medians["plain"] / medians[way], 2) for way in ("fp32", "bf16")}}


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "bench_training")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    about = {"device": device_name(torch.device("cpu")), "torch": torch.__version__, "commit": versions()["commit"]}
    rows = []
    for name in MODELS:
        rows.append({**measure(name, given.rounds), **about})
        print(rows[-1], flush=True)
    given.out.mkdir(parents=True, exist_ok=True)
    with open(given.out / "table.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
