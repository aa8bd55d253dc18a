"""What the user keeps: the points of a front, to look at, to choose from, and to get a model of. Looking imports no torch."""

from __future__ import annotations

import copy
import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..errors import EvopruneError, first_line
from ..files import load_safetensors
from ..masks.genome import Individual
from .folder import CONFIG, DENSE, DONE, FRONT, MASKS, model_file
from .points import Measured, from_row, thin
from .record import Record, read_record

if TYPE_CHECKING:
    from torch import Tensor, nn

SHOWN = 16  # rows of a printed front


@dataclass(frozen=True)
class Point(Measured):
    """A pruned model: what it measured, and the front whose folder has its mask and values."""

    front: Front = field(repr=False, compare=False, kw_only=True)

    def masks(self) -> dict[str, Tensor]:
        """Return a bool mask a searched layer, of the parameter's shape, True = kept."""
        from ..masks.tensors import named_masks

        layout = self.front.layout
        with np.load(self.front.path / MASKS, allow_pickle=False) as file:
            individual = Individual(file[f"{self.id}/{layer.name}"] for layer in layout)
        return named_masks(individual, layout)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the parameters and buffers of the pruned model, with zeros where it is pruned."""
        trained = self.front.path / model_file(self.id)
        if trained.exists():
            return load_safetensors(trained)
        if self.repair != "none":
            raise EvopruneError(f"{trained}: not there yet, repaired values are written when the run is finished; go on with "
                                f"--resume {self.front.path}")
        state = load_safetensors(self.front.path / DENSE)
        shared = self.front.aliases()
        for name, mask in self.masks().items():
            for alias in shared.get(name, [name]):
                state[alias] = state[alias].masked_fill(~mask, 0)
        return state

    def model(self) -> nn.Module:
        """Return the pruned model as a new nn.Module in eval mode, on the CPU; yours is untouched."""
        model = self.front.structure()
        model.load_state_dict(self.state_dict())
        return model.eval()


class Front(Sequence[Point]):
    """The points of a run, by sparsity; `front[3]`, `front["003"]`, or by wish: `front.best(accuracy=0.98)`."""

    def __init__(self, path: Path, record: Record, model: nn.Module | None):
        self.path, self.record, self._model = path, record, model
        self.layout = record.layers()
        self.finished = (path / DONE).exists()
        self.points = read_points(path / FRONT, self)

    def __len__(self) -> int:
        return len(self.points)

    def __getitem__(self, key):  # type: ignore[no-untyped-def]  # int, slice or id
        if isinstance(key, str):
            for point in self.points:
                if point.id == key:
                    return point
            raise KeyError(key)
        return self.points[key]

    def __iter__(self) -> Iterator[Point]:
        return iter(self.points)

    def best(self, *, drop: float | None = None, **wishes: float | None) -> Point:
        """Return the sparsest point with at least `accuracy=0.98` (search split), or that `drop` below the dense model's at most;
        or the most accurate with at least `sparsity=0.95`; with several, of any objectives, the sparsest that has them all.

        Raises:
            EvopruneError: no point has it; says how close the front comes.
            TypeError: a wish is for no objective of the run.
        """
        objectives = self.record.optimised
        self.check_points()
        if unknown := set(wishes) - set(objectives.names):
            raise TypeError(f"best: found {', '.join(sorted(unknown))}, expected {', '.join(objectives.names)} or drop")
        asked = {i: wish for i, o in enumerate(objectives) if (wish := wishes.get(o.name)) is not None}
        if drop is not None:
            asked[objectives.score] = max(asked.get(objectives.score, 0), self.record.measured.score - drop - 1e-12)
        fits = [p for p in self.points if all(objectives[i].fits(p.values[i], limit) for i, limit in asked.items())]
        if not fits:
            wanted = [f"{objectives[i].name} {'>=' if objectives[i].weight > 0 else '<='} {limit}" for i, limit in asked.items()]
            reached = [f"{objectives[i].name} {objectives[i].best_of([p.values[i] for p in self.points]):.4f}" for i in asked]
            raise EvopruneError(f"front: no point has {' and '.join(wanted)}; the front reaches {' and '.join(reached)}")
        first, second = (objectives.axis, objectives.score)[::1 if objectives.score in asked else -1]
        return max(fits, key=lambda p: (p.values[first], p.values[second]))

    def knee(self) -> Point:
        """Return the point at the knee of the front, see `Objectives.knee`."""
        self.check_points()
        return self.points[self.record.optimised.knee(np.array([p.values for p in self.points]))]

    def check_points(self) -> None:
        """Raise `EvopruneError` where there is nothing to choose from."""
        if not self.points:
            raise EvopruneError(f"front: {self.path} has no point; lower --accuracy-floor, or search longer")

    def structure(self) -> nn.Module:
        """Return a new model of this architecture, its values still to be loaded."""
        if self._model is not None:
            return copy.deepcopy(self._model).cpu()
        if not self.record.rebuildable:
            raise EvopruneError(f"{self.path}: made from a model handed in; call load_front(dir, model=mine) with it")
        from ..inputs.named import build_model

        return build_model(self.record.settings["model"], self.record.outputs, self.record.channels)

    def aliases(self) -> dict[str, list[str]]:
        """Return all names that the state dict has for a searched layer: more than one where weights are tied."""
        every = dict(self.structure().named_parameters(remove_duplicate=False))
        return {layer.name: [n for n, p in every.items() if p is every[layer.name]] for layer in self.layout}

    def __str__(self) -> str:
        objectives = self.record.optimised
        tested = f"test {objectives[objectives.score].name} (95 %)"
        names = "  ".join(f"{name:>8}" for name in objectives.names)
        shown = thin(self.points, SHOWN)
        lines = [f"{'id':>5}  {names}  {'kept':>11}  {tested:>22}  origin",
                 table_row(replace(self.record.measured, origin="")), *map(table_row, shown)]
        if len(shown) < len(self.points):
            lines.append(f"{len(shown)} of {len(self.points)} points, spread in log density")
        return "\n".join(lines)


def table_row(point: Measured) -> str:
    """Return a row of the printed table."""
    objectives = point.objectives
    score, tested = objectives[objectives.score], ""
    if point.test is not None and point.test_low is not None and point.test_high is not None:
        tested = f"{score.shown(point.test)} ({score.shown(point.test_low)}-{score.shown(point.test_high)})"
    values = "  ".join(f"{o.shown(value):>{max(8, len(o.name))}}" for o, value in zip(objectives, point.values))
    return f"{point.id:>5}  {values}  {point.kept:11,}  {tested:>22}  {point.origin}".rstrip()


def load_front(path: str | Path, model: nn.Module | None = None) -> Front:
    """Return the front of a run's folder; `model` is needed where the run's own was handed in, not named.

    Raises:
        EvopruneError: no run there, or none that has written its front yet.
    """
    path = Path(path)
    try:
        record = read_record(path / CONFIG)
    except FileNotFoundError as error:
        raise EvopruneError(f"{path}: no run there ({error}), expected a folder with {CONFIG}") from None
    if not (path / FRONT).exists():
        raise EvopruneError(f"{path}: no front yet; go on with --resume {path}")
    if record.dense is None:
        raise EvopruneError(f"{path / CONFIG}: dense is missing; expected what the run wrote")
    try:
        return Front(path, record, model)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise EvopruneError(f"{path / FRONT}: damaged ({first_line(error)}); expected what the run wrote") from None


def read_points(path: Path, front: Front) -> list[Point]:
    """Read the points' table, or that of the dominated ones."""
    with open(path, newline="") as file:
        return [Point(**from_row(row, front.record.optimised), front=front) for row in csv.DictReader(file)]
