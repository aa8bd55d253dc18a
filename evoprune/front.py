"""What the user keeps: the points of a front, to look at, to choose from, and to get a model of."""

from __future__ import annotations

import copy
import csv
import io
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .config import EvopruneError, first_line
from .layers import Layer, Layout
from .named import build_model

SHOWN = 16  # rows of a printed front
SPARSEST = 0.002  # density; points beyond it are hardly better than chance and are not worth a place each


@dataclass(frozen=True)
class Point:
    """A pruned model: a row of front.csv, and where its masks and values lie."""

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
    repair: str
    front: Front = field(repr=False, compare=False)

    def masks(self) -> dict[str, Tensor]:
        """Return a bool mask a searched layer, of the parameter's shape, True = kept."""
        with np.load(self.front.path / "masks.npz", allow_pickle=False) as file:
            return {layer.name: torch.from_numpy(np.unpackbits(file[f"{self.id}/{layer.name}"], count=layer.genes)
                                                 .view(np.bool_)).view(layer.gene_shape).expand(layer.shape)
                    for layer in self.front.layout}

    def state_dict(self) -> dict[str, Tensor]:
        """Return the parameters and buffers of the pruned model, with zeros where it is pruned."""
        from safetensors.torch import load_file

        trained = self.front.path / "models" / f"{self.id}.safetensors"
        if trained.exists():
            return load_file(trained)
        if self.repair != "none":
            raise EvopruneError(f"{trained}: not there yet, repaired values are written when the run is finished; go on with "
                                f"--resume {self.front.path}")
        state: dict[str, Tensor] = load_file(self.front.path / "dense.safetensors")
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

    def __init__(self, path: Path, config: dict[str, Any], model: nn.Module | None):
        self.path, self.config, self._model = path, config, model
        layers = tuple(Layer(each["name"], tuple(each["shape"]), each["unit"]) for each in config["layout"])
        self.layout = Layout(layers, config["weights"])
        self.finished = (path / "done.json").exists()
        self.points = read_points(path / "front.csv", self)

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

    def best(self, accuracy: float | None = None, sparsity: float | None = None) -> Point:
        """Return the sparsest point with at least `accuracy` (search split), or the most accurate with at least
        `sparsity`; with both, the sparsest that has both.

        Raises:
            EvopruneError: no point has it; says how close the front comes.
        """
        fits = [p for p in self.points if p.accuracy >= (accuracy or 0) and p.sparsity >= (sparsity or 0)]
        if not fits:
            raise EvopruneError(f"front: no point has accuracy >= {accuracy or 0} and sparsity >= {sparsity or 0}; the "
                                f"front reaches accuracy {max((p.accuracy for p in self.points), default=0):.4f} and "
                                f"sparsity {max((p.sparsity for p in self.points), default=0):.4f}")
        return max(fits, key=lambda p: (p.sparsity, p.accuracy) if accuracy is not None else (p.accuracy, p.sparsity))

    def structure(self) -> nn.Module:
        """Return a new model of this architecture, its values still to be loaded."""
        if self._model is not None:
            return copy.deepcopy(self._model).cpu()
        config = self.config
        if not config["rebuildable"]:
            raise EvopruneError(f"{self.path}: made from a model handed in; call load_front(dir, model=mine) with it")
        return build_model(config["settings"]["model"], config["outputs"], config["channels"])

    def aliases(self) -> dict[str, list[str]]:
        """Return all names that the state dict has for a searched layer: more than one where weights are tied."""
        every = dict(self.structure().named_parameters(remove_duplicate=False))
        return {layer.name: [n for n, p in every.items() if p is every[layer.name]] for layer in self.layout}

    def __str__(self) -> str:
        dense = self.config["dense"]
        lines = [f"{'id':>5}  {'accuracy':>8}  {'sparsity':>8}  {'kept':>11}  {'test accuracy (95 %)':>22}  origin"]
        lines.append(table_row("dense", dense["accuracy"], 0.0, self.layout.total, dense["test_accuracy"],
                         (dense["test_low"], dense["test_high"]), ""))
        shown = thin(self.points, SHOWN)
        lines += [table_row(p.id, p.accuracy, p.sparsity, p.kept, p.test_accuracy, (p.test_low, p.test_high), p.origin)
                  for p in shown]
        if len(shown) < len(self.points):
            lines.append(f"{len(shown)} of {len(self.points)} points, spread in log density")
        return "\n".join(lines)


def table_row(id: str, accuracy: float, sparsity: float, kept: int, test: float | None, interval: tuple[Any, Any],
        origin: str) -> str:
    tested = "" if test is None else f"{100 * test:.2f} ({100 * interval[0]:.2f}-{100 * interval[1]:.2f})"
    return f"{id:>5}  {100 * accuracy:8.2f}  {100 * sparsity:8.2f}  {kept:11,}  {tested:>22}  {origin}".rstrip()


def load_front(path: str | Path, model: nn.Module | None = None) -> Front:
    """Return the front of a run's folder; `model` is needed where the run's own was handed in, not named.

    Raises:
        EvopruneError: no run there, or none that has written its front yet.
    """
    path = Path(path)
    try:
        config = json.loads((path / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise EvopruneError(f"{path}: no run there ({first_line(error)}), expected a folder with config.json") from None
    if not (path / "front.csv").exists():
        raise EvopruneError(f"{path}: no front yet; go on with --resume {path}")
    try:
        return Front(path, config, model)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise EvopruneError(f"{path}: config.json or front.csv is damaged ({first_line(error)})") from None


COLUMNS = tuple(f.name for f in fields(Point) if f.name != "front")


def read_points(path: Path, front: Front) -> list[Point]:
    """Read front.csv or dominated.csv."""
    kinds: dict[str, Any] = {"id": str, "origin": str, "repair": str, "kept": int, "weights": int, "generation": int}

    def read(column: str, text: str) -> Any:
        kind = kinds.get(column, float)
        return kind(text) if text or kind is str else None

    with open(path, newline="") as file:
        rows: list[dict[str, Any]] = [{k: read(k, v) for k, v in row.items()} for row in csv.DictReader(file)]
    return [Point(**row, front=front) for row in rows]


def points_csv(rows: Sequence[dict[str, Any]], columns: Sequence[str] = COLUMNS) -> str:
    """Return rows as CSV; floats in full precision, None empty."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


def thin(points: Sequence[Any], count: int) -> list[Any]:
    """Return at most `count` of points with a `.sparsity`, spread evenly in log density down to `SPARSEST`.

    Takes the nearest to each place of an even grid, then, where several places share one, whichever point is farthest
    from all taken; of equally dense ones the first.
    """
    if len(points) <= count:
        return list(points)
    place = np.log(np.maximum([1 - p.sparsity for p in points], SPARSEST))
    grid = np.linspace(place.max(), place.min(), count)
    chosen = sorted({int(np.abs(place - target).argmin()) for target in grid})
    while len(chosen) < count:
        distance = np.abs(place[:, None] - place[chosen]).min(1)
        chosen.append(int(distance.argmax()))
    return [points[i] for i in sorted(set(chosen))]


def wilson(right: int, of: int) -> tuple[float, float]:
    """Return the 95 % Wilson score interval of a share (Wilson, 1927, doi:10.1080/01621459.1927.10502953)."""
    z, p = 1.959963984540054, right / of
    centre, half = p + z * z / (2 * of), z * math.sqrt(p * (1 - p) / of + z * z / (4 * of * of))
    low, high = (centre - half) / (1 + z * z / of), (centre + half) / (1 + z * z / of)
    return max(0.0, min(low, p)), min(1.0, max(high, p))  # rounding must not put the share outside
