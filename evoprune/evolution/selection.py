"""Who is better and who stays: ranks, crowding, tournaments, the front. What is better, individuals' fitness says, all of one run
alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import moocore
import numpy as np
import numpy.typing as npt

from ..masks.genome import Individual
from ..objectives import Floats, Objectives

Values = tuple[float, ...]  # of the objectives


def values_of(individuals: Sequence[Individual], objectives: Objectives) -> Floats:
    """Return the values of the objectives, (n, objectives). Read from wvalues: `values` divides each time."""
    flat = chain.from_iterable(individual.fitness.wvalues for individual in individuals)
    found = np.fromiter(flat, float, len(objectives) * len(individuals)).reshape(-1, len(objectives))
    return found / objectives.weights


def rank_and_crowding(values: Floats, fits: npt.NDArray[np.bool_], score: int) -> tuple[npt.NDArray[np.int64], Floats]:
    """Return the non-domination rank (0 best) and the crowding distance of each of (n, objectives) maximised values.

    Constraint domination: what does not fit comes after everything that does, by its column `score` (Deb et al., 2002, VI).
    """
    ranks = np.empty(len(values), np.int64)
    if fits.any():
        ranks[fits] = moocore.pareto_rank(values[fits], maximise=True)
    _, missed = np.unique(-values[~fits, score], return_inverse=True)
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


def in_order(individuals: Sequence[Individual], values: Floats, floor: float, niches: bool) -> npt.NDArray[np.intp]:
    """Return the places of individuals from the best on: by rank, then crowding distance, with `niches` in log density."""
    objectives = individuals[0].fitness.objectives
    maximised = (objectives.spread(values) if niches else values) * objectives.weights
    ranks, crowding = rank_and_crowding(maximised, objectives.reaches(values, floor), objectives.score)
    return np.lexsort((-crowding, ranks))


def nsga2(individuals: Sequence[Individual], k: int, rng: np.random.Generator | None = None,
          floor: float = 0.0, niches: bool = False) -> list[Individual]:
    """Return the k best by rank, then crowding distance; a copy of a mask counts once while there are others.

    The result of DEAP's `selNSGA2`, vectorised: 5 to 50 times as fast with two objectives. With `niches`, crowding is
    measured in log density.
    """
    values = values_of(individuals, individuals[0].fitness.objectives)
    copies = copies_among(individuals, values)
    copies = copies[max(0, k - (len(individuals) - len(copies))):]  # some are needed to make k
    pool = np.delete(np.arange(len(individuals)), copies)
    return [individuals[i] for i in pool[in_order(individuals, values[pool], floor, niches)[:k]]]


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
    values = values_of(individuals, individuals[0].fitness.objectives)
    place = np.empty(len(individuals), np.int64)
    place[in_order(individuals, values, floor, niches)] = np.arange(len(individuals))
    pairs = rng.integers(len(individuals), size=(k, 2))
    return [individuals[a if place[a] <= place[b] else b] for a, b in pairs]


def non_dominated(individuals: Sequence[Individual], floor: float = 0.0,
                  always: Individual | None = None) -> list[Individual]:
    """Return those that no other dominates and that reach the floor, along the axis, of equal ones the last; `always` first."""
    if not individuals:
        return []
    objectives = individuals[0].fitness.objectives
    newest = individuals[::-1]
    values = values_of(newest, objectives)
    reached = objectives.reaches(values, floor)
    front = [newest[i] for i in objectives.front(values) if reached[i] and newest[i] is not always]
    return ([always] if always is not None else []) + front
