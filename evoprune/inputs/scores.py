"""What sums over examples are worth: the scores of the built-in tasks, intervals. Whoever only reads a run's files needs no torch
for them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np


def wilson(right: int, of: int) -> tuple[float, float]:
    """Return the 95 % Wilson score interval of a share (Wilson, 1927, doi:10.1080/01621459.1927.10502953)."""
    z, p = 1.959963984540054, right / of
    centre, half = p + z * z / (2 * of), z * math.sqrt(p * (1 - p) / of + z * z / (4 * of * of))
    low, high = (centre - half) / (1 + z * z / of), (centre + half) / (1 + z * z / of)
    return max(0.0, min(low, p)), min(1.0, max(high, p))  # rounding must not put the share outside


def share(sums: Sequence[float]) -> float:
    """Return the share of right answers."""
    return sums[0] / sums[1] if sums[1] else 0.0


def f1(sums: Sequence[float]) -> float:
    """Return F1 over all labels of all examples (micro)."""
    right, extra, missed = sums
    return 2 * right / (2 * right + extra + missed) if right else 0.0


def r2(sums: Sequence[float]) -> float:
    """Return the coefficient of determination R2, the mean over outputs; one that never varies counts as all or nothing."""
    *parts, count = sums
    errors, wanted, powers = np.array(parts).reshape(3, -1)
    spread = powers - wanted ** 2 / max(count, 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        found = np.where(spread > 1e-14 * np.maximum(powers, 1e-300), 1 - errors / spread, np.where(errors > 0, -np.inf, 1.0))
    return float(found.mean())


def mean_iou(sums: Sequence[float]) -> float:
    """Return the mean over classes of intersection over union; a class that is neither said nor there is left out."""
    half = len(sums) // 2
    found = [both / either for both, either in zip(sums[:half], sums[half:]) if either]
    return sum(found) / len(found) if found else 0.0


VALUES: dict[str, Callable[[Sequence[float]], float]] = {  # of the tasks of that name
    "classification": share, "binary": share, "multilabel": f1, "regression": r2, "segmentation": mean_iou, "tokens": share}
