"""The search of one run, of masks or of trained individuals: from the newest checkpoint or generation 0 to the last generation,
saving and telling on the way.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from time import monotonic, perf_counter
from typing import Any

import numpy as np
import torch
from deap import base
from torch import Tensor

from ..engines.engine import Engine, Local, local
from ..engines.worker import ignore
from ..errors import Stopped
from ..evaluation.evaluator import Evaluator
from ..evolution.budget import Budget, budget_of, kept_at_targets, seeded_budget
from ..evolution.checkpoint import load, save
from ..evolution.generations import State, as_result, begin, evolve
from ..evolution.starts import Known, at_targets, first_population
from ..evolution.tuned import Job
from ..files import remove, uninterrupted
from ..masks.genome import Fitness, Individual, Measurement, dense_individual
from ..masks.saliency import gene_scores, gradient_squares
from ..masks.tensors import masks
from ..objectives import Objectives
from ..results.written import TRAINED
from ..rules import SURGEON, read_method
from ..values.inherited import packed, unpacked
from ..values.repair import PATH_IMAGES
from ..values.training import recipe_for
from .progress import SearchProgress, progress_of
from .run import Run

SLOW = 1.0  # seconds for which masks are measured together, before what there is may be kept
SAVE_EVERY = 1.0  # seconds between checkpoints: a generation can be shorter than the write that saves it
FISHER_IMAGES, FISHER_BATCH = 4096, 16  # of the mean squared gradients
log = logging.getLogger("evoprune")


def search(run: Run, toolbox: base.Toolbox, checkpoint: Path, mapping: Callable[..., list[Any]],
           found: Sequence[Individual] = ()) -> Iterator[State]:
    """Yield the states of a search, from the newest in the folder `checkpoint`, or the first, to the last; save them there.

    `mapping(function, items, progress=)` runs evaluations, unless the toolbox has a map of its own; `found` are the individuals
    that --refine-epochs starts from.

    Raises:
        Stopped: `max_seconds` have passed.
    """
    config, trains = run.config, run.config.total_epochs is not None
    if trains:
        budget = plan_jobs(run, toolbox, found)
        planned = budget.epochs
        if config.generations:  # as many as there really are: of a line each child is one
            config = replace(config, generations=budget.generations)
            run = replace(run, config=config)
    else:
        planned = plan_masks(run, toolbox)
    state = load(checkpoint, run.layout, run.objectives, run.identity)
    started = perf_counter()
    measured, offspring = toolbox.first() if state is None else ([], [])
    done = 0 if state is None else state.log[-1]["epochs" if trains else "evaluations"]
    if state is not None and not trains:
        planned = done + config.population * (config.generations - state.generation)
    progress = SearchProgress(config.generations, planned, trains, done, run.objectives)  # its clock starts with the first masks
    if toolbox.map.func in (map, local):  # whoever registered another keeps it
        toolbox.register("map", mapping, progress=progress.evaluated)
    if state is None:
        if measured and offspring:
            yield begin([], toolbox, config, measured, started)  # all there is if measuring the others is stopped
        state = begin(offspring, toolbox, config, measured, started)
        with uninterrupted():  # whoever stops the run here has its first front
            save(checkpoint, state, run.identity)
            yield state
    else:
        yield state
    tell(run, state, progress)
    yield from generations_in_time(run, state, toolbox, checkpoint, progress)


def generations_in_time(run: Run, state: State, toolbox: base.Toolbox, checkpoint: Path,
                        progress: SearchProgress) -> Iterator[State]:
    """Yield the states that follow, as long as there is time for one more; save on the way and, however this ends, the last."""
    saved, longest = monotonic(), 0.0
    generations = evolve(state, toolbox, run.config)
    try:
        while state.generation < run.config.generations:
            started = monotonic()
            if longest and started + longest > run.deadline:  # one goes on, however long it took to get here
                raise Stopped("max_seconds")
            state = next(generations)
            longest = max(longest, monotonic() - started)
            yield state  # before anything that a signal may interrupt
            tell(run, state, progress)
            if monotonic() - saved >= SAVE_EVERY:
                save(checkpoint, state, run.identity)
                remove(checkpoint / TRAINED)  # jobs of this generation, which is whole now
                saved = monotonic()
    finally:
        save(checkpoint, state, run.identity)


def tell(run: Run, state: State, progress: SearchProgress) -> None:
    """Say how the archive stands, to whoever looks and to whoever asked."""
    progress.generation(state.log[-1], [individual.fitness.values for individual in state.archive])
    if run.on_generation is not None:
        run.on_generation(dict(state.log[-1]))


def map_measured(function: Callable[[Individual], Measurement], individuals: Sequence[Individual], evaluate: Any,
                 engine: Local | Engine, run: Run, progress: Callable[[int, int], None] = ignore) -> list[Measurement | None]:
    # 6 arguments: four are registered
    """Return what individuals measure, in order, None where that was given up; where it takes long, what there is is kept now and
    then, so that a resumed run need not repeat it. Any other function than `evaluate` is mapped as it is.

    Raises:
        Stopped: `max_seconds` have passed before the last of them.
    """
    if function is not evaluate:
        return engine.map(function, individuals, progress=progress)
    name = f"masks-{run.identity[:16]}"
    pieces = run.pieces(name, run.identity, run.until, "measuring masks")
    found = {} if pieces is None or pieces.start is None else all_unpacked(pieces.start)
    keys = [individual.key().hex() for individual in individuals]  # now: measuring may change them
    missing = [(key, individual) for key, individual in zip(keys, individuals) if key not in found]
    items, done = [individual for _, individual in missing], 0

    def arrived(i: int, measured: Measurement | None) -> None:
        nonlocal done
        found[missing[i][0]] = measured
        done += 1
        if done < len(items) and pieces is not None and isinstance(engine, Engine):
            pieces.keep(partial(all_packed, found, run.objectives))

    def further(before: int, more: int, of: int) -> None:
        progress(before + more, len(items))

    if isinstance(engine, Engine):
        engine.map(function, items, arrived, progress)
    count = 1  # that are measured together: as many as take about `SLOW` seconds
    while done < len(items):
        started, first = monotonic(), done
        for i, measured in enumerate(local(function, items[first:first + count], partial(further, first))):
            arrived(first + i, measured)
        if done < len(items) and pieces is not None:
            pieces.keep(partial(all_packed, found, run.objectives))
        count = 2 * count if monotonic() - started < SLOW else max(1, count // 2)
    run.forget(name)
    return [found[key] for key in keys]


def all_packed(found: Mapping[str, Measurement | None], objectives: Objectives) -> dict[str, Tensor]:
    """Return what masks measured, by key, as tensors."""
    named = {f"{key}/{name}": value for key, measured in found.items()
             for name, value in packed(as_result(measured, objectives)).items()}
    return {"step": torch.tensor(len(found)), **named}


def all_unpacked(state: Mapping[str, Tensor]) -> dict[str, Measurement | None]:
    """Return what masks measured, which `all_packed` took apart."""
    parts: dict[str, dict[str, Tensor]] = {}
    for name, value in state.items():
        key, _, rest = name.partition("/")
        if rest:
            parts.setdefault(key, {})[rest] = value
    return {key: unpacked(tensors) for key, tensors in parts.items()}


def plan_masks(run: Run, toolbox: base.Toolbox) -> int:
    """Register the first masks; return how many masks are planned."""
    config = run.config
    toolbox.register("first", first_masks, run, toolbox)
    if read_method(config.method).kind != "evolve":
        return 1 + len(kept_at_targets(config, run.layout))
    return config.population * (config.generations + 1)


def first_masks(run: Run, toolbox: base.Toolbox) -> tuple[list[Individual], list[Individual]]:
    """Return what is measured already, nothing, and the first masks: those of --start or of the rule of --method."""
    config = run.config
    if read_method(config.method).kind != "evolve":
        population = [dense_individual(run.layout), *rule_masks(run)]
    else:
        log.info("making the first %d masks: %s", config.population, config.start)
        population = first_population(known(run), config.start, config.population, np.random.default_rng((config.seed, 0)))
    for individual in population:
        toolbox.simplify(individual)
    return [], population


def plan_jobs(run: Run, toolbox: base.Toolbox, found: Sequence[Individual]) -> Budget:
    """Register the first jobs and how long each trains; return that."""
    config = run.config
    assert run.data.train is not None
    budget = (seeded_budget if found else budget_of)(config, len(run.data.train), recipe_for(run.model, 0, 0).batch_size)
    log.info("%s: %g epochs in all, %d jobs of %d steps%s%s", "training" if found else config.method, budget.epochs, budget.first,
             budget.of(0), ", each from the one before" if budget.line else "",
             f", then {budget.jobs - budget.first} of {budget.of(budget.jobs - 1)}" if budget.jobs > budget.first else "")
    toolbox.register("steps", budget.of)
    toolbox.register("before", budget.before)
    toolbox.register("inherits", budget.inherits)
    toolbox.register("epochs", budget.spent)
    toolbox.register("first", first_jobs, run, toolbox, budget, found)
    return budget


def first_jobs(run: Run, toolbox: base.Toolbox, budget: Budget,
               found: Sequence[Individual]) -> tuple[list[Individual], list[Job]]:
    """Return the dense model, which costs nothing, and the jobs of what was found, or of a rule, if one makes the masks."""
    dense = dense_individual(run.layout)
    dense.fitness = Fitness(run.objectives.measured(run.dense.score, dense, run.layout), run.objectives)
    kind = read_method(run.config.method).kind
    if found:
        return [dense], toolbox.seeds(found, budget=budget)
    if kind == "evolve":
        return [dense], []
    return [dense], toolbox.jobs([] if kind == "gradual" else rule_masks(run), budget=budget)


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

    def repaired(individual: Individual) -> list[Tensor]:
        run.evaluator.simplify(individual)
        if config.worth != SURGEON:
            return [w * mask for w, mask in zip(weights(), masks(individual, run.layout))]
        repairing().set_masks(individual)
        return [parameter.detach().float().cpu().clone() for parameter, _ in repairing().masked]

    def worth(values: Sequence[Tensor]) -> list[Tensor]:
        if config.worth != SURGEON:
            return gene_scores("lamp", run.layout, values)
        return repairing().saliency()

    @cache
    def repairing() -> Evaluator:
        log.info("looking at the dense model on up to %s images: what its layers make, what outputs feel", f"{PATH_IMAGES:,}")
        return run.plain_evaluator(PATH_IMAGES, config.worth)

    path = "the multi-shot path"
    return Known(run.layout, weights, squares, repaired, worth, lambda: run.evaluator.channels, config.shots,
                 progress_of(path, "steps"), lambda: run.pieces(f"path-{run.identity[:16]}", run.identity, run.until, path))
