"""How far a run is and how long the rest will take: on a bar where a person looks, elsewhere in lines now and then."""

from __future__ import annotations

import logging
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from time import monotonic
from typing import Any

from ..objectives import Objectives

SAY_EVERY = 3.0  # seconds between lines of progress
AT = (0.8, 0.95, 0.99)  # sparsities at which the bar has the front
NARROW = 80  # columns of a terminal below which there is no room for a bar
SURE = 1.0  # seconds of a phase before its end can be guessed
log = logging.getLogger("evoprune")


class Bar:
    """One line at the foot of a terminal, which is there while a phase tells how far it is."""

    def __init__(self) -> None:
        self.bar: Any = None

    def show(self, what: str, share: float, rest: str) -> None:
        """Show how far a phase is."""
        from tqdm import tqdm

        if self.bar is None:
            self.bar = tqdm(total=1.0, dynamic_ncols=True, leave=False, miniters=0, bar_format="{desc}", desc=what)
        if shutil.get_terminal_size().columns < NARROW:  # what is left comes first, for the end is cut off
            what, rest = re.sub(r"(\d+) of (\d+)", r"\1/\2", what), "; ".join(reversed(rest.split("; ")))
            self.bar.bar_format = "{desc}; " + rest
        else:
            self.bar.bar_format = "{desc} |{bar}| " + rest
        self.bar.set_description_str(what, refresh=False)
        self.bar.update(min(1.0, share) - self.bar.n)

    def end(self) -> None:
        """Clear the line until the next phase."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None


BARS: list[Bar] = []  # of this process, at most one


def looked_at() -> bool:
    """Return whether a person looks, at a terminal that says how large it is, or a notebook."""
    if "ipykernel" in sys.modules:
        return True
    return sys.stdout.isatty() and sys.stderr.isatty() and min(os.get_terminal_size(sys.stderr.fileno())) > 0


@contextmanager
def progress_shown(wanted: bool | None) -> Iterator[None]:
    """Show for a while how far a run is: by a bar where a person looks, elsewhere by lines on standard error, unless messages go
    somewhere already. Without a wish, only where a person looks."""
    if wanted is False or not (wanted or looked_at()):
        yield
        return
    handler, level = logging.StreamHandler(), log.level
    if lines := not log.hasHandlers() and not looked_at():
        log.addHandler(handler)
        log.setLevel(logging.INFO)
    if looked_at():
        BARS.append(Bar())
    try:
        yield
    finally:
        while BARS:
            BARS.pop().end()
        if lines:
            log.removeHandler(handler)
            log.setLevel(level)


def on_bar(what: str, share: float, rest: str) -> bool:
    """Show on the bar how far a phase is, till it is done; return False where there is none."""
    for bar in BARS:
        bar.show(what, share, rest)
        if share >= 1:
            bar.end()
    return bool(BARS)


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

    def sure(self) -> str:
        """Return that for a bar: nothing in the first moments, which say little."""
        return f", {self.left()} left" if monotonic() - self.started >= SURE else ""


class SearchProgress:
    """Tells how far a search is: of `planned` masks, or epochs where it trains."""

    def __init__(self, generations: int, planned: float, trains: bool, done: float, objectives: Objectives):
        self.generations, self.trains, self.axis = generations, trains, objectives[objectives.axis]
        self.objectives, self.pace, self.bred = objectives, Pace(planned, done), Pace(generations)
        self.estimated, self.begun, self.front = trains, False, ""
        self.first: float | None = None  # when the first mask was measured, for which an engine starts and models are looked at

    def left(self) -> str:
        """Return how long the rest will take: by generations once there has been one, for not every child is measured."""
        bred = self.bred
        if self.trains or bred.done == bred.begun:
            return self.pace.left()
        since = monotonic() - self.ended
        return clock(max(0.0, (self.ended - bred.started) / (bred.done - bred.begun) * (bred.planned - bred.done) - since))

    def evaluated(self, i: int, of: int) -> None:
        """Count one more mask measured; `i` of `of` in this batch."""
        self.pace.done += not self.trains
        which = f"generation {int(self.bred.done) + self.begun} of {self.generations}, " if self.generations else ""
        what = f"{which}child {i} of {of}"
        pace, left = self.pace, f"{self.left()} left" if self.pace.sure() else ""
        if on_bar(what, pace.done / max(pace.planned, 1e-9), "; ".join(filter(None, (self.front, left)))) or self.trains:
            return
        if self.first is None:
            self.first = monotonic()
        since, before = monotonic() - self.first, self.first - pace.started
        if not self.estimated and (i == of or (since >= before and pace.due(SAY_EVERY))):
            self.estimated, pace.said = True, monotonic()
            masks, each = pace.planned - pace.begun, pace.each()
            whole = each * masks
            if since >= before and pace.done - pace.begun > 1:  # long enough to tell a mask from the start
                each = since / (pace.done - pace.begun - 1)
                whole = before + each * (masks - 1)
            log.info("%.3g s a mask; %s masks will take about %s", each, f"{masks:,}", clock(whole))
        elif self.estimated and pace.due(5 * SAY_EVERY):  # long generations
            log.info("  %d of %d masks of this generation, %s left", i, of, self.left())

    def generation(self, row: Mapping[str, float], values: Sequence[Sequence[float]] = ()) -> None:
        """Say how the archive stands, by a row of the log and the values of its points."""
        last = row["generation"] == self.generations
        if self.trains:
            self.pace.done = row["epochs"]
        if not self.begun:
            self.begun, self.bred.begun, self.bred.started = True, row["generation"], monotonic()
        self.bred.done, self.ended, self.front = row["generation"], monotonic(), self.at(values)
        if BARS or not (self.trains or last or not row["generation"] or self.pace.due(SAY_EVERY)):
            return
        self.pace.said = monotonic()
        spent = f", {row['epochs']:.3g} of {self.pace.planned:g} epochs" if self.trains else ""
        masks = "" if self.trains else f", {row['evaluations']:,} masks"
        left = "" if last or self.pace.done == self.pace.begun else f", {self.left()} left"
        which = f"generation {row['generation']} of {self.generations}" if self.generations else \
            "training" if self.trains else "the first masks"
        log.info("%s%s: hvlog %.4f, %d points up to %s %s%s%s", which, spent, row["hvlog"], row["points"],
                 self.axis.said(row[self.axis.logged]), self.axis.name, masks, left)

    def at(self, values: Sequence[Sequence[float]]) -> str:
        """Return the best score at three sparsities, for the bar."""
        objectives, found = self.objectives, []
        score = objectives[objectives.score]
        for wish in AT:
            fits = [each[objectives.score] for each in values if each[objectives.axis] >= wish]
            found.append(f"{score.shown(score.best_of(fits)) if fits else '-'} at {100 * wish:g} %")
        return f"{score.title} {', '.join(found)}" if values else ""


def training_progress(what: str) -> Callable[[int, int], None]:
    """Return a callback for `tune` that says now and then how long the rest will take."""
    return progress_of(f"training {what}", "steps")


def progress_of(what: str, units: str) -> Callable[[int, int], None]:
    """Return a callback, told how much of how much is done, that says now and then how long the rest will take."""
    pace = Pace(0)

    def progress(done: int, of: int) -> None:
        if not pace.planned:  # the first of a piece of training may be a later one
            pace.begun = max(0, done - 1)
        pace.planned, pace.done = of, done
        if not on_bar(what, done / max(of, 1), f"{done} of {of} {units}{pace.sure()}") and done < of and pace.due(5):
            log.info("%s: %d of %d %s, %s left", what, done, of, units, pace.left())

    return progress


def say_full_size(masks: int, images: int, each: float) -> None:
    """Say how long a search of the default size would take, after one that took `each` seconds a mask and image."""
    log.info("a search of the default size (%s masks, %s images) would take about %s here", f"{masks:,}", f"{images:,}",
             clock(each * masks * images))
