"""Files that are there whole or not at all, tensors as the bytes of one, and a hash of what a run is made of. Nothing is pickled;
torch is imported by what needs it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from torch import Tensor

LABEL = "evoprune"  # in the metadata of a kept file: what it belongs to
log = logging.getLogger("evoprune")


def write_atomic(path: Path, content: bytes | str, part: Path | None = None) -> None:
    """Write a file that is there whole or not at all, whenever the power goes; what is there of it before that is the `part`."""
    part = part or path.with_name(path.name + ".part")
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


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


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


def as_bytes(value: Any) -> npt.NDArray[np.uint8]:
    return np.frombuffer(json.dumps(value).encode(), np.uint8)


def to_safetensors(state: dict[str, Tensor], metadata: dict[str, str] | None = None) -> bytes:
    """Return a state dict as safetensors; tied tensors are written out under each of their names."""
    from safetensors.torch import save

    plain = {name: value.detach().cpu().clone().contiguous() for name, value in state.items()}
    return save(plain, metadata)


def from_safetensors(content: bytes) -> dict[str, Tensor]:
    """Return the state dict in the bytes of a safetensors file."""
    from safetensors.torch import load

    return load(content)


def load_safetensors(path: Path) -> dict[str, Tensor]:
    """Return the state dict in a safetensors file."""
    from safetensors.torch import load_file

    return load_file(path)


def write_kept(path: Path, label: str, state: dict[str, Tensor]) -> None:
    """Write tensors that `read_kept` gives back under the same label."""
    content = to_safetensors(state, {LABEL: label})
    path.parent.mkdir(exist_ok=True)
    part = path.with_name(f"{path.name}.{platform.node()}-{os.getpid()}.part")  # a process that was given up may write it too
    write_atomic(path, hashlib.sha256(content).digest() + content, part)


def read_kept(path: Path, label: str) -> dict[str, Tensor] | None:
    """Return what `write_kept` wrote under this label, None if there is nothing whole."""
    if not path.exists():
        return None
    content = path.read_bytes()
    try:
        if hashlib.sha256(content[32:]).digest() == content[:32] and metadata_of(content[32:]).get(LABEL) == label:
            return from_safetensors(content[32:])
    except Exception as error:  # noqa: BLE001  # its hash is right: somebody wrote it by hand
        log.debug("%s", error)
    log.warning("%s: damaged or of another run, making it again", path)
    return None


def piece_of(path: Path) -> Path:
    """Return where the state of a training lies that is not whole, which then is kept in `path`."""
    return path.with_name(f"{path.name}.piece")


def metadata_of(content: bytes) -> dict[str, str]:
    """Return the metadata of a safetensors file: its head is JSON, whose length comes first."""
    found: dict[str, str] = json.loads(content[8:8 + int.from_bytes(content[:8], "little")]).get("__metadata__", {})
    return found


def as_bytes_of(value: Tensor) -> npt.NDArray[np.uint8]:
    """Return a tensor's bytes, whatever its type."""
    import torch

    return value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
