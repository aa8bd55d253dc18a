"""Runs side by side: of each the point that is chosen at each sparsity or above it, what that scores on the test
split, and whether the first run's is beyond chance. Only CSV, JSON and arrays are read, and no code of a folder is run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..chance import DRAWS, LEVEL, holm, mcnemar, two_sided_bootstrap
from ..errors import EvopruneError, printable
from ..inputs.scores import VALUES
from ..objectives import DENSE, SPARSE, Objectives
from ..results.front import Front, Point, load_front
from ..results.plots import density_axis, density_of, plain, score_axis, subplots
from ..results.points import beyond_chance, table_csv
from ..results.written import CONFIG, RIGHT, Right

if TYPE_CHECKING:
    from matplotlib.figure import Figure

AT = (0.5, 0.8, 0.9, 0.95, 0.97, 0.98, 0.985, 0.99, 0.993, 0.995)  # sparsities, unless others are asked for
WHOLE_TEST = ("mnist", "cifar10")  # data whose test split no seed cuts


@dataclass(frozen=True)
class Against:
    """One point against that of the first run on the same images."""

    difference: float
    only_first: int | None  # images that only the first run's point has right, where answers are right or wrong
    only_this: int | None
    p: float
    corrected: float = math.nan  # after Holm's correction

    @property
    def verdict(self) -> str:
        return "tie" if self.corrected >= LEVEL else "better" if self.difference > 0 else "worse"


@dataclass(frozen=True)
class Side:
    """One run: what it chose at each sparsity, and how that differs from the first run."""

    front: Front
    right: Right | None
    chosen: list[Point | None]
    tests: list[Against | None]

    @property
    def name(self) -> str:
        return printable(str(self.front.path))


@dataclass(frozen=True)
class Comparison:
    """What `compare` found, to be printed, kept or drawn."""

    sides: list[Side]
    at: list[float]
    notes: list[str]

    def rows(self) -> list[dict[str, Any]]:
        """Return a row for each run and sparsity."""
        found = []
        for side in self.sides:
            for wish, point, test in zip(self.at, side.chosen, side.tests):
                mine = {} if point is None else {
                    "id": point.id, "found": point.values[point.objectives.axis], "search": point.score, "test": point.test,
                    "low": point.test_low, "high": point.test_high}
                against = {} if test is None else {**vars(test), "verdict": test.verdict}
                found.append(dict.fromkeys(COLUMNS) | {"run": str(side.front.path), "at": wish} | mine | against)
        return found

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain data."""
        runs = [{"run": str(s.front.path), "hvlog": hvlog(s.front), "test_hvlog": hvlog_on_test(s.front)} for s in self.sides]
        return {"runs": runs, "rows": self.rows(), "notes": self.notes}

    def csv(self) -> str:
        """Return the rows as CSV."""
        return table_csv(self.rows(), COLUMNS)

    def __str__(self) -> str:
        objective = self.sides[0].front.record.optimised
        score = objective[objective.score]
        heads = [*(f"{100 * wish:.6g}" for wish in self.at), "hvlog", "search"]
        width = max(30, *(4 + len(side.name) for side in self.sides))

        def line(name: str, cells: Sequence[str]) -> str:
            return f"{name:{width}}" + "".join(f"{cell:>9}" for cell in cells).rstrip()

        lines = [line(f"test {score.title} at sparsity, %", heads)]
        for i, side in enumerate(self.sides, 1):
            tested = ["-" if point is None or point.test is None else score.shown(point.test) for point in side.chosen]
            lines.append(line(f"{i}  {side.name}", [*tested, f"{hvlog_on_test(side.front):.4f}", f"{hvlog(side.front):.4f}"]))
        for i, side in enumerate(self.sides[1:], 2):
            if any(side.tests):
                lines += ["", line(f"{i} less 1", ["-" if t is None else shown(score.scale * t.difference) for t in side.tests]),
                          line("p", ["-" if t is None else f"{t.p:.2g}" for t in side.tests]),
                          line("p, Holm", ["-" if t is None else f"{t.corrected:.2g}" for t in side.tests]),
                          line("so it is", ["-" if t is None else t.verdict for t in side.tests])]
        return "\n".join([*lines, "", *self.notes])

    def figure(self) -> Figure:
        """Return the fronts in one picture, on the test split."""
        objectives = self.sides[0].front.record.optimised
        figure, (axes,) = subplots()
        density, seen = [], []
        for side in self.sides:
            points = [p for p in beyond_chance(side.front.points, side.front.record.chance) if p.test is not None]
            score, low, high = np.array([(p.test, p.test_low, p.test_high) for p in points], float).T
            name = side.name if len(side.name) <= 60 else f"...{side.name[-57:]}"
            axes.errorbar([density_of(p) for p in points], objectives[objectives.score].scale * score,
                          objectives[objectives.score].scale * np.array([score - low, high - score]), fmt=".-", linewidth=1,
                          label=" " * name.startswith("_") + name)
            density += [density_of(p) for p in points]
            seen += [*low.tolist(), *high.tolist()]
        score_axis(axes, seen, objectives[objectives.score])
        density_axis(axes, density, objectives[objectives.axis].label)
        figure.set_figheight(figure.get_figheight() + 0.2 * len(self.sides))
        for text in figure.legend(loc="outside lower left", fontsize="small").get_texts():
            text.set_parse_math(False)
        plain(axes.set_title, "test split, 95 % intervals of each point", loc="left", fontsize="medium")
        axes.grid(alpha=0.3)
        return figure


