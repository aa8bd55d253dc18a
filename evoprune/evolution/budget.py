"""How many weights are kept at each target, and how many steps each training has: all together they are what the user gave."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..config import Config
from ..errors import EvopruneError
from ..masks.layout import Layout
from ..rules import read_method, target_sparsities
from ..values.training import steps_an_epoch
from .generations import State

FIRST_SHARE = 0.4  # of the budget, for the first children, one a target, of the dense model, or for `seed_jobs`
LINE_SHARE = 0.8  # the same where they are a line, after which there are half as many children: shorter ones brought nothing
SEEDS, SEED_STEPS = 3, 3000  # seed jobs a target, and children after them, if each seed has so many steps; otherwise one
LINE_STEPS = 3000  # steps a target, below which the first children are a line


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
    children: int = 1  # that each generation after the first ones has
    seeded: bool = False  # whether generation 0 has the first of them, made of what a search of masks found, not generation 1
    line: bool = False  # whether each of the first inherits from the one before, so that they are one a generation

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
        early, after = (self.first, 1) if self.line else (1, self.first)  # generations with the first jobs, how many each has
        past = max(0, generation - (0 if self.seeded else 1))
        return after * min(past, early) + self.children * max(0, past - early)

    def inherits(self, generation: int) -> bool:
        """Say whether a generation is one of a line: a child of the one before."""
        return self.line and self.before(generation) < self.first

    @property
    def generations(self) -> int:
        """How many generations there are after generation 0."""
        return (self.first if self.line else 1) + (self.jobs - self.first) // self.children - (1 if self.seeded else 0)

    def spent(self, state: State) -> float:
        """Return the epochs that all jobs up to a state took; those of a rule are its generation 0."""
        if not (state.generation or (self.seeded and state.evaluations)):
            return self.epochs if state.evaluations else 0
        return self.epochs * self.upto(self.before(state.generation + 1)) / self.steps


def budget_of(config: Config, images: int, batch_size: int) -> Budget:
    """Return the budget of a run: a job a target, then, unless a rule makes the masks, the children of each generation. With
    fewer steps than `LINE_STEPS` a target the first jobs are a line, and at most half as many follow.

    Raises:
        EvopruneError: it has not a step for each job.
    """
    first, epochs = len(target_sparsities(config.targets)), config.total_epochs or 0.0
    steps = round(epochs * steps_an_epoch(images, batch_size))
    children, later = children_of(config), max(0, config.generations - 1)
    line = read_method(config.method).kind == "evolve" and first > 1 and steps < LINE_STEPS * first
    if line:
        children = min(children, first // 2)
        later = min(later, first // 2 // children)
    jobs = first + children * later
    budget = Budget(epochs, steps, jobs, first, LINE_SHARE if line else FIRST_SHARE, children, line=line)
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
        return Budget(epochs, steps, targets, targets, 1.0, seeded=True, line=True)
    first, generations = targets, 0
    if (each := int(FIRST_SHARE * steps) // (SEEDS * targets)) >= SEED_STEPS:
        first, generations = SEEDS * targets, int((1 - FIRST_SHARE) * steps) // (each * children)
    return Budget(epochs, steps, first + children * generations, first, FIRST_SHARE, children, seeded=True)


def children_of(config: Config) -> int:
    """Return how many children a generation has: the fewer, the longer the lines of descent that a budget allows."""
    return max(1, config.population // 8)
