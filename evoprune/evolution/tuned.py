"""Tuned runs: a child inherits its parent's values, grows back some weights, trains, loses as many again, and is measured.

The first generation has a child of the dense model for each target. With few steps the first children are one line instead, from
the densest target to the sparsest, one a generation, so that the steps of all count. Later generations have few children, so that
lines of descent grow long, most of them where the front is weakest. A parent stands at the child's own target or at the next
denser one, and NSGA-II says who stays. How a child trains, its strategy, is inherited too and mutates: learning rate, growth,
pace of pruning, saliency, and when its mask comes to rest (population-based training; Jaderberg et al., 2017, arXiv:1711.09846).
The steps of all jobs together are the run's budget.
"""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from deap import base

from ..config import Config
from ..masks.genome import Fitness, Individual, Strategy, dense_individual, kept_weights
from ..masks.layout import Layout
from ..objectives import Objectives
from ..rules import read_method
from ..values.inherited import fit_values
from .budget import SEEDS, Budget, kept_at_targets
from .generations import State
from .selection import Values

# of a strategy: learning rate (times the usual one), growth (times the target's weights), and `Shrink`'s until, pace and mix
FIRST_STRATEGY = np.array([0.5, 4.0, 0.6, 4.0, 0.75])  # that of the first child of the first target,
LAST_STRATEGY = np.array([1.0, 8.0, 0.6, 4.0, 0.75])  # and of the last
LOW, HIGH = np.array([0.2, 1.5, 0.4, 1.0, 0.25]), np.array([2.0, 16.0, 0.85, 8.0, 1.0])
SPREAD = np.array([0.15, 0.2, 0.08, 0.2, 0.1])  # of the logarithm of the factor by which each mutates
DENSE_STEPS, SPARSE = 700, 0.1  # steps from which on, and share of weights up to which, that one is a child of the dense model
GENTLE = 0.5  # times the usual learning rate, from repaired values
SHORT = 5  # epochs a target, below which a rule's learning rate is the usual one, and from which on half of it
GOLDEN = 0.5 * (5**0.5 - 1)
OWN_NICHE = 0.9  # probability that a parent stands at the target itself, once something does


def unite(a: Individual, b: Individual, rng: np.random.Generator, p: float = 0.3) -> tuple[Individual, Individual]:
    """Let `a` keep what `b` keeps too, in each layer with probability `p`: for children that train before they lose as many
    weights again. Changes `a` in place and returns both."""
    for i in np.flatnonzero(rng.random(len(a)) < p):
        a[i] |= b[i]
    return a, b


def mutate_strategy(strategy: Strategy, rng: np.random.Generator) -> tuple[Strategy]:
    """Return a strategy, float of shape (5,), each number times a log-normal one and kept within its limits."""
    return (np.clip(strategy * np.exp(SPREAD * rng.normal(size=len(strategy))), LOW, HIGH),)


@dataclass(frozen=True)
class Job:
    """A child before its training, as plain data."""

    individual: Individual  # its mask and, unless it comes from the dense model, its values
    kept: int  # weights at the end
    steps: int
    seed: int
    learning_rate: float = 1.0  # times the usual one
    growth: float = 1.0  # times `kept`: how many weights its mask has before the first pruning, at least
    until: float = 0.7  # share of the steps after which the mask stays
    pace: float | None = None  # of the pruning; None: cubic
    mix: float = 1.0  # power of the mean squared gradients in the saliency
    saliency: str = "fisher"  # what is pruned first
    repaired: bool = False  # whether training starts from the mask's repaired values, in place of its own or the dense ones
    what: str = "a child"  # for the progress

    @property
    def strategy(self) -> Strategy:
        """How it trains, as children inherit it."""
        return np.array([self.learning_rate, self.growth, self.until, self.pace, self.mix], float)


def rule_jobs(masks: Sequence[Individual], budget: Budget, config: Config, layout: Layout) -> list[Job]:
    """Return a job a target: from the mask of a rule, or from the dense model with the rule pruning on the way."""
    method = read_method(config.method)
    gradual = method.kind == "gradual"
    targets = kept_at_targets(config, layout)
    rate = 1.0 if budget.epochs / len(targets) < SHORT else 0.5
    if gradual:
        dense = dense_individual(layout)
        dense.origin = config.method
        masks = [dense] * len(targets)
    return [Job(mask, kept, budget.of(i), config.seed + i, rate, saliency=method.rule if gradual else "magnitude",
                what=f"target {i + 1} of {len(targets)}") for i, (mask, kept) in enumerate(zip(masks, targets))]


def seed_jobs(found: Sequence[Individual], budget: Budget, config: Config, layout: Layout) -> list[Job]:
    """Return the first jobs of --refine-epochs, `SEEDS` a target: the mask that a search found there, trained from its repaired
    values and from the dense ones, and a child of the dense model that loses its weights on the way; or one of them, see
    `DENSE_STEPS`, and of a line that at the densest target."""
    targets = kept_at_targets(config, layout)
    repairs, jobs = config.repair != "none", list[Job]()
    count = 1 if budget.line else budget.first
    for i, kept in enumerate(targets[:count]):
        rate, growth, until, pace, mix = usual_strategy(i, len(targets)).tolist()
        seeds: list[tuple[Individual, str, dict[str, Any]]] = [
            (dense_individual(layout), "tune", {"learning_rate": rate, "growth": growth})]
        if mask := found_at(found, kept, min(targets[i + 1:i + 2] or [0]), layout):
            gentle: dict[str, Any] = {"learning_rate": GENTLE, "repaired": True} if repairs else {}
            seeds = [(mask, f"{mask.origin}{'+repair' * repairs}+tune", gentle), (mask, f"{mask.origin}+tune", {}), *seeds]
        else:
            seeds *= SEEDS
        if budget.first <= len(targets):
            seeds = seeds[-1:] if budget.of(i) >= DENSE_STEPS and kept <= SPARSE * layout.total else seeds[:1]
        for mask, origin, how in seeds:
            start = Individual(mask, origin)
            jobs.append(Job(start, min(kept, kept_weights(mask, layout)), budget.of(len(jobs)), config.seed + len(jobs),
                            until=until, pace=pace, mix=mix, what=f"seed {len(jobs) + 1} of {count}", **how))
    return jobs


