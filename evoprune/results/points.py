"""A measured point: a row of the table of points, whose columns follow from what is optimised; its mask and values until they lie
in files. Points spread evenly, and intervals.
"""

from __future__ import annotations

import csv
import io
import math
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt

from ..masks.genome import Individual, kept_genes, pruned_weights
from ..masks.layout import Layout
from ..objectives import SPARSITY, Objectives

if TYPE_CHECKING:
    from torch import Tensor

    State = dict[str, Tensor]

AnyPoint = TypeVar("AnyPoint", bound="Measured")
LEAST_DENSITY = 0.002  # density; points beyond it are hardly better than chance and are not worth a place each
TESTED = ("test", "test_low", "test_high")  # parts of a measured point
LAYER_COLUMNS = ("id", "layer", "weights", "kept", "sparsity")


@dataclass(frozen=True)
class Measured:
    """What a pruned model is and measured. Each column of the points' table is an attribute too: with the usual objectives
    `accuracy`, `sparsity`, `test_accuracy`, `accuracy_before`."""

    id: str
    values: tuple[float, ...]  # of the objectives; the score on the search split, after training if there was any
    kept: int  # weights
    weights: int  # prunable weights of the whole model
    test: float | None  # score; None until a run has finished, or without a test split
    test_low: float | None  # 95 % interval
    test_high: float | None
    before: float  # score without that training
    generation: int
    origin: str
    repair: str  # that made the values, "none" where they are dense or trained ones
    objectives: Objectives = field(repr=False)
    choice: float | None = None  # score on the search images and those that --choice-images kept back

    def row(self) -> dict[str, Any]:
        """Return the row of the points' table."""
        rest = [getattr(self, name) for name in PARTS]
        chosen = [] if self.choice is None else [self.choice]
        return dict(zip(columns(self.objectives, choice=True), [self.id, *self.values, *rest, *chosen]))

    def __getattr__(self, name: str) -> Any:
        if "objectives" in vars(self) and name in columns(self.objectives, choice=True):
            return self.row().get(name)
        raise AttributeError(f"a point has no {name!r}")

    @property
    def score(self) -> float:
        return self.values[self.objectives.score]

    @property
    def ranked(self) -> tuple[float, ...]:
        """The values by which it is compared with others: the score on all images that there are for that."""
        return self.values if self.choice is None else self.objectives.scored(self.values, self.choice)

    @property
    def trained(self) -> bool:
        """Whether its values are trained ones: it says so, or has another score than before."""
        return self.origin.endswith("tune") or (self.repair == "none" and self.before != self.score)

    @property
    def density(self) -> float:
        """The share that is left, by the objective of the axis."""
        return 1 - self.values[self.objectives.axis]

    @property
    def tested(self) -> str:
        """The score on the test split and its interval, in words; empty where there is none."""
        if self.test is None or self.test_low is None or self.test_high is None:
            return ""
        return self.objectives[self.objectives.score].within(self.test, self.test_low, self.test_high)


PARTS = {name: next(iter(typing.get_args(hint)), hint) for name, hint in typing.get_type_hints(Measured).items()
         if name not in ("id", "values", "objectives", "choice")}  # of a measured point behind its id and values


def column(part: str, objectives: Objectives) -> str:
    """Return the column that a part of a measured point has."""
    score = objectives[objectives.score].name
    return {"test": f"test_{score}", "before": f"{score}_before", "choice": f"choice_{score}"}.get(part, part)


def columns(objectives: Objectives, choice: bool = False) -> list[str]:
    """Return the columns of the points' table, in order; with that of `choice`, which only some runs have."""
    return ["id", *objectives.names, *(column(part, objectives) for part in [*PARTS, *["choice"] * choice])]


def from_row(row: Mapping[str, str], objectives: Objectives) -> dict[str, Any]:
    """Return the fields of `Measured` from a row of the points' table, as CSV has it; KeyError or ValueError if it is none."""
    values = tuple(float(row[name]) for name in objectives.names)
    texts = {part: row[column(part, objectives)] for part in PARTS}
    choice = row.get(column("choice", objectives))
    return {"id": row["id"], "values": values, "objectives": objectives, "choice": float(choice) if choice else None,
            **{part: PARTS[part](text) if text or PARTS[part] is str else None for part, text in texts.items()}}


def check_points(points: Sequence[Measured], weights: int) -> None:
    """Raise ValueError for points that no run wrote: an id becomes part of a path, an origin is printed."""
    for point in points:
        if not (point.id.isascii() and point.id.isdecimal()):
            raise ValueError(f"found the id {point.id!r:.40}, expected digits")
        if not (point.origin.isprintable() and point.repair.isprintable()):
            raise ValueError(f"found {point.origin!r:.40} in {point.id}, expected plain text")
        numbers = [x for x in (*point.values, point.before, point.test, point.test_low, point.test_high, point.choice)
                   if x is not None]
        score, sparsity = point.objectives[point.objectives.score], [o.name for o in point.objectives].index(SPARSITY.name)
        bounded = (point.score, point.before, *(x for x in (point.test, point.test_low, point.test_high, point.choice)
                                                if x is not None))
        if (not 0 <= point.kept <= point.weights == weights or not all(map(math.isfinite, numbers)) or point.generation < 0
                or not all(score.worst <= x <= score.best for x in bounded)
                or abs(1 - point.kept / point.weights - point.values[sparsity]) > 1e-9):
            raise ValueError(f"found numbers in {point.id} that cannot be, of {weights} weights")
    if len({point.id for point in points}) < len(points):
        raise ValueError("found an id twice")


