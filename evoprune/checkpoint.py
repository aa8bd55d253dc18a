"""A state in one atomic, verified file, and back exactly; and the folder that a run owns.

A checkpoint is MAGIC, the SHA-256 of the rest, and an .npz of plain arrays; the text in it is JSON. Nothing is pickled.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import logging
import math
import os
import shutil
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from .config import EvopruneError, first_line
from .evolution import State
from .genome import Individual
from .layers import Layout

MAGIC = b"evoprune checkpoint 2\n"
KEPT = 2  # generations
FILES = ("done.json", "dense.safetensors", "log.csv", "front.csv", "dominated.csv", "layers.csv", "masks.npz", "front.png",
         "layers.png", "progress.png", "models", "config.json")  # of a run, beside checkpoint/; cleared in this order
Pool = dict[int, tuple[int, npt.NDArray[Any]]]  # by id: place, array
log = logging.getLogger("evoprune")


def write_atomic(path: Path, content: bytes | str) -> None:
    """Write a file that is there whole or not at all, whenever the power goes."""
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        error.filename = error.filename or str(path)
        raise


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Let Ctrl-C and SIGTERM wait for the end: where one comes in the middle of a member, zipfile makes a ValueError of it."""
    if threading.current_thread() is not threading.main_thread():  # no other one gets signals
        yield
        return
    came: list[int] = []
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    before = {number: handler for number, handler in handlers.items() if handler is not None}  # None: not set from Python
    try:
        for number in before:
            signal.signal(number, lambda sent, _: came.append(sent))
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for sent in came:
            signal.raise_signal(sent)


def save(folder: Path, state: State, run: str) -> Path:
    """Write `folder`/GENERATION.npz; keep the newest two. `run` says what the state belongs to: see `fingerprint`."""
    buffer = io.BytesIO()
    pool: Pool = {}
    groups = {**arrays("population", state.population, pool), **arrays("archive", state.archive, pool)}
    inherited = [array for _, array in pool.values()]
    text = {"run": run, "generation": state.generation, "log": state.log,
            "inherited": [[array.dtype.str, array.shape] for array in inherited]}
    content: dict[str, Any] = {"text": as_bytes(text), **groups,
                               "inherited": np.frombuffer(b"".join(array.tobytes() for array in inherited), np.uint8),
                               "seen_keys": np.frombuffer(b"".join(state.seen), np.uint8),
                               "seen_values": np.array(list(state.seen.values()))}
    with uninterrupted():
        np.savez(buffer, **content)
    path = folder / f"{state.generation:06d}.npz"
    write_atomic(path, MAGIC + hashlib.sha256(buffer.getbuffer()).digest() + buffer.getbuffer())
    for old in sorted(folder.glob("[0-9]*.npz"))[:-KEPT]:
        old.unlink()
    return path


def load(folder: Path, layout: Layout, run: str) -> State | None:
    """Return the newest whole state of `folder`, None if there is no checkpoint.

    Raises:
        EvopruneError: every checkpoint is damaged, or the newest whole one belongs to another model, data or settings.
    """
    paths = sorted(folder.glob("[0-9]*.npz"), reverse=True)
    for path in paths:
        content = path.read_bytes()
        start = len(MAGIC) + 32
        if content[:len(MAGIC)] != MAGIC or hashlib.sha256(content[start:]).digest() != content[len(MAGIC):start]:
            log.warning("%s: damaged, looking for an older one", path)
            continue
        with np.load(io.BytesIO(content[start:]), allow_pickle=False) as file:
            text = json.loads(file["text"].tobytes())
            if text["run"] != run:
                raise EvopruneError(f"{path}: belongs to another run (its model, data or settings differ), expected a "
                                    f"checkpoint of this one; resume the run that wrote it, or choose a new --out")
            inherited = read_inherited(file["inherited"].tobytes(), text["inherited"])
            return State(text["generation"], individuals(file, "population", layout, inherited),
                         individuals(file, "archive", layout, inherited), read_seen(file), tuple(text["log"]))
    if paths:
        raise EvopruneError(f"{folder}: {len(paths)} checkpoint{'s' * (len(paths) > 1)} and none whole, expected one; "
                            f"start the run again with --overwrite")
    return None


