"""A rule that prunes gradually, with one thing changed: what a schedule or a learning rate alone is worth.

    python scripts/gradual_variants.py paced --method gradual:fisher --total-epochs 80 --out results/NAME ...
    python scripts/gradual_variants.py rate=1.0 --method gradual:fisher --total-epochs 80 --out results/NAME ...

`paced` prunes as the first children of a tuned run do; `rate=X` trains at X times the usual learning rate, whatever the budget.
"""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from functools import partial
from typing import Any

from deap import base

from evoprune import main
from evoprune.config import Config
from evoprune.errors import EvopruneError
from evoprune.evolution import default_toolbox
from evoprune.evolution.budget import Budget
from evoprune.evolution.tuned import FIRST_STRATEGY, Job
from evoprune.masks.genome import Individual
from evoprune.masks.layout import Layout
from evoprune.rules import read_method


def changes_of(kind: str) -> dict[str, float]:
    """Return what a variant changes of a job; raise `EvopruneError` for one that there is not."""
    if kind == "paced":
        return dict(zip(("until", "pace", "mix"), FIRST_STRATEGY[2:].tolist()))
    try:
        name, rate = kind.split("=")
        if name != "rate" or not 0 < float(rate) < math.inf:
            raise ValueError
    except ValueError:
        raise EvopruneError(f"gradual_variants.py: found {kind!r}, expected paced, or rate=X like rate=0.5") from None
    return {"learning_rate": float(rate)}


def toolbox(evaluate: Any, layout: Layout, config: Config, kind: str) -> base.Toolbox:
    """Return the usual toolbox, in which a rule's jobs have another pruning or another learning rate.

    Raises:
        EvopruneError: there is no such variant, or nothing that it would change.
    """
    if read_method(config.method).kind != "gradual":
        raise EvopruneError(f"gradual_variants.py: found --method {config.method}, expected gradual:RULE")
    made, changes = default_toolbox(evaluate, layout, config), changes_of(kind)
    usual = made.jobs

    def changed(masks: list[Individual], budget: Budget) -> list[Job]:
        return [replace(job, **changes) for job in usual(masks, budget=budget)]

    made.register("jobs", changed)
    return made


if __name__ == "__main__":
    kind = sys.argv.pop(1)
    sys.exit(main.main(toolbox=partial(toolbox, kind=kind), program=f"python scripts/gradual_variants.py {kind}"))
