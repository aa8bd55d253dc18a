"""NSGA-II as a generator: a state goes in, the next state comes out (Deb et al., 2002, doi:10.1109/4235.996017).

Each generation draws from its own generator, seeded by (seed, generation), so a state needs to carry no random state:
whoever continues from it gets the same generations as whoever never stopped.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from time import perf_counter
from typing import Any

import moocore
import numpy as np
import numpy.typing as npt
from deap import base

from .config import Config
from .engines import local
from .genome import Individual, Result
from .layers import Layout
from .operators import mate, mutate, mutate_genes, refine, unite
from .saliency import SALIENCIES, logarithm

Values = tuple[float, float]  # (accuracy, sparsity)
Floats = npt.NDArray[np.float64]
SPARSE, DENSE = 0.005, 0.5  # the densities between which hvlog looks
WORST = 0.0, 0.0  # objectives of a mask that no worker survived measuring
RETRIES = 4  # further mutations of a child whose mask was measured before


@dataclass(frozen=True)
class State:
    """All that the next generation depends on."""

    generation: int
    population: list[Individual]
    archive: list[Individual]  # every non-dominated individual seen, and the unpruned model first
    seen: dict[bytes, Values]  # objectives of every mask measured, by Individual.key()
    log: tuple[dict[str, float], ...]  # a row a generation

    @property
    def evaluations(self) -> int:
        return len(self.seen)


def default_toolbox(evaluate: Any, layout: Layout, config: Config) -> base.Toolbox:
    """Return DEAP's toolbox with evoprune's operators; register others to change the search."""
    toolbox = base.Toolbox()
    repaired = config.total_epochs is None and config.repair == "least-squares"
    toolbox.register("clone", Individual.clone)
    if config.total_epochs is not None:  # training decides which weights a child loses, its genes how it trains
        toolbox.register("mate", unite)
        toolbox.register("mutate", mutate_genes)
    elif repaired and config.knowledge != "none" and hasattr(evaluate, "weights"):  # blind ones win elsewhere: LOG.md
        toolbox.register("mate", mate, p=0.2, uniform=0.0, layout=layout)
        toolbox.register("mutate", refine, layout=layout, growth=[
            logarithm(score).numpy() for score in SALIENCIES["lamp"](evaluate.weights, None)])
    else:
        toolbox.register("mate", mate)
        toolbox.register("mutate", mutate, layout=layout)
    toolbox.register("simplify", getattr(evaluate, "simplify", leave))  # before an individual is measured
    toolbox.register("select", tournament, niches=repaired)
    toolbox.register("survive", nsga2, floor=config.accuracy_floor, niches=repaired)
    toolbox.register("evaluate", evaluate)
    toolbox.register("map", local)  # `prune` puts the engine's map here
    return toolbox


def leave(individual: Individual) -> None:
    """Leave an individual as it is."""


def begin(population: list[Individual], toolbox: base.Toolbox, config: Config) -> State:
    """Measure the first population and return generation 0; its first individual is the unpruned model."""
    seen: dict[bytes, Values] = {}
    started = perf_counter()
    for individual in population:
        toolbox.simplify(individual)
    assign(population, seen, toolbox)
    archive = non_dominated(population, config.accuracy_floor, always=population[0])
    return State(0, population, archive, seen, (log_row(0, archive, seen, config, perf_counter() - started),))


def evolve(state: State, toolbox: base.Toolbox, config: Config) -> Iterator[State]:
    """Yield a state a generation, up to `config.generations`; saving, logging and stopping belong to the caller."""
    while state.generation < config.generations:
        started, generation = perf_counter(), state.generation + 1
        rng = np.random.default_rng((config.seed, generation))
        seen = dict(state.seen)
        parents = toolbox.select(state.population, config.population, rng=rng)
        children = vary(parents, toolbox, rng, seen, generation)
        assign(children, seen, toolbox)
        survivors = toolbox.survive(state.population + children, config.population, rng=rng)
        archive = non_dominated(state.archive + children, config.accuracy_floor, always=state.archive[0])
        row = log_row(generation, archive, seen, config, state.log[-1]["seconds"] + perf_counter() - started)
        state = replace(state, generation=generation, population=survivors, archive=archive, seen=seen,
                        log=(*state.log, row))
        yield state


def vary(parents: Sequence[Individual], toolbox: base.Toolbox, rng: np.random.Generator, seen: dict[bytes, Values],
         generation: int) -> list[Individual]:
    """Return a child a parent: neighbours in sparsity mate (p = 0.7), then one in two mutates, and always those that
    would otherwise be a mask measured before."""
    children = [toolbox.clone(parent) for parent in sorted(parents, key=lambda p: p.fitness.values[1])]
    mated = np.zeros(len(children), bool)
    for i in range(0, len(children) - 1, 2):
        if rng.random() < 0.7:
            toolbox.mate(children[i], children[i + 1], rng=rng)
            mated[i:i + 2] = True
    keys = set(seen)
    for child, origin in zip(children, np.where(mated, "mate", "")):
        origins = [origin] if origin else []
        if rng.random() < 0.5 or child.key() in keys:
            toolbox.mutate(child, rng=rng)
            origins.append("mutate")
        toolbox.simplify(child)
        for _ in range(RETRIES):
            if child.key() not in keys:
                break
            toolbox.mutate(child, rng=rng)
            toolbox.simplify(child)
        keys.add(child.key())
        child.origin, child.generation = "+".join(origins), generation
        del child.fitness.values
    return children


def assign(individuals: Iterable[Individual], seen: dict[bytes, Values], toolbox: base.Toolbox) -> None:
    """Give each individual its objectives, measuring only masks that are not in `seen`, and each of those once.

    Where `toolbox.evaluate` returns a `Result`, also the mask that was measured and what its children inherit.
    """
    keys = [(individual.key(), individual) for individual in individuals]
    new = {key: individual for key, individual in reversed(keys) if key not in seen}
    results = dict(zip(new, map(as_result, toolbox.map(toolbox.evaluate, list(new.values())))))
    for key, individual in keys:
        result = results.get(key) or Result(seen[key])
        if result.bits is not None:
            individual[:] = [bits.copy() for bits in result.bits]
        if result.inherited is not None:
            individual.inherited = dict(result.inherited)
        individual.fitness.values = result.objectives
    for key, result in results.items():
        seen[new[key].key()] = result.objectives


def as_result(found: Result | Values | None) -> Result:
    """Return what an evaluation returned as a `Result` of plain floats; None if no worker survived it."""
    result = found if isinstance(found, Result) else Result(WORST if found is None else found)
    accuracy, sparsity = result.objectives
    return replace(result, objectives=(float(accuracy), float(sparsity)))


def objectives(individuals: Sequence[Individual]) -> Floats:
    """Return (n, 2): accuracy, sparsity. Read from wvalues: the weights are 1, and `values` divides by them each time."""
    flat = chain.from_iterable(individual.fitness.wvalues for individual in individuals)
    return np.fromiter(flat, float, 2 * len(individuals)).reshape(-1, 2)


def in_log_density(values: Floats) -> Floats:
    """Return objectives with the logarithm of the density for the sparsity: crowding then leaves no sparsity empty."""
    return np.column_stack([values[:, 0], -np.log(np.maximum(1 - values[:, 1], SPARSE / 2))])


def rank_and_crowding(values: Floats, floor: float) -> tuple[npt.NDArray[np.int64], Floats]:
    """Return the non-domination rank (0 best) and the crowding distance of each of (n, 2) maximised values.

    Constraint domination: whatever is below the floor comes after everything above it, by accuracy (Deb et al., 2002, VI).
    """
    ranks = np.empty(len(values), np.int64)
    fits = values[:, 0] >= floor
    if fits.any():
        ranks[fits] = moocore.pareto_rank(values[fits], maximise=True)
    _, missed = np.unique(-values[~fits, 0], return_inverse=True)
    ranks[~fits] = missed + 1 + (ranks[fits].max() if fits.any() else -1)
    crowding = np.zeros(len(values))
    for column in values.T:
        order = np.lexsort((column, ranks))  # front after front, each by the column
        rank, value = ranks[order], column[order]
        new = np.append(True, rank[1:] != rank[:-1])
        first, last = np.flatnonzero(new), np.append(np.flatnonzero(new)[1:], len(new)) - 1
        span = np.repeat(value[last] - value[first], last - first + 1)
        gap = np.append(value[1:], 0) - np.append(0, value[:-1])  # from the neighbour below to the one above
        distance = np.divide(gap, span, out=np.zeros(len(gap)), where=span > 0)
        distance[first] = distance[last] = np.inf
        crowding[order] += distance
    return ranks, crowding


def nsga2(individuals: Sequence[Individual], k: int, rng: np.random.Generator | None = None,
          floor: float = 0.0, niches: bool = False) -> list[Individual]:
    """Return the k best by rank, then crowding distance; a copy of a mask counts once while there are others.

    The result of DEAP's `selNSGA2`, vectorised: 5 to 50 times as fast with two objectives. With `niches`, crowding is
    measured in log density.
    """
    values = objectives(individuals)
    copies = copies_among(individuals, values)
    copies = copies[max(0, k - (len(individuals) - len(copies))):]  # some are needed to make k
    pool = np.delete(np.arange(len(individuals)), copies)
    ranks, crowding = rank_and_crowding(in_log_density(values[pool]) if niches else values[pool], floor)
    return [individuals[i] for i in pool[np.lexsort((-crowding, ranks))[:k]]]


def copies_among(individuals: Sequence[Individual], values: Floats) -> list[int]:
    """Return the places of individuals whose mask stands at an earlier place too; only equal objectives are looked into."""
    order = np.lexsort(values.T)
    equal = np.all(values[order][1:] == values[order][:-1], axis=1)
    suspects = np.sort(order[np.append(equal, False) | np.append(False, equal)])
    seen: set[bytes] = set()
    copies = []
    for i in suspects:
        key = individuals[i].key()
        if key in seen:
            copies.append(int(i))
        seen.add(key)
    return copies


def tournament(individuals: Sequence[Individual], k: int, rng: np.random.Generator, floor: float = 0.0,
               niches: bool = False) -> list[Individual]:
    """Return k winners of binary tournaments on rank, then crowding distance."""
    values = objectives(individuals)
    ranks, crowding = rank_and_crowding(in_log_density(values) if niches else values, floor)
    place = np.empty(len(individuals), np.int64)
    place[np.lexsort((-crowding, ranks))] = np.arange(len(individuals))
    pairs = rng.integers(len(individuals), size=(k, 2))
    return [individuals[a if place[a] <= place[b] else b] for a, b in pairs]


def non_dominated(individuals: Sequence[Individual], floor: float = 0.0,
                  always: Individual | None = None) -> list[Individual]:
    """Return those that no other dominates and that reach the floor, by sparsity, equal objectives once; `always` first."""
    values = objectives(individuals)
    order = np.lexsort((values[:, 0], values[:, 1]))[::-1]  # sparsest first, of equally sparse ones the more accurate
    kept, best = [], -1.0
    for i in order:
        if values[i, 0] > best:
            best = values[i, 0]
            if best >= floor and individuals[i] is not always:
                kept.append(individuals[i])
    return ([always] if always is not None else []) + kept[::-1]


def hvlog(values: Floats) -> float:
    """Return the mean accuracy of a front over log density from 0.5 to 0.005; at each density the best point at or
    below it counts, 0 if there is none. `values` is (n, 2): accuracy, sparsity; dominated points change nothing."""
    density = np.clip(1 - values[:, 1], SPARSE, None)
    order = np.argsort(density, kind="stable")
    density, best = density[order], np.maximum.accumulate(values[order, 0]) if len(values) else values[:, 0]
    inside = density < DENSE
    edges = np.log(np.append(density[inside], DENSE))
    return float((best[inside] * np.diff(edges)).sum() / np.log(DENSE / SPARSE))


def log_row(generation: int, archive: Sequence[Individual], seen: dict[bytes, Values], config: Config,
            seconds: float) -> dict[str, float]:
    """Return a row of log.csv: how good the archive is, and what it took."""
    points = non_dominated(archive, config.accuracy_floor)
    values = objectives(points)
    return {"generation": generation, "evaluations": len(seen), "epochs": 0, "seconds": round(seconds, 3),
            "hvlog": hvlog(values), "points": len(points), "best_accuracy": float(values[:, 0].max(initial=0)),
            "max_sparsity": float(values[:, 1].max(initial=0))}
