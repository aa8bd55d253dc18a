"""What a search has measured and logged: it only grows at its end, so states share it, and none copies it.

A `Seen` or a `Log` is what one state knows: so many entries of a store that later states go on writing to. Whoever goes on from
an older state gets a store of its own. Entries come in segments of `SEGMENT`, which checkpoints write once each.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from .selection import Values

SEGMENT = 4096  # entries that a checkpoint writes together, once
NEWEST = 200_000  # masks that are remembered
KEY = 16  # bytes of `Individual.key()`
COLUMNS = ("generation", "evaluations", "epochs", "seconds", "hvlog", "points")  # that every log has


@dataclass
class SeenStore:
    """The store behind `Seen`: the newest masks and their values, oldest first, from entry `first` on."""

    entries: dict[bytes, tuple[int, Values]] = field(default_factory=dict)
    order: list[bytes] = field(default_factory=list)
    first: int = 0
    hashes: dict[int, str] = field(default_factory=dict)  # of whole segments, by number; checkpoints fill it

    @property
    def end(self) -> int:
        return self.first + len(self.order)

    def append(self, key: bytes, values: Values) -> None:
        """Add an entry."""
        self.entries[key] = self.end, values
        self.order.append(key)

    def copy(self, end: int) -> SeenStore:
        """Return a store of its own that ends before the entry `end`."""
        found = SeenStore(first=self.first)
        for key in self.order[:end - self.first]:
            found.append(key, self.entries[key][1])
        return found

    def forget(self, first: int) -> None:
        """Drop the entries before `first`."""
        for place, key in enumerate(self.order[:max(0, first - self.first)], self.first):
            if self.entries[key][0] == place:  # not measured again since
                del self.entries[key]
        del self.order[:max(0, first - self.first)]
        self.first = max(self.first, first)


class Seen(Mapping[bytes, Values]):
    """The values of the objectives of the `NEWEST` masks measured, by `Individual.key()`; `count` is how many there were."""

    def __init__(self, store: SeenStore | None = None, count: int | None = None):
        self.store = SeenStore() if store is None else store
        self.count = self.store.end if count is None else count

    @property
    def first(self) -> int:
        """The oldest entry that is remembered."""
        return max(0, self.count - NEWEST)

    def __getitem__(self, key: bytes) -> Values:
        place, values = self.store.entries[key]
        if not self.first <= place < self.count:
            raise KeyError(key)
        return values

    def __iter__(self) -> Iterator[bytes]:
        return (key for key, (place, _) in self.store.entries.items() if self.first <= place < self.count)

    def __len__(self) -> int:
        return self.count - self.first

    def and_then(self, more: Mapping[bytes, Values]) -> Seen:
        """Return what is known once these masks have been measured too; one measured before keeps its place and values.

        Of older states, only this one is whole after that: it may have to be saved yet.
        """
        store = self.store
        if store.end != self.count:
            store = store.copy(self.count)
        else:
            store.forget(self.first // SEGMENT * SEGMENT)
        for key, values in more.items():
            if key not in self:
                store.append(key, values)
        return Seen(store)

    def part(self, start: int, end: int) -> npt.NDArray[np.uint8]:
        """Return entries as bytes, (entries, 16 + 8 a value): a key, then its values as float64."""
        assert start >= self.store.first
        keys = self.store.order[start - self.store.first:end - self.store.first]
        values = np.array([self.store.entries[key][1] for key in keys], np.float64).reshape(len(keys), -1 if keys else 0)
        return np.concatenate([np.frombuffer(b"".join(keys), np.uint8).reshape(len(keys), KEY), values.view(np.uint8)], axis=1)


def read_seen(content: npt.NDArray[np.uint8], count: int, objectives: int) -> SeenStore:
    """Return a store of what `Seen.part` took out: all that is remembered of `count` masks, from the start of a segment on.

    Raises:
        ValueError: it is not as many, or no such entries.
    """
    first = max(0, count - NEWEST) // SEGMENT * SEGMENT
    if content.shape != (count - first, KEY + 8 * objectives if len(content) else KEY):
        raise ValueError(f"found masks of shape {content.shape}, of {count} that were measured")
    store = SeenStore(first=first)
    values = np.ascontiguousarray(content[:, KEY:]).view(np.float64)
    if not np.isfinite(values).all():
        raise ValueError("found masks without objectives")
    for row, found in zip(content, values.tolist()):
        store.append(row[:KEY].tobytes(), tuple(found))
    return store


@dataclass
class LogStore:
    """The store behind `Log`: the numbers of all rows one after another, and which of them are whole."""

    columns: tuple[str, ...] = ()
    numbers: array[float] = field(default_factory=lambda: array("d"))
    whole: array[int] = field(default_factory=lambda: array("b"))
    hashes: dict[int, str] = field(default_factory=dict)  # of whole segments, by number; checkpoints fill it


class Log(Sequence[dict[str, float]]):
    """A row a generation."""

    def __init__(self, store: LogStore | None = None, rows: int | None = None):
        self.store = LogStore() if store is None else store
        self.width = len(self.store.columns)
        self.rows = len(self.store.numbers) // max(1, self.width) if rows is None else rows

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, i: Any) -> Any:  # int or slice, as Sequence
        if isinstance(i, slice):
            return [self[k] for k in range(*i.indices(self.rows))]
        if not -self.rows <= i < self.rows:
            raise IndexError(i)
        start = i % self.rows * self.width
        numbers, whole = (part[start:start + self.width] for part in (self.store.numbers, self.store.whole))
        return {name: int(x) if is_whole else x for name, x, is_whole in zip(self.store.columns, numbers, whole)}

    def and_then(self, row: Mapping[str, float]) -> Log:
        """Return the log with one more row."""
        store, end = self.store, self.rows * self.width
        if len(store.numbers) != end:
            store = LogStore(store.columns, store.numbers[:end], store.whole[:end])
        store.columns = store.columns or tuple(row)
        store.numbers.extend(row[name] for name in store.columns)
        store.whole.extend(isinstance(row[name], int) for name in store.columns)
        return Log(store)

    def part(self, start: int, end: int) -> npt.NDArray[np.uint8]:
        """Return rows as bytes, (rows, 9 a number): their numbers as float64, then which are whole."""
        numbers, whole = (np.frombuffer(part, kind)[start * self.width:end * self.width].reshape(end - start, self.width)
                          for part, kind in ((self.store.numbers, np.float64), (self.store.whole, np.uint8)))
        return np.concatenate([np.ascontiguousarray(numbers).view(np.uint8), whole], axis=1)


def read_log(content: npt.NDArray[np.uint8], columns: Sequence[str]) -> LogStore:
    """Return a store of what `Log.part` took out, from the first row on.

    Raises:
        ValueError: it is no such log.
    """
    width = len(columns)
    if not set(COLUMNS) <= set(columns) or content.shape[1] != 9 * width:
        raise ValueError(f"found a log of shape {content.shape} and the columns {columns}")
    numbers = np.ascontiguousarray(content[:, :8 * width])
    whole = np.ascontiguousarray(content[:, 8 * width:])
    if not np.isfinite(numbers.view(np.float64)).all() or whole.max() > 1:
        raise ValueError("found a log without numbers")
    return LogStore(tuple(columns), array("d", numbers.tobytes()), array("b", whole.tobytes()))
