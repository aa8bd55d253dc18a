"""What a worker process does: run one job after another, never raise, end with its parent, take a GPU of its own."""

from __future__ import annotations

import ctypes
import fcntl
import io
import itertools
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import EvopruneError, with_type

Function = Callable[[Any], Any]
Start = Callable[[], None]  # builds what is heavy, once a process
Outcome = tuple[str, Any]  # DONE and the result, FAILED and what an exception said, or LOST: the worker died
DONE, FAILED, LOST = "done", "failed", "lost"
PARENT = "EVOPRUNE_PARENT"  # variable of the environment: the process that a Dask worker ends with
LOCKS: list[io.IOBase] = []  # locks of this process


def ignore(*_: Any) -> None:
    """Do nothing with what is given."""


def attempt(start: Start, function: Function, item: Any, timeout: float | None = None) -> Outcome:
    """Run one job in a worker. Never raises: an exception that cannot be unpickled elsewhere kills whole pools.

    After `timeout` seconds the kernel ends this process, whatever it hangs in; `start` is not counted.
    """
    try:
        start()
        signal.setitimer(signal.ITIMER_REAL, timeout or 0)
        try:
            return DONE, function(item)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    except EvopruneError as error:
        return FAILED, str(error)
    except BaseException as error:  # noqa: BLE001  # it is told in the process that asked
        return FAILED, with_type(error)


def dask_setup(worker: Any) -> None:
    """End with the search: Dask calls this in each worker of a cluster of ours."""
    if PARENT in os.environ:  # not os.getppid(): it may have ended while this process started
        die_with_parent(int(os.environ[PARENT]))


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when its parent ends, however that ends; Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(1)


def take_slot(folder: Path | None = None) -> int:
    """Return the lowest number that no other process of this host has, and hold it until this process ends."""
    folder = folder or Path(tempfile.gettempdir()) / f"evoprune-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    for slot in itertools.count():
        file = open(folder / f"slot-{slot}", "w")  # noqa: SIM115  # closing it would give the slot back
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.close()
        else:
            LOCKS.append(file)
            break
    return slot