COLUMNS = ("run", "at", "id", "found", "search", "test", "low", "high", "difference", "only_first", "only_this", "p", "corrected",
           "verdict")


def shown(difference: float) -> str:
    """Return a difference with its sign."""
    return f"{difference:+.2f}" if abs(difference) >= 0.005 else "0.00"


def compare(paths: Sequence[str | Path], at: Sequence[float] | None = None) -> Comparison:
    """Return runs side by side, each against the first.

    Raises:
        EvopruneError: a folder has no front with test scores, or one of other test images or another task.
    """
    fronts = [load_front(path) for path in paths]
    for front in fronts:
        check(front, fronts[0])
    rights = [front.written.per_image(front.points, front.record.splits["test"]) for front in fronts]
    for front, right in zip(fronts, rights):
        if right is not None and rights[0] is not None and right.split != rights[0].split:
            raise EvopruneError(f"{front.path}: was tested on other images than {fronts[0].path}; expected the same, so run one "
                                f"of them again on the data of the other")
    wished = [wish for wish in at or AT if at or any(chosen(front, wish) for front in fronts)]
    found = [[chosen(front, wish) for wish in wished] for front in fronts]
    tests, count = tested(fronts, rights, found)
    sides = [Side(*each) for each in zip(fronts, rights, found, tests)]
    return Comparison(sides, wished, notes(sides, count))


def check(front: Front, first: Front) -> None:
    """Raise `EvopruneError` unless two runs were measured in the same way on as many images of the same data."""
    mine, other = front.record, first.record
    front.check_points()
    if any(point.test is None for point in front):
        raise EvopruneError(f"{front.path}: has no test scores to compare; resume it to its end, or run it with a test split")
    score = mine.optimised[mine.optimised.score]
    if score != other.optimised[other.optimised.score] or task_of(front) != task_of(first):
        raise EvopruneError(f"{front.path}: found the task {task_of(front)}, expected {task_of(first)} as {first.path} has")
    if split_of(front) != split_of(first):
        found, expected = (f"{count:,} images of {data}{cut}" for data, count, cut in (split_of(front), split_of(first)))
        raise EvopruneError(f"{front.path}: found a test split of {found}, expected {expected} as {first.path} has")


def task_of(front: Front) -> str:
    return front.record.config.task or "classification"


def split_of(front: Front) -> tuple[str, int, str]:
    """Return what config.json says of the test images: of which data, how many, and how they were cut."""
    record, config = front.record, front.record.config
    data = config.data if record.named_data else "data handed in"
    whole = config.data in WHOLE_TEST or config.data.startswith(("folder:", "npz:"))
    return data, int(record.splits.get("test") or 0), "" if whole else f", --split-seed {config.split_seed}"


def chosen(front: Front, wish: float) -> Point | None:
    """Return the point at or above a sparsity that is best on the search split, and on what was kept back beside it."""
    objectives = front.record.optimised
    fits = [p for p in front if p.values[objectives.axis] >= wish - 1e-9]
    return max(fits, key=lambda p: p.ranked[objectives.score]) if fits else None


