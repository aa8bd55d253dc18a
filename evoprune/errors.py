"""The one error that users see, and what an exception says in one line."""

from __future__ import annotations

import re


class EvopruneError(Exception):
    """A user's mistake, told in one line: where, what was found, what was expected, what to do."""


def first_line(error: BaseException) -> str:
    """Return what an exception says, in one line without terminal codes; a bare word gets its type before it."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip()
    line = text.splitlines()[0] if text else ""
    return line if " " in line else with_type(error, line)


def with_type(error: BaseException, line: str | None = None) -> str:
    """Return the type of an exception and what it says, in one line."""
    name = type(error).__name__
    line = first_line(error).removeprefix(f"{name}: ") if line is None else line
    return f"{name}: {line}" if line else name
