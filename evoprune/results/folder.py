"""The folder that a run owns: the one list of its files, its lock, what is kept for --resume, and how its results are written."""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import EvopruneError, first_line
from ..files import from_safetensors, metadata_of, remove, to_safetensors, uninterrupted, write_atomic
from ..masks.layout import Layout
from .plots import plot_front, plot_layers, plot_progress
from .points import LAYER_COLUMNS, Measured, Pruned, layer_rows, points_csv, table_csv, undominated
from .record import Record, read_record

if TYPE_CHECKING:
    from torch import Tensor

CONFIG, DENSE, LOG, FRONT, DOMINATED = "config.json", "dense.safetensors", "log.csv", "front.csv", "dominated.csv"
LAYERS, MASKS, MODELS, DONE = "layers.csv", "masks.npz", "models", "done.json"
FRONT_PLOT, LAYERS_PLOT, PROGRESS_PLOT = "front.png", "layers.png", "progress.png"
FILES = (DONE, DENSE, LOG, FRONT, DOMINATED, LAYERS, MASKS, FRONT_PLOT, LAYERS_PLOT, PROGRESS_PLOT, MODELS,
         CONFIG)  # of a run, beside checkpoint/; cleared in this order
CHECKPOINT, LOCK, TRAINED, STAGE_VALUES = "checkpoint", "lock", "trained", "values.safetensors"
LABEL = "evoprune"  # in the metadata of a kept file: what it belongs to
log = logging.getLogger("evoprune")


def model_file(id: str) -> str:
    """Return where the values of a point lie."""
    return f"{MODELS}/{id}.safetensors"


class Folder:
    """The folder of one run, locked while it is open.

    Raises:
        EvopruneError: it is in use, holds a run or anything else, or (to resume) holds no run.
    """

    def __init__(self, path: Path, resume: bool = False, overwrite: bool = False):
        self.path, self.checkpoint, self.resuming = path, path / CHECKPOINT, resume
        self.holds_run = holds_run = (path / CONFIG).exists()
        if resume and not holds_run:
            raise EvopruneError(f"{path}: no run to resume (no {CONFIG} in it), expected the folder of a run")
        if path.exists() and not path.is_dir():
            raise EvopruneError(f"{path}: is a file, expected a folder for the run")
        if holds_run and not (resume or overwrite):
            raise EvopruneError(f"{path}: already holds a run; go on with --resume {path}, replace it with --overwrite, "
                                f"or choose another --out")
        own = {CHECKPOINT, *FILES, *(f"{name}.part" for name in FILES)}
        if not holds_run and path.exists() and {p.name for p in path.iterdir()} - own:
            raise EvopruneError(f"{path}: holds other files and no run, expected a new or an empty folder")

    def __enter__(self) -> Folder:
        self.new = not self.path.exists()
        self.checkpoint.mkdir(parents=True, exist_ok=True)
        self.lock = open(self.checkpoint / LOCK, "w")  # the kernel lets go of it however this process ends
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.lock.close()
            raise EvopruneError(f"{self.path}: in use by another process; wait for it, or choose another --out") from None
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        started = (self.path / CONFIG).exists()
        self.lock.close()
        if not started:  # nothing was written: leave no trace
            shutil.rmtree(self.path if self.new else self.checkpoint, ignore_errors=True)

    def clear(self) -> None:
        """Remove the files of an earlier run, and only those; call it when everything new has been checked."""
        names = [name + end for name in FILES for end in (".part", "")]
        for old in [self.path / name for name in names] + [f for f in self.checkpoint.iterdir() if f.name != LOCK]:
            remove(old)

    def write(self, name: str, content: bytes | str) -> None:
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, content)

    def remove(self, name: str) -> None:
        remove(self.path / name)

    def write_trained(self, key: str, label: str, state: dict[str, Tensor]) -> None:
        """Keep the values of one trained mask until the run is done, so that a resumed run need not train it again."""
        content = to_safetensors(state, {LABEL: label})
        (self.checkpoint / TRAINED).mkdir(exist_ok=True)
        write_atomic(self.checkpoint / TRAINED / key, hashlib.sha256(content).digest() + content)

    def read_trained(self, key: str, label: str) -> dict[str, Tensor] | None:
        """Return what `write_trained` kept under this label, None if there is nothing whole."""
        path = self.checkpoint / TRAINED / key
        if not path.exists():
            return None
        content = path.read_bytes()
        if hashlib.sha256(content[32:]).digest() != content[:32] or metadata_of(content[32:]).get(LABEL) != label:
            log.warning("%s: damaged or of another run, training that point again", path)
            return None
        return from_safetensors(content[32:])

    def forget_trained(self) -> None:
        """Remove what `write_trained` kept, as far as that can be."""
        shutil.rmtree(self.checkpoint / TRAINED, ignore_errors=True)

    def read_record(self) -> Record:
        """Return what config.json holds."""
        return read_record(self.path / CONFIG)

    def finished(self, generations: int) -> bool:
        """Say whether the folder holds a finished run of so many generations."""
        return (self.path / DONE).exists() and self.read_json(DONE).get("generations") == generations

    def write_done(self, **facts: Any) -> None:
        """Say that the run has finished: the last file of all."""
        self.write(DONE, json.dumps({"stopped": "finished", **facts}, indent=2) + "\n")
        self.forget_trained()

    def read_json(self, name: str) -> Any:
        """Return the content of a JSON file."""
        try:
            return json.loads((self.path / name).read_text())
        except (OSError, ValueError) as error:
            raise EvopruneError(f"{self.path / name}: {first_line(error)}; expected the JSON that the run wrote") from None


def write_run(folder: Folder, points: Sequence[Pruned], rows: Sequence[dict[str, float]], layout: Layout,
              dense: Measured, floor: float = 0.0) -> None:  # 6 arguments: all that a run found
    """Write everything but config.json, dense.safetensors and done.json; front.csv last, so that it never stands beside
    masks or models of another front. `rows` are those of the log.

    Points that another dominates, or that are below the floor (training can do both), go to dominated.csv.
    """
    front = undominated(points, floor)
    kept = {p.measured.id for p in front}
    dominated = [p for p in points if p.measured.id not in kept]
    folder.remove(FRONT)
    folder.remove(MODELS)
    for p in points:
        if p.state is not None:
            folder.write(model_file(p.measured.id), to_safetensors(p.state))
    folder.write(MASKS, masks_npz(points, layout))
    folder.write(LAYERS, table_csv([row for p in points for row in layer_rows(p, layout)], LAYER_COLUMNS))
    folder.write(LOG, table_csv(rows, tuple(rows[0])))
    if dominated:
        folder.write(DOMINATED, points_csv(dominated, dense.objectives))
    else:
        folder.remove(DOMINATED)
    if front:
        folder.write(FRONT_PLOT, plot_front([p.measured for p in front], dense.score))
        folder.write(LAYERS_PLOT, plot_layers(front, layout))
    folder.write(PROGRESS_PLOT, plot_progress(rows, dense.objectives))
    folder.write(FRONT, points_csv(front, dense.objectives))


def masks_npz(points: Sequence[Pruned], layout: Layout) -> bytes:
    """Return `ID/LAYER` -> packed bits, the same bytes for the same masks."""
    buffer = io.BytesIO()
    named: dict[str, Any] = {f"{p.measured.id}/{layer.name}": bits
                             for p in points for layer, bits in zip(layout, p.individual)}
    with uninterrupted():
        np.savez_compressed(buffer, **named)
    return buffer.getvalue()
