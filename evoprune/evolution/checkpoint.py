"""A state in one atomic, verified file, and back exactly.

A checkpoint is MAGIC, the SHA-256 of the rest, and an .npz of plain arrays; the text in it is JSON. Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import EvopruneError
from ..files import as_bytes, uninterrupted, write_atomic
from ..masks.genome import Arrays, Fitness, Individual
from ..masks.layout import Layout
from ..objectives import Objectives
from .generations import State

MAGIC, OLDER = b"evoprune checkpoint 3\n", re.compile(rb"evoprune checkpoint \d\n")
KEPT = 2  # generations
Carried = dict[int, tuple[int, npt.NDArray[Any]]]  # by id: place, array
log = logging.getLogger("evoprune")


def save(folder: Path, state: State, run: str) -> Path:
    """Write `folder`/GENERATION.npz; keep the newest two. `run` says what the state belongs to: see `fingerprint`."""
    buffer = io.BytesIO()
    pool: Carried = {}
    groups = {**arrays("population", state.population, pool), **arrays("archive", state.archive, pool)}
    carried = [array for _, array in pool.values()]
    text = {"run": run, "generation": state.generation, "log": state.log,
            "carried": [[array.dtype.str, array.shape] for array in carried]}
    content: dict[str, Any] = {"text": as_bytes(text), **groups,
                               "carried": np.frombuffer(b"".join(array.tobytes() for array in carried), np.uint8),
                               "seen_keys": np.frombuffer(b"".join(state.seen), np.uint8),
                               "seen_values": np.array(list(state.seen.values()))}
    with uninterrupted():
        np.savez(buffer, **content)
    path = folder / f"{state.generation:06d}.npz"
    write_atomic(path, MAGIC + hashlib.sha256(buffer.getbuffer()).digest() + buffer.getbuffer())
    for old in sorted(folder.glob("[0-9]*.npz"))[:-KEPT]:
        old.unlink()
    return path


def load(folder: Path, layout: Layout, objectives: Objectives, run: str) -> State | None:
    """Return the newest whole state of `folder`, None if there is no checkpoint.

    Raises:
        EvopruneError: every checkpoint is damaged, or the newest whole one belongs to another model, data or settings.
    """
    paths, older = sorted(folder.glob("[0-9]*.npz"), reverse=True), None
    for path in paths:
        content = path.read_bytes()
        start = len(MAGIC) + 32
        if OLDER.match(content) and not content.startswith(MAGIC):
            older = path
            continue
        if content[:len(MAGIC)] != MAGIC or hashlib.sha256(content[start:]).digest() != content[len(MAGIC):start]:
            log.warning("%s: damaged, looking for an older one", path)
            continue
        with np.load(io.BytesIO(content[start:]), allow_pickle=False) as file:
            text = json.loads(file["text"].tobytes())
            if text["run"] != run:
                raise EvopruneError(f"{path}: belongs to another run (its model, data or settings differ), expected a "
                                    f"checkpoint of this one; resume the run that wrote it, or choose a new --out")
            carried = read_carried(file["carried"].tobytes(), text["carried"])
            population, archive = (individuals(file, name, layout, objectives, carried) for name in ("population", "archive"))
            return State(text["generation"], population, archive, read_seen(file), tuple(text["log"]))
    if older is not None:
        raise EvopruneError(f"{older}: written by another version of evoprune, expected {MAGIC.decode().strip()!r}; go on with "
                            f"that version, or start the run again with --overwrite")
    if paths:
        raise EvopruneError(f"{folder}: {len(paths)} checkpoint{'s' * (len(paths) > 1)} and none whole, expected one; "
                            f"start the run again with --overwrite")
    return None


def arrays(name: str, group: Sequence[Individual], pool: Carried) -> dict[str, npt.NDArray[Any]]:
    """Return individuals as arrays: all bits (individuals, bytes), the values of the objectives, the rest as JSON.

    Saliency and values go to `pool`, each array once.
    """
    def places(arrays: Arrays) -> dict[str, int]:
        return {key: pool.setdefault(id(array), (len(pool), array))[0] for key, array in arrays.items()}

    about = [[each.origin, each.generation, places(each.saliency), places(each.values),
              None if each.strategy is None else each.strategy.tolist()] for each in group]
    return {f"{name}_bits": np.stack([np.concatenate(individual) for individual in group]),
            f"{name}_values": np.array([individual.fitness.values for individual in group]),
            f"{name}_about": as_bytes(about)}


def individuals(file: Any, name: str, layout: Layout, objectives: Objectives,
                carried: Sequence[npt.NDArray[Any]]) -> list[Individual]:
    """Return the individuals that `arrays` took apart."""
    ends = np.cumsum([(layer.genes + 7) // 8 for layer in layout])[:-1]
    bits, values = file[f"{name}_bits"], file[f"{name}_values"].tolist()
    group = []
    for row, value, about in zip(bits, values, json.loads(file[f"{name}_about"].tobytes())):
        origin, generation, saliency, trained, strategy = about
        each = Individual((part.copy() for part in np.split(row, ends)), origin, generation)
        each.saliency, each.values = ({key: carried[i] for key, i in places.items()} for places in (saliency, trained))
        each.strategy = None if strategy is None else np.array(strategy)
        each.fitness = Fitness(value, objectives)
        group.append(each)
    return group


def read_carried(content: bytes, kinds: Sequence[tuple[str, list[int]]]) -> list[npt.NDArray[Any]]:
    """Return the arrays that stand one after another in `content`."""
    found, start = [], 0
    for dtype, shape in kinds:
        found.append(np.frombuffer(content, dtype, math.prod(shape), start).reshape(shape))
        start += found[-1].nbytes
    return found


def read_seen(file: Any) -> dict[bytes, tuple[float, ...]]:
    keys = file["seen_keys"].reshape(-1, 16)
    return {key.tobytes(): tuple(values) for key, values in zip(keys, file["seen_values"].tolist())}
