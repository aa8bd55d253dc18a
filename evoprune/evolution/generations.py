"""NSGA-II as a generator: a state goes in, the next state comes out (Deb et al., 2002, doi:10.1109/4235.996017).

Each generation draws from its own generator, seeded by (seed, generation), so a state needs to carry no random state:
whoever continues from it gets the same generations as whoever never stopped. What masks and trained individuals do not share,
`breed`, `measure` and `epochs`, is registered in the toolbox.
"""

from __future__ import annotations

import math
from collections import ChainMap
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any

import numpy as np
from deap import base

from ..config import Config
from ..errors import EvopruneError, shown
from ..masks.genome import Fitness, Individual, Measurement, Result
from ..objectives import Objectives
from .history import Log, Seen
from .selection import Values, non_dominated, values_of

RETRIES = 4  # further mutations of a child whose mask was measured before


@dataclass(frozen=True)
class State:
    """All that the next generation depends on."""

    generation: int
    population: list[Individual]
    archive: list[Individual]  # the unpruned model, every non-dominated individual seen, and first ones if `config.keeps_first`
    seen: Seen  # objectives of the masks measured, by Individual.key()
    log: Log  # a row a generation

    @property
    def evaluations(self) -> int:
        return self.seen.count


def begin(offspring: Sequence[Any], toolbox: base.Toolbox, config: Config, measured: Sequence[Individual] = (),
          started: float | None = None) -> State:
    """Return generation 0: what is `measured` already, then `offspring`, which are measured now; the unpruned model first. Its
    seconds count from when its masks were begun, `started` by `perf_counter`, or from now."""
    seen: dict[bytes, Values] = {}
    started = perf_counter() if started is None else started
    population = [*measured, *toolbox.measure(offspring, seen=seen)]
    archive = non_dominated(population, config.accuracy_floor, always=population[0])
    if config.choice_images:  # all but what was given up
        archive = [population[0], *(each for each in population[1:] if each.fitness.values != each.fitness.objectives.worst)]
    state = State(0, population, archive, Seen().and_then(seen), Log())
    return replace(state, log=state.log.and_then(log_row(state, toolbox, config, perf_counter() - started)))


def evolve(state: State, toolbox: base.Toolbox, config: Config) -> Iterator[State]:
    """Yield a state a generation, up to `config.generations`; saving, logging and stopping belong to the caller."""
    while state.generation < config.generations:
        started = perf_counter()
        rng = np.random.default_rng((config.seed, state.generation + 1))
        new: dict[bytes, Values] = {}
        seen: MutableMapping[bytes, Values] = ChainMap(new, state.seen)  # type: ignore[arg-type]  # writes to the first alone
        children = toolbox.measure(toolbox.breed(state, rng=rng), seen=seen)
        survivors = toolbox.survive(state.population + children, config.population, rng=rng)
        archive = non_dominated(state.archive + children, config.accuracy_floor, always=state.archive[0])
        if config.keeps_first:
            first = [each for each in (*state.archive, *children) if not each.generation or
                     (config.total_epochs is not None and toolbox.inherits(each.generation))]
            archive += [each for each in first if not any(each is kept for kept in archive)]
        state = State(state.generation + 1, survivors, archive, state.seen.and_then(new), state.log)
        row = log_row(state, toolbox, config, state.log[-1]["seconds"] + perf_counter() - started)
        state = replace(state, log=state.log.and_then(row))
        yield state


def breed(state: State, rng: np.random.Generator, toolbox: base.Toolbox, size: int) -> list[Individual]:
    """Return the children of the next generation, masks still to be measured."""
    parents = toolbox.select(state.population, size, rng=rng)
    return vary(parents, toolbox, rng, state.seen, state.generation + 1)


