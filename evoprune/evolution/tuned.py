"""Tuned runs: a child inherits its parent's values, grows back some weights, trains, loses as many again, and is measured.

The first generation has a child of the dense model for each target; later ones have few children, so that lines of descent
grow long, most of them where the front is weakest. A parent stands at the child's own target or at the next denser one, and
NSGA-II says who stays. What --refine-epochs trains with few steps is one line, from the densest target to the sparsest, so that
the steps of all count. How a child trains, its strategy, is inherited too and mutates: learning rate, growth, pace of pruning,
saliency, and when its mask comes to rest (population-based training; Jaderberg et al., 2017, arXiv:1711.09846). The steps of all
jobs together are the run's budget.
"""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from deap import base

from ..config import Config
from ..errors import EvopruneError
from ..masks.genome import Fitness, Individual, Strategy, dense_individual, kept_weights
from ..masks.layout import Layout
from ..objectives import Objectives
from ..rules import read_method, target_sparsities
from ..values.inherited import fit_values
from ..values.training import steps_an_epoch
from .generations import State
from .selection import Values

# of a strategy: learning rate (times the usual one), growth (times the target's weights), and `Shrink`'s until, pace and mix
FIRST_STRATEGY = np.array([0.5, 4.0, 0.6, 4.0, 0.75])  # that of the first child of the first target,
LAST_STRATEGY = np.array([1.0, 8.0, 0.6, 4.0, 0.75])  # and of the last
LOW, HIGH = np.array([0.2, 1.5, 0.4, 1.0, 0.25]), np.array([2.0, 16.0, 0.85, 8.0, 1.0])
SPREAD = np.array([0.15, 0.2, 0.08, 0.2, 0.1])  # of the logarithm of the factor by which each mutates
FIRST_SHARE = 0.4  # of the budget, for the first children, one a target, of the dense model, or for `seed_jobs`
SEEDS, SEED_STEPS = 3, 3000  # seed jobs a target, and children after them, if each seed has so many steps; otherwise one
DENSE_STEPS, SPARSE = 700, 0.1  # steps from which on, and share of weights up to which, that one is a child of the dense model
LINE_STEPS = 3000  # steps a target, below which all are one line of descent, from the densest target to the sparsest
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


def kept_at_targets(config: Config, layout: Layout) -> list[int]:
    """Return how many of the searched weights are kept at each target, falling.

    Raises:
        EvopruneError: the layers that are searched cannot give so much sparsity.
    """
    found = []
    for sparsity in target_sparsities(config.targets):
        kept = layout.weights - (int(np.ceil(sparsity * layout.total - 1e-6)) - layout.pruned)
        if kept < layout.least:
            most = (layout.pruned + layout.weights - layout.least) / layout.total
            what = "a weight" if layout.least == len(layout) else "a gene (see --unit)"
            raise EvopruneError(f"targets: found {sparsity:.6g}, expected at most {most:.6g}: so much do the searched layers "
                                f"allow, with {what} left in each")
        found.append(min(kept, layout.weights))
    return found


@dataclass(frozen=True)
class Budget:
    """So many steps for so many jobs, to the step; the first `first` jobs share `share` of them."""

    epochs: float
    steps: int
    jobs: int
    first: int
    share: float
    children: int = 1  # that each generation after the first has
    seeded: bool = False  # whether the first jobs are generation 0, made of what a search of masks found, not generation 1
    line: bool = False  # whether each job inherits from the one before: one a generation, for the next target

    def upto(self, job: int) -> int:
        """Return the steps of all jobs before `job`."""
        early = round(self.share * self.steps) if self.first < self.jobs else self.steps
        if job <= self.first:
            return early * job // self.first
        return early + (self.steps - early) * (job - self.first) // (self.jobs - self.first)

    def of(self, job: int) -> int:
        """Return the steps of `job`, counted from 0."""
        return self.upto(job + 1) - self.upto(job)

    def before(self, generation: int) -> int:
        """Return how many jobs there are before those of a generation."""
        later = generation - (1 if self.seeded else 2)
        return 0 if later < 0 else self.first + self.children * later

    def spent(self, state: State) -> float:
        """Return the epochs that all jobs up to a state took; those of a rule are its generation 0."""
        if not (state.generation or (self.seeded and state.evaluations)):
            return self.epochs if state.evaluations else 0
        return self.epochs * self.upto(self.before(state.generation + 1)) / self.steps


