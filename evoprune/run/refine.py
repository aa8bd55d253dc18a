"""--refine-epochs: what a search of masks found is trained, and the front is what stands out among all that was measured.

The simplest points are those of the rule that made the first masks, repaired. What evolution, or training, made joins where it is
better than the best simpler point of at least its sparsity, and by more than chance: of many that are measured on few images, the
best is partly lucky, and a change that helps nothing is not worth having. A few images say little of one point (so judged, digits
lose 0.5 to 1.3 points of test accuracy at 97 and 98 %), so all that a phase made is judged together, then each by its score.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch

from ..chance import paired_bootstrap, sign_test
from ..engines.engine import Engine, Local
from ..evolution.budget import seeded_budget
from ..evolution.generations import State
from ..evolution.selection import non_dominated
from ..evolution.toolbox import Make, made
from ..files import fingerprint
from ..inputs.splits import Split
from ..results.folder import Folder
from ..results.points import Pruned
from ..values.training import recipe_for
from .jobs import TrainChild, map_kept, sums_under
from .progress import progress_of
from .run import Run
from .search import search
from .settings import training_config

CHANCE = 0.1  # probability up to which a difference counts
REFINE = "refine"  # folder of its states, in checkpoint/
log = logging.getLogger("evoprune")


def trained(run: Run) -> Run:
    """Return the run as its training has it."""
    assert run.data.train is not None
    size = len(run.data.train), recipe_for(run.model, 0, 0).batch_size
    config = training_config(run.config, *size)
    line = seeded_budget(config, *size).line
    return replace(run, config=config, identity=fingerprint(run.identity, REFINE, *["line"] * line))


def refined(run: Run, state: State, toolbox: Make, folder: Folder, engine: Local | Engine) -> Iterator[State]:
    """Yield the states of the training of what a search found, from the newest that was saved to the last; none unless asked.

    Raises:
        Stopped: `max_seconds` have passed.
    """
    found = [each for each in non_dominated(state.archive, run.config.accuracy_floor) if each.origin != "dense"]
    if run.config.refine_epochs is None or not found:
        return
    training, tells = trained(run), run.on_generation
    if tells is not None:
        training = replace(training, on_generation=lambda row: tells(following(state, row)))
    checkpoint = folder.checkpoint / REFINE
    checkpoint.mkdir(exist_ok=True)
    mapping = partial(map_kept, engine=engine, folder=folder, run=run)
    evaluate = TrainChild(run.identity, run.until)
    yield from search(training, made(toolbox, evaluate, run.layout, training.config), checkpoint, mapping, found)


def rows_of(state: State, later: State | None) -> list[dict[str, float]]:
    """Return the rows of the log of a search, and of the training that followed, which go on where those end."""
    return [*state.log, *(following(state, row) for row in (later.log if later else ()))]


def following(state: State, row: dict[str, float]) -> dict[str, float]:
    """Return a row of what came after a search, counted from its start."""
    last = state.log[-1]
    return {**row, **{name: last[name] + row[name] for name in ("evaluations", "seconds")},
            "generation": last["generation"] + 1 + row["generation"]}


def joined(run: Run, groups: Sequence[Sequence[Pruned]]) -> list[Pruned]:
    """Return the points that stand out, of groups from the simplest on: all of the first, and of each other those that score more
    than the best before them of at least their sparsity, and no worse in any further objective, if the group as a whole does by
    more than chance; else those that do alone."""
    def score(point: Pruned) -> float:
        return point.measured.ranked[run.objectives.score]

    def rivals(point: Pruned, each: Pruned) -> bool:
        return each.density <= point.density and all(
            run.objectives[i].fits(each.measured.values[i], point.measured.values[i]) for i in run.objectives.others)

    stays, left, split = list(groups[0]), 0, run.data.search
    every, tell = [point for group in groups for point in group], progress_of("comparing points", "points")
    sums: dict[int, np.ndarray] = {}
    for point in every:
        tell(len(sums), len(every))
        sums[id(point)] = sums_of(run, point)
    for group in groups[1:]:
        best = {id(point): max((each for each in stays if rivals(point, each)), default=None, key=score) for point in group}
        pairs = [(sums[id(point)], sums[id(rival)]) for point in group if (rival := best[id(point)]) is not None]
        helps = bool(pairs) and better(np.concatenate([a for a, _ in pairs]), np.concatenate([b for _, b in pairs]), split)
        for point in group:
            rival = best[id(point)]
            if rival is None or (score(point) > score(rival) and (helps or better(sums[id(point)], sums[id(rival)], split))):
                stays.append(point)
            else:
                left += 1
    if left:
        log.info("points left out, which others are as good as, or worse by no more than chance: %d", left)
    return sorted(stays, key=lambda point: -point.density)


def sums_of(run: Run, point: Pruned) -> np.ndarray:
    """Return what the task makes of each image that points are compared on, (n, k); where some were kept back for that, note the
    score on all of them."""
    sums = torch.cat([sums_under(run, point, each) for each in run.choosers])
    if run.kept is not None:
        point.note(choice=run.data.search.task.score(sums.sum(0).tolist()))
    return sums.double().numpy()


def better(a: np.ndarray, b: np.ndarray, split: Split) -> bool:
    """Say whether `a` is better than `b`, on the same images, by more than chance."""
    if split.task.single:
        wins, losses = (int((x[:, 0] > y[:, 0]).sum()) for x, y in ((a, b), (b, a)))
        return wins > losses and sign_test(wins, losses) < CHANCE
    return paired_bootstrap(a, b, split.task.score) < CHANCE
