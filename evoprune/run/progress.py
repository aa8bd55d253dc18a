"""How far a run is and how long the rest will take, told now and then."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from time import monotonic

from ..objectives import Objectives

SAY_EVERY = 3.0  # seconds between lines of progress
log = logging.getLogger("evoprune")


def clock(seconds: float) -> str:
    """Return a duration as 0:07, 12:30 or 3:05:00."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Pace:
    """How far a piece of work is, in whatever it is counted, and how long the rest takes at the pace so far."""

    def __init__(self, planned: float, done: float = 0):
        self.planned, self.begun, self.done = planned, done, done
        self.started = self.said = monotonic()

    def due(self, every: float) -> bool:
        """Return whether nothing has been said for so many seconds; what follows counts as said."""
        if monotonic() - self.said < every:
            return False
        self.said = monotonic()
        return True

    def each(self) -> float:
        """Return the seconds that one takes."""
        return (monotonic() - self.started) / max(self.done - self.begun, 1e-9)

    def left(self) -> str:
        """Return how long the rest will take."""
        return clock(self.each() * max(0, self.planned - self.done))


class SearchProgress:
    """Tells how far a search is: of `planned` masks, or epochs where it trains."""

    def __init__(self, generations: int, planned: float, trains: bool, done: float, objectives: Objectives):
        self.generations, self.trains, self.axis = generations, trains, objectives[objectives.axis]
        self.pace = Pace(planned, done)
        self.estimated = trains

    def evaluated(self, i: int, of: int) -> None:
        """Count one more mask measured; `i` of `of` in this batch."""
        if self.trains:
            return
        pace = self.pace
        pace.done += 1
        if not self.estimated and (i == of or pace.due(SAY_EVERY)):
            self.estimated, pace.said = True, monotonic()
            log.info("%.3g s a mask; the search of %s masks will take about %s", pace.each(), f"{pace.planned:,}",
                     clock(pace.each() * (pace.planned - pace.begun)))
        elif self.estimated and pace.due(5 * SAY_EVERY):  # long generations
            log.info("  %d of %d masks of this generation, %s left", i, of, pace.left())

    def generation(self, row: Mapping[str, float]) -> None:
        """Say how the archive stands, by a row of the log."""
        last = row["generation"] == self.generations
        if self.trains:
            self.pace.done = row["epochs"]
        if not (self.trains or last or not row["generation"] or self.pace.due(SAY_EVERY)):
            return
        self.pace.said = monotonic()
        spent = f", {row['epochs']:.3g} of {self.pace.planned:g} epochs" if self.trains else ""
        masks = "" if self.trains else f", {row['evaluations']:,} masks"
        left = "" if last or self.pace.done == self.pace.begun else f", {self.pace.left()} left"
        log.info("generation %d of %d%s: hvlog %.4f, %d points up to %s %s%s%s", row["generation"], self.generations,
                 spent, row["hvlog"], row["points"], self.axis.said(row[self.axis.logged]), self.axis.name, masks, left)


def training_progress(what: str) -> Callable[[int, int], None]:
    """Return a callback for `tune` that says now and then how long the rest will take."""
    return progress_of(f"training {what}", "steps")


def progress_of(what: str, units: str) -> Callable[[int, int], None]:
    """Return a callback, told how much of how much is done, that says now and then how long the rest will take."""
    pace = Pace(0)

    def progress(done: int, of: int) -> None:
        pace.planned, pace.done = of, done
        if done < of and pace.due(5):
            log.info("%s: %d of %d %s, %s left", what, done, of, units, pace.left())

    return progress


def say_full_size(masks: int, images: int, each: float) -> None:
    """Say how long a search of the default size would take, after one that took `each` seconds a mask on so many images."""
    log.info("a search of the default size (%s masks, 5,000 images) would take about %s here", f"{masks:,}",
             clock(each * masks * 5000 / images))
