"""The one list of a run's files, and how they are read back: only as they were written. done.json has a hash of each, and masks
are held against layers.csv. Nothing is unpickled and no code of theirs is run.
"""

from __future__ import annotations

import csv
import hashlib
import logging
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..errors import EvopruneError, shown, with_type
from ..files import load_safetensors, write_atomic
from ..masks.genome import Individual, is_mask, kept_genes
from ..masks.layout import Layout
from .points import LAYER_COLUMNS, Measured
from .record import read_json

if TYPE_CHECKING:
    from torch import Tensor

CONFIG, DENSE, LOG, FRONT, DOMINATED = "config.json", "dense.safetensors", "log.csv", "front.csv", "dominated.csv"
LAYERS, MASKS, MODELS, DONE = "layers.csv", "masks.npz", "models", "done.json"
FRONT_PLOT, LAYERS_PLOT, PROGRESS_PLOT = "front.png", "layers.png", "progress.png"
REPORT, RIGHT = "report.html", "right.npz"
TEST_SPLIT = "test"  # in right.npz, beside the ids: what the test images are
VIEWS = (FRONT_PLOT, LAYERS_PLOT, PROGRESS_PLOT, REPORT)  # what is there to look at, made from the others
FILES = (DONE, DENSE, LOG, FRONT, DOMINATED, LAYERS, MASKS, RIGHT, *VIEWS, MODELS,
         CONFIG)  # of a run, beside checkpoint/; cleared in this order
CHECKPOINT, LOCK, TRAINED, STAGE_VALUES = "checkpoint", "lock", "trained", "values.safetensors"  # all but the first are in it
SECONDS = "seconds"  # likewise: what the run has taken so far
REPLACED, GONE = "replaced", "gone"  # likewise: a run that a new one may replace, and one that it has replaced
NOTE_EVERY = 60.0  # seconds, at least, from one note of a stopwatch to the next
log = logging.getLogger("evoprune")


def model_file(id: str) -> str:
    """Return where the values of a point lie."""
    return f"{MODELS}/{id}.safetensors"


def home_of(path: Path) -> Path:
    """Return where the run of a folder lies: set aside, as long as a new one has nothing to put in its place."""
    aside = path / CHECKPOINT / REPLACED
    return aside if os.path.exists(aside / CONFIG) else path  # of any text, Path.exists raises for some


@dataclass(frozen=True)
class Done:
    """What done.json says."""

    generations: int
    files: dict[str, Any] | None = None  # the SHA-256 of each file of the run by its name; None: of an older evoprune


def read_done(home: Path) -> Done | None:
    """Return what done.json says, None where there is none; raise `EvopruneError` where it is damaged."""
    try:
        return read_json(home / DONE, Done)
    except FileNotFoundError:
        return None


class Stopwatch:
    """How long a run takes by the clock, in all its parts: what a stopped one had taken is in a file of it, from which one that
    is `resuming` goes on. Of a killed one a minute or so may be missing, or all since something was kept."""

    def __init__(self, path: Path, resuming: bool):
        self.file, self.resuming = path / CHECKPOINT / SECONDS, resuming
        self.began = self.noted = monotonic()

    @cached_property
    def earlier(self) -> float:
        """The seconds before this process, 0 where nothing says them."""
        try:
            found = float(self.file.read_text()) if self.resuming else 0.0
        except (OSError, ValueError):
            return 0.0
        return found if 0 <= found < math.inf else 0.0

    @property
    def seconds(self) -> float:
        """What the run has taken so far."""
        return round(self.earlier + monotonic() - self.began, 1)

    def note(self, every: float = 0.0) -> None:
        """Keep that, if the last note is so many seconds old."""
        if monotonic() >= self.noted + every:
            write_atomic(self.file, f"{self.seconds}\n")
            self.noted = monotonic()


def hashes(home: Path) -> dict[str, str]:
    """Return the SHA-256 of each file of a run but done.json, by its name."""
    names = [*(name for name in FILES if name not in (DONE, MODELS)), *(f"{MODELS}/{p.name}" for p in (home / MODELS).glob("*"))]
    return {name: sha256(home / name) for name in sorted(names) if (home / name).exists()}


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def free_file(what: str, name: Any, suffixes: Sequence[str], overwrite: bool) -> Path:
    """Return the path of a new file of a user's, whose name ends in one of `suffixes`; `what` it is for.

    Raises:
        EvopruneError: it cannot be, is there already, or is one of a run's.
    """
    if not isinstance(name, (str, Path)) or not str(name) or "\0" in str(name):
        raise EvopruneError(f"{what}: found {shown(name)}, expected the name of a file that ends in {', '.join(suffixes)}")
    path = Path(name)
    if not path.name.lower().endswith(tuple(suffixes)):
        raise EvopruneError(f"{what}: found {shown(path.name)}, expected a name that ends in {', '.join(suffixes)}")
    try:
        if path.is_dir() or (os.path.lexists(path) and not overwrite):
            raise EvopruneError(f"{path}: is there already; expected another name, or overwrite=True for a file")
    except OSError as error:
        raise EvopruneError(f"{path}: {error.strerror}; expected another name") from None
    if not path.parent.is_dir():
        raise EvopruneError(f"{path}: no folder {path.parent}, expected one that is there")
    folder = path.resolve().parent
    home = folder.parent if folder.name in (MODELS, CHECKPOINT) else folder
    if (home / CONFIG).exists() and (home != folder or path.name in FILES):
        raise EvopruneError(f"{path}: is one of a run's own files; expected another name")
    return path


