"""One point of a front, by a wish: what it is, in words and as plain data. Only wishes for bytes or latency build anything."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..config import PROGRAM
from ..errors import EvopruneError, printable
from ..inputs.scores import wilson
from ..results.front import Front, Point
from ..results.points import thin
from ..results.written import FRONT
from ..rules import function_named

UNITS = {"": 1, "k": 1e3, "m": 1e6, "g": 1e9}  # of bytes
SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6}
TRIED = 16  # points whose latency is measured at most


@dataclass(frozen=True)
class Wish:
    """What is asked for: exactly one of these."""

    drop: float | None = None  # of the score, below the dense model's
    score: float | None = None  # on the search split
    axis: float | None = None  # its sparsity
    bytes: float | None = None  # of the packed file, with so many bits a value
    latency: float | None = None  # seconds that one example takes here, on one thread
    knee: bool = False
    id: str | None = None


def picked(front: Front, wish: Wish, bits: int = 32, slim: bool = False) -> Point:
    """Return the point that is wished for.

    Raises:
        EvopruneError: none is so, and how near the front comes.
    """
    front.check_points()
    if wish.id is not None:
        name = wish.id.zfill(3) if wish.id.isdecimal() else wish.id
        if name not in (ids := [point.id for point in front]):
            raise EvopruneError(f"pick: no point {printable(name)!r}, expected one of {ids[0]} to {ids[-1]}, as in {FRONT}")
        return front.points[ids.index(name)]
    if wish.knee:
        return front.knee()
    if wish.bytes is not None:
        return first_within(front.points, lambda point: float(packed_bytes(point, bits)), wish.bytes,
                             lambda found: f"bytes at {bits} bits a value <= {wish.bytes:,.0f}; the smallest has {found:,.0f}")
    if wish.latency is not None:
        tip = "" if slim else "; with --slim the dead channels are cut out first"
        return first_within(thin(front.points, TRIED), lambda point: latency(point, slim), wish.latency,
                             lambda found: f"latency <= {1e3 * (wish.latency or 0):g} ms, one example on one thread here; the "
                             f"fastest takes {math.ceil(1e6 * found) / 1e3:g} ms{tip}")
    objectives = front.record.optimised
    axis = {objectives[objectives.axis].name: wish.axis}
    return front.best(drop=wish.drop, score=wish.score, **axis)


def first_within(points: Sequence[Point], cost: Callable[[Point], float], limit: float, told: Callable[[float], str]) -> Point:
    """Return the most accurate of points whose cost is within a limit; of equals the first."""
    least = float("inf")
    for point in sorted(points, key=lambda point: -point.ranked[point.objectives.score]):
        if (found := cost(point)) <= limit:
            return point
        least = min(least, found)
    raise EvopruneError(f"pick: no point has {told(least)}")


def packed_bytes(point: Point, bits: int) -> int:
    """Return the size of a point's packed file, at most."""
    from safetensors.numpy import save

    from ..masks.packed import pack
    from ..results.export import facts_of

    entries, metadata = pack(point.state_dict(), bits)
    images = point.front.record.splits.get("test")
    measured = {} if bits == 32 else {"measured": f"{-1 / 3!r} on {images} examples"}  # no number is longer
    return len(save(entries, {**metadata, **facts_of(point), **measured}))


def latency(point: Point, slim: bool) -> float:
    """Return the seconds that one example takes on one thread of this machine, a median."""
    import torch

    from ..inputs.nested import applied
    from ..values.sparse import timed

    model, example = point.model(slim=slim), point.front.examples(1)
    with torch.inference_mode():
        return timed(lambda: applied(model, example), threads=1)[0]


def bytes_of(text: str) -> float:
    """Return a number of bytes from text like 20k, 1.5M or 300000; raise ValueError for what is none."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?(?:e\d+)?)([kmg]?)b?", text.strip().lower())
    if not found:
        raise ValueError
    return float(found[1]) * UNITS[found[2]]


def seconds_of(text: str) -> float:
    """Return seconds from text like 5ms, 300us or 0.1s; raise ValueError for what is none."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(s|ms|us)", text.strip().lower())
    if not found:
        raise ValueError
    return float(found[1]) * SECONDS[found[2]]