def tested(fronts: Sequence[Front], rights: Sequence[Right | None],
           found: Sequence[Sequence[Point | None]]) -> tuple[list[list[Against | None]], int]:
    """Return a test of each run's points against those of the first, where both say which images they have right, corrected over
    all different pairs of points; and how many these are."""
    value = VALUES.get(task_of(fronts[0]))
    both = {(i, a.id, b.id): (right.points[b.id], rights[0].points[a.id], (b.test or 0.0) - (a.test or 0.0))
            for i, (points, right) in enumerate(zip(found, rights)) for a, b in zip(found[0], points)
            if i and a and b and value and right and rights[0]}
    draws = max(DRAWS, 100 * len(both))  # so many that a difference can be beyond chance after the correction
    pairs: dict[tuple[int, str, str], Against] = {}
    for key, (mine, other, difference) in both.items():
        if mine.shape[1] == 1:
            only: tuple[Any, Any] = int((other > mine).sum()), int((mine > other).sum())
            p = mcnemar(other[:, 0], mine[:, 0])
        else:
            assert value is not None
            sums = other.astype(float), mine.astype(float)
            only, p = (None, None), two_sided_bootstrap(*sums, value)
            if p <= 2 / DRAWS and draws > DRAWS:  # it may be smaller yet
                p = two_sided_bootstrap(*sums, value, draws)
        pairs[key] = Against(difference, *only, p)
    corrected = holm([test.p for test in pairs.values()])
    final = {key: replace(test, corrected=p) for (key, test), p in zip(pairs.items(), corrected)}
    return [[final.get((i, a.id, b.id)) if a and b else None for a, b in zip(found[0], points)]
            for i, points in enumerate(found)], len(pairs)


def notes(sides: Sequence[Side], count: int) -> list[str]:
    """Return what has to be known to read the table."""
    first, words = sides[0], measure_of(sides[0].front).hvlog_in_words
    said = [f"Each is the point that is chosen, without the test split, at that sparsity or above. {words}, as these points "
            f"score on the test split; search: on the search split."]
    without = [side.name for side in sides if side.right is None]
    sparsest = max(100 * point.values[point.objectives.axis] for side in sides for point in side.front)
    if not any(point for side in sides for point in side.chosen):
        said.append(f"No run reaches these sparsities: the sparsest point has {math.floor(100 * sparsest) / 100:g} %.")
    if count and first.right is not None:
        one = next(iter(first.right.points.values())).shape[1] == 1
        how, images = "exact McNemar test" if one else "paired bootstrap", first.front.record.splits["test"]
        pairs = f"{count} pair{'s' * (count > 1)} of points"
        said.append(f"p: {how} on {images:,} test images; Holm's correction over {pairs}. It is about these models: another seed "
                    f"gives others.")
    if without and len(sides) > 1:
        said.append(f"Not tested, for want of {RIGHT}, which earlier versions did not write: {', '.join(without)}. That the "
                    f"test images are the same is what {CONFIG} says.")
    elif len(sides) > 1 and task_of(first.front) not in VALUES:
        said.append("Not tested: no code of a task of the user's own is run here.")
    return said


def measure_of(front: Front) -> Objectives:
    """Return the two objectives that runs are compared by, whatever else they optimise."""
    objectives = front.record.optimised
    return Objectives((objectives[objectives.score], objectives[objectives.axis]))


def hvlog(front: Front) -> float:
    """Return `Objectives.hvlog` of a front, on the search split."""
    return measure_of(front).hvlog(np.array([(p.score, 1 - p.density) for p in front]))


def hvlog_on_test(front: Front) -> float:
    """Return the mean test score over log density from 0.5 to 0.005, scaled to 0..1: at each density that of the point which the
    search split chooses, 0 where there is none."""
    score = measure_of(front)[0]
    places = sorted({min(max(p.density, SPARSE), DENSE) for p in front} | {SPARSE, DENSE})
    total = 0.0
    for low, high in zip(places, places[1:]):
        point = chosen(front, 1 - low)
        total += 0.0 if point is None else score.share(point.test or 0.0) * math.log(high / low)
    return total / math.log(DENSE / SPARSE)
