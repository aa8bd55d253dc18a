"""What stays the same from the first generation of a run to the last, and the one way to stop before it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from time import monotonic, time

import torch
from torch import Tensor, nn

from ..config import Config
from ..errors import EvopruneError, Stopped
from ..evaluation.evaluator import Evaluator
from ..files import piece_of, read_kept, write_kept
from ..inputs.nested import joined
from ..inputs.splits import Data, Split, calibration
from ..inputs.tasks import optimised
from ..masks.layout import Layout
from ..objectives import Objectives
from ..results.points import Measured
from ..values.repair import BATCHES, IMAGES, LAST_IMAGES
from ..values.training import Pieces

SAVE_EVERY = 300.0  # seconds of a training from one state of it that is kept to the next
GRACE = 20.0  # seconds that a training has after --max-seconds: most end, and need not be begun again
log = logging.getLogger("evoprune")


@contextmanager
def stoppable() -> Iterator[None]:
    """Make Ctrl-C and SIGTERM one more reason of `Stopped`."""
    try:
        yield
    except KeyboardInterrupt:
        raise Stopped("interrupted") from None


@dataclass
class Run:
    """What stays the same from the first generation to the last."""

    config: Config
    model: nn.Module  # dense, on the CPU
    data: Data  # on the device, less what is kept back
    layout: Layout
    batch_size: int  # of every number that is reported
    evaluator: Evaluator  # of the search split
    dense: Measured  # what the model measured before pruning
    identity: str  # of model, data and settings: a checkpoint belongs to it or is refused
    deadline: float  # of the monotonic clock
    choice: Split | None = None  # the search images and those kept back, which points are compared on in the end
    more_from: int | None = None  # points of a finished run that are trained further
    trained_at: Path | None = None  # where what jobs have trained is kept
    on_generation: Callable[[dict[str, float]], None] | None = None  # the user's, called with each row of the log

    @property
    def objectives(self) -> Objectives:
        """What is optimised."""
        return self.dense.objectives

    @property
    def until(self) -> float:
        """The deadline as a time of day."""
        return time() + self.deadline - monotonic()

    def pieces(self, key: str, label: str, until: float, what: str) -> Pieces | None:
        """Return what keeps the state of the training of a job, whose result is kept under this key."""
        return None if self.trained_at is None else pieces_of(piece_of(self.trained_at / key), label, until, what)

    def check_time(self) -> None:
        """Raise `Stopped` when `max_seconds` have passed."""
        if monotonic() > self.deadline:
            raise Stopped("max_seconds")

    @cached_property
    def last(self) -> Evaluator:
        """The evaluator of the points at the end."""
        return self.plain_evaluator(LAST_IMAGES)

    @cached_property
    def chooser(self) -> Evaluator:
        """The evaluator of all images that points are compared on in the end."""
        return self.last if self.choice is None else Evaluator(self.model, self.layout, self.choice, self.batch_size, plain=True)

    def plain_evaluator(self, images: int, worth: str | None = None) -> Evaluator:
        """Return an evaluator of the model as the user has it, which repairs on so many images: more than the search takes."""
        return Evaluator(self.model, self.layout, self.data.search, self.batch_size, plain=True, repair=str(self.config.repair),
                         calibration=calibration_images(self.config, self.data, self.batch_size, images),
                         worth=worth, objectives=self.objectives)


def late(until: float) -> bool:
    """Say whether a training has to stop, or none is begun."""
    return time() >= until + GRACE


def pieces_of(path: Path, label: str, until: float, what: str) -> Pieces:
    """Return what keeps the state of a training in a file, every `SAVE_EVERY` seconds and where it stops: `GRACE` seconds after
    `until`, a time of day, which other processes know too. `label` is of all that decides what the training becomes; `what` a
    message calls it.

    Its `keep` raises:
        Stopped: there was no time for all of it.
    """
    kept = time()
    start = read_kept(path, label)
    if start is not None:
        log.info("training %s goes on after step %d", what, int(start["step"]))

    def keep(state: Callable[[], dict[str, Tensor]]) -> None:
        nonlocal kept
        if (over := late(until)) or time() - kept >= SAVE_EVERY:
            try:
                write_kept(path, label, state())
            except OSError as error:  # a full disk: the training itself goes on
                log.warning("%s: %s; the state of training %s is not kept", path, error.strerror, what)
            kept = time()
        if over:
            raise Stopped("max_seconds")

    return Pieces(start, keep)


def make_evaluator(net: nn.Module, layout: Layout, splits: Data, config: Config, batch_size: int, usual: int) -> Evaluator:
    """Return the evaluator of the search; `usual` is the batch size of the reports."""
    # 6 arguments: the parts of a run before there is one
    return Evaluator(net, layout, splits.search, batch_size, floor=config.accuracy_floor, precision=config.precision,
                     cache_mb=config.cache_mb, repair=str(config.repair), worth=config.worth,
                     calibration=calibration_images(config, splits, usual, IMAGES),
                     objectives=optimised(config.objectives, config.task))


def calibration_images(config: Config, splits: Data, batch_size: int, images: int) -> Split | None:
    """Return what masks are repaired on, from the train split where there is one; no label of it is looked at."""
    if config.repair == "none":
        return None
    return calibration(splits.train or splits.search, min(images, BATCHES * batch_size), config.split_seed)


def check_kept_back(config: Config, splits: Data) -> None:
    """Raise `EvopruneError` where more than half of the training images would be kept back."""
    most = 0 if splits.train is None else len(splits.train) // 2
    if config.choice_images > most:
        raise EvopruneError(f"choice_images: found {config.choice_images:,}, expected at most {most:,}, half of the training "
                            f"images")


def keep_back(config: Config, splits: Data) -> tuple[Data, Split | None]:
    """Return the splits without the training images that --choice-images keeps back, and these beside the search images."""
    count, search = config.choice_images, splits.search
    if not count:
        return splits, None
    assert splits.train is not None
    kept = calibration(splits.train, count, config.split_seed)
    rest = calibration(splits.train, len(splits.train), config.split_seed, count)
    both = replace(search, images=joined([search.images, kept.images]), labels=torch.cat([search.labels, kept.labels]))
    return Data(rest, search, splits.test, classes=splits.classes), both
