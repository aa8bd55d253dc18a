"""The runs of a folder side by side: test score of the best point at or above each sparsity, chosen on the search split.

    python scripts/rules_table.py results/lenet5_mnist_rules 90 95 98

FOLDER/METHOD/seed-N/ holds each run's front.csv, log.csv, config.json and, once it has finished, done.json. Prints every seed,
the medians, and, of two methods, the mean paired difference over the seeds that both have, with its 95 % interval (Student's t);
what that says (win, loss or tie: p < 0.05 in a paired t test), and what it still says after Holm's correction (1979) over the
sparsities of the comparison, hvlog apart; last, which of all differences are beyond chance after the correction over all of them.

Seconds are those of the command, else of the run in all its parts, else, of older runs, of its search alone.

Methods with unequal epochs, or, where seed-N/seconds.txt says what each command took, with more time, are marked and not tested.
Nor is a difference where a seed has no point so sparse (nan) or where every seed differs by the same: "-", and "equal" where no
seed differs at all.
"""

from __future__ import annotations

import csv
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.stats import t as student

from evoprune import chance
from evoprune.results.record import read_record

PAIRS = (("evolve-80", "gradual-fisher-80"), ("evolve-80", "gradual-fisher-80-paced"), ("evolve-48", "gradual-fisher-80"),
         ("gradual-fisher-80-paced", "gradual-fisher-80"), ("gradual-fisher-80-rate-1", "gradual-fisher-80"),
         ("gradual-fisher-24-rate-half", "gradual-fisher-24"),
         ("evolve-80", "evolve-80-without-selection"), ("evolve-80", "evolve-80-random-targets"),
         ("evolve-80", "evolve-80-random-parents"), ("evolve-80-random-targets", "evolve-80-random-parents"),
         ("evolve-40", "gradual-fisher-40"), ("evolve-40", "gradual-fisher-40-paced"),
         ("evolve-40", "line-40"), ("line-40", "gradual-fisher-40-paced"), ("gradual-fisher-40-paced", "gradual-fisher-40"),
         ("evolve", "uniform-random"), ("evolve", "filter-norm"),
         ("evolve", "filter-norm-over-mean"), ("evolve", "gradual-fisher"), ("evolve", "gradual-magnitude"),
         ("refined", "gradual-magnitude"), ("refined", "evolve"),
         ("refined", "gradual-fisher"), ("refined", "gradual-fisher-paced"), ("plan", "path"), ("plan", "search"),
         ("plan", "gradual-fisher"), ("plan", "gradual-fisher-paced"), ("chosen", "search"), ("trained-chosen", "trained"),
         ("chosen", "path"), ("search", "path"), ("evolve", "gradual-fisher-paced"))
GRID = np.geomspace(0.5, 0.005, 2001)  # densities of hvlog
LEVEL = 0.05  # of every test
SLACK = 1.05  # times the seconds of another method that count as the same time
DIGITS = 9  # of a difference, of which less is rounding


class Run(NamedTuple):
    """What one run contributes."""

    values: np.ndarray  # test accuracy in percent at each wished sparsity, NaN where there is no such point; last, hvlog
    chosen: list[dict[str, str]]  # the points of these
    log: list[dict[str, str]]
    wall: float | None = None  # seconds of the whole command, where methods are compared that take the same time
    whole: float | None = None  # of the run in all its parts, of newer ones

    @property
    def epochs(self) -> float:
        return float(self.log[-1]["epochs"])


Runs = dict[str, dict[str, Run]]  # by method and seed


def rows(path: Path) -> list[dict[str, str]]:
    """Read a CSV file."""
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def ranked(row: dict[str, str]) -> float:
    """Return the score by which a point is chosen: on the search images, and those kept back beside them."""
    score = score_of([row])
    return float(row.get(f"choice_{score}") or row[score])


def score_of(front: list[dict[str, str]]) -> str:
    """Return the column of the score: the accuracy, but for other tasks than classification."""
    return "score" if front and "score" in front[0] else "accuracy"


def at_or_above(front: list[dict[str, str]], sparsity: float) -> dict[str, str] | None:
    """Return the point that is chosen, without the test split; None if there is none."""
    fits = [row for row in front if float(row["sparsity"]) >= sparsity - 1e-9]
    return max(fits, key=ranked, default=None)


def tested(row: dict[str, str] | None) -> float:
    """Return the test accuracy of a point in percent, NaN without one."""
    return float("nan") if row is None else 100 * float(row[f"test_{score_of([row])}"])


