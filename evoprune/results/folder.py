"""The folder that a run owns: its lock, the run that it replaces, what is kept for --resume, and how its results are written."""

from __future__ import annotations

import fcntl
import io
import json
import logging
import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import EvopruneError, Stopped
from ..files import piece_of, read_kept, remove, to_safetensors, uninterrupted, write_atomic, write_kept
from ..masks.layout import Layout
from . import written
from .points import LAYER_COLUMNS, Measured, Pruned, layer_rows, points_csv, table_csv, undominated
from .record import Record, read_record
from .written import Stopwatch, hashes, home_of, model_file, read_done

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger("evoprune")


class Folder:
    """The folder of one run, locked while it is open.

    A run that it holds is set aside for a new one, and comes back, however that ends, unless the new one has `started`: has
    something to put in its place. A new one that was refused before that leaves no trace.

    Raises:
        EvopruneError: it is in use, holds a run or anything else, or (to resume) holds no run.
    """

    def __init__(self, path: Path, resume: bool = False, overwrite: bool = False):
        self.path, self.checkpoint, self.resuming, self.overwrite = path, path / written.CHECKPOINT, resume, overwrite
        self.replaced, self.gone = self.checkpoint / written.REPLACED, self.checkpoint / written.GONE
        self.kept = resume  # whether it has something of the run that goes on in it
        self.config: str | None = None  # of a resumed run, written when that has gone on
        self.watch = Stopwatch(path, resume)
        self.check()

    def check(self) -> None:
        """Raise `EvopruneError` unless the folder is one for this run."""
        path = self.path
        self.holds_run = os.path.exists(home_of(path) / written.CONFIG) and (  # Path.exists raises for names that cannot be
            self.resuming or is_runs(path))
        if self.resuming and not self.holds_run:
            raise EvopruneError(f"{path}: no run to resume (no {written.CONFIG} in it), expected the folder of a run")
        there = os.path.exists(path)
        if there and not path.is_dir():
            raise EvopruneError(f"{path}: is a file, expected a folder for the run")
        if self.holds_run and not (self.resuming or self.overwrite):
            raise EvopruneError(f"{path}: already holds a run; go on with --resume {path}, replace it with --overwrite, "
                                f"or choose another --out")
        if not self.holds_run and there and not is_free(path):
            raise EvopruneError(f"{path}: holds other files and no run, expected a new or an empty folder")

    def __enter__(self) -> Folder:
        self.new = not os.path.exists(self.path)
        while not self.locked():
            pass
        try:
            self.put_back()  # what a killed process had set aside
            self.check()
        except BaseException:
            self.lock.close()
            raise
        return self

    def locked(self) -> bool:
        """Take the lock; return False if whoever had it has removed the folder meanwhile."""
        self.checkpoint.mkdir(parents=True, exist_ok=True)
        self.lock = open(self.checkpoint / written.LOCK, "w")  # noqa: SIM115  # the kernel lets go of it however this process ends
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.lock.close()
            raise EvopruneError(f"{self.path}: in use by another process; wait for it, or choose another --out") from None
        path = self.checkpoint / written.LOCK
        if path.exists() and os.path.samestat(os.fstat(self.lock.fileno()), path.stat()):
            return True
        self.lock.close()
        return False

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if not self.kept and self.holds_run:
                self.put_back()
            elif not self.kept and error is not None and not isinstance(error, (Stopped, KeyboardInterrupt)):
                self.clear()
            self.kept = self.kept or (not self.holds_run and (self.path / written.CONFIG).exists())
            refused = error is not None and not isinstance(error, (Stopped, KeyboardInterrupt))
            if self.kept and not refused and not self.intact():
                with suppress(OSError):  # a full disk, which has been told
                    self.watch.note()
            if not (self.path / written.CONFIG).exists():  # nothing was begun: leave no trace
                shutil.rmtree(self.path if self.new else self.checkpoint, ignore_errors=True)
        finally:
            self.lock.close()  # last, so that no other process takes a folder that goes away

    def clear(self) -> None:
        """Remove the files of a run, and only those."""
        for name in [*self.kept_for_resume(), *(name + end for name in written.FILES for end in (".part", ""))]:
            remove(self.path / name)

    def kept_for_resume(self) -> list[str]:
        """Return what lies in checkpoint/ and is the run's."""
        others = (written.LOCK, written.REPLACED, written.GONE)
        return [f"{written.CHECKPOINT}/{each.name}" for each in self.checkpoint.iterdir() if each.name not in others]

    def set_aside(self) -> None:
        """Put the run that the folder holds where `put_back` finds it; config.json last: until it is there, nothing was done."""
        if not self.holds_run:
            self.clear()
            return
        (self.replaced / written.CHECKPOINT).mkdir(parents=True)
        move([*self.kept_for_resume(), *written.FILES], self.path, self.replaced)

    def put_back(self) -> None:
        """Put back what was set aside, in place of what a new run had begun; config.json first: once it is back, that is gone."""
        remove(self.gone)
        if not self.replaced.exists():
            return
        if (self.replaced / written.CONFIG).exists():
            self.clear()
        checkpoint = [f"{written.CHECKPOINT}/{each.name}" for each in (self.replaced / written.CHECKPOINT).iterdir()]
        move([*reversed(written.FILES), *checkpoint], self.replaced, self.path)
        remove(self.replaced)

    def intact(self) -> bool:
        """Say whether this is a finished run that has been resumed and has not gone on."""
        return self.config is not None and (self.path / written.DONE).exists()

    def started(self) -> None:
        """Let go of what the run replaces, or of the end that a resumed one had: it has something new."""
        if self.config is not None:
            self.remove(written.DONE)
            self.write(written.CONFIG, self.config)
            self.config = None
        if not self.kept:
            self.kept = True
            if self.replaced.exists():
                self.replaced.rename(self.gone)
                remove(self.gone)
        self.watch.note(written.NOTE_EVERY)

    def write(self, name: str, content: bytes | str) -> None:
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, content)

    def remove(self, name: str) -> None:
        remove(self.path / name)

    def write_trained(self, key: str, label: str, state: dict[str, Tensor]) -> None:
        """Keep the values of one trained mask until the run is done, so that a resumed run need not train it again."""
        write_kept(self.trained(key), label, state)
        remove(piece_of(self.trained(key)))
        self.started()

    def read_trained(self, key: str, label: str) -> dict[str, Tensor] | None:
        """Return what `write_trained` kept under this label, None if there is nothing whole."""
        return read_kept(self.trained(key), label)

    def later(self, key: str, label: str) -> Callable[[], dict[str, Tensor]] | None:
        """Return what reads that again, None if there is nothing whole."""
        return None if self.read_trained(key, label) is None else partial(self.read_again, key, label)

    def read_again(self, key: str, label: str) -> dict[str, Tensor]:
        """Return what was there.

        Raises:
            EvopruneError: it has gone, or was damaged meanwhile.
        """
        if (found := self.read_trained(key, label)) is None:
            raise EvopruneError(f"{self.trained(key)}: gone or damaged since it was written; go on with --resume {self.path}")
        return found

    def trained(self, key: str) -> Path:
        """Return where `write_trained` keeps."""
        return self.checkpoint / written.TRAINED / key

    def forget_trained(self) -> None:
        """Remove what `write_trained` kept, as far as that can be."""
        shutil.rmtree(self.checkpoint / written.TRAINED, ignore_errors=True)

    def read_record(self) -> Record:
        """Return what config.json holds."""
        return read_record(self.path / written.CONFIG)

    def finished(self, generations: int) -> bool:
        """Say whether the folder holds a finished run of so many generations."""
        done = read_done(self.path)
        return done is not None and done.generations == generations

    def write_done(self, **facts: Any) -> None:
        """Say that the run has finished: the last file of all."""
        self.started()
        facts = {"stopped": "finished", **facts, "seconds": self.watch.seconds, "files": hashes(self.path)}
        self.write(written.DONE, json.dumps(facts, indent=2) + "\n")
        self.forget_trained()


