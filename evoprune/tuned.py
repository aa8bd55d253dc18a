"""Tuned runs: a child inherits its parent's values, grows back some weights, trains, loses as many again, and is measured.

The first generation has a child of the dense model for each target; later ones have few children, so that lines of descent
grow long, most of them where the front is weakest. A parent stands at the child's own target or at the next denser one, and
NSGA-II says who stays. How it trains is inherited too and mutates: learning
rate, growth, pace of pruning, saliency, and when its mask comes to rest (population-based training; Jaderberg et al., 2017,
arXiv:1711.09846). The steps of all jobs together are the run's budget.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from time import perf_counter

import numpy as np
from deap import base

from .config import Config, EvopruneError, target_sparsities
from .evolution import State, log_row, non_dominated
from .genome import Individual, Result, dense_individual, get_bits, pruned_weights
from .layers import Layout
from .operators import Genes
from .tuning import steps_an_epoch

GENES = "genes"  # under which an individual inherits its recipe
DENSEST = np.array([0.5, 4.0, 0.6, 4.0, 0.75])  # genes of the first child of the first target: learning rate (times the usual
SPARSEST = np.array([1.0, 8.0, 0.6, 4.0, 0.75])  # one), growth (times the target's weights), `Shrink`'s numbers; and of the last
FIRST_SHARE = 0.4  # of the budget, for the first children, one a target, of the dense model
SHORT = 5  # epochs a target, below which a rule's learning rate is the usual one, and from which on half of it
GOLDEN = 0.5 * (5**0.5 - 1)
OWN = 0.9  # probability that a parent stands at the target itself, once something does


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
    what: str = "a child"  # for the progress

    @property
    def genes(self) -> Genes:
        """Return how it trains, as children inherit it."""
        return np.array([self.learning_rate, self.growth, self.until, self.pace, self.mix], float)


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
    """So many steps for so many jobs, to the step; the first `first` jobs share `share` of them."""

    epochs: float
    steps: int
    jobs: int
    first: int
    share: float

    def upto(self, job: int) -> int:
        """Return the steps of all jobs before `job`."""
        early = round(self.share * self.steps) if self.first < self.jobs else self.steps
        if job <= self.first:
            return early * job // self.first
        return early + (self.steps - early) * (job - self.first) // (self.jobs - self.first)

    def of(self, job: int) -> int:
        """Return the steps of `job`, counted from 0."""
        return self.upto(job + 1) - self.upto(job)


def budget_of(config: Config, images: int, batch_size: int) -> Budget:
    """Return the budget of a run: a job a target, then, unless a rule makes the masks, the children of each generation.

    Raises:
        EvopruneError: it has not a step for each job.
    """
    first, epochs = len(target_sparsities(config)), config.total_epochs or 0.0
    jobs = first + children_of(config) * max(0, config.generations - 1)
    budget = Budget(epochs, round(epochs * steps_an_epoch(images, batch_size)), jobs, first, FIRST_SHARE)
    if not all(budget.of(job) for job in range(jobs)):
        raise EvopruneError(f"total_epochs: found {epochs:g}, which is {budget.steps} steps for {jobs} jobs, expected at least "
                            f"one each; raise it, or lower population, generations or targets")
    return budget


def children_of(config: Config) -> int:
    """Return how many children a generation has: the fewer, the longer the lines of descent that a budget allows."""
    return max(1, config.population // 8)


def begin_tuned(config: Config, layout: Layout, dense_accuracy: float) -> State:
    """Return generation 0: the dense model, which costs nothing."""
    dense = dense_individual(layout)
    dense.fitness.values = dense_accuracy, layout.pruned / layout.total
    return State(0, [dense], [dense], {}, (log_row(0, [dense], {}, config, 0.0),))


def evolve_tuned(state: State, toolbox: base.Toolbox, config: Config, layout: Layout, budget: Budget) -> Iterator[State]:
    """Yield a state a generation, up to `config.generations`; `toolbox.evaluate` takes a `Job` and returns a `Result`."""
    targets, children = kept_at_targets(config, layout), children_of(config)
    while state.generation < config.generations:
        started, generation = perf_counter(), state.generation + 1
        rng = np.random.default_rng((config.seed, generation))
        first = 0 if generation == 1 else budget.first + children * (generation - 2)
        chosen = list(range(len(targets))) if generation == 1 else aims(state, targets, children, layout)
        jobs = [breed(state.population, targets, aim, budget.of(first + i), toolbox, layout, rng)
                for i, aim in enumerate(chosen)]
        born = born_of(jobs, toolbox.map(toolbox.evaluate, jobs), generation)
        archive = non_dominated(state.archive + born, config.accuracy_floor, always=state.archive[0])
        survivors = toolbox.survive(state.population + born, config.population, rng=rng)
        seen = state.seen | {blake2b(f"{first + i}".encode(), digest_size=16).digest(): child.fitness.values
                             for i, child in enumerate(born)}
        row = log_row(generation, archive, seen, config, state.log[-1]["seconds"] + perf_counter() - started)
        row["epochs"] = budget.epochs * budget.upto(first + len(jobs)) / budget.steps
        state = replace(state, generation=generation, population=survivors, archive=archive, seen=seen, log=(*state.log, row))
        yield state


def rule_jobs(masks: Sequence[Individual], config: Config, layout: Layout, budget: Budget) -> list[Job]:
    """Return a job a target: from the mask of a rule, or from the dense model with the rule pruning on the way."""
    kind, _, rule = config.method.partition(":")
    targets = kept_at_targets(config, layout)
    rate = 1.0 if budget.epochs / len(targets) < SHORT else 0.5
    if kind == "gradual":
        dense = dense_individual(layout)
        dense.origin = config.method
        masks = [dense] * len(targets)
    return [Job(mask, kept, budget.of(i), config.seed + i, rate, saliency=rule if kind == "gradual" else "magnitude",
                what=f"target {i + 1} of {len(targets)}") for i, (mask, kept) in enumerate(zip(masks, targets))]


def begin_rules(state: State, jobs: Sequence[Job], toolbox: base.Toolbox, config: Config, budget: Budget) -> State:
    """Return a rule's only state: the dense model of `state` and what the rule's jobs became."""
    started, dense = perf_counter(), state.archive[0]
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
            child.inherited = {**result.inherited, GENES: job.genes}
            child.fitness.values = result.objectives
            born.append(child)
    return born


def aims(state: State, targets: Sequence[int], children: int, layout: Layout) -> list[int]:
    """Return the targets of a generation's children: the weaker the front is at a target, against the dense model, the
    more. Stochastic universal sampling (Baker, 1987), its start turned by the golden ratio from generation to generation,
    so that few children too are spread as they should be."""
    best = [best_within(state.archive, kept, layout) for kept in targets]
    weak = np.cumsum([max(state.archive[0].fitness.values[0] - accuracy, 1e-3) for accuracy in best])
    start = (state.generation * GOLDEN) % 1
    return list(map(int, np.searchsorted(weak, (start + np.arange(children)) / children * weak[-1])))


def best_within(individuals: Sequence[Individual], kept: int, layout: Layout) -> float:
    """Return the best accuracy of those that keep at most `kept` weights, 0 if there is none."""
    return max((each.fitness.values[0] for each in individuals if kept_in(each, layout) <= kept), default=0.0)


def kept_in(individual: Individual, layout: Layout) -> int:
    return layout.weights - pruned_weights(individual, layout)


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
    usual = DENSEST * (SPARSEST / DENSEST) ** (aim / max(1, len(targets) - 1))
    toolbox.mate(child, mate, rng=rng)
    spread(child, parent, layout)
    genes, = toolbox.mutate(child.inherited.get(GENES, usual), rng=rng)
    rate, growth, until, pace, mix = genes.tolist()
    child.origin = "tune"
    return Job(child, targets[aim], steps, int(rng.integers(2**32)), rate, growth, until, pace, mix)


def spread(child: Individual, parent: Individual, layout: Layout) -> None:
    """Make room in the values that a child inherits for weights that its parent does not keep: they start at zero."""
    for i, layer in enumerate(layout):
        if layer.name in child.inherited:
            whole = np.zeros(layer.genes, child.inherited[layer.name].dtype)
            whole[get_bits(parent, i, layout)] = child.inherited[layer.name]
            child.inherited[layer.name] = whole[get_bits(child, i, layout)]
