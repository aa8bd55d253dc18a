"""A rule that prunes gradually, with one thing changed: what a schedule or a learning rate alone is worth.

    python scripts/gradual_variants.py paced --method gradual:fisher --total-epochs 80 --out results/NAME ...
    python scripts/gradual_variants.py rate=1.0 --method gradual:fisher --total-epochs 80 --out results/NAME ...

`paced` prunes as the first children of a tuned run do; `rate=X` trains at X times the usual learning rate, whatever the budget.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial
from typing import Any

from deap import base

from evoprune import main
from evoprune.config import Config
from evoprune.evolution import default_toolbox
from evoprune.evolution.tuned import FIRST_STRATEGY, Budget, Job
from evoprune.masks.genome import Individual
from evoprune.masks.layout import Layout


def toolbox(evaluate: Any, layout: Layout, config: Config, kind: str) -> base.Toolbox:
    """Return the usual toolbox, in which a rule's jobs have another pruning or another learning rate."""
    made = default_toolbox(evaluate, layout, config)
    usual = made.jobs
    if kind == "paced":
        changes = dict(zip(("until", "pace", "mix"), FIRST_STRATEGY[2:].tolist()))
    else:
        changes = {"learning_rate": float(kind.removeprefix("rate="))}

    def changed(masks: list[Individual], budget: Budget) -> list[Job]:
        return [replace(job, **changes) for job in usual(masks, budget=budget)]

    made.register("jobs", changed)
    return made


if __name__ == "__main__":
    kind = sys.argv.pop(1)
    sys.exit(main.main(toolbox=partial(toolbox, kind=kind), program=f"python scripts/gradual_variants.py {kind}"))
