"""A tuned run like any other, but accuracy chooses nothing on the way: what selection is worth.

    python scripts/without_selection.py niche --total-epochs 80 --seed 0 --out results/NAME ...
    python scripts/without_selection.py any --total-epochs 80 --seed 0 --out results/NAME ...

With `niche`, a parent is drawn at random from all that were ever born at the child's target or the next denser one; with `any`,
from all that were ever born, and the child's target at random too.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from deap import base

import evoprune
from evoprune import main, tuned
from evoprune.config import Config
from evoprune.evolution import State, default_toolbox
from evoprune.genome import Individual
from evoprune.layers import Layout


def random_targets(state: State, targets: Sequence[int], children: int, layout: Layout, seed: int) -> list[int]:
    """Return the targets of a generation's children, each drawn at random."""
    rng = np.random.default_rng((seed, state.generation, 1))
    return [int(i) for i in rng.integers(len(targets), size=children)]


def toolbox(evaluate: Any, layout: Layout, config: Config, anywhere: bool) -> base.Toolbox:
    """Return the usual toolbox without selection."""
    born: list[Individual] = []

    def survive(individuals: list[Individual], k: int, rng: Any) -> list[Individual]:
        born[:] = individuals
        return individuals

    def select(near: list[Individual], k: int, rng: Any) -> list[Individual]:
        pool = born if anywhere and born else near
        return [pool[i] for i in rng.integers(len(pool), size=k)]

    made = default_toolbox(evaluate, layout, config)
    made.register("select", select)
    made.register("survive", survive)
    return made


if __name__ == "__main__":
    anywhere = sys.argv.pop(1) == "any"
    if anywhere:
        seed = int(sys.argv[sys.argv.index("--seed") + 1])
        setattr(tuned, "aims", partial(random_targets, seed=seed))  # noqa: B010  # mypy knows no such name there
    setattr(main, "prune", partial(evoprune.prune, toolbox=partial(toolbox, anywhere=anywhere)))  # noqa: B010
    sys.exit(main.main())