@dataclass
class Pruned:
    """A pruned model before it lies in files: what it measured, its mask, and its values where they are not the dense ones."""

    measured: Measured
    individual: Individual
    kept: State | Callable[[], State] | None = None  # its state dict, or what reads it: all in memory at once may be too many
    right: npt.NDArray[Any] | None = None  # of each test image, see `Task.each`

    @property
    def has_state(self) -> bool:
        return self.kept is not None

    @property
    def state(self) -> State:
        """The state dict of a point that has one."""
        assert self.kept is not None
        return self.kept() if callable(self.kept) else self.kept

    @property
    def density(self) -> float:
        return self.measured.density

    def note(self, score: float | None = None, **found: Any) -> None:
        """Replace what was measured by something newer."""
        if score is not None:
            found["values"] = self.measured.objectives.scored(self.measured.values, score)
        self.measured = replace(self.measured, **found)

    def note_test(self, score: float, low: float, high: float, right: npt.NDArray[Any]) -> None:
        """Note the score on the test split, with its 95 % interval, and what each image contributes."""
        self.note(test=score, test_low=low, test_high=high)
        self.right = right


def pruned(individual: Individual, layout: Layout, score: float, before: float | None = None,
           state: State | None = None) -> Pruned:
    """Return an individual as a point with a `score`, and `before` any training; its id is still to be given."""
    objectives = individual.fitness.objectives
    values = objectives.scored(individual.fitness.values, score)
    measured = Measured("", values, layout.total - pruned_weights(individual, layout), layout.total, None, None, None,
                        score if before is None else before, individual.generation, individual.origin, "none", objectives)
    return Pruned(measured, individual, state)


def before_and_after(p: Pruned) -> str:
    """Return in words how sparse a point is, and its score before and after training."""
    found, objectives = p.measured, p.measured.objectives
    axis, score = objectives[objectives.axis], objectives[objectives.score]
    return (f"{axis.said(found.values[objectives.axis])} {axis.name}, {score.title} {score.said(found.before)} before and "
            f"{score.said(found.score)} after training")


def numbered(points: Sequence[Pruned]) -> list[Pruned]:
    """Give the points their ids, 000, 001, ... in order; return them."""
    for i, point in enumerate(points):
        point.note(id=f"{i:03d}")
    return list(points)


def undominated(points: Sequence[Pruned], floor: float = 0.0) -> list[Pruned]:
    """Return the points at or above the floor that no other dominates, of equal ones the first, along the axis."""
    if not points:
        return []
    objectives = points[0].measured.objectives
    reached = [p for p, fits in zip(points, objectives.reaches(np.array([p.measured.values for p in points]), floor)) if fits]
    return [reached[i] for i in objectives.front(np.array([p.measured.ranked for p in reached]))] if reached else []


def beyond_chance(points: Sequence[AnyPoint], chance: float | None) -> list[AnyPoint]:
    """Return the points that are better than one answer for all examples, and what is not pruned; all where that is not known, or
    none is."""
    found = [p for p in points if chance is None or p.score > chance or p.kept == p.weights]
    return found or list(points)


def layer_rows(p: Pruned, layout: Layout) -> list[dict[str, Any]]:
    """Return a row a layer: how much of it a point keeps."""
    kept = [kept_genes(bits) * layer.weights_a_gene for bits, layer in zip(p.individual, layout)]
    return [dict(zip(LAYER_COLUMNS, (p.measured.id, layer.name, layer.weights, k, 1 - k / layer.weights)))
            for layer, k in zip(layout, kept)]


def points_csv(points: Sequence[Pruned], objectives: Objectives) -> str:
    """Return points as CSV."""
    choice = any(p.measured.choice is not None for p in points)
    return table_csv([p.measured.row() for p in points], columns(objectives, choice))


def table_csv(rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> str:
    """Return rows as CSV; floats in full precision, None empty."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


def thin(points: Sequence[Any], count: int) -> list[Any]:
    """Return at most `count` of points with a `.density`, spread evenly in log density down to `LEAST_DENSITY`.

    Takes the nearest to each place of an even grid, then, where several places share one, whichever point is farthest
    from all taken; of equally dense ones the first.
    """
    if len(points) <= count:
        return list(points)
    place = np.log(np.maximum([p.density for p in points], LEAST_DENSITY))
    grid = np.linspace(place.max(), place.min(), count)
    chosen = sorted({int(np.abs(place - target).argmin()) for target in grid})
    while len(chosen) < count:
        distance = np.abs(place[:, None] - place[chosen]).min(1)
        chosen.append(int(distance.argmax()))
    return [points[i] for i in sorted(set(chosen))]