def write_file(path: Path, content: bytes | str) -> None:
    """Write a user's file, whole or not at all; raise `EvopruneError` where that cannot be."""
    try:
        write_atomic(path, content, path.with_name(f"{path.name}.{os.getpid()}.part"))
    except OSError as error:
        raise EvopruneError(f"{path}: {error.strerror}; nothing is written") from None


@dataclass(frozen=True)
class Right:
    """What right.npz says: which test images a run had, and what each contributes to each point, (images, k): 1 or 0 where
    answers are right or wrong, otherwise what the task sums."""

    split: str
    points: dict[str, npt.NDArray[Any]]


class Written:
    """The files of a run, checked as they are read; of one that has not finished, or of an older evoprune, as far as can be."""

    def __init__(self, path: Path):
        self.home = home_of(path)
        done = read_done(self.home)
        self.finished, self.hashes = done is not None, None if done is None else done.files
        self.right: set[str] = set()  # of the files: compared with their hash
        if self.finished and self.hashes is None:
            log.warning("%s: written by an older evoprune, without hashes: nothing in it can be checked", path)

    def has(self, name: str) -> bool:
        """Return whether the run wrote such a file."""
        return (self.home / name).exists() if self.hashes is None else name in self.hashes

    def file(self, name: str) -> Path:
        """Return the path of a file.

        Raises:
            EvopruneError: it is missing, or not as the run wrote it.
        """
        path = self.home / name
        try:
            if self.hashes is None or name in self.right:
                path.stat()
            elif sha256(path) != self.hashes.get(name):
                raise EvopruneError(f"{path}: damaged or changed since the run wrote it (its SHA-256 is not that in {DONE}); "
                                    f"take a copy that is whole")
        except OSError as error:
            raise EvopruneError(f"{path}: {error.strerror}; expected the file that the run wrote") from None
        self.right.add(name)
        return path

    def rows(self, name: str, columns: Sequence[str]) -> list[dict[str, str]]:
        """Return the rows of a table that has at least these columns."""
        path = self.file(name)
        try:
            with open(path, newline="") as file:
                table = csv.DictReader(file)
                if missing := [column for column in columns if column not in (table.fieldnames or ())]:
                    raise ValueError(f"no column {missing[0]}")
                return list(table)
        except (OSError, ValueError, csv.Error) as error:
            raise self.damaged(name, error) from None

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Return the tensors of a .safetensors file."""
        path = self.file(name)
        try:
            return load_safetensors(path)
        except Exception as error:  # noqa: BLE001  # the library has exceptions of its own
            raise self.damaged(name, error) from None

    def individual(self, id: str, layout: Layout) -> Individual:
        """Return the mask of a point, held against layers.csv."""
        path, rows = self.file(MASKS), self.rows(LAYERS, LAYER_COLUMNS)
        try:
            with np.load(path, allow_pickle=False) as file:
                found = Individual(file[f"{id}/{layer.name}"] for layer in layout)
        except Exception as error:  # noqa: BLE001  # zipfile, zlib and numpy raise some ten kinds
            raise self.damaged(MASKS, error) from None
        kept = {row.get("layer"): row.get("kept") for row in rows if row.get("id") == id}
        for bits, layer in zip(found, layout):
            if not is_mask(bits, layer) or str(kept_genes(bits) * layer.weights_a_gene) != kept.get(layer.name):
                raise EvopruneError(f"{self.home / MASKS}: damaged ({id}/{layer.name} is not the mask that {LAYERS} counts); "
                                    f"take a copy that is whole")
        return found

    def per_image(self, points: Sequence[Measured], images: int) -> Right | None:
        """Return what each of so many test images contributes to each point, None where an older run has not kept it.

        Raises:
            EvopruneError: the file is damaged, or says something else than the points.
        """
        if not self.has(RIGHT):
            return None
        try:
            with np.load(self.file(RIGHT), allow_pickle=False) as file:
                split, found = str(file[TEST_SPLIT]), {point.id: file[point.id] for point in points}
            for point in points:
                each = found[point.id]
                if each.dtype == np.uint8 and each.shape == ((images + 7) // 8,):
                    found[point.id] = each = np.unpackbits(each, count=images)[:, None]
                    if point.test is None or abs(int(each.sum()) - point.test * images) > 1e-6 * images:
                        raise ValueError(f"{point.id} has other right answers than {FRONT}")
                elif each.ndim != 2 or len(each) != images or each.dtype.kind not in "iuf":
                    raise ValueError(f"{point.id} is no array of {images} images")
        except EvopruneError:
            raise
        except Exception as error:  # noqa: BLE001  # zipfile, zlib and numpy raise some ten kinds
            raise self.damaged(RIGHT, error) from None
        return Right(split, found)

    def damaged(self, name: str, error: Exception) -> EvopruneError:
        """Return what to raise for a file that cannot be read."""
        return EvopruneError(f"{self.home / name}: damaged ({with_type(error)}); expected what the run wrote")
