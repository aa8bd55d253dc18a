"""A measured point: a row of the table of points, whose columns are its fields, and its mask and values until they lie in files.
Points spread evenly, and intervals.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ..masks.genome import Individual, kept_genes, pruned_weights
from ..masks.layout import Layout

if TYPE_CHECKING:
    from torch import Tensor

LEAST_DENSITY = 0.002  # density; points beyond it are hardly better than chance and are not worth a place each
LAYER_COLUMNS = ("id", "layer", "weights", "kept", "sparsity")


@dataclass(frozen=True)
class Measured:
    """What a pruned model is and measured; the columns of the points' table, in this order."""

    id: str
    accuracy: float  # on the search split, after training if there was any
    sparsity: float
    kept: int  # weights
    weights: int  # prunable weights of the whole model
    test_accuracy: float | None  # None until a run has finished, or without a test split
    test_low: float | None  # 95 % Wilson interval
    test_high: float | None
    accuracy_before: float  # without that training
    generation: int
    origin: str
    repair: str  # that made the values, "none" where they are dense or trained ones


COLUMNS = tuple(f.name for f in fields(Measured))


@dataclass
class Pruned:
    """A pruned model before it lies in files: what it measured, its mask, and its values where they are not the dense ones."""

    measured: Measured
    individual: Individual
    state: dict[str, Tensor] | None = None

    @property
    def sparsity(self) -> float:
        return self.measured.sparsity

    def note(self, **found: Any) -> None:
        """Replace what was measured by something newer."""
        self.measured = replace(self.measured, **found)

    def note_test(self, right: int, of: int) -> None:
        """Note the right answers on the test split, with their 95 % interval."""
        low, high = wilson(right, of)
        self.note(test_accuracy=right / of, test_low=low, test_high=high)


def pruned(individual: Individual, layout: Layout, accuracy: float, before: float | None = None,
           state: dict[str, Tensor] | None = None) -> Pruned:
    """Return an individual as a point with `accuracy`, and `before` any training; its id is still to be given."""
    measured = Measured("", accuracy, individual.fitness.values[1], layout.total - pruned_weights(individual, layout),
                        layout.total, None, None, None, accuracy if before is None else before, individual.generation,
                        individual.origin, "none")
    return Pruned(measured, individual, state)


def numbered(points: Sequence[Pruned]) -> list[Pruned]:
    """Give the points their ids, 000, 001, ... in order; return them."""
    for i, point in enumerate(points):
        point.note(id=f"{i:03d}")
    return list(points)


def undominated(points: Sequence[Pruned], floor: float = 0.0) -> list[Pruned]:
    """Return the points at or above the floor that no other dominates, of equal ones the first, by sparsity."""
    front: list[Pruned] = []
    best = floor - 1e-12
    for p in sorted(points, key=lambda p: (-p.sparsity, -p.measured.accuracy)):
        if p.measured.accuracy > best:
            best = p.measured.accuracy
            front.append(p)
    return front[::-1]


def layer_rows(p: Pruned, layout: Layout) -> list[dict[str, Any]]:
    """Return a row a layer: how much of it a point keeps."""
    kept = [kept_genes(bits) * layer.weights_a_gene for bits, layer in zip(p.individual, layout)]
    return [dict(zip(LAYER_COLUMNS, (p.measured.id, layer.name, layer.weights, k, 1 - k / layer.weights)))
            for layer, k in zip(layout, kept)]


def points_csv(points: Sequence[Pruned]) -> str:
    """Return points as CSV."""
    return table_csv([asdict(p.measured) for p in points], COLUMNS)


def table_csv(rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> str:
    """Return rows as CSV; floats in full precision, None empty."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


def thin(points: Sequence[Any], count: int) -> list[Any]:
    """Return at most `count` of points with a `.sparsity`, spread evenly in log density down to `LEAST_DENSITY`.

    Takes the nearest to each place of an even grid, then, where several places share one, whichever point is farthest
    from all taken; of equally dense ones the first.
    """
    if len(points) <= count:
        return list(points)
    place = np.log(np.maximum([1 - p.sparsity for p in points], LEAST_DENSITY))
    grid = np.linspace(place.max(), place.min(), count)
    chosen = sorted({int(np.abs(place - target).argmin()) for target in grid})
    while len(chosen) < count:
        distance = np.abs(place[:, None] - place[chosen]).min(1)
        chosen.append(int(distance.argmax()))
    return [points[i] for i in sorted(set(chosen))]


def knee(values: Sequence[Sequence[float]]) -> int:
    """Return the place of the point farthest above the line between the ends of a front, all objectives, to be maximised, scaled
    to 0..1; of equally far ones the last."""
    found = np.array(values)  # (n, objectives)
    low, high = found.min(0), found.max(0)
    above = ((found - low) / np.maximum(high - low, 1e-12)).sum(1)
    return int(np.flatnonzero(above == above.max())[-1])


def wilson(right: int, of: int) -> tuple[float, float]:
    """Return the 95 % Wilson score interval of a share (Wilson, 1927, doi:10.1080/01621459.1927.10502953)."""
    z, p = 1.959963984540054, right / of
    centre, half = p + z * z / (2 * of), z * math.sqrt(p * (1 - p) / of + z * z / (4 * of * of))
    low, high = (centre - half) / (1 + z * z / of), (centre + half) / (1 + z * z / of)
    return max(0.0, min(low, p)), min(1.0, max(high, p))  # rounding must not put the share outside