def move(names: Sequence[str], source: Path, target: Path) -> None:
    """Move those of the files and folders that are there, in order."""
    for name in names:
        if os.path.lexists(source / name):
            (source / name).rename(target / name)


def is_runs(path: Path) -> bool:
    """Say whether a folder that has a config.json is a run's: others have a file of that name too."""
    if (path / written.CHECKPOINT / written.LOCK).exists():
        return True
    try:
        read_record(home_of(path) / written.CONFIG)
    except (OSError, EvopruneError):
        return False
    return True


def is_free(path: Path) -> bool:
    """Say whether a folder without a run is empty, but for what a run leaves that was killed as it began: its lock, and files of
    its own. Without the lock they are somebody else's."""
    there = {each.name for each in path.iterdir()}
    if (path / written.CHECKPOINT / written.LOCK).exists():
        return there <= {written.CHECKPOINT, *written.FILES, *(f"{name}.part" for name in written.FILES)}
    return not there or (there == {written.CHECKPOINT} and not os.listdir(path / written.CHECKPOINT))


def read_to_resume(path: Path) -> Record:
    """Return what config.json of a run to be resumed holds.

    Raises:
        EvopruneError: there is none, or it is damaged.
    """
    try:
        return read_record(home_of(path) / written.CONFIG)
    except FileNotFoundError as error:
        raise EvopruneError(f"{path}: no run to resume ({error}), expected the folder of a run") from None


