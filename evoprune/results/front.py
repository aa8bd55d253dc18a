"""What the user keeps: the points of a front, to look at, to choose from, and to get a model of. Looking imports no torch."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..config import check_setting
from ..errors import EvopruneError, printable, shown
from ..objectives import Floats
from .points import LAYER_COLUMNS, Measured, beyond_chance, check_points, columns, from_row
from .record import Record, read_record
from .tables import as_html, as_text
from .written import CONFIG, DENSE, FRONT, LAYERS, Written, model_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor, nn

DROP = 0.01  # below the dense model, that most would give away
SLIM_EXAMPLES = 16  # that a smaller model is compared on
log = logging.getLogger("evoprune")


@dataclass(frozen=True)
class Point(Measured):
    """A pruned model: what it measured, and the front whose folder has its mask and values."""

    front: Front = field(repr=False, compare=False, kw_only=True)

    def plain(self) -> Measured:
        """Return what it measured, without the front."""
        return Measured(**{each.name: getattr(self, each.name) for each in fields(Measured)})

    def masks(self) -> dict[str, Tensor]:
        """Return a bool mask a searched layer, of the parameter's shape, True = kept."""
        from ..masks.tensors import named_masks

        layout = self.front.layout
        return named_masks(self.front.written.individual(self.id, layout), layout)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the parameters and buffers of the pruned model, with zeros where it is pruned. Runs no code of the folder."""
        written, own = self.front.written, model_file(self.id)
        if written.has(own):
            return written.tensors(own)
        if self.repair != "none" and not written.finished:
            raise EvopruneError(f"{written.home / own}: not there yet, repaired values are written when the run is finished; "
                                f"resume it")
        config = self.front.record.config
        trained = config.total_epochs or config.layerwise or self.trained or (config.finetune_epochs and written.finished)
        if self.repair != "none" or (trained and self.kept < self.weights):
            raise EvopruneError(f"{written.home / own}: missing; expected the file that the run wrote")
        state = written.tensors(DENSE)
        shared = {names[0]: names for names in self.front.aliases()}
        for name, mask in self.masks().items():
            for alias in shared.get(name, (name,)):
                if alias not in state or state[alias].shape != mask.shape:
                    raise written.damaged(DENSE, KeyError(f"no {alias} of shape {tuple(mask.shape)} in it"))
                state[alias] = state[alias].masked_fill(~mask, 0)
        return state

    def model(self, *, slim: bool = False, sparse: bool = False, latency_batch: int | None = None) -> nn.Module:
        """Return the pruned model as a new nn.Module in eval mode, on the CPU; yours is untouched. With `slim` it is smaller:
        channels and heads that nothing needs are cut out, its outputs are the same (`values.slim`). With `sparse`, layers that
        are faster so on this machine, for `latency_batch` examples at a time (unless given, the run's), skip their zeros; the
        model's `sparse_layers` says how many times as fast as dense each of them was (`values.sparse`).

        Where the run's model was a function, named, and none was handed to `load_front`, that function is called.
        """
        from ..inputs.weights import load_weights

        model, state = self.front.structure(), self.state_dict()
        load_weights(model, state, f"{self.front.path}, point {self.id}")
        model.eval()
        if latency_batch is None:
            latency_batch = self.front.record.config.latency_batch
        check_setting("latency_batch", latency_batch)
        if slim or sparse:
            from ..values.slim import slimmed
            from ..values.sparse import sparsely_run

            model = slimmed(model, self.front.examples(SLIM_EXAMPLES))[0] if slim else model
            model = sparsely_run(model, self.front.examples(latency_batch)) if sparse else model
        return model

    def export(self, path: str | Path, *, bits: int = 32, slim: bool = False, data: Any = None, overwrite: bool = False) -> Path:
        """Write the point to a file and return where it lies; the suffix says what it is: `.safetensors` or `.pt`, the state
        dict; `.packed.safetensors`, the same without zeros, in 32, 16 or 8 `bits` a value; `.pt2` or `.onnx`, a program, smaller
        with `slim`.

        The file is opened again in a fresh process. What it scores is counted on `data`, or on the test images of a run whose
        data are named, and said with its size and speed.

        Raises:
            EvopruneError: it cannot be written so, is there already, or what was read back is something else.
        """
        from .export import export

        return export(self, path, bits, slim, data, overwrite)


class Front(Sequence[Point]):
    """The points of a run, by sparsity; `front[3]`, `front["003"]`, or by wish: `front.best(accuracy=0.98)`."""

    def __init__(self, path: Path, record: Record, written: Written, model: nn.Module | None):
        self.path, self.record, self._model = path, record, model
        self.layout, self.written = record.layers(), written
        self.finished = written.finished
        self.points = self.read(FRONT)

    def __len__(self) -> int:
        return len(self.points)

    def __getitem__(self, key):  # type: ignore[no-untyped-def]  # int, slice or id
        if isinstance(key, str):
            if key not in (found := {point.id: point for point in self.points}):
                raise KeyError(f"no point {key!r}, expected one of {', '.join(found)}")
            return found[key]
        return self.points[key]

    def __iter__(self) -> Iterator[Point]:
        return iter(self.points)

    def best(self, *, drop: float | None = None, **wishes: float | None) -> Point:
        """Return the sparsest point with at least `accuracy=0.98` (search split; `score=` for any task), or that `drop` below the
        dense model's at most; or the most accurate with at least `sparsity=0.95`; with several, of any objectives, the sparsest
        that has them all.

        Raises:
            EvopruneError: no point has it; says how close the front comes.
            TypeError: a wish is for no objective of the run.
        """
        objectives = self.record.optimised
        self.check_points()
        wishes = {objectives[objectives.score].name if name == "score" else name: wish for name, wish in wishes.items()}
        if unknown := set(wishes) - set(objectives.names):
            raise TypeError(f"best: found {', '.join(sorted(unknown))}, expected {', '.join(objectives.names)} or drop")
        score, axis = objectives[objectives.score], objectives[objectives.axis]
        bounds = {"drop": (0.0, score.best - score.worst), **{o.name: (o.worst, o.best) for o in (score, axis)}}
        for name, wish in {"drop": drop, **wishes}.items():
            low, high = bounds.get(name, (-math.inf, math.inf))
            number = isinstance(wish, (int, float, np.number)) and math.isfinite(wish)
            if wish is not None and not (number and low <= wish <= high):
                expected = f"a number from {low:g} to {high:g}" if name in bounds else "a finite number"
                raise EvopruneError(f"best: found {name}={shown(wish)}, expected {expected}")
        asked = {i: wish for i, o in enumerate(objectives) if (wish := wishes.get(o.name)) is not None}
        if drop is not None:
            asked[objectives.score] = max(asked.get(objectives.score, -math.inf), self.record.measured.score - drop - 1e-12)
        fits = [p for p in self.points if all(objectives[i].fits(p.values[i], limit) for i, limit in asked.items())]
        if not fits:
            pairs = [objectives[i].beside(limit, [p.values[i] for p in self.points]) for i, limit in asked.items()]
            raise EvopruneError("front: no point has {}; the front reaches {}".format(*map(" and ".join, zip(*pairs))))
        if all(p.kept == p.weights for p in fits):
            log.warning("front: only the unpruned model has what was asked for")
        first, second = (objectives.axis, objectives.score)[::1 if objectives.score in asked else -1]
        return max(fits, key=lambda p: (p.ranked[first], p.ranked[second]))

    def knee(self) -> Point:
        """Return the point at the knee of the front, see `Objectives.knee`."""
        self.check_points()
        points = beyond_chance(self.points, self.record.chance)
        return points[self.record.optimised.knee(np.array([p.ranked for p in points]))]

    def check_points(self) -> None:
        """Raise `EvopruneError` where there is nothing to choose from."""
        if not self.points:
            raise EvopruneError(f"front: {self.path} has no point; lower the accuracy floor, or search longer")

    def structure(self) -> nn.Module:
        """Return a new model of this architecture, its values still to be loaded."""
        from ..inputs.models import private_copy

        if self._model is not None:
            return private_copy(self._model)
        if not self.record.rebuildable:
            raise EvopruneError(f"{self.path}: made from a model handed in; in Python, load_front(dir, model=mine) takes it")
        from ..inputs.named import build_model, says_what_it_calls

        says_what_it_calls(self.record.config.model, "building the model", "load_front(dir, model=mine)")
        return build_model(self.record.config.model, self.record.outputs, self.record.channels)

    @property
    def has_model(self) -> bool:
        """Whether a model of this architecture is here, or made without calling what the folder names."""
        from ..inputs.named import names_function

        return self._model is not None or (self.record.rebuildable and not names_function(self.record.config.model))

    def examples(self, count: int) -> Any:
        """Return random inputs of the model, always the same.

        Raises:
            EvopruneError: the run does not say what they are like.
        """
        from ..inputs.nested import examples

        if self.record.inputs is None:
            raise EvopruneError(f"{self.path}: an older evoprune has not recorded what inputs are like; hand in data=, or run it "
                                f"again")
        return examples(self.record.inputs, count)

    def aliases(self) -> Sequence[Sequence[str]]:
        """Return all names of each searched parameter that the state dict has more than once: where weights are tied.

        Raises:
            EvopruneError: an older evoprune has not recorded them, and only a function that the folder names could say.
        """
        from ..masks.layers import aliases

        if self.record.aliases is None and not self.has_model:  # of an older evoprune: only the model itself says
            raise EvopruneError(f"{self.path}: does not say which weights are tied, and finding out would call "
                                f"{self.record.config.model}; in Python, load_front(dir, model=mine) calls nothing")
        return aliases(self.structure(), self.layout) if self.record.aliases is None else self.record.aliases

    def read(self, name: str) -> list[Point]:
        """Return the points of a table: front.csv, or that of the dominated ones.

        Raises:
            EvopruneError: it is missing or damaged.
        """
        rows = self.written.rows(name, columns(self.record.optimised))
        try:
            found = [Point(**from_row(row, self.record.optimised), front=self) for row in rows]
            check_points([*found], self.record.weights)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise self.written.damaged(name, error) from None
        return found

    def layer_shares(self) -> Floats:
        """Return what is pruned of each layer at each point, (layers, points) in 0..1."""
        kept = {(row["id"], row["layer"]): row["kept"] for row in self.written.rows(LAYERS, LAYER_COLUMNS)}
        try:
            return np.array([[1 - int(kept[p.id, layer.name]) / layer.weights for p in self] for layer in self.layout])
        except (KeyError, ValueError) as error:
            raise self.written.damaged(LAYERS, error) from None

    def to_dict(self) -> dict[str, Any]:
        """Return the folder, the dense model and all points as plain data, by the names of front.csv's columns."""
        return {"path": str(self.path), "finished": self.finished, "dense": self.record.measured.row(),
                "points": [point.row() for point in self]}

    def plot(self) -> Figure:
        """Return the front as a picture, a matplotlib Figure, with what `knee()` and `best(drop=0.01)` take; a notebook shows it,
        `front.plot().savefig("front.svg")` keeps it.

        Raises:
            EvopruneError: there is no point.
        """
        from .plots import front_figure

        self.check_points()
        return front_figure(self.points, self.record, self.marks())

    def marks(self) -> dict[str, Point]:
        """Return what is marked in pictures: the points that are taken without another wish, by how to take them."""
        found = {"knee()": self.knee()}
        if any(p.kept < p.weights and self.record.measured.score - p.score <= DROP for p in self):
            found[f"best(drop={DROP})"] = self.best(drop=DROP)
        return found

    def __str__(self) -> str:
        return as_text(self.points, self.record)

    def __repr__(self) -> str:
        return f"{len(self)} points of {printable(str(self.path))}\n{self}"

    def _repr_html_(self) -> str:
        return as_html(self.points, self.record)


def load_front(path: str | Path, model: nn.Module | None = None) -> Front:
    """Return the front of a run's folder, none of whose code is run; `model` is needed where the run's was handed in, not named.

    Raises:
        EvopruneError: no run there, none that has written its front yet, or files that are not as the run wrote them.
    """
    if not isinstance(path, (str, Path)):
        raise EvopruneError(f"load_front: found {type(path).__name__}, expected the folder of a run")
    if model is not None and not ("torch" in sys.modules and isinstance(model, sys.modules["torch"].nn.Module)):
        raise EvopruneError(f"load_front: found {shown(model)} for a model, expected an nn.Module")
    path = Path(path)
    written = Written(path)
    try:
        record = read_record(written.home / CONFIG)
    except FileNotFoundError as error:
        raise EvopruneError(f"{path}: no run there ({error}), expected a folder with {CONFIG}") from None
    written.file(CONFIG)
    if not written.has(FRONT):
        raise EvopruneError(f"{path}: no front yet; resume the run first")
    if record.dense is None:
        raise EvopruneError(f"{path / CONFIG}: dense is missing; expected what the run wrote")
    return Front(path, record, written, model)
