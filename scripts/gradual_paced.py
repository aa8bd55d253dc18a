"""A rule that prunes gradually, but as the first children of a tuned run do: what schedule and saliency alone are worth.

    python scripts/gradual_paced.py --method gradual:fisher --total-epochs 80 --out results/NAME ...
"""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

from deap import base

from evoprune import main
from evoprune.config import Config
from evoprune.evolution import default_toolbox
from evoprune.evolution.tuned import FIRST_STRATEGY, Budget, Job
from evoprune.masks.genome import Individual
from evoprune.masks.layout import Layout


def toolbox(evaluate: Any, layout: Layout, config: Config) -> base.Toolbox:
    """Return the usual toolbox, in which a rule's jobs have `until`, `pace` and `mix` of the first children."""
    made = default_toolbox(evaluate, layout, config)
    usual, (until, pace, mix) = made.jobs, FIRST_STRATEGY[2:].tolist()

    def paced(masks: list[Individual], budget: Budget) -> list[Job]:
        return [replace(job, until=until, pace=pace, mix=mix) for job in usual(masks, budget=budget)]

    made.register("jobs", paced)
    return made


if __name__ == "__main__":
    sys.exit(main.main(toolbox=toolbox))
