"""What config.json holds, declared once: written when a run has been checked, read by whoever goes on or looks."""

from __future__ import annotations

import json
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

from ..config import Config
from ..errors import EvopruneError, first_line, shown
from ..masks.layout import UNUSED, Layer, Layout
from ..objectives import ACCURACY, SPARSITY, USUAL, Objective, Objectives, split_objectives
from .points import TESTED, Measured, column

Kind = TypeVar("Kind")
RETIRED = ("judge_images",)  # settings that runs of before have, and nothing of today's
LEAST_ONE = ("outputs", "channels", "weights", "batch_size", "threads", "search_batch_size")  # entries that count something


@dataclass(frozen=True)
class Record:
    """A run as it was started: every setting and all that its results depend on."""

    settings: dict[str, Any]
    command: str | None  # None: started from Python
    rebuildable: bool  # whether the model was named, not handed in
    named_data: bool
    outputs: int  # of the model
    channels: int  # of its inputs
    splits: dict[str, Any]  # images of train, search and test
    mean: tuple[float, ...] | None  # of images in 0..1, a number a channel
    std: tuple[float, ...] | None
    layout: tuple[Layer, ...]  # the searched layers
    weights: int  # prunable ones of the whole model
    batch_size: int  # of every number that is reported
    threads: int
    device: str  # as a person would call it
    versions: dict[str, Any]
    search_batch_size: int | None = None  # None, like `dense`: the dense model is still being trained
    dense: dict[str, Any] | None = None  # what the model measured before pruning, as columns of front.csv; see `dense_row`
    objectives: tuple[Objective, ...] = USUAL
    aliases: tuple[tuple[str, ...], ...] | None = None  # of each searched parameter that has several names; None: not recorded
    toolbox: str | None = None  # what made it: file, function, arguments; None: the default
    inputs: dict[str, Any] | list[Any] | None = None  # what an example is like, as `described`; None: not recorded
    left_out: dict[str, Any] | None = None  # names and sizes of parameters that are not searched, by the reason
    more_from: int | None = None  # points that the finished run had, to which --more-epochs adds; None: nothing was added
    searched: str | None = None  # the name of the search images, see `Split`; None: not recorded
    scaled: bool = False  # whether images came in bytes, which are divided by 255
    constant: float | None = None  # what the best answer scores that is the same for all search images; None: not known

    def to_json(self) -> str:
        """Return the content of config.json."""
        return json.dumps(asdict(self), indent=2) + "\n"

    @property
    def config(self) -> Config:
        """The settings; raises `EvopruneError` for one that cannot be."""
        return Config(**{name: value for name, value in self.settings.items() if name not in RETIRED})

    @property
    def optimised(self) -> Objectives:
        """The objectives of the run."""
        return Objectives(self.objectives)

    @property
    def measured(self) -> Measured:
        """What the dense model measured, once it has been, as a point."""
        assert self.dense is not None
        dense, objectives, all_kept = self.dense, self.optimised, (self.weights, self.weights)
        values = tuple(dense.get(o.name, o.worst) for o in objectives)
        test, low, high = (dense[column(part, objectives)] for part in TESTED)
        return Measured("dense", values, *all_kept, test, low, high, values[objectives.score], 0, "dense", "none", objectives)

    @property
    def chance(self) -> float | None:
        """What guessing scores: one answer for all, as recorded, or of an older run with classes a share of them."""
        if self.constant is not None or self.config.task not in (None, "classification") or self.outputs < 2:
            return self.constant
        return 1 / self.outputs

    @property
    def title(self) -> str:
        """The model and the data, short enough for the title of a picture."""
        data = self.config.data if self.named_data else "data handed in"
        return " on ".join(name if len(name) <= 32 else f"...{name[-29:]}" for name in (self.config.model, data))

    @property
    def normalised(self) -> str | None:
        """What is done to images before the model has them, in words, None where nothing is."""
        if self.mean is None or self.std is None:
            return "images in 0..1" if self.scaled else None
        mean, std = (", ".join(f"{value:g}" for value in values) for values in (self.mean, self.std))
        return f"images in 0..1, less a mean of {mean}, over a standard deviation of {std}"

    @property
    def unused(self) -> list[str]:
        """Parameters that the forward pass does not use: neither searched nor counted."""
        return [name for name, _ in (self.left_out or {}).get(UNUSED, ())]

    def layers(self) -> Layout:
        """Return the layout of the searched layers."""
        return Layout(self.layout, self.weights)


def dense_row(values: Sequence[float], tested: Sequence[float | None], objectives: Objectives) -> dict[str, float | None]:
    """Return what config.json says of the dense model: its `values`, and what was `tested`, as in `TESTED`, None where there is
    no test split."""
    return {**dict(zip(objectives.names, values)), **{column(part, objectives): value for part, value in zip(TESTED, tested)}}


def check_objectives(record: Record) -> None:
    """Raise `EvopruneError` unless the settings can be and the objectives are those that they name."""
    scores = [o.name for o in record.objectives if o.splits]
    wanted = [name.rpartition(":")[2] for name in split_objectives(record.config.objectives)]
    wanted = [scores[0] if name == ACCURACY.name and scores == ["score"] else name for name in wanted]
    if record.optimised.names != wanted or SPARSITY not in record.objectives or len(scores) != 1:
        found = ", ".join(record.optimised.names) or "none"
        raise EvopruneError(f"objectives: found {found}, expected {', '.join(wanted)} as the run wrote them")


