"""A state in one atomic, verified file, and back exactly.

A checkpoint is MAGIC, the SHA-256 of the rest, and an .npz of plain arrays; the text in it is JSON. Of what was measured and
logged it has what follows the last whole segment; segments lie beside it, each written once, its SHA-256 in its name. Nothing is
pickled.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import EvopruneError, with_type
from ..files import as_bytes, uninterrupted, write_atomic
from ..masks.genome import Arrays, Fitness, Individual, is_mask, kept_genes
from ..masks.layout import Layout
from ..objectives import Objectives
from .generations import State
from .history import SEGMENT, Log, Seen, read_log, read_seen

MAGIC, OLDER = b"evoprune checkpoint 5\n", re.compile(rb"evoprune checkpoint \d\n")
KEPT = 2  # generations
HASH = 32  # bytes
Carried = dict[int, tuple[int, npt.NDArray[Any]]]  # by id: place, array
log = logging.getLogger("evoprune")


def save(folder: Path, state: State, run: str) -> Path:
    """Write `folder`/GENERATION.npz and the whole segments of what was measured and logged that are not there yet; keep the
    newest two. `run` says what the state belongs to: see `fingerprint`."""
    buffer = io.BytesIO()
    pool: Carried = {}
    groups = {**arrays("population", state.population, pool), **arrays("archive", state.archive, pool)}
    carried = [array for _, array in pool.values()]
    seen, logged = state.seen, state.log
    segments = [*whole_segments(folder, "seen", seen.part, seen.store.hashes, seen.first, seen.count),
                *whole_segments(folder, "log", logged.part, logged.store.hashes, 0, len(logged))]
    text = {"run": run, "generation": state.generation, "seen": seen.count, "log": len(logged), "columns": logged.store.columns,
            "segments": segments, "carried": [[array.dtype.str, array.shape] for array in carried]}
    content: dict[str, Any] = {"text": as_bytes(text), **groups,
                               "carried": np.frombuffer(b"".join(array.tobytes() for array in carried), np.uint8),
                               "seen": seen.part(seen.count // SEGMENT * SEGMENT, seen.count),
                               "log": logged.part(len(logged) // SEGMENT * SEGMENT, len(logged))}
    with uninterrupted():
        np.savez(buffer, **content)
    path = folder / f"{state.generation:06d}.npz"
    write_atomic(path, MAGIC + hashlib.sha256(buffer.getbuffer()).digest() + buffer.getbuffer())
    *old, _ = sorted(folder.glob("[0-9]*.npz"))
    for each in old[:1 - KEPT]:
        each.unlink()
    kept = {name for each in old[1 - KEPT:] for name in segments_of(each)} | set(segments)
    for name in {each.name for each in folder.glob("*.segment")} - kept:
        (folder / name).unlink()
    return path


def whole_segments(folder: Path, kind: str, part: Callable[[int, int], npt.NDArray[np.uint8]], hashes: dict[int, str], first: int,
                   end: int) -> list[str]:  # 6 arguments: two kinds are told apart by them
    """Write the whole segments between two entries that are not there yet; return the names of all, which hold their hashes."""
    names = []
    for i in range(first // SEGMENT, end // SEGMENT):
        if i not in hashes:
            hashes[i] = hashlib.sha256(part(i * SEGMENT, (i + 1) * SEGMENT).data).hexdigest()
        names.append(f"{kind}-{i:06d}-{hashes[i]}.segment")
        if not (folder / names[-1]).exists():
            write_atomic(folder / names[-1], part(i * SEGMENT, (i + 1) * SEGMENT).tobytes())
    return names


def segments_of(path: Path) -> list[str]:
    """Return the names of the segments of a checkpoint, none where it is damaged."""
    content = whole(path)
    if content is None:
        return []
    with np.load(io.BytesIO(content), allow_pickle=False) as file:
        return [str(name) for name in json.loads(file["text"].tobytes())["segments"]]


def whole(path: Path) -> bytes | None:
    """Return what a checkpoint holds behind its hash, None where it is damaged."""
    content, start = path.read_bytes(), len(MAGIC) + HASH
    right = content[:len(MAGIC)] == MAGIC and hashlib.sha256(content[start:]).digest() == content[len(MAGIC):start]
    return content[start:] if right else None


def load(folder: Path, layout: Layout, objectives: Objectives, run: str) -> State | None:
    """Return the newest whole state of `folder`, None if there is no checkpoint.

    Raises:
        EvopruneError: every checkpoint is damaged, or the newest whole one belongs to another model, data or settings.
    """
    paths, older = sorted(folder.glob("[0-9]*.npz"), reverse=True), None
    for path in paths:
        content = whole(path)
        if content is None:
            with open(path, "rb") as file:
                start = file.read(len(MAGIC))
            if OLDER.match(start) and start != MAGIC:
                older = path
            else:
                log.warning("%s: damaged, looking for an older one", path)
            continue
        try:
            return read_state(folder, content, layout, objectives, run)
        except AnotherRun:
            raise EvopruneError(f"{path}: belongs to another run (its model, data or settings differ), expected a checkpoint of "
                                f"this one; resume the run that wrote it, or choose a new --out") from None
        except Exception as error:  # noqa: BLE001  # its hash is right: somebody wrote it by hand, or a segment is gone
            log.warning("%s: damaged (%s), looking for an older one", path, with_type(error))
    if older is not None:
        raise EvopruneError(f"{older}: written by another version of evoprune, expected {MAGIC.decode().strip()!r}; go on with "
                            f"that version, or start the run again with --overwrite")
    if paths:
        raise EvopruneError(f"{folder}: {len(paths)} checkpoint{'s' * (len(paths) > 1)} and none whole, expected one; "
                            f"start the run again with --overwrite")
    return None


class AnotherRun(Exception):
    """A checkpoint belongs to another run."""


def read_state(folder: Path, content: bytes, layout: Layout, objectives: Objectives, run: str) -> State:
    """Return the state that `save` took apart; raise `AnotherRun`, or anything where it is damaged."""
    with np.load(io.BytesIO(content), allow_pickle=False) as file:
        text = json.loads(file["text"].tobytes())
        if text["run"] != run:
            raise AnotherRun
        carried = read_carried(file["carried"].tobytes(), text["carried"])
        population, archive = (individuals(file, name, layout, objectives, carried) for name in ("population", "archive"))
        seen_part, log_part = (read_parts(folder, kind, text["segments"], file[kind]) for kind in ("seen", "log"))
    seen = read_seen(seen_part, text["seen"], len(objectives))
    logged = Log(read_log(log_part, text["columns"]))
    generation = text["generation"]
    if not (population and archive and type(generation) is int and generation >= 0 and 0 < len(logged) == text["log"]):
        raise ValueError("counts that do not go together")
    return State(generation, population, archive, Seen(seen), logged)


def read_parts(folder: Path, kind: str, names: Sequence[str], last: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Return the entries of the whole segments and of the `last` one together."""
    parts = []
    for name in names:
        if name.startswith(f"{kind}-"):
            content = (folder / name).read_bytes()
            if hashlib.sha256(content).hexdigest() != name.rpartition("-")[2].removesuffix(".segment"):
                raise ValueError(f"{name} is not whole")
            parts.append(np.frombuffer(content, np.uint8).reshape(SEGMENT, -1))
    if last.dtype != np.uint8 or last.ndim != 2:
        raise ValueError(f"{kind}: found {last.dtype} of shape {last.shape}")
    return np.concatenate([*parts, last]) if len(last) or not parts else np.concatenate(parts)


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
    bits, values = file[f"{name}_bits"], file[f"{name}_values"]
    if bits.dtype != np.uint8 or bits.shape[1:] != (sum((layer.genes + 7) // 8 for layer in layout),):
        raise ValueError(f"{name}: found masks {bits.dtype} of shape {bits.shape}")
    if values.shape != (len(bits), len(objectives)) or not np.isfinite(values).all():
        raise ValueError(f"{name}: found objectives of shape {values.shape}, or none")
    group = []
    for row, value, about in zip(bits, values.tolist(), json.loads(file[f"{name}_about"].tobytes())):
        origin, generation, saliency, trained, strategy = about
        each = Individual((part.copy() for part in np.split(row, ends)), origin, generation)
        each.saliency, each.values = ({key: carried[i] for key, i in places.items()} for places in (saliency, trained))
        each.strategy = None if strategy is None else np.array(strategy, float)
        check_individual(each, layout)
        each.fitness = Fitness(value, objectives)
        group.append(each)
    return group


def check_individual(each: Individual, layout: Layout) -> None:
    """Raise ValueError for an individual that no search wrote."""
    kept = {layer.name: kept_genes(bits) for layer, bits in zip(layout, each)}
    if not all(is_mask(bits, layer) for layer, bits in zip(layout, each)):
        raise ValueError("found bits behind the last gene")
    if not isinstance(each.origin, str) or not each.origin.isprintable() or not isinstance(each.generation, int):
        raise ValueError(f"found the origin {each.origin!r:.40} of generation {each.generation!r:.40}")
    if any(kept.get(name, scores.size) != scores.size for name, scores in each.saliency.items()):
        raise ValueError("found saliencies of other masks")
    if each.strategy is not None and (each.strategy.shape != (5,) or np.isnan(np.delete(each.strategy, 3)).any()):
        raise ValueError(f"found the strategy {each.strategy}")


def read_carried(content: bytes, kinds: Sequence[tuple[str, list[int]]]) -> list[npt.NDArray[Any]]:
    """Return the arrays that stand one after another in `content`."""
    found, start = [], 0
    for dtype, shape in kinds:
        found.append(np.frombuffer(content, dtype, math.prod(shape), start).reshape(shape))
        start += found[-1].nbytes
    return found
