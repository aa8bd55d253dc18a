"""DEAP's toolbox with evoprune's operators: where a user, or a script, plugs in others.

Both kinds of search have `evaluate`, `map`, `select`, `mate`, `mutate`, `clone` and `survive`, and three that make them one
loop: `breed(state, rng)` returns what is to be measured next, `measure(offspring, seen)` the individuals it becomes,
`epochs(state)` what has been trained. Masks have `simplify`, which drops their dead paths before they are measured. With
--total-epochs, offspring are jobs, and there are `aim(state, targets, children, layout)`, the targets of a generation's
children, `seeds(found, budget)`, the first jobs of --refine-epochs, and `jobs(masks, budget)`, those of a rule to compare with.
The run adds what only it knows: `first()`, what generation 0 is made of, an engine's `map` unless another was registered, how
many jobs there are `before(generation)`, how long each trains, `steps(job)`, and whether a generation is one child that inherits
from the one before, `inherits(generation)`, for which none of `aim`, `select`, `mate` and `mutate` is asked.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Protocol

from deap import base
from torch import Tensor

from ..config import Config
from ..engines.engine import local
from ..errors import EvopruneError, shown
from ..inputs.tasks import optimised
from ..masks.genome import Individual, Measurement, Result
from ..masks.layout import Layout
from ..masks.saliency import gene_scores, logarithm
from .generations import breed, measure, no_epochs
from .operators import mate, mutate, refine
from .selection import nsga2, tournament
from .tuned import Job, breed_jobs, measure_jobs, mutate_strategy, rule_jobs, seed_jobs, unite, weakest_targets


class Evaluate(Protocol):
    """What measures masks: an `Evaluator`, or what stands for one in a worker process."""

    def __call__(self, individual: Individual) -> Measurement:
        """Return the values of the objectives, or a `Result`."""

    def many(self, individuals: Iterable[Individual], progress: Callable[[int, int], None]) -> list[Measurement]:
        """Return the same of each, in order; call `progress(done, of)` after each."""

    def simplify(self, individual: Individual) -> None:
        """Drop the dead paths of a mask."""

    @property
    def weights(self) -> list[Tensor]:
        """The dense weights, shaped like the layers."""


Evaluation = Evaluate | Callable[[Job], Result | bytes]  # the latter where training is part of it; bytes: it was stopped
Make = Callable[[Evaluation, Layout, Config], base.Toolbox]  # what `prune(toolbox=...)` takes; `default_toolbox` is one


def made(make: Make, evaluate: Evaluation, layout: Layout, config: Config) -> base.Toolbox:
    """Return the toolbox of a run; raise `EvopruneError` where what was handed in makes none."""
    toolbox = make(evaluate, layout, config)
    if not isinstance(toolbox, base.Toolbox):
        raise EvopruneError(f"toolbox: {name_of(make)} returned {shown(toolbox)}, expected a deap.base.Toolbox, as "
                            f"evoprune.evolution.default_toolbox returns")
    return toolbox


def name_of(make: Make) -> str | None:
    """Return what made a toolbox that is not the default one: file, function and the arguments it was given, for the record."""
    if make is default_toolbox:
        return None
    function, given = (make.func, make.keywords) if isinstance(make, partial) else (make, {})
    arguments = ", ".join(f"{key}={value!r}" for key, value in given.items())
    if not inspect.isfunction(function):
        return f"{type(function).__qualname__}({arguments})"
    return f"{Path(function.__code__.co_filename).name}: {function.__qualname__}({arguments})"


def default_toolbox(evaluate: Evaluation, layout: Layout, config: Config) -> base.Toolbox:
    """Return DEAP's toolbox with evoprune's operators; register others to change the search."""
    toolbox = base.Toolbox()
    toolbox.register("clone", Individual.clone)
    toolbox.register("evaluate", evaluate)
    toolbox.register("map", local)  # `prune` puts the engine's map here
    repaired = config.total_epochs is None and config.repair == "least-squares"
    toolbox.register("select", tournament, niches=repaired)
    toolbox.register("survive", nsga2, floor=config.accuracy_floor, niches=repaired)
    if config.total_epochs is None:
        register_masks(toolbox, evaluate, layout, config)  # type: ignore[arg-type]  # settings say which of the two it is
    else:
        register_jobs(toolbox, layout, config)
    return toolbox


def register_masks(toolbox: base.Toolbox, evaluate: Evaluate, layout: Layout, config: Config) -> None:
    """Register what only a search of masks has."""
    if config.worth:  # blind operators win elsewhere: LOG.md
        toolbox.register("mate", mate, p=0.2, uniform=0.0, layout=layout)
        toolbox.register("mutate", refine, layout=layout, growth=[
            logarithm(score).flatten().numpy() for score in gene_scores("lamp", layout, evaluate.weights)])
    else:
        toolbox.register("mate", mate)
        toolbox.register("mutate", mutate, layout=layout)
    toolbox.register("simplify", evaluate.simplify)
    toolbox.register("breed", breed, toolbox=toolbox, size=config.population)
    toolbox.register("measure", measure, toolbox=toolbox, objectives=optimised(config.objectives, config.task))
    toolbox.register("epochs", no_epochs)


def register_jobs(toolbox: base.Toolbox, layout: Layout, config: Config) -> None:
    """Register what only a tuned run has, but for those that its data decide: `before`, `steps`, `epochs`, `inherits`."""
    toolbox.register("mate", unite)  # training decides which weights a child loses, its strategy how it trains
    toolbox.register("mutate", mutate_strategy)
    toolbox.register("aim", weakest_targets)
    toolbox.register("breed", breed_jobs, toolbox=toolbox, config=config, layout=layout)
    toolbox.register("measure", measure_jobs, toolbox=toolbox, objectives=optimised(config.objectives, config.task))
    toolbox.register("jobs", rule_jobs, config=config, layout=layout)
    toolbox.register("seeds", seed_jobs, config=config, layout=layout)
