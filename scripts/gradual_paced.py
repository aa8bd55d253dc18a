"""A rule that prunes gradually, but in the time that the children of a tuned run start with: what the schedule alone is worth.

    python scripts/gradual_paced.py --method gradual:fisher --total-epochs 80 --out results/NAME ...
"""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

from evoprune import main, search
from evoprune.tuned import DENSEST, Job, rule_jobs


def paced(*given: Any) -> list[Job]:
    """Return the rule's jobs with `until` and `pace` of the first children."""
    return [replace(job, until=float(DENSEST[2]), pace=float(DENSEST[3])) for job in rule_jobs(*given)]


if __name__ == "__main__":
    setattr(search, "rule_jobs", paced)  # noqa: B010  # mypy knows no such name there
    sys.exit(main.main())
