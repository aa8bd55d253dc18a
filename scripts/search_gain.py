"""Does the search earn its keep? hvlog of the first masks, of the final archive, and of a run of the same budget whose
selection is random, on digits or on LeNet-5/MNIST.

    python scripts/search_gain.py digits
    python scripts/search_gain.py mnist --data-dir DIR --weights FILE

Prints a row a seed and writes results/search_gain/TASK.csv. All numbers are of the search split, no training.
"""

from __future__ import annotations

import argparse
import csv
import tempfile
from pathlib import Path

import numpy as np

import evoprune
from evoprune.evolution.toolbox import default_toolbox


def random_selection(evaluator, layout, config):
    """The default toolbox, but parents and survivors are drawn without looking at them."""
    toolbox = default_toolbox(evaluator, layout, config)
    toolbox.register("select", lambda group, k, rng: [group[i] for i in rng.integers(len(group), size=k)])
    toolbox.register("survive", lambda group, k, rng: [group[i] for i in rng.choice(len(group), k, replace=False)])
    return toolbox


def hvlogs(toolbox, seed: int, settings: dict) -> tuple[float, float, int]:
    """Return hvlog of the first masks, of the final archive, and the masks measured."""
    with tempfile.TemporaryDirectory() as folder:
        evoprune.prune(toolbox=toolbox, seed=seed, out=f"{folder}/run", **settings)
        with open(f"{folder}/run/log.csv", newline="") as file:
            rows = list(csv.DictReader(file))
    return float(rows[0]["hvlog"]), float(rows[-1]["hvlog"]), int(rows[-1]["evaluations"])


def main() -> None:
    """Run every seed both ways."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("task", choices=("digits", "mnist"))
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--weights")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--generations", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    settings = {"generations": given.generations, "threads": given.threads, "test_images": 100}
    if given.task == "mnist":
        settings |= {"model": "lenet5", "data": "mnist", "data_dir": given.data_dir, "weights": given.weights}
    rows = []
    for seed in range(given.seeds):
        start, final, masks = hvlogs(default_toolbox, seed, settings)
        _, by_chance, _ = hvlogs(random_selection, seed, settings)
        rows.append({"seed": seed, "masks": masks, "first_masks": start, "final": final, "random_selection": by_chance,
                     "gain": final - start, "gain_over_random": final - by_chance})
        print("  ".join(f"{k} {v:.4f}" if isinstance(v, float) else f"{k} {v}" for k, v in rows[-1].items()), flush=True)
    gains = np.array([[row["gain"], row["gain_over_random"]] for row in rows])
    print("smallest gain {:.4f}, over random selection {:.4f}".format(*gains.min(0)))
    out = Path("results/search_gain")
    out.mkdir(parents=True, exist_ok=True)
    with open(out / f"{given.task}.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