def vary(parents: Sequence[Individual], toolbox: base.Toolbox, rng: np.random.Generator, seen: Mapping[bytes, Values],
         generation: int) -> list[Individual]:
    """Return a child a parent: neighbours along the axis mate (p = 0.7), then one in two mutates, and always those that
    would otherwise be a mask measured before."""
    children = [toolbox.clone(parent) for parent in sorted(parents, key=lambda p: p.fitness.axis)]
    mated = np.zeros(len(children), bool)
    for i in range(0, len(children) - 1, 2):
        if rng.random() < 0.7:
            toolbox.mate(children[i], children[i + 1], rng=rng)
            mated[i:i + 2] = True
    born: set[bytes] = set()
    for child, origin in zip(children, np.where(mated, "mate", "")):
        origins = [origin] if origin else []
        if rng.random() < 0.5 or child.key() in born or child.key() in seen:
            toolbox.mutate(child, rng=rng)
            origins.append("mutate")
        toolbox.simplify(child)
        for _ in range(RETRIES):
            if child.key() not in born and child.key() not in seen:
                break
            toolbox.mutate(child, rng=rng)
            toolbox.simplify(child)
        born.add(child.key())
        child.origin, child.generation = "+".join(origins), generation
        del child.fitness.values
    return children


def measure(individuals: Sequence[Individual], seen: MutableMapping[bytes, Values], toolbox: base.Toolbox,
            objectives: Objectives) -> list[Individual]:
    """Give each individual its objectives, measuring only masks that are not in `seen`, and each of those once; return them.

    Where `toolbox.evaluate` returns a `Result`, also the mask that was measured and what its children inherit.
    """
    keys = [(individual.key(), individual) for individual in individuals]
    new = {key: individual for key, individual in reversed(keys) if key not in seen}
    measured = toolbox.map(toolbox.evaluate, list(new.values()))
    results = {key: as_result(found, objectives) for key, found in zip(new, measured)}
    for key, individual in keys:
        result = results.get(key) or Result(seen[key])
        if result.bits is not None:
            individual[:] = [bits.copy() for bits in result.bits]
        if result.saliency is not None:
            individual.saliency = dict(result.saliency)
        if result.values is not None:
            individual.values = dict(result.values)
        individual.fitness = Fitness(result.objectives, objectives)
    for key, result in results.items():
        seen[new[key].key()] = result.objectives
    return list(individuals)


def as_result(found: Measurement | None, objectives: Objectives) -> Result:
    """Return what an evaluation returned as a `Result` of plain floats, the worst ones if no worker survived it.

    Raises:
        EvopruneError: it is not a finite number an objective, of one that is a share from 0 to 1.
    """
    result = found if isinstance(found, Result) else Result(objectives.worst if found is None else found)
    try:
        values = tuple(map(float, result.objectives))
    except (TypeError, ValueError):
        values = ()
    if len(values) != len(objectives) or not all(map(math.isfinite, values)):
        raise EvopruneError(f"toolbox: evaluate returned {shown(result.objectives)}, expected {len(objectives)} finite numbers, "
                            f"one an objective")
    if not all(0 <= value <= 1 for value, objective in zip(values, objectives) if objective.percent):
        raise EvopruneError(f"toolbox: evaluate returned {shown(result.objectives)}, expected shares from 0 to 1")
    return replace(result, objectives=values)


def no_epochs(state: State) -> int:
    """Return the epochs that a search of masks has trained."""
    return 0


def log_row(state: State, toolbox: base.Toolbox, config: Config, seconds: float) -> dict[str, float]:
    """Return a row of the log: how good the archive is, and what it took."""
    points = non_dominated(state.archive, config.accuracy_floor)
    objectives = state.archive[0].fitness.objectives
    values = values_of(points, objectives)
    extremes = {o.logged: o.best_of(column) for o, column in zip(objectives, values.T)}
    return {"generation": state.generation, "evaluations": state.evaluations, "epochs": toolbox.epochs(state),
            "seconds": round(seconds, 3), "hvlog": objectives.hvlog(values), "points": len(points), **extremes}
