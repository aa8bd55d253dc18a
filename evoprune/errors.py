"""The one error that users see, the one way to stop, and what an exception says in one line."""

from __future__ import annotations

import re
import sysconfig
import traceback
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).parent
LIBRARIES = {Path(sysconfig.get_path(name)) for name in ("stdlib", "platlib", "purelib")}


class EvopruneError(Exception):
    """A user's mistake, told in one line: where, what was found, what was expected, what to do."""

    def __str__(self) -> str:
        return printable(" ".join(super().__str__().split("\n")))


class Stopped(Exception):
    """A run stops before its end and can be resumed; `why` is "max_seconds" or "interrupted"."""

    def __init__(self, why: str):
        super().__init__(why)
        self.why = why


def printable(text: str) -> str:
    """Return text of anyone's making as a terminal may have it: all but what can be seen, and ends of lines, is escaped."""
    return "".join(c if c == "\n" or c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def shown(value: Any) -> str:
    """Return what was found, as one short line."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:77]}..."


def first_line(error: BaseException) -> str:
    """Return what an exception says, in one line without terminal codes; a bare word gets its type before it."""
    lines = [*map(str.strip, re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip().splitlines()), ""]
    line = " ".join(filter(None, lines[:2])) if lines[0].endswith(":") else lines[0]  # what is announced comes behind
    return line if " " in line else with_type(error, line)


def with_type(error: BaseException, line: str | None = None) -> str:
    """Return the type of an exception and what it says, in one line."""
    name = type(error).__name__
    line = first_line(error).removeprefix(f"{name}: ") if line is None else line
    return f"{name}: {line}" if line else name


def where_raised(error: BaseException) -> str | None:
    """Return where code that evoprune called raised: a model, a data set, an operator of the user's; None if it was evoprune."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [i for i, frame in enumerate(frames) if Path(frame.filename).is_relative_to(PACKAGE)]
    called = [frame for frame in frames[ours[0]:] if not Path(frame.filename).is_relative_to(PACKAGE)] if ours else []
    theirs = [frame for frame in called if not any(Path(frame.filename).is_relative_to(path) for path in LIBRARIES)]
    inside = theirs or [frame for frame in called[-1:] if any(each.name == "_call_impl" for each in called)]  # nn.Module's
    if not inside:
        return None
    return f"{Path(inside[-1].filename).name}, line {inside[-1].lineno}, in {inside[-1].name}"
