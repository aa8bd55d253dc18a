"""A tuned run like any other, but accuracy chooses nothing on the way: what selection is worth.

    python scripts/without_selection.py niche --total-epochs 80 --seed 0 --out results/NAME ...
    python scripts/without_selection.py targets --total-epochs 80 --seed 0 --out results/NAME ...
    python scripts/without_selection.py any --total-epochs 80 --seed 0 --out results/NAME ...

With `niche`, a parent is drawn at random from all that were ever born at the child's target or the next denser one; with
`targets`, the child's target at random too; with `any`, moreover, the parent from all that were ever born.
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
from evoprune.evolution import default_toolbox
from evoprune.evolution.generations import State
from evoprune.masks.genome import Individual
from evoprune.masks.layout import Layout


def toolbox(evaluate: Any, layout: Layout, config: Config, kind: str) -> base.Toolbox:
    """Return the usual toolbox without selection."""
    born: list[Individual] = []

    def survive(individuals: list[Individual], k: int, rng: Any) -> list[Individual]:
        born[:] = individuals
        return individuals

    def select(near: list[Individual], k: int, rng: Any) -> list[Individual]:
        pool = born if kind == "any" and born else near
        return [pool[i] for i in rng.integers(len(pool), size=k)]

    def aim(state: State, targets: Sequence[int], children: int, layout: Layout) -> list[int]:
        rng = np.random.default_rng((config.seed, state.generation, 1))
        return [int(i) for i in rng.integers(len(targets), size=children)]

    made = default_toolbox(evaluate, layout, config)
    made.register("select", select)
    made.register("survive", survive)
    if kind != "niche":
        made.register("aim", aim)
    return made


if __name__ == "__main__":
    kind = sys.argv.pop(1)
    sys.exit(main.main(toolbox=partial(toolbox, kind=kind), program=f"python scripts/without_selection.py {kind}"))
