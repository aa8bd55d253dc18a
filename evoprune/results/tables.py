"""The points of a front as a table: for a terminal, and for a notebook or a page, where all that is anyone's is escaped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from html import escape

from ..errors import printable
from .points import Measured, beyond_chance, thin
from .record import Record

SHOWN = 16  # rows of a printed front


def heads(record: Record) -> list[str]:
    """Return the heads of the columns."""
    objectives = record.optimised
    return ["id", *objectives.names, "kept", f"test {objectives[objectives.score].title} (95 %)", "origin"]


def cells(point: Measured) -> list[str]:
    """Return a row: a text for each column."""
    objectives = point.objectives
    score, tested = objectives[objectives.score], ""
    if point.test is not None and point.test_low is not None and point.test_high is not None:
        tested = f"{score.shown(point.test)} ({score.shown(point.test_low)}-{score.shown(point.test_high)})"
    return [point.id, *(o.shown(v) for o, v in zip(objectives, point.values)), f"{point.kept:,}", tested, point.origin]


def chosen(points: Sequence[Measured], record: Record) -> tuple[list[list[str]], str]:
    """Return the rows of the dense model and of points spread evenly, none no better than chance; and what is not shown."""
    better = beyond_chance(points, record.chance)
    shown = thin(better, SHOWN)
    rest = [] if len(shown) == len(better) else [f"{len(shown)} of {len(better)} points, spread in log density"]
    if len(better) < len(points) and record.chance is not None:
        score = record.optimised[record.optimised.score]
        rest.append(f"{len(points) - len(better)} no better than one answer for all ({score.said(record.chance)}) left out")
    if any(point.choice is not None for point in points):
        rest.append(f"compared on the search images and {record.config.choice_images or 0:,} training images kept back")
    return [cells(replace(record.measured, origin="")), *map(cells, shown)], "; ".join(rest)


def as_text(points: Sequence[Measured], record: Record) -> str:
    """Return the table for a terminal."""
    rows, rest = chosen(points, record)
    wide = [5, *(max(8, len(name)) for name in record.optimised.names), 11, 22]
    lines = ["  ".join([*(f"{cell:>{width}}" for cell, width in zip(row, wide)), row[-1]]).rstrip()
             for row in [heads(record), *rows]]
    return "\n".join([*lines, rest] if rest else lines)


def as_html(points: Sequence[Measured], record: Record) -> str:
    """Return the table for a notebook."""
    rows, rest = chosen(points, record)
    head = "".join(f"<th>{escape(name)}</th>" for name in heads(record))
    body = "".join(f"<tr>{''.join(f'<td>{escape(printable(cell))}</td>' for cell in row)}</tr>" for row in rows)
    return (f"<table><caption>{escape(printable(record.title))}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody>"
            f"</table>" + f"<p>{escape(rest)}</p>" * bool(rest))