def hvlog(front: list[dict[str, str]]) -> float:
    """Return the mean test accuracy over log density from 0.5 to 0.005; at each density the best point at or below it, 0 if there
    is none."""
    if not front:
        return 0.0
    score = score_of(front)
    sparsity, accuracy, test = np.array([(float(row["sparsity"]), ranked(row), float(row[f"test_{score}"])) for row in front]).T
    fits = sparsity >= 1 - GRID[:, None] - 1e-9  # (densities, points)
    chosen = np.where(fits, accuracy, -np.inf).argmax(axis=1)
    return float(np.where(fits.any(axis=1), test[chosen], 0).mean())


def read_runs(folder: Path, wished: Sequence[float]) -> tuple[Runs, list[str]]:
    """Return the finished runs of a folder, and the names of the others."""
    found: Runs = {}
    unfinished = []
    for run in sorted(folder.glob("*/seed-*")):
        method = run.parent.name
        if not (run / "done.json").exists():
            unfinished.append(f"{method} {run.name}")
            continue
        front = rows(run / "front.csv")
        chosen = [at_or_above(front, wish / 100) for wish in wished]
        values = np.array([*map(tested, chosen), hvlog(front)])
        there = [row for row in chosen if row is not None]
        found.setdefault(method, {})[run.name] = Run(values, there, rows(run / "log.csv"), seconds_of(run),
                                                             json.loads((run / "done.json").read_text()).get("seconds"))
    return found, unfinished


def seconds_of(run: Path) -> float | None:
    """Return the seconds that the script measured, if it did."""
    file = run / "seconds.txt"
    return float(file.read_text()) if file.exists() else None


def holm(ps: np.ndarray) -> np.ndarray:
    """Return p values after Holm's correction; NaN, no test, stays NaN and counts for nothing."""
    corrected, tested = np.full(len(ps), np.nan), np.isfinite(ps)
    corrected[tested] = chance.holm(ps[tested].tolist())
    return corrected


