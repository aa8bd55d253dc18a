"""The runs of a folder side by side: test accuracy of the best point at or above each sparsity, chosen on the search split.

    python scripts/rules_table.py results/lenet5_mnist_rules 90 95 98

FOLDER/METHOD/seed-N/ holds each run's front.csv, log.csv and config.json. Prints every seed, the medians, and, where two methods
share seeds and training, the mean paired difference with its 95 % interval (Student's t), and which of all these differences are
beyond chance (paired t tests, p < 0.05 after Holm's correction, 1979).
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import numpy as np
from scipy.stats import t as student

from evoprune.results.record import read_record

PAIRS = (("evolve-80", "gradual-fisher-80"), ("evolve-80", "gradual-fisher-80-paced"),
         ("evolve-80", "evolve-80-without-selection"), ("evolve-80", "evolve-80-random-parents"),
         ("evolve-40", "gradual-fisher-40"),
         ("evolve", "uniform-random"), ("evolve", "filter-norm"),
         ("evolve", "filter-norm-over-mean"), ("evolve", "gradual-fisher"))


def rows(path: Path) -> list[dict[str, str]]:
    """Read a CSV file."""
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def at_or_above(front: list[dict[str, str]], sparsity: float) -> float:
    """Return the test accuracy in percent of the point that the search split chooses; NaN if there is none."""
    fits = [row for row in front if float(row["sparsity"]) >= sparsity - 1e-9]
    return 100 * float(max(fits, key=lambda row: float(row["accuracy"]))["test_accuracy"]) if fits else float("nan")


def hvlog(front: list[dict[str, str]]) -> float:
    """Return the mean test accuracy over log density from 0.5 to 0.005; at each density the best point at or below it."""
    grid = np.geomspace(0.5, 0.005, 2001)
    return float(np.mean([np.nan_to_num(at_or_above(front, 1 - density)) for density in grid])) / 100


def line(name: str, values: list[float]) -> str:
    return f"{name:42s}" + "".join(f"{value:9.3f}" for value in values)


def holm(tests: list[tuple[float, str]]) -> list[str]:
    """Return those of (p, what) whose p, after Holm's correction, is below 0.05, with it."""
    found, largest = [], 0.0
    for i, (p, what) in enumerate(sorted(tests)):
        largest = max(largest, p * (len(tests) - i))
        if largest < 0.05:
            found.append(f"{what} ({largest:.2g})")
    return found


def main() -> None:
    """Print the table."""
    folder, wished = Path(sys.argv[1]), [float(text) for text in sys.argv[2:]]
    found: dict[str, dict[str, np.ndarray]] = {}
    heads = [*(f"{wish:g}" for wish in wished), "hvlog", "epochs", "seconds"]
    print(f"{'test accuracy, %, at least so sparse':42s}" + "".join(f"{head:>9s}" for head in heads))
    for method in sorted(path for path in folder.iterdir() if path.is_dir()):
        runs = sorted(method.glob("seed-*"))
        found[method.name] = {}
        for run in runs:
            front, last = rows(run / "front.csv"), rows(run / "log.csv")[-1]
            found[method.name][run.name] = np.array([*(at_or_above(front, wish / 100) for wish in wished), hvlog(front)])
            cells = [*found[method.name][run.name], float(last["epochs"]), float(last["seconds"])]
            print(line(f"{method.name} {run.name}", cells))
        if len(runs) > 1:
            print(line(f"{method.name} median", list(np.median(list(found[method.name].values()), axis=0))))
    tests: list[tuple[float, str]] = []
    for a, b in PAIRS:
        seeds = sorted(set(found.get(a, {})) & set(found.get(b, {})))
        if len(seeds) > 1:
            difference = np.array([found[a][seed] - found[b][seed] for seed in seeds])
            mean = difference.mean(0)
            error = difference.std(0, ddof=1) / len(seeds) ** 0.5
            half = student.ppf(0.975, len(seeds) - 1) * error
            ps = 2 * student.sf(np.abs(mean) / np.maximum(error, 1e-30), len(seeds) - 1)
            tests += [(float(p), f"{a} {'better' if m > 0 else 'worse'} than {b} at {wish:g} %")
                      for p, m, e, wish in zip(ps, mean, error, wished) if e > 0]
            print(f"\n{a} against {b}, {len(seeds)} seeds")
            print(line("mean paired difference", list(mean)))
            print(line("lower end of its 95 %", list(mean - half)))
            print(line("upper end of its 95 %", list(mean + half)))
            print(f"{'':42s}" + "".join(f"{'win' if low > 0 else 'loss' if high < 0 else 'tie' if low <= 0 <= high else '-':>9s}"
                                        for low, high in zip(mean - half, mean + half)))
    if tests:
        print(f"\nbeyond chance, of {len(tests)} differences, p after Holm's correction:", *holm(tests) or ["none"], sep="\n  ")
    print("\nhvlog on the search split, first masks and last archive, of each seed")
    for method in found:
        logs = [rows(run / "log.csv") for run in sorted((folder / method).glob("seed-*"))]
        if all(len(log) > 1 and float(log[-1]["epochs"]) == 0 for log in logs):
            print(f"{method:42s}" + ", ".join(f"{float(log[0]['hvlog']):.3f} {float(log[-1]['hvlog']):.3f}" for log in logs))
    where: dict[str, set[str]] = {}
    for path in folder.glob("*/seed-*/config.json"):
        record = read_record(path)
        versions = ", ".join(f"{name} {version}" for name, version in record.versions.items())
        where.setdefault(f"{record.device}, {versions}", set()).add(path.parts[-3])
    for machine, methods in sorted(where.items()):
        print(f"\n{machine}" + (f": {', '.join(sorted(methods))}" if len(where) > 1 else ""))


if __name__ == "__main__":
    main()