def check_dense(record: Record) -> None:
    """Raise `EvopruneError` unless the dense model's entry has its numbers."""
    if record.dense is None:
        return
    objectives = record.optimised
    score = objectives[objectives.score]
    hints = {score.name: float, **{column(part, objectives): float | None for part in TESTED}}
    for name, hint in hints.items():
        if name not in record.dense:
            raise EvopruneError(f"dense.{name} is missing, expected what the run wrote")
        value = read(record.dense[name], hint, f"dense.{name}")
        if value is not None and not score.worst <= value <= score.best:
            raise EvopruneError(f"dense.{name}: found {value}, expected a number from {score.worst:g} to {score.best:g}")


JSON: dict[Any, str] = {type(None): "null", tuple: "list", dict: "object"}


def read_record(path: Path) -> Record:
    """Return what a config.json holds.

    Raises:
        FileNotFoundError: there is none.
        EvopruneError: it is damaged: which entry, what was found, what was expected.
    """
    return read_json(path, Record, check_record)


def check_record(record: Record) -> None:
    """Raise `EvopruneError` for entries that do not go together."""
    for name in LEAST_ONE:
        if (value := getattr(record, name)) is not None and value < 1:
            raise EvopruneError(f"{name}: found {value}, expected at least 1")
    if record.search_batch_size is None and record.dense is not None:
        raise EvopruneError("search_batch_size: found null, expected at least 1")
    counts = [record.splits.get(name) or 0 for name in ("train", "search", "test")]
    if any(type(count) is not int or count < 0 for count in counts) or not counts[1]:
        raise EvopruneError(f"splits: found {shown(record.splits)}, expected how many images train, search and test have")
    if not record.layout or record.layers().weights > record.weights:
        raise EvopruneError(f"layout: found {len(record.layout)} layers of {record.layers().weights} weights, expected some of "
                            f"{record.weights}")
    names = {layer.name for layer in record.layout}
    if odd := [each for each in record.aliases or () if len(each) < 2 or each[0] not in names]:
        raise EvopruneError(f"aliases: found {list(odd[0])}, expected a searched parameter and its other names")
    for reason, each in (record.left_out or {}).items():
        try:
            read(each, tuple[tuple[str | int, ...], ...], reason)
            if any([type(part) for part in pair] != [str, int] for pair in each):
                raise EvopruneError(f"{reason}: found {shown(each)}")
        except EvopruneError as error:
            raise EvopruneError(f"left_out: {error}; expected names and sizes") from None
    check_objectives(record)
    check_dense(record)
    score = record.optimised[record.optimised.score]
    if record.constant is not None and not score.worst <= record.constant <= score.best:
        raise EvopruneError(f"constant: found {record.constant}, expected a number from {score.worst:g} to {score.best:g}")


def read_json(path: Path, kind: type[Kind], check: Callable[[Kind], None] = lambda _: None) -> Kind:
    """Return what a JSON file holds, as a `kind` that `check` finds nothing wrong with.

    Raises:
        FileNotFoundError: there is none.
        EvopruneError: it is damaged: which entry, what was found, what was expected.
    """
    try:
        content = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileNotFoundError(f"no {path.name} in it") from error
    except OSError as error:
        raise EvopruneError(f"{path}: {error.strerror}; expected what the run wrote") from None
    except (ValueError, RecursionError) as error:
        raise EvopruneError(f"{path}: {first_line(error)}; expected what the run wrote") from None
    try:
        found: Kind = read(content, kind, "")
        check(found)
    except TypeError as error:
        raise EvopruneError(f"{path}: settings: {first_line(error)}; expected what the run wrote") from None
    except EvopruneError as error:
        raise EvopruneError(f"{path}: {error}") from None
    return found


def read(value: Any, hint: Any, name: str) -> Any:
    """Return a value from JSON as its type hint says: classes from objects, tuples from lists.

    Raises:
        EvopruneError: an entry cannot be: its name, what was found, what was expected.
    """
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    for kind in kinds:
        plain = typing.get_origin(kind) or kind
        if is_dataclass(kind) and isinstance(value, dict):
            hints, dot = typing.get_type_hints(kind), f"{name}." if name else ""
            for each in fields(kind):
                if each.name not in value and each.default is MISSING:
                    raise EvopruneError(f"{dot}{each.name} is missing, expected what the run wrote")
            known = {each.name for each in fields(kind)} & set(value)
            return plain(**{each: read(value[each], hints[each], dot + each) for each in hints if each in known})
        if plain is tuple and isinstance(value, list):
            return tuple(read(each, typing.get_args(kind)[0], f"{name}[{i}]") for i, each in enumerate(value))
        if type(value) is plain or (plain is float and type(value) is int):
            return value
    plain_kinds = [typing.get_origin(kind) or kind for kind in kinds]
    wanted = ["object" if is_dataclass(plain) else JSON.get(plain, plain.__name__) for plain in plain_kinds]
    raise EvopruneError(f"{name}{': ' if name else ''}found {shown(value)}, expected {' or '.join(wanted)}")