def paired(differences: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the mean of paired differences, (seeds, columns), half the width of its 95 % interval, and p of a paired t test.

    The latter two are NaN where there is no test: a difference is NaN, or they are all the same.
    """
    degrees = len(differences) - 1
    spread = np.where(np.ptp(differences, axis=0) > 0, differences.std(0, ddof=1), np.nan)
    error, mean = spread / math.sqrt(len(differences)), differences.mean(0)
    return mean, student.ppf(1 - LEVEL / 2, degrees) * error, 2 * student.sf(np.abs(mean) / error, degrees)


def verdicts(differences: np.ndarray, ps: np.ndarray) -> list[str]:
    """Return what p values say of the differences that they come from, a word a column."""
    return ["equal" if not column.any() else "-" if np.isnan(p) else "tie" if p >= LEVEL else
            "win" if column.mean() > 0 else "loss" for column, p in zip(differences.T, ps)]


def line(name: str, cells: Sequence[float | str]) -> str:
    return f"{name:42s}" + "".join(f"{cell:>9s}" if isinstance(cell, str) else f"{cell:9.3f}" for cell in cells)


def print_runs(found: Runs, unfinished: list[str], heads: list[str]) -> None:
    """Print every seed, the medians, and what is not there."""
    print(line("test score, %, at least so sparse", [*heads, "epochs", "seconds"]))
    for method, runs in found.items():
        for seed, run in runs.items():
            print(line(f"{method} {seed}", [*run.values, run.epochs, run.wall or run.whole or float(run.log[-1]["seconds"])]))
        if len(runs) > 1:
            print(line(f"{method} median", list(np.median([run.values for run in runs.values()], axis=0))))  # NaN if one is
    missing = [f"{method} {seed} at {head} %" for method, runs in found.items() for seed, run in runs.items()
               for head, value in zip(heads, run.values) if np.isnan(value)]
    for what, names in (("unfinished, left out", unfinished), ("nan, no point so sparse, and no median or test of it", missing)):
        if names:
            print(f"\n{what}: {', '.join(names)}")


def equal_epochs(a: str, b: str, found: Runs, seeds: list[str]) -> bool:
    """Return whether two methods trained equally long with each seed or, where the time of all is known, `a` took no more."""
    walls = [(found[a][seed].wall, found[b][seed].wall) for seed in seeds]
    if all(wall is not None for pair in walls for wall in pair):
        return all(mine <= SLACK * other for mine, other in walls)  # type: ignore[operator]
    return all(math.isclose(found[a][seed].epochs, found[b][seed].epochs) for seed in seeds)


def heading(a: str, b: str, found: Runs, seeds: list[str]) -> str:
    """Return what is compared, and what is wrong with it."""
    parts = [f"{a} against {b}, {len(seeds)} shared seed{'s' * (len(seeds) != 1)}"]
    for of, other in ((a, b), (b, a)):
        if lacks := sorted(set(found[other]) - set(seeds)):
            parts.append(f"{', '.join(lacks)} missing from {of}")
    if len(seeds) < 2:
        parts.append("too few to compare")
    elif not equal_epochs(a, b, found, seeds):
        spent = [", ".join(sorted({f"{found[method][seed].epochs:g}" for seed in seeds})) for method in (a, b)]
        parts.append(f"UNEQUAL EPOCHS, {spent[0]} against {spent[1]}, not tested" if found[a][seeds[0]].wall is None else
                     "MORE TIME, not tested")
    return "; ".join(parts)


def compare(a: str, b: str, found: Runs, heads: list[str]) -> list[tuple[float, str]]:
    """Print the paired differences of two methods; return what is tested, but for hvlog, as (p, what is found)."""
    seeds = sorted(set(found[a]) & set(found[b]))
    print(f"\n{heading(a, b, found, seeds)}")
    if len(seeds) < 2:
        return []
    differences = np.round([found[a][seed].values - found[b][seed].values for seed in seeds], DIGITS)
    mean, half, ps = paired(differences)
    print(line("mean paired difference", list(mean)))
    print(line("lower end of its 95 %", list(mean - half)))
    print(line("upper end of its 95 %", list(mean + half)))
    if not equal_epochs(a, b, found, seeds):
        return []
    print(line("by that interval", verdicts(differences, ps)))
    print(line("after Holm's correction, hvlog apart", verdicts(differences, np.append(holm(ps[:-1]), ps[-1]))))
    if same := [head for head, column in zip(heads, differences.T) if np.ptp(column) == 0 and column.any()]:
        print(f"not tested, every seed differs by the same: {', '.join(same)}")
    return [(float(p), f"{a} {'better' if m > 0 else 'worse'} than {b} at {head} %")
            for p, m, head in zip(ps[:-1], mean, heads) if not np.isnan(p)]


def print_all_tests(tests: list[tuple[float, str]]) -> None:
    """Print which of all differences are beyond chance."""
    corrected = holm(np.array([p for p, _ in tests]))
    beyond = [f"{what} ({p:.2g})" for p, (_, what) in sorted(zip(corrected, tests)) if p < LEVEL]
    print(f"\nbeyond chance, of {len(tests)} differences, p after Holm's correction over all:", *beyond or ["none"], sep="\n  ")


def at_these_alone(run: Run, wished: Sequence[float]) -> float:
    """Return hvlog, test split, where a front has its points at the wished sparsities and no others: what a rule has."""
    there = [wish for wish, value in zip(wished, run.values) if not np.isnan(value)]
    return hvlog([{**row, "sparsity": str(wish / 100)} for wish, row in zip(there, run.chosen)])


def print_search(found: Runs, wished: Sequence[float]) -> None:
    """Print what the searches without training gained, and what of that is the number of their points."""
    untrained = {method: runs for method, runs in found.items() if all(run.epochs == 0 for run in runs.values())}
    print("\nhvlog on the search split, first masks and last archive, of each seed")
    for method, runs in untrained.items():
        logs = [run.log for run in runs.values()]
        if all(len(log) > 1 for log in logs):
            print(f"{method:42s}" + ", ".join(f"{float(log[0]['hvlog']):.3f} {float(log[-1]['hvlog']):.3f}" for log in logs))
    print("\nhvlog on the test split without training, median: of all points, and of those at these sparsities alone")
    for method, runs in untrained.items():
        both = np.median([[run.values[-1], at_these_alone(run, wished)] for run in runs.values()], axis=0)
        print(f"{method:42s}{both[0]:.3f} {both[1]:.3f}")


def print_machines(folder: Path, found: Runs) -> None:
    """Print on what the runs were made."""
    where: dict[str, set[str]] = {}
    for method, runs in found.items():
        for seed in runs:
            record = read_record(folder / method / seed / "config.json")
            versions = ", ".join(f"{name} {version}" for name, version in record.versions.items())
            where.setdefault(f"{record.device}, {versions}", set()).add(method)
    for machine, methods in sorted(where.items()):
        print(f"\n{machine}" + (f": {', '.join(sorted(methods))}" if len(where) > 1 else ""))


def main(arguments: Sequence[str]) -> None:
    """Print the table."""
    folder, wished = Path(arguments[0]), [float(text) for text in arguments[1:]]
    heads = [*(f"{wish:g}" for wish in wished), "hvlog"]
    found, unfinished = read_runs(folder, wished)
    print_runs(found, unfinished, heads)
    if not found:
        sys.exit(f"{folder}: found no finished run, expected METHOD/seed-N/ with done.json")
    tests = [test for a, b in PAIRS if a in found and b in found for test in compare(a, b, found, heads)]
    if tests:
        print_all_tests(tests)
    print_search(found, wished)
    print_machines(folder, found)


if __name__ == "__main__":
    main(sys.argv[1:])