def write_run(folder: Folder, points: Sequence[Pruned], rows: Sequence[dict[str, float]], layout: Layout,
              dense: Measured, floor: float = 0.0, more: bool = False) -> None:  # 7 arguments: all that a run found, and how
    """Write everything but config.json, dense.safetensors, done.json and what is there to look at (`views.pictures`); front.csv
    last, so that it never stands beside masks or models of another front. `rows` are those of the log.

    Points that another dominates, or that are below the floor (training can do both), go to dominated.csv. Where these are `more`
    points of a finished run, nothing is removed, for nobody could make it again.
    """
    folder.started()
    front = undominated(points, floor)
    kept = {p.measured.id for p in front}
    dominated = [p for p in points if p.measured.id not in kept]
    for name in () if more else (written.FRONT, written.MODELS, written.RIGHT, *written.VIEWS):
        folder.remove(name)
    for p in points:
        if p.has_state:
            folder.write(model_file(p.measured.id), to_safetensors(p.state))
    folder.write(written.MASKS, masks_npz(points, layout))
    folder.write(written.LAYERS, table_csv([row for p in points for row in layer_rows(p, layout)], LAYER_COLUMNS))
    folder.write(written.LOG, table_csv(rows, tuple(rows[0])))
    if dominated:
        folder.write(written.DOMINATED, points_csv(dominated, dense.objectives))
    else:
        folder.remove(written.DOMINATED)
    folder.write(written.FRONT, points_csv(front, dense.objectives))


def write_right(folder: Folder, points: Sequence[Pruned], split: str) -> None:
    """Write which test images each point has right, and which images these are, so that runs can be compared image by image."""
    named: dict[str, Any] = {p.measured.id: p.right for p in points if p.right is not None}
    folder.write(written.RIGHT, npz({**named, written.TEST_SPLIT: np.array(split)}))


def masks_npz(points: Sequence[Pruned], layout: Layout) -> bytes:
    """Return `ID/LAYER` -> packed bits."""
    return npz({f"{p.measured.id}/{layer.name}": bits for p in points for layer, bits in zip(layout, p.individual)})


def npz(named: dict[str, Any]) -> bytes:
    """Return arrays by name, the same bytes for the same arrays."""
    buffer = io.BytesIO()
    with uninterrupted():
        np.savez_compressed(buffer, **named)
    return buffer.getvalue()
