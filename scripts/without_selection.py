"""A run like any other, but parents are drawn at random from all that were ever born: what selection is worth.

    python scripts/without_selection.py --total-epochs 80 --out results/NAME ...
"""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

from deap import base

import evoprune
from evoprune import main
from evoprune.config import Config
from evoprune.evolution import default_toolbox
from evoprune.genome import Individual
from evoprune.layers import Layout


def by_chance(individuals: list[Individual], k: int, rng: Any, **_: Any) -> list[Individual]:
    """Return k of them, each drawn at random."""
    return [individuals[i] for i in rng.integers(len(individuals), size=k)]


def toolbox(evaluate: Any, layout: Layout, config: Config) -> base.Toolbox:
    """Return the usual toolbox without selection."""
    made = default_toolbox(evaluate, layout, config)
    made.register("select", by_chance)
    made.register("survive", lambda individuals, k, rng: list(individuals))
    return made


if __name__ == "__main__":
    setattr(main, "prune", partial(evoprune.prune, toolbox=toolbox))  # noqa: B010  # mypy knows no such name there
    sys.exit(main.main())
