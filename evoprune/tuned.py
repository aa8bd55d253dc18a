"""Tuned runs: a child inherits its parent's values, grows back some weights, trains, loses as many again, and is measured.

A population spreads from the dense model to sparser and sparser targets: a child aims at a target, its parent is one that
stands there or at the next denser one, and NSGA-II says who stays. How it trains is inherited too and mutates: learning
rate, growth, and when its mask comes to rest (population-based training; Jaderberg et al., 2017, arXiv:1711.09846). The
steps of all jobs together are the run's budget.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from time import perf_counter

import numpy as np
from deap import base

from .config import Config, EvopruneError, target_sparsities
from .evolution import State, log_row, non_dominated
from .genome import Individual, Result, from_masks, get_bits, pruned_weights
from .layers import Layout
from .tuning import steps_an_epoch

GENES = "genes"  # under which an individual inherits its recipe
FIRST = np.array([0.6, 6.0, 0.6])  # learning rate (times the usual one), growth (times the target's weights), until (share)
WAVE = 0.5  # share of the generations after which all targets are to be reached
SHORT = 5  # epochs a target, below which a rule's learning rate is the usual one, and from which on half of it
OWN = 0.7  # probability that a parent stands at the target itself, once something does


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
    saliency: str = "fisher"  # what is pruned first
    what: str = "a child"  # for the progress


def kept_at_targets(config: Config, layout: Layout) -> list[int]:
    """Return how many of the searched weights are kept at each target, falling.

    Raises:
        EvopruneError: the layers that are searched cannot give so much sparsity.
    """
    found = []
    for sparsity in target_sparsities(config):
        kept = layout.weights - (int(np.ceil(sparsity * layout.total - 1e-6)) - layout.pruned)
        if kept < len(layout):
            most = (layout.pruned + layout.weights - len(layout)) / layout.total
            raise EvopruneError(f"targets: found {sparsity:.6g}, expected at most {most:.6g}: so much do the searched layers "
                                f"allow, with a weight left in each")
        found.append(min(kept, layout.weights))
    return found


@dataclass(frozen=True)
class Budget:
    """So many steps for so many jobs, to the step."""

    epochs: float
    steps: int
    jobs: int

    def upto(self, job: int) -> int:
        """Return the steps of all jobs before `job`."""
        return self.steps * job // self.jobs

    def of(self, job: int) -> int:
        """Return the steps of `job`, counted from 0."""
        return self.upto(job + 1) - self.upto(job)


def budget_of(config: Config, images: int, batch_size: int, jobs: int) -> Budget:
    """Return the budget of a run.

    Raises:
        EvopruneError: it has not a step for each job.
    """
    epochs = config.total_epochs or 0.0
    steps = round(epochs * steps_an_epoch(images, batch_size))
    if steps < jobs:
        least = jobs / steps_an_epoch(images, batch_size)
        raise EvopruneError(f"total_epochs: found {epochs:g}, which is {steps} steps for {jobs} jobs, expected at least "
                            f"{least:.3g}; raise it, or lower population, generations or targets")
    return Budget(epochs, steps, jobs)


def children_of(config: Config) -> int:
    """Return how many children a generation has: the fewer, the longer the lines of descent that a budget allows."""
    return max(1, config.population // 4)


def begin_tuned(config: Config, layout: Layout, dense_accuracy: float) -> State:
    """Return generation 0: the dense model, which costs nothing."""
    dense = from_masks((np.ones(layer.genes, bool) for layer in layout), "dense")
    dense.fitness.values = dense_accuracy, layout.pruned / layout.total
    return State(0, [dense], [dense], {}, (log_row(0, [dense], {}, config, 0.0),))


def evolve_tuned(state: State, toolbox: base.Toolbox, config: Config, layout: Layout, budget: Budget) -> Iterator[State]:
    """Yield a state a generation, up to `config.generations`; `toolbox.evaluate` takes a `Job` and returns a `Result`."""
    targets, children = kept_at_targets(config, layout), children_of(config)
    while state.generation < config.generations:
        started, generation, first = perf_counter(), state.generation + 1, children * state.generation
        rng = np.random.default_rng((config.seed, generation))
        jobs = [breed(state.population, targets, aim, budget.of(first + i), toolbox, layout, rng)
                for i, aim in enumerate(aims(state, targets, children, config.generations, layout, rng))]
        born = born_of(jobs, toolbox.map(toolbox.evaluate, jobs), generation)
        archive = non_dominated(state.archive + born, config.accuracy_floor, always=state.archive[0])
        survivors = toolbox.survive(state.population + born, config.population, rng=rng)
        seen = state.seen | {blake2b(f"{first + i}".encode(), digest_size=16).digest(): child.fitness.values
                             for i, child in enumerate(born)}
        row = log_row(generation, archive, seen, config, state.log[-1]["seconds"] + perf_counter() - started)
        row["epochs"] = budget.epochs * budget.upto(first + children) / budget.steps
        state = replace(state, generation=generation, population=survivors, archive=archive, seen=seen, log=(*state.log, row))
        yield state


def gradual_jobs(config: Config, layout: Layout, budget: Budget) -> list[Job]:
    """Return a job a target: from the dense model, pruned on the way by the rule of --method gradual:RULE."""
    rule, targets = config.method.partition(":")[2], kept_at_targets(config, layout)
    dense = from_masks((np.ones(layer.genes, bool) for layer in layout), config.method)
    rate = 1.0 if budget.epochs / len(targets) < SHORT else 0.5
    return [Job(dense, kept, budget.of(i), config.seed + i, rate, saliency=rule, what=f"target {i + 1} of {len(targets)}")
            for i, kept in enumerate(targets)]


def begin_rules(jobs: Sequence[Job], toolbox: base.Toolbox, config: Config, layout: Layout, dense_accuracy: float,
                budget: Budget) -> State:
    """Return generation 0 of a rule: the dense model and what its jobs became."""
    started, dense = perf_counter(), begin_tuned(config, layout, dense_accuracy).archive[0]
    points = born_of(jobs, toolbox.map(toolbox.evaluate, jobs), 0)
    archive = non_dominated([dense, *points], config.accuracy_floor, always=dense)
    seen = {point.key(): point.fitness.values for point in points}
    row = log_row(0, archive, seen, config, perf_counter() - started) | {"epochs": budget.epochs}
    return State(0, [dense, *points], archive, seen, (row,))


def born_of(jobs: Sequence[Job], results: Sequence[Result | None], generation: int) -> list[Individual]:
    """Return the individuals that jobs became; those given up are missing."""
    born = []
    for job, result in zip(jobs, results):
        if result is not None and result.bits is not None and result.inherited is not None:
            child = Individual((bits.copy() for bits in result.bits), job.individual.origin, generation)
            child.inherited = {**result.inherited, GENES: np.array([job.learning_rate, job.growth, job.until])}
            child.fitness.values = result.objectives
            born.append(child)
    return born


def aims(state: State, targets: Sequence[int], children: int, generations: int, layout: Layout,
         rng: np.random.Generator) -> list[int]:
    """Return the targets of a generation's children: first those that are to be reached by now, then where the front is
    weakest, at random by how far its accuracy is below the dense model's."""
    best = [best_within(state.archive, kept, layout) for kept in targets]
    reached = sum(accuracy is not None for accuracy in best)
    due = min(len(targets), math.ceil(len(targets) * (state.generation + 1) / max(1.0, WAVE * generations)))
    chosen = list(range(reached, due))[:children]
    known = [accuracy for accuracy in best if accuracy is not None]
    if len(chosen) < children and known:
        dense = state.archive[0].fitness.values[0]
        weak = np.maximum([dense - accuracy for accuracy in known], 1e-3)
        chosen += rng.choice(len(known), children - len(chosen), p=weak / weak.sum()).tolist()
    return chosen + [due - 1] * (children - len(chosen))


