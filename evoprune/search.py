"""The search of one run: from the newest checkpoint or the first masks to the last generation, saving and telling."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from time import monotonic

import numpy as np
from deap import base
from torch import Tensor

from .checkpoint import Folder, load, remove, save
from .config import Config
from .engines import Engine, Local, local
from .evaluation import Evaluator, masks
from .evolution import State, begin, evolve
from .genome import Individual, dense_individual
from .jobs import map_kept
from .repair import PATH_IMAGES
from .run import Run, TimeUp, clock
from .saliency import SALIENCIES, gradient_squares
from .starts import Known, at_targets, first_population
from .tuned import Budget, begin_rules, begin_tuned, budget_of, evolve_tuned, kept_at_targets, rule_jobs
from .tuning import recipe_for

SAVE_EVERY = 1.0  # seconds between checkpoints: a generation can be shorter than the write that saves it
FISHER_IMAGES, FISHER_BATCH = 4096, 16  # of the mean squared gradients
SAY_EVERY = 3.0  # seconds between lines of progress
log = logging.getLogger("evoprune")


def search(run: Run, toolbox: base.Toolbox, checkpoint: Path, engine: Local | Engine) -> tuple[State, str]:
    """Return the last whole state, and why the search stopped early ("" if it did not).

    Goes on from the newest state in the folder `checkpoint`, and saves there.
    """
    config = run.config
    state = load(checkpoint, run.layout, run.identity)
    if state is None:
        if config.method == "evolve":
            log.info("making the first %d masks: %s", config.population, config.start)
            population = first_population(known(run), config.start, config.population, np.random.default_rng((config.seed, 0)))
        else:
            population = [dense_individual(run.layout), *rule_masks(run)]
    progress = Progress(config, 0 if state is None else state.evaluations)
    run.evaluator.progress = progress.evaluated
    if toolbox.map.func in (map, local):  # whoever registered another keeps it
        toolbox.register("map", engine.map, progress=progress.evaluated)
    if state is None:
        state = begin(population, toolbox, config)
        save(checkpoint, state, run.identity)
    progress.generation(state)
    return go_on(run, state, evolve(state, toolbox, config), checkpoint, progress)


def search_tuned(run: Run, toolbox: base.Toolbox, folder: Folder, engine: Local | Engine) -> tuple[State, str]:
    """Return the last whole state of a tuned run, and why it stopped early ("" if it did not).

    Goes on from the newest state of the folder; jobs of the generation in hand that have ended are kept too.
    """
    config, checkpoint = run.config, folder.checkpoint
    assert run.data.train is not None
    budget = budget_of(config, len(run.data.train), recipe_for(run.model, 0, 0).batch_size)
    log.info("%s: %g epochs in all, %d jobs of %d steps%s", config.method, budget.epochs, budget.first, budget.of(0),
             f", then {budget.jobs - budget.first} of {budget.of(budget.jobs - 1)}" if budget.jobs > budget.first else "")
    if toolbox.map.func in (map, local):
        toolbox.register("map", map_kept, engine, folder, run)
    state = load(checkpoint, run.layout, run.identity)
    if state is None:
        state = begin_tuned(config, run.layout, run.dense_accuracy)
        if config.method != "evolve":
            masks = [] if config.method.startswith("gradual") else rule_masks(run)
            try:
                state = begin_rules(state, rule_jobs(masks, config, run.layout, budget), toolbox, config, budget)
            except TimeUp:
                return state, "max_seconds"
    progress = TunedProgress(config, budget, state)
    return go_on(run, state, evolve_tuned(state, toolbox, config, run.layout, budget), checkpoint, progress)


def go_on(run: Run, state: State, generations: Iterator[State], checkpoint: Path,
          progress: Progress | TunedProgress) -> tuple[State, str]:
    """Return the last whole state, saving and telling on the way, and why it stopped early ("" if it did not)."""
    saved, stopped, longest = monotonic(), "", 0.0
    try:
        while not stopped:
            started = monotonic()
            if started + longest > run.deadline and state.generation < run.config.generations:
                stopped = "max_seconds"
            elif (following := next(generations, None)) is None:
                break
            else:
                state = following
                longest = max(longest, monotonic() - started)
                progress.generation(state)
                if monotonic() - saved >= SAVE_EVERY:
                    save(checkpoint, state, run.identity)
                    remove(checkpoint / "trained")  # jobs of this generation, which is whole now
                    saved = monotonic()
    except KeyboardInterrupt:  # the generation in hand is dropped
        stopped = "interrupted"
    except TimeUp:
        stopped = "max_seconds"
    save(checkpoint, state, run.identity)
    return state, stopped


def rule_masks(run: Run) -> list[Individual]:
    """Return the masks of --method at --targets."""
    return at_targets(known(run), run.config.method, kept_at_targets(run.config, run.layout), run.config.seed)


def known(run: Run) -> Known:
    """Return what the rules of the first masks may look at, read when they ask for it."""
    config, names = run.config, [layer.name for layer in run.layout]

    def weights() -> list[Tensor]:
        assert config.knowledge != "none"
        return [run.model.get_parameter(name).detach().float() for name in names]

    def squares() -> list[Tensor]:
        assert config.knowledge == "data" and run.data.train is not None
        return [s.float().cpu() for s in gradient_squares(run.model, names, run.data.train, FISHER_BATCH, FISHER_IMAGES)]

    def settled(individual: Individual) -> list[Tensor]:
        run.evaluator.simplify(individual)
        if config.knowledge != "data" or config.repair != "least-squares":
            return [w * mask for w, mask in zip(weights(), masks(individual, run.layout))]
        careful().set_masks(individual)
        return [parameter.detach().float().cpu().clone() for parameter, _ in careful().masked]

    def worth(values: Sequence[Tensor]) -> list[Tensor]:
        if config.knowledge != "data" or config.repair != "least-squares":
            return SALIENCIES["lamp"](values, None)
        return careful().saliency()

    @cache
    def careful() -> Evaluator:
        return run.plain_evaluator(PATH_IMAGES)

    return Known(run.layout, weights, squares, settled, worth, lambda: run.evaluator.channels)


class Progress:
    """Says now and then how far the search is and how long the rest will take."""

    def __init__(self, config: Config, done: int):
        self.config, self.done, self.started_with = config, done, done
        self.planned = config.population * (config.generations + 1)
        self.started = self.said = monotonic()
        self.estimated = False

    def evaluated(self, i: int, of: int) -> None:
        """Count one more mask measured; `i` of `of` in this batch."""
        self.done += 1
        now = monotonic()
        if not self.estimated and (i == of or now - self.started >= SAY_EVERY):
            self.estimated, self.said = True, now
            each = (now - self.started) / (self.done - self.started_with)
            log.info("%.3g s a mask; the search of %s masks will take about %s", each, f"{self.planned:,}",
                     clock(each * (self.planned - self.started_with)))
        elif now - self.said >= 5 * SAY_EVERY:  # long generations
            self.said = now
            log.info("  %d of %d masks of this generation, %s left", i, of, self.left(now))

    def generation(self, state: State) -> None:
        """Say how the archive stands."""
        now, last = monotonic(), state.generation == self.config.generations
        if now - self.said >= SAY_EVERY or last or not state.generation:
            self.said = now
            row = state.log[-1]
            log.info("generation %d of %d: hvlog %.4f, %d points up to %.2f %% sparsity, %s masks%s", state.generation,
                     self.config.generations, row["hvlog"], row["points"], 100 * row["max_sparsity"],
                     f"{state.evaluations:,}", "" if last else f", {self.left(now)} left")

    def left(self, now: float) -> str:
        each = (now - self.started) / max(1, self.done - self.started_with)
        return clock(each * max(0, self.planned - self.done))


class TunedProgress:
    """Says after each generation how far a tuned run is and how long the rest will take."""

    def __init__(self, config: Config, budget: Budget, state: State):
        self.config, self.budget, self.begun, self.started = config, budget, state.log[-1]["epochs"], monotonic()

    def generation(self, state: State) -> None:
        """Say how the archive stands."""
        row = state.log[-1]
        done = row["epochs"] - self.begun
        left = (monotonic() - self.started) / max(done, 1e-9) * (self.budget.epochs - row["epochs"])
        log.info("generation %d of %d, %.3g of %g epochs: hvlog %.4f, %d points up to %.2f %% sparsity%s", state.generation,
                 self.config.generations, row["epochs"], self.budget.epochs, row["hvlog"], row["points"],
                 100 * row["max_sparsity"], f", {clock(left)} left" if done and left > 0 else "")
