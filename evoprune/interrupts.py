"""Ctrl-C and SIGTERM, from the first moment of the program to its last: exit status 130 or 143, whenever they come."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

NUMBERS = (signal.SIGINT, signal.SIGTERM)


def end_at_once() -> None:
    """End at the first signal, as long as there is nothing to lose: importing takes a moment."""
    for number in NUMBERS:
        if signal.getsignal(number) != signal.SIG_IGN:  # as it is in the background
            signal.signal(number, lambda number, frame: os._exit(128 + number))


@contextmanager
def signals() -> Iterator[list[int]]:
    """Make KeyboardInterrupt of the first signal, and of the second; yield the list of those that came."""
    came: list[int] = []

    def stop(number: int, frame: Any) -> None:
        came.append(number)
        if len(came) <= 2:
            raise KeyboardInterrupt

    before = {number: signal.getsignal(number) for number in NUMBERS}
    before = {number: handler for number, handler in before.items() if handler not in (signal.SIG_IGN, None)}
    for number in before:
        signal.signal(number, stop)
    try:
        yield came
    except KeyboardInterrupt:  # the second, while the first was told
        sys.exit(128 + came[0])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
