"""What the user keeps: the points of a front, to look at, to choose from, and to get a model of. Looking imports no torch."""

from __future__ import annotations

import copy
import csv
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import EvopruneError, first_line
from ..files import load_safetensors
from ..masks.genome import Individual
from .folder import CONFIG, DENSE, DONE, FRONT, MASKS, model_file
from .points import Measured, knee, thin
from .record import Dense, Record, read_record

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

    def best(self, accuracy: float | None = None, sparsity: float | None = None, drop: float | None = None) -> Point:
        """Return the sparsest point with at least `accuracy` (search split), or that `drop` below the dense model's at most;
        or the most accurate with at least `sparsity`; with several, the sparsest that has them all.

        Raises:
            EvopruneError: no point has it; says how close the front comes.
        """
        if drop is not None:
            accuracy = max(accuracy or 0, self.record.measured.accuracy - drop - 1e-12)
        fits = [p for p in self.points if p.accuracy >= (accuracy or 0) and p.sparsity >= (sparsity or 0)]
        if not fits:
            raise EvopruneError(f"front: no point has accuracy >= {accuracy or 0} and sparsity >= {sparsity or 0}; the "
                                f"front reaches accuracy {max((p.accuracy for p in self.points), default=0):.4f} and "
                                f"sparsity {max((p.sparsity for p in self.points), default=0):.4f}")
        return max(fits, key=lambda p: (p.sparsity, p.accuracy) if accuracy is not None else (p.accuracy, p.sparsity))

    def knee(self) -> Point:
        """Return the point at the knee of the front, see `points.knee`."""
        if not self.points:
            raise EvopruneError(f"front: {self.path} has no point, so no knee")
        return self.points[knee([(p.accuracy, p.sparsity) for p in self.points])]

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
        dense = self.record.measured
        lines = [f"{'id':>5}  {'accuracy':>8}  {'sparsity':>8}  {'kept':>11}  {'test accuracy (95 %)':>22}  origin"]
        lines.append(table_row("dense", dense.accuracy, 0.0, self.layout.total, "", dense))
        shown = thin(self.points, SHOWN)
        lines += [table_row(p.id, p.accuracy, p.sparsity, p.kept, p.origin, p) for p in shown]
        if len(shown) < len(self.points):
            lines.append(f"{len(shown)} of {len(self.points)} points, spread in log density")
        return "\n".join(lines)


def table_row(id: str, accuracy: float, sparsity: float, kept: int, origin: str, tested: Dense | Point) -> str:
    # 6 arguments: the dense model has a row as well, and is no point
    shown = ""
    if tested.test_accuracy is not None and tested.test_low is not None and tested.test_high is not None:
        shown = f"{100 * tested.test_accuracy:.2f} ({100 * tested.test_low:.2f}-{100 * tested.test_high:.2f})"
    return f"{id:>5}  {100 * accuracy:8.2f}  {100 * sparsity:8.2f}  {kept:11,}  {shown:>22}  {origin}".rstrip()


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
    kinds = {name: next(iter(typing.get_args(hint)), hint) for name, hint in typing.get_type_hints(Measured).items()}

    def read(column: str, text: str) -> Any:
        kind = kinds[column]
        return kind(text) if text or kind is str else None

    with open(path, newline="") as file:
        rows: list[dict[str, Any]] = [{k: read(k, v) for k, v in row.items()} for row in csv.DictReader(file)]
    return [Point(**row, front=front) for row in rows]
