"""How the time of a generation grows with population, genes and images: a plot with the slope in log-log for each.

    python scripts/bench_growth.py

CPU seconds, one thread, medians of three generations, random weights and images. Everything but evaluation and evaluation
are told apart. Writes results/bench_evaluation/growth.csv and growth.png.
"""

from __future__ import annotations

import csv
import time
from pathlib import Path

import numpy as np
import torch
from bench_evaluation import images
from matplotlib.figure import Figure
from torch import nn

from evoprune.config import Config
from evoprune.evaluation.evaluator import Evaluator
from evoprune.evolution.generations import begin, evolve
from evoprune.evolution.starts import Known, first_population
from evoprune.evolution.toolbox import default_toolbox
from evoprune.masks.layers import find_layers


def generation(population: int, width: int, count: int) -> tuple[float, float]:
    """Return CPU seconds of (evaluation, everything else) for a generation of a two-layer net of that width."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, width), nn.ReLU(), nn.Linear(width, 10))
    layout = find_layers(model)
    config = Config(population=population, generations=3)
    evaluator = Evaluator(model, layout, images(count, 1, 28, 10, torch.device("cpu")), 256, cache_mb=1024)
    spent = 0.0

    class Timed:
        def many(self, individuals, progress):  # type: ignore[no-untyped-def]
            nonlocal spent
            started = time.process_time()
            found = evaluator.many(individuals)
            spent += time.process_time() - started
            return found

    known = Known(layout, lambda: [p.detach() for p in model.parameters() if p.dim() > 1], list, list, list)
    toolbox = default_toolbox(evaluator, layout, config)
    toolbox.evaluate = Timed()
    state = begin(first_population(known, "random,magnitude,erk,lamp", population, np.random.default_rng(0)), toolbox, config)
    states, rows = evolve(state, toolbox, config), []
    for _ in range(3):
        spent, started = 0.0, time.process_time()
        next(states)
        rows.append((spent, time.process_time() - started - spent))
    return tuple(np.median(rows, 0))  # type: ignore[return-value]  # two floats


def main() -> None:
    """Measure three series, print the slopes, draw them."""
    torch.set_num_threads(1)
    series = {"population": [(p, p, 128, 1000) for p in (8, 16, 32, 64, 128, 256)],
              "genes": [(794 * w, 16, w, 500) for w in (32, 128, 512, 2048, 8192)],
              "images": [(n, 16, 128, n) for n in (500, 1000, 2000, 4000, 8000, 16000)]}
    out = Path("results/bench_evaluation")
    out.mkdir(parents=True, exist_ok=True)
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    rows = []
    for axes, (name, points) in zip(figure.subplots(1, 3), series.items()):
        size = np.array([p[0] for p in points])
        spent = np.array([generation(*p[1:]) for p in points])
        for column, label in enumerate(("evaluation", "everything else")):
            slope = np.polyfit(np.log(size), np.log(spent[:, column]), 1)[0]
            axes.loglog(size, spent[:, column], "o-", label=f"{label}, slope {slope:.2f}")
            print(f"{name}: {label} grows with slope {slope:.2f}")
        rows += [(name, int(n), *map(float, s)) for n, s in zip(size, spent)]
        axes.set_xlabel(name)
        axes.set_ylabel("CPU seconds a generation")
        axes.legend(fontsize="small")
        axes.grid(alpha=0.3)
    figure.savefig(out / "growth.png", dpi=120)
    with open(out / "growth.csv", "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows([("series", "size", "evaluation_seconds", "other_seconds"), *rows])


if __name__ == "__main__":
    main()
