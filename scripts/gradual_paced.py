"""A rule that prunes gradually, but as the first children of a tuned run do: what schedule and saliency alone are worth.

    python scripts/gradual_paced.py --method gradual:fisher --total-epochs 80 --out results/NAME ...
"""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

from evoprune import main, search
from evoprune.tuned import DENSEST, Job, rule_jobs


def paced(*given: Any) -> list[Job]:
    """Return the rule's jobs with `until`, `pace` and `mix` of the first children."""
    until, pace, mix = DENSEST[2:].tolist()
    return [replace(job, until=until, pace=pace, mix=mix) for job in rule_jobs(*given)]


if __name__ == "__main__":
    setattr(search, "rule_jobs", paced)  # noqa: B010  # mypy knows no such name there
    sys.exit(main.main())
