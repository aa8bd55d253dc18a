"""What stays the same from the first generation of a run to the last, and the one way to stop before it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from time import monotonic, time

from torch import Tensor, nn

from ..config import AUTO, Config
from ..engines.worker import ignore
from ..errors import EvopruneError, Stopped
from ..evaluation.evaluator import Evaluator
from ..files import piece_of, read_kept, remove, write_kept
from ..inputs.models import copied
from ..inputs.splits import Data, Split, calibration, score
from ..inputs.tasks import optimised
from ..masks.layout import Layout
from ..objectives import Objectives
from ..results.points import Measured
from ..results.record import Record
from ..values.norms import Fitting
from ..values.repair import BATCHES, IMAGES, LAST_IMAGES
from ..values.training import Pieces

SAVE_EVERY = 300.0  # seconds of a training from one state of it that is kept to the next
GRACE = 20.0  # seconds that a training has after --max-seconds: most end, and need not be begun again
FEW_SEARCH, MOST_CHOICE, CHOICE_SHARE = 5000, 4096, 0.125  # search images that are few enough to keep training images back, at
# most so many and such a share of them: as many as there are search images, or it is not worth it
BY_HEART, CHECKED = 0.02, 64  # by how much a model that has learnt images scores more on them, and examples a batch to see that
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
    kept: Split | None = None  # training images that points are compared on in the end, beside the search images
    more_from: int | None = None  # points of a finished run that are trained further
    trained_at: Path | None = None  # where what jobs have trained is kept
    on_generation: Callable[[dict[str, float]], None] | None = None  # the user's, called with each row of the log
    started: Callable[[], None] = ignore  # told when a state is kept that the run can go on with

    @property
    def objectives(self) -> Objectives:
        """What is optimised."""
        return self.dense.objectives

    @property
    def until(self) -> float:
        """The deadline as a time of day."""
        return time() + self.deadline - monotonic()

    def pieces(self, key: str, label: str, until: float, what: str) -> Pieces | None:
        """Return what keeps the state of a training, or of a path, whose result is kept under this key."""
        return None if self.trained_at is None else pieces_of(piece_of(self.trained_at / key), label, until, what, self.started)

    def forget(self, key: str) -> None:
        """Remove what `pieces` kept under this key."""
        if self.trained_at is not None:
            remove(piece_of(self.trained_at / key))

    def check_time(self) -> None:
        """Raise `Stopped` when `max_seconds` have passed."""
        if monotonic() > self.deadline:
            raise Stopped("max_seconds")

    @cached_property
    def last(self) -> Evaluator:
        """The evaluator of the points at the end."""
        return self.plain_evaluator(LAST_IMAGES, fits=True)

    @cached_property
    def choosers(self) -> list[Evaluator]:
        """The evaluators of all images that points are compared on in the end."""
        if self.kept is None:
            return [self.last]
        return [Evaluator(self.model, self.layout, split, self.batch_size, plain=True) for split in (self.data.search, self.kept)]

    def plain_evaluator(self, images: int, worth: str | None = None, fits: bool = False) -> Evaluator:
        """Return an evaluator of the model as the user has it, which repairs on so many images, more than the search takes,
        and fits batch norms if asked."""
        return Evaluator(self.model, self.layout, self.data.search, self.batch_size, plain=True, repair=str(self.config.repair),
                         calibration=calibration_images(self.config, self.data, self.batch_size, images),
                         worth=worth, objectives=self.objectives,
                         fitting=fitting_images(self.config, self.data, self.batch_size) if fits else None)


def late(until: float) -> bool:
    """Say whether a training has to stop, or none is begun."""
    return time() >= until + GRACE


def pieces_of(path: Path, label: str, until: float, what: str, started: Callable[[], None] = ignore) -> Pieces:
    """Return what keeps the state of something long in a file, every `SAVE_EVERY` seconds and where it stops: `GRACE` seconds
    after `until`, a time of day, which other processes know too. `label` is of all that decides what it becomes; `what` a message
    calls it; `started` is called when a state is kept.

    Its `keep` raises:
        Stopped: there was no time for all of it.
    """
    kept = time()
    start = read_kept(path, label)
    if start is not None:
        log.info("%s goes on after step %d", what, int(start["step"]))

    def keep(state: Callable[[], dict[str, Tensor]]) -> None:
        nonlocal kept
        if (over := late(until)) or time() - kept >= SAVE_EVERY:
            try:
                write_kept(path, label, state())
                started()
            except OSError as error:  # a full disk: the training itself goes on
                log.warning("%s: %s; the state of %s is not kept", path, error.strerror, what)
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


def fitting_images(config: Config, splits: Data, batch_size: int) -> Fitting | None:
    """Return what batch norms of the points are fitted on in the end, from the split that they are repaired on."""
    if config.repair != "least-squares":
        return None
    return Fitting.drawn(splits.train or splits.search, min(LAST_IMAGES, BATCHES * batch_size), config.split_seed)


def kept_apart(config: Config, net: nn.Module, splits: Data, old: Record | None) -> tuple[Config, Data, Split | None]:
    """Return the settings with what a plan keeps back for the last choice, the splits without that, and that.

    Raises:
        EvopruneError: more than half of the training images would be kept back.
    """
    config = with_choice(config, net, splits, old)
    count, most = config.choice_images or 0, 0 if splits.train is None else len(splits.train) // 2
    if count > most:
        raise EvopruneError(f"choice_images: found {count:,}, expected at most {most:,}, half of the training images")
    return config, *keep_back(config, splits)


def with_choice(config: Config, net: nn.Module, splits: Data, old: Record | None) -> Config:
    """Return the settings with how many training images a plan keeps back for the last choice, unless that is given: none where
    the model comes trained and knows them by heart."""
    if config.plan != AUTO or config.choice_images is not None or (old is not None and old.dense is not None):
        return config
    count = choice_for(splits.sizes())
    if count and not config.train_epochs:
        model, train = copied(net).to(splits.search.labels.device).eval(), splits.train
        assert train is not None
        known = score(model, calibration(train, count, config.split_seed), CHECKED) - score(model, splits.search, CHECKED)
        if known > BY_HEART:
            log.info("no training images are kept back for the last choice: the model knows them, and scores %.1f points more on "
                     "them than on the search images", 100 * known)
            count = 0
    return replace(config, choice_images=count or None)


def choice_for(images: Mapping[str, int]) -> int:
    """Return how many training images a plan keeps back, by how many images each split has."""
    count = min(MOST_CHOICE, int(CHOICE_SHARE * images["train"]))
    return count if images["search"] < FEW_SEARCH and count >= images["search"] else 0


def keep_back(config: Config, splits: Data) -> tuple[Data, Split | None]:
    """Return the splits without the training images that --choice-images keeps back, and these."""
    if not config.choice_images or splits.train is None:
        return splits, None
    count, there = config.choice_images, len(splits.train)
    rest = calibration(splits.train, there, config.split_seed, after=count)
    return Data(rest, splits.search, splits.test, classes=splits.classes), calibration(splits.train, count, config.split_seed)