def found_at(individuals: Sequence[Individual], kept: int, beyond: int, layout: Layout) -> Individual | None:
    """Return the best of the individuals that keep at most `kept` weights and more than `beyond`, of equal ones the densest."""
    here = [(each.fitness.score, kept_weights(each, layout), i) for i, each in enumerate(individuals)
            if beyond < kept_weights(each, layout) <= kept]
    return individuals[max(here)[2]] if here else None


def breed_jobs(state: State, rng: np.random.Generator, toolbox: base.Toolbox, config: Config, layout: Layout) -> list[Job]:
    """Return the jobs of the next generation: of a line, that of the next target, otherwise first a child of the dense model a
    target, then children where `toolbox.aim` says."""
    targets = kept_at_targets(config, layout)
    first, end = toolbox.before(state.generation + 1), toolbox.before(state.generation + 2)
    if toolbox.inherits(state.generation + 1):
        return [heir(first, targets, state, layout, rng, toolbox.steps(first))]
    aims = range(len(targets)) if first == 0 else toolbox.aim(state, targets, end - first, layout)
    return [child_for(aim, targets, state, toolbox, layout, rng, toolbox.steps(first + i)) for i, aim in enumerate(aims)]


def measure_jobs(jobs: Sequence[Job], seen: MutableMapping[bytes, Values], toolbox: base.Toolbox,
                 objectives: Objectives) -> list[Individual]:
    """Return the individuals that jobs become; those given up are missing."""
    born = []
    for job, result in zip(jobs, toolbox.map(toolbox.evaluate, jobs)):
        if result is not None and result.bits is not None and result.values is not None:
            child = Individual((bits.copy() for bits in result.bits), job.individual.origin, job.individual.generation)
            child.values, child.strategy = dict(result.values), job.strategy if job.growth else None  # of a line: usual
            seen[child.key()] = result.objectives
            child.fitness = Fitness(result.objectives, objectives)
            born.append(child)
    return born


def weakest_targets(state: State, targets: Sequence[int], children: int, layout: Layout) -> list[int]:
    """Return the targets of a generation's children: the weaker the front is at a target, against the dense model, the
    more. Stochastic universal sampling (Baker, 1987), its start turned by the golden ratio from generation to generation,
    so that few children too are spread as they should be."""
    best = [best_within(state.archive, kept, layout) for kept in targets]
    weak = np.cumsum([max(state.archive[0].fitness.score - score, 1e-3) for score in best])
    start = (state.generation * GOLDEN) % 1
    return list(map(int, np.searchsorted(weak, (start + np.arange(children)) / children * weak[-1])))


def best_within(individuals: Sequence[Individual], kept: int, layout: Layout) -> float:
    """Return the best score of those that keep at most `kept` weights, 0 if there is none."""
    return max((each.fitness.score for each in individuals if kept_weights(each, layout) <= kept), default=0.0)


def child_for(aim: int, targets: Sequence[int], state: State, toolbox: base.Toolbox, layout: Layout,
              rng: np.random.Generator, steps: int) -> Job:  # 7 arguments: it is the body of one loop
    """Return a child for a target: a parent of its own niche or of the nearest denser one, a mate, a mutated strategy."""
    niches: dict[int, list[Individual]] = {}
    for individual in state.population:  # the dense model is in niche -1
        kept = kept_weights(individual, layout)
        niches.setdefault(sum(kept <= target for target in targets) - 1, []).append(individual)
    own = niches.get(aim, [])
    denser = niches[max(niche for niche in niches if niche < aim)] if min(niches) < aim else own
    near = own if own and rng.random() < OWN_NICHE else denser or own
    if not near:  # only sparser ones are left
        near = list(state.population)
    parent, mate = toolbox.select(near, 2, rng=rng)
    child = toolbox.clone(parent)
    usual = usual_strategy(aim, len(targets))
    toolbox.mate(child, mate, rng=rng)
    fit_values(child, parent, layout)
    strategy, = toolbox.mutate(usual if child.strategy is None else child.strategy, rng=rng)
    rate, growth, until, pace, mix = strategy.tolist()
    child.origin, child.generation = "tune", state.generation + 1
    return Job(child, targets[aim], steps, int(rng.integers(2**32)), rate, growth, until, pace, mix)


def heir(aim: int, targets: Sequence[int], state: State, layout: Layout, rng: np.random.Generator, steps: int) -> Job:
    # 6 arguments: as `child_for`
    """Return the child of a line for a target: of the sparsest that has weights enough, which only loses some."""
    enough = [each for each in (state.archive[0], *state.population) if kept_weights(each, layout) >= targets[aim]]
    child = min(enough, key=lambda each: (kept_weights(each, layout), -each.generation)).clone()
    rate, _, until, pace, mix = usual_strategy(aim, len(targets)).tolist()
    child.origin, child.generation = "tune", state.generation + 1
    return Job(child, targets[aim], steps, int(rng.integers(2**32)), rate, 0.0, until, pace, mix)


def usual_strategy(aim: int, targets: int) -> Strategy:
    """Return how the first child of a target trains."""
    return np.asarray(FIRST_STRATEGY * (LAST_STRATEGY / FIRST_STRATEGY) ** (aim / max(1, targets - 1)))