def best_within(individuals: Sequence[Individual], kept: int, layout: Layout) -> float | None:
    """Return the best accuracy of those that keep at most `kept` weights, None if there is none."""
    return max((each.fitness.values[0] for each in individuals if kept_in(each, layout) <= kept), default=None)


def kept_in(individual: Individual, layout: Layout) -> int:
    return layout.total - pruned_weights(individual, layout) - (layout.total - layout.weights)


def breed(population: Sequence[Individual], targets: Sequence[int], aim: int, steps: int, toolbox: base.Toolbox,
          layout: Layout, rng: np.random.Generator) -> Job:
    """Return a child for a target: a parent of the target's own niche or of the nearest denser one, a mate, mutated genes."""
    niches: dict[int, list[Individual]] = {}
    for individual in population:  # the dense model is in niche -1
        kept = kept_in(individual, layout)
        niches.setdefault(sum(kept <= target for target in targets) - 1, []).append(individual)
    own = niches.get(aim, [])
    denser = niches[max(niche for niche in niches if niche < aim)] if min(niches) < aim else own
    near = own if own and rng.random() < OWN else denser or own
    if not near:  # only sparser ones are left
        near = list(population)
    parent, mate = toolbox.select(near, 2, rng=rng)
    child = toolbox.clone(parent)
    toolbox.mate(child, mate, rng=rng)
    spread(child, parent, layout)
    (rate, growth, until), = toolbox.mutate(child.inherited.get(GENES, FIRST), rng=rng)
    child.origin = "tune"
    return Job(child, targets[aim], steps, int(rng.integers(2**32)), float(rate), float(growth), float(until))


def spread(child: Individual, parent: Individual, layout: Layout) -> None:
    """Make room in the values that a child inherits for weights that its parent does not keep: they start at zero."""
    for i, layer in enumerate(layout):
        if layer.name in child.inherited:
            whole = np.zeros(layer.genes, child.inherited[layer.name].dtype)
            whole[get_bits(parent, i, layout)] = child.inherited[layer.name]
            child.inherited[layer.name] = whole[get_bits(child, i, layout)]