def fingerprint(*parts: Any) -> str:
    """Return what identifies a run: a hash of arrays and plain data."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, np.ndarray):
            digest.update(f"{part.dtype}{part.shape}".encode())
            digest.update(np.ascontiguousarray(part).reshape(-1).view(np.uint8).data)
        else:
            digest.update(json.dumps(part, sort_keys=True).encode())
    return digest.hexdigest()


def arrays(name: str, group: Sequence[Individual], pool: Pool) -> dict[str, npt.NDArray[Any]]:
    """Return individuals as arrays: all bits (individuals, bytes), objectives (individuals, 2), the rest as JSON.

    What they inherited goes to `pool`, each array once.
    """
    def place(array: npt.NDArray[Any]) -> int:
        return pool.setdefault(id(array), (len(pool), array))[0]

    about = [[individual.origin, individual.generation, {key: place(array) for key, array in individual.inherited.items()}]
             for individual in group]
    return {f"{name}_bits": np.stack([np.concatenate(individual) for individual in group]),
            f"{name}_values": np.array([individual.fitness.values for individual in group]),
            f"{name}_about": as_bytes(about)}


def individuals(file: Any, name: str, layout: Layout, inherited: Sequence[npt.NDArray[Any]]) -> list[Individual]:
    """Return the individuals that `arrays` took apart."""
    ends = np.cumsum([(layer.genes + 7) // 8 for layer in layout])[:-1]
    bits, values = file[f"{name}_bits"], file[f"{name}_values"].tolist()
    group = []
    for row, value, (origin, generation, places) in zip(bits, values, json.loads(file[f"{name}_about"].tobytes())):
        group.append(Individual((part.copy() for part in np.split(row, ends)), origin, generation))
        group[-1].inherited = {key: inherited[place] for key, place in places.items()}
        group[-1].fitness.values = tuple(value)
    return group


def read_inherited(content: bytes, kinds: Sequence[tuple[str, list[int]]]) -> list[npt.NDArray[Any]]:
    """Return the arrays that stand one after another in `content`."""
    found, start = [], 0
    for dtype, shape in kinds:
        found.append(np.frombuffer(content, dtype, math.prod(shape), start).reshape(shape))
        start += found[-1].nbytes
    return found


def read_seen(file: Any) -> dict[bytes, tuple[float, float]]:
    keys = file["seen_keys"].reshape(-1, 16)
    return {key.tobytes(): (accuracy, sparsity) for key, (accuracy, sparsity) in zip(keys, file["seen_values"].tolist())}


def as_bytes(value: Any) -> npt.NDArray[np.uint8]:
    return np.frombuffer(json.dumps(value).encode(), np.uint8)


def to_safetensors(state: dict[str, Tensor], metadata: dict[str, str] | None = None) -> bytes:
    """Return a state dict as safetensors; tied tensors are written out under each of their names."""
    plain = {name: value.detach().cpu().clone().contiguous() for name, value in state.items()}
    return save_tensors(plain, metadata)


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


class Folder:
    """The folder of one run, locked while it is open.

    Raises:
        EvopruneError: it is in use, holds a run or anything else, or (to resume) holds no run.
    """

    def __init__(self, path: Path, resume: bool = False, overwrite: bool = False):
        self.path, self.checkpoint, self.resuming = path, path / "checkpoint", resume
        self.holds_run = holds_run = (path / "config.json").exists()
        if resume and not holds_run:
            raise EvopruneError(f"{path}: no run to resume (no config.json in it), expected the folder of a run")
        if path.exists() and not path.is_dir():
            raise EvopruneError(f"{path}: is a file, expected a folder for the run")
        if holds_run and not (resume or overwrite):
            raise EvopruneError(f"{path}: already holds a run; go on with --resume {path}, replace it with --overwrite, "
                                f"or choose another --out")
        own = {"checkpoint", *FILES, *(f"{name}.part" for name in FILES)}
        if not holds_run and path.exists() and {p.name for p in path.iterdir()} - own:
            raise EvopruneError(f"{path}: holds other files and no run, expected a new or an empty folder")

    def __enter__(self) -> Folder:
        self.new = not self.path.exists()
        self.checkpoint.mkdir(parents=True, exist_ok=True)
        self.lock = open(self.checkpoint / "lock", "w")  # the kernel lets go of it however this process ends
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.lock.close()
            raise EvopruneError(f"{self.path}: in use by another process; wait for it, or choose another --out") from None
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        started = (self.path / "config.json").exists()
        self.lock.close()
        if not started:  # nothing was written: leave no trace
            shutil.rmtree(self.path if self.new else self.checkpoint, ignore_errors=True)

    def clear(self) -> None:
        """Remove the files of an earlier run, and only those; call it when everything new has been checked."""
        names = [name + end for name in FILES for end in (".part", "")]
        for old in [self.path / name for name in names] + [f for f in self.checkpoint.iterdir() if f.name != "lock"]:
            remove(old)

    def write(self, name: str, content: bytes | str) -> None:
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, content)

    def remove(self, name: str) -> None:
        remove(self.path / name)

    def write_trained(self, key: str, label: str, state: dict[str, Tensor]) -> None:
        """Keep the values of one trained mask until the run is done, so that a resumed run need not train it again."""
        content = to_safetensors(state, {"evoprune": label})
        (self.checkpoint / "trained").mkdir(exist_ok=True)
        write_atomic(self.checkpoint / "trained" / key, hashlib.sha256(content).digest() + content)

    def read_trained(self, key: str, label: str) -> dict[str, Tensor] | None:
        """Return what `write_trained` kept under this label, None if there is nothing whole."""
        path = self.checkpoint / "trained" / key
        if not path.exists():
            return None
        content = path.read_bytes()
        if hashlib.sha256(content[32:]).digest() != content[:32] or label.encode() not in content:
            log.warning("%s: damaged or of another run, training that point again", path)
            return None
        return load_tensors(content[32:])

    def finished(self, generations: int) -> bool:
        """Say whether the folder holds a finished run of so many generations."""
        return (self.path / "done.json").exists() and self.read_json("done.json").get("generations") == generations

    def write_done(self, **facts: Any) -> None:
        """Say that the run has finished: the last file of all."""
        self.write("done.json", json.dumps({"stopped": "finished", **facts}, indent=2) + "\n")
        shutil.rmtree(self.checkpoint / "trained", ignore_errors=True)

    def read_json(self, name: str) -> Any:
        """Return the content of a JSON file."""
        try:
            return json.loads((self.path / name).read_text())
        except (OSError, ValueError) as error:
            raise EvopruneError(f"{self.path / name}: {first_line(error)}; expected the JSON that the run wrote") from None
