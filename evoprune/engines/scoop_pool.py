"""The SCOOP pool that this program was started in, if it was."""

from __future__ import annotations

import logging
import sys
from collections.abc import Generator, Sequence
from typing import Any

from .worker import Function, Outcome, Start, attempt

OURS = "evoprune"  # in scoop.CONFIGURATION: started by our own launcher
WINDOW = 256  # jobs in SCOOP at once: it looks each result up in the list of all
log = logging.getLogger("evoprune")


class Scoop:
    """The SCOOP pool that this program was started in."""

    def __init__(self, start: Start, timeout: float | None):
        import scoop

        if not scoop.CONFIGURATION.get(OURS):
            log.warning("warning: python -m scoop cannot promise an end when a worker dies, a true exit status, that a job "
                        "runs once, or closed ports: prefer python -m evoprune.main --engine scoop --workers N")
        self.start, self.timeout = start, timeout

    def run(self, function: Function, items: Sequence[Any]) -> Generator[tuple[int, Outcome], None, None]:
        """Yield (index, outcome) of every item once, as they come."""
        from scoop import futures

        for first in range(0, len(items), WINDOW):
            jobs = {futures.submit(attempt, self.start, function, items[i], self.timeout): i
                    for i in range(first, min(len(items), first + WINDOW))}
            for future in futures.as_completed(list(jobs)):
                yield jobs[future], future.result()

    def close(self) -> None:
        """Nothing to end: the launcher does."""


def under_scoop() -> bool:
    """Return whether SCOOP runs this program; without importing it, since SCOOP itself would have."""
    return "scoop" in sys.modules and bool(sys.modules["scoop"].IS_RUNNING)