def budget_of(config: Config, images: int, batch_size: int) -> Budget:
    """Return the budget of a run: a job a target, then, unless a rule makes the masks, the children of each generation.

    Raises:
        EvopruneError: it has not a step for each job.
    """
    first, epochs = len(target_sparsities(config.targets)), config.total_epochs or 0.0
    jobs = first + children_of(config) * max(0, config.generations - 1)
    budget = Budget(epochs, round(epochs * steps_an_epoch(images, batch_size)), jobs, first, FIRST_SHARE, children_of(config))
    if not all(budget.of(job) for job in range(jobs)):
        raise EvopruneError(f"total_epochs: found {epochs:g}, which is {budget.steps} steps for {jobs} jobs, expected at least "
                            f"one each; raise it, or lower population, generations or targets")
    return budget


def seeded_budget(config: Config, images: int, batch_size: int) -> Budget:
    """Return the budget of --refine-epochs: `SEEDS` jobs a target and then children, if each has `SEED_STEPS`: else they would
    cost the front more than they bring, and all steps go to one job a target; where those are fewer than `LINE_STEPS`, each
    inherits from that of the next denser target, so that the steps of all count.

    Raises:
        EvopruneError: it has not a step for each job.
    """
    epochs, children, targets = config.total_epochs or 0.0, children_of(config), len(target_sparsities(config.targets))
    steps = round(epochs * steps_an_epoch(images, batch_size))
    if steps < targets:
        raise EvopruneError(f"refine_epochs: found {epochs:g}, which is {steps} steps for {targets} jobs, expected at least one "
                            f"each; raise it, or lower targets")
    if steps < LINE_STEPS * targets:
        return Budget(epochs, steps, targets, 1, 1 / targets, seeded=True, line=True)
    first, generations = targets, 0
    if (each := int(FIRST_SHARE * steps) // (SEEDS * targets)) >= SEED_STEPS:
        first, generations = SEEDS * targets, int((1 - FIRST_SHARE) * steps) // (each * children)
    return Budget(epochs, steps, first + children * generations, first, FIRST_SHARE, children, seeded=True)


def children_of(config: Config) -> int:
    """Return how many children a generation has: the fewer, the longer the lines of descent that a budget allows."""
    return max(1, config.population // 8)


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
    for i, kept in enumerate(targets[:budget.first]):
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
                            until=until, pace=pace, mix=mix, what=f"seed {len(jobs) + 1} of {budget.first}", **how))
    return jobs


def found_at(individuals: Sequence[Individual], kept: int, beyond: int, layout: Layout) -> Individual | None:
    """Return the best of the individuals that keep at most `kept` weights and more than `beyond`, of equal ones the densest."""
    here = [(each.fitness.score, kept_weights(each, layout), i) for i, each in enumerate(individuals)
            if beyond < kept_weights(each, layout) <= kept]
    return individuals[max(here)[2]] if here else None


def breed_jobs(state: State, rng: np.random.Generator, toolbox: base.Toolbox, config: Config, layout: Layout) -> list[Job]:
    """Return the jobs of the next generation: a child of the dense model a target, then children where `toolbox.aim` says, or, of
    a line, the one of the next target."""
    targets, children = kept_at_targets(config, layout), children_of(config)
    first = toolbox.before(state.generation + 1)
    if toolbox.line():  # a job a target
        return [heir(first, targets, state, layout, rng, toolbox.steps(first))]
    aims = range(len(targets)) if first == 0 else toolbox.aim(state, targets, children, layout)
    return [child_for(aim, targets, state, toolbox, layout, rng, toolbox.steps(first + i)) for i, aim in enumerate(aims)]


def measure_jobs(jobs: Sequence[Job], seen: MutableMapping[bytes, Values], toolbox: base.Toolbox,
                 objectives: Objectives) -> list[Individual]:
    """Return the individuals that jobs become; those given up are missing."""
    born = []
    for job, result in zip(jobs, toolbox.map(toolbox.evaluate, jobs)):
        if result is not None and result.bits is not None and result.values is not None:
            child = Individual((bits.copy() for bits in result.bits), job.individual.origin, job.individual.generation)
            child.values, child.strategy = dict(result.values), job.strategy
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
