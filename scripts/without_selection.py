"""A tuned run like any other, but nobody is selected: what selection is worth.

    python scripts/without_selection.py niche --total-epochs 80 --seed 0 --out results/NAME ...
    python scripts/without_selection.py targets --total-epochs 80 --seed 0 --out results/NAME ...
    python scripts/without_selection.py any --total-epochs 80 --seed 0 --out results/NAME ...

With `niche`, all that were ever born stay, and a parent is drawn at random from those at the child's target or the next denser
one, as usual the child's target is one where the front is weak; with `targets`, accuracy chooses nothing: the child's target is
drawn at random too; with `any`, moreover, the parent from all that were ever born, the dense model among them.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from deap import base

from evoprune import main
from evoprune.config import Config
from evoprune.errors import EvopruneError
from evoprune.evolution import default_toolbox
from evoprune.evolution.generations import State
from evoprune.evolution.tuned import Job
from evoprune.masks.genome import Individual
from evoprune.masks.layout import Layout
from evoprune.rules import read_method


def toolbox(evaluate: Any, layout: Layout, config: Config, kind: str) -> base.Toolbox:
    """Return the usual toolbox without selection.

    Raises:
        EvopruneError: there is no such kind, or nothing that it would change.
    """
    if kind not in ("niche", "targets", "any"):
        raise EvopruneError(f"without_selection.py: found {kind!r}, expected niche, targets or any")
    if config.total_epochs is None or read_method(config.method).kind != "evolve":
        raise EvopruneError("without_selection.py: expected a tuned run; give --total-epochs, and no --method but evolve")
    born: list[Individual] = []

    def breed(state: State, rng: Any) -> list[Job]:
        born[:] = state.population  # all of them, as nobody dies; from a checkpoint too
        return usual(state, rng=rng)

    def survive(individuals: list[Individual], k: int, rng: Any) -> list[Individual]:
        return individuals

    def select(near: list[Individual], k: int, rng: Any) -> list[Individual]:
        pool = born if kind == "any" else near
        return [pool[i] for i in rng.integers(len(pool), size=k)]

    def aim(state: State, targets: Sequence[int], children: int, layout: Layout) -> list[int]:
        rng = np.random.default_rng((config.seed, state.generation, 1))
        return [int(i) for i in rng.integers(len(targets), size=children)]

    made = default_toolbox(evaluate, layout, config)
    usual = made.breed
    made.register("breed", breed)
    made.register("select", select)
    made.register("survive", survive)
    if kind != "niche":
        made.register("aim", aim)
    return made


if __name__ == "__main__":
    kind = sys.argv.pop(1)
    sys.exit(main.main(toolbox=partial(toolbox, kind=kind), program=f"python scripts/without_selection.py {kind}"))
