"""What config.json holds, declared once: written when a run has been checked, read by whoever goes on or looks."""

from __future__ import annotations

import json
import types
import typing
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ..config import Config
from ..errors import EvopruneError, first_line
from ..masks.layout import Layer, Layout

LEAST_ONE = ("outputs", "channels", "weights", "batch_size", "threads", "search_batch_size")  # entries that count something


@dataclass(frozen=True)
class Dense:
    """What the model measured before pruning; None where there is no test split."""

    accuracy: float
    test_accuracy: float | None
    test_low: float | None
    test_high: float | None


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
    mean: list[float] | None  # of images in 0..1, a number a channel
    std: list[float] | None
    layout: list[dict[str, Any]]  # name, shape and unit of each searched layer
    weights: int  # prunable ones of the whole model
    batch_size: int  # of every number that is reported
    threads: int
    device: str  # as a person would call it
    versions: dict[str, Any]
    search_batch_size: int | None = None  # None, like `dense`: the dense model is still being trained
    dense: dict[str, Any] | None = None

    def to_json(self) -> str:
        """Return the content of config.json."""
        return json.dumps(asdict(self), indent=2) + "\n"

    @property
    def config(self) -> Config:
        """The settings; raises `EvopruneError` for one that cannot be."""
        return Config(**self.settings)

    @property
    def measured(self) -> Dense:
        """What the dense model measured."""
        return Dense(**(self.dense or {}))

    def layers(self) -> Layout:
        """Return the layout of the searched layers."""
        return Layout(tuple(Layer(each["name"], tuple(each["shape"]), each["unit"]) for each in self.layout), self.weights)


def read_record(path: Path) -> Record:
    """Return what a config.json holds.

    Raises:
        FileNotFoundError: there is none.
        EvopruneError: it is damaged: which entry, what was found, what was expected.
    """
    expected = "expected what the run wrote"
    try:
        content = json.loads(path.read_text())
        if not isinstance(content, dict):
            raise ValueError(f"found {type(content).__name__}, no object")
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise EvopruneError(f"{path}: {first_line(error)}; {expected}") from None
    hints = typing.get_type_hints(Record)
    for each in fields(Record):
        if each.name in content:
            check_entry(path, each.name, content[each.name], hints[each.name])
        elif each.default is MISSING:
            raise EvopruneError(f"{path}: {each.name} is missing; {expected}")
    try:
        record = Record(**{each.name: content[each.name] for each in fields(Record) if each.name in content})
        record.layers()
        if record.dense is not None:
            Dense(**record.dense)
        Config(**record.settings)
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise EvopruneError(f"{path}: {first_line(error)}; {expected}") from None
    except EvopruneError as error:
        raise EvopruneError(f"{path}: {error}") from None
    return record


def check_entry(path: Path, name: str, value: Any, hint: Any) -> None:
    """Raise `EvopruneError` unless an entry has its type, and its number is not too low."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    kinds = tuple(typing.get_origin(option) or option for option in options)
    wrong = not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds)
    low = name in LEAST_ONE
    if wrong or (low and value is not None and value < 1):
        names = " or ".join("null" if kind is type(None) else kind.__name__ for kind in kinds)
        least = " of at least 1" if low else ""
        raise EvopruneError(f"{path}: {name}: found {value!r:.60}, expected {names}{least}, as the run wrote it")
