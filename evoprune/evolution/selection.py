"""Who is better and who stays: ranks, crowding, tournaments, the front, and one number for it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import moocore
import numpy as np
import numpy.typing as npt

from ..masks.genome import Individual

Values = tuple[float, float]  # (accuracy, sparsity)
Floats = npt.NDArray[np.float64]
SPARSE, DENSE = 0.005, 0.5  # the densities between which hvlog looks


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
