"""What chance may explain: two models on the same examples."""

from __future__ import annotations

from collections.abc import Callable
from math import comb

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
DRAWS = 2000  # of examples, with replacement


def sign_test(wins: int, losses: int) -> float:
    """Return the probability of so many `wins` or more among wins and losses that are equally likely: one-sided, exact
    (McNemar, 1947, with the binomial distribution)."""
    of = wins + losses
    return float(sum(comb(of, k) for k in range(wins, of + 1)) / 2**of)


def paired_bootstrap(a: Floats, b: Floats, score: Callable[[list[float]], float], seed: int = 0) -> float:
    """Return the share of resamples in which `a` scores no more than `b`; both are sums of each example, (n, k), and `score`
    makes a score of their totals (Efron, 1979)."""
    rng, worse = np.random.default_rng(seed), 0
    for _ in range(DRAWS):
        drawn = rng.multinomial(len(a), np.full(len(a), 1 / len(a)))
        worse += score((drawn @ a).tolist()) <= score((drawn @ b).tolist())
    return worse / DRAWS