def described(point: Point) -> dict[str, Any]:
    """Return what a point is, as plain data."""
    front, record = point.front, point.front.record
    return {"run": str(front.path), "finished": front.finished, **point.row(), "dense": record.measured.row(),
            "search_interval": search_interval(point), "differ": differ(point), "calls": calls(front),
            "inputs": record.normalised, "python": python(front, point)}


def search_interval(point: Point) -> tuple[float, float] | None:
    """Return the 95 % interval of the score on the search split, None where that is no share of right answers."""
    record = point.front.record
    images = record.splits.get("search")
    if not images or (record.config.task or "classification") not in ("classification", "binary"):
        return None
    return wilson(round(point.score * images), images)


def differ(point: Point) -> bool | None:
    """Return whether search and test score differ beyond their intervals; None where there are none."""
    interval = search_interval(point)
    if interval is None or point.test_low is None or point.test_high is None:
        return None
    return interval[0] > point.test_high or interval[1] < point.test_low


def calls(front: Front) -> str | None:
    """Return which function building the model calls, None if none."""
    return function_named(front.record.config.model) if front.record.rebuildable else None


def python(front: Front, point: Point) -> str:
    """Return how to get the model."""
    model = "" if front.record.rebuildable else ", model=yours"
    return f"import evoprune; model = evoprune.load_front({str(front.path)!r}{model})[{point.id!r}].model()"


def in_words(point: Point) -> str:
    """Return what a point is, for a person."""
    front, record, objectives = point.front, point.front.record, point.objectives
    score, images, dense = objectives[objectives.score], record.splits, record.measured
    tested, dense_tested = "", ""
    if point.test is not None and point.test_low is not None and point.test_high is not None:
        tested = (f", {score.said(point.test)} on {images['test']:,} test images "
                  f"({score.shown(point.test_low)}-{score.shown(point.test_high)})")
    if dense.test is not None:
        dense_tested = f", {score.said(dense.test)}"
    made = {"none": "trained ones" if point.trained else "those of the dense model"}.get(
        point.repair, f"repaired ({point.repair})")
    lines = [f"point {point.id} of {front.path}: {record.title}{'' if front.finished else '; the run has not finished'}",
             f"  {score.title}: {score.said(point.score)} on {images['search']:,} search images{tested}",
             *([] if point.choice is None else [f"  compared by: {score.said(point.choice)} on these and "
                                                f"{record.config.choice_images or 0:,} training images kept back"]),
             f"  before pruning: {score.said(dense.score)}{dense_tested}",
             *(f"  {o.label.partition(',')[0]}: {o.said(v)}" for o, v in zip(objectives, point.values) if o != score),
             f"  weights: {point.kept:,} of {point.weights:,}; values: {made}; {point.origin}, generation {point.generation}"]
    if differ(point):
        low, high = search_interval(point) or (0.0, 0.0)
        lines.append(f"  search and test differ beyond their 95 % intervals ({score.shown(low)}-{score.shown(high)} on search "
                     f"images): go by the test split")
    if (chance := record.chance) is not None and point.score <= chance and point.kept < point.weights:
        lines.append(f"  no better than one answer for all examples, which has {score.said(chance)}")
    if record.normalised is not None:
        lines.append(f"  the model takes {record.normalised}")
    lines.append(f"in Python: {python(front, point)}")
    if (function := calls(front)) is not None:
        lines.append(f"building the model calls the function {function}, as the run's folder says: only if you trust it")
    return printable("\n".join(lines))


def next_step(point: Point, wish: Wish, bits: int, slim: bool) -> str:
    """Return the command that takes a point away, as it was wished for."""
    file = "small.pt2 --slim" if slim else "small.safetensors" if wish.bytes is None else "small.packed.safetensors" + (
        f" --bits {bits}" * (bits != 32))
    return f"{PROGRAM} pick {shlex.quote(str(point.front.path))} --id {point.id} --export {file}"
