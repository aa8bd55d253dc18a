"""What chance may explain: two models on the same examples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import comb
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
DRAWS = 2000  # of examples, with replacement
LEVEL = 0.05  # of two-sided tests


def sign_test(wins: int, losses: int) -> float:
    """Return the probability of so many `wins` or more among wins and losses that are equally likely: one-sided, exact
    (McNemar, 1947, with the binomial distribution)."""
    of = wins + losses
    ways, all_ways = comb(of, wins), 0
    for k in range(wins, of + 1):
        all_ways += ways
        ways = ways * (of - k) // (k + 1)  # comb(of, k + 1), which takes long to compute anew where there are many
    return float(all_ways / 2**of)


def paired_bootstrap(a: Floats, b: Floats, score: Callable[[list[float]], float], draws: int = DRAWS) -> float:
    """Return the share of resamples in which `a` scores no more than `b`; both are sums of each example, (n, k), and `score`
    makes a score of their totals (Efron, 1979)."""
    return no_more(a, b, score, draws)[0]


def no_more(a: Floats, b: Floats, score: Callable[[list[float]], float], draws: int) -> tuple[float, float]:
    """Return the shares of resamples in which `a` scores no more than `b`, and `b` no more than `a`."""
    rng, counts = np.random.default_rng(0), [0, 0]
    for _ in range(draws):
        drawn = rng.multinomial(len(a), np.full(len(a), 1 / len(a)))
        mine, other = score((drawn @ a).tolist()), score((drawn @ b).tolist())
        counts = [counts[0] + (mine <= other), counts[1] + (other <= mine)]
    return counts[0] / draws, counts[1] / draws


def mcnemar(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> float:
    """Return the two-sided p of the exact test (McNemar, 1947, doi:10.1007/BF02295996) on what two models have right, (images,)
    of 1 and 0: among images that one of them has right, each is as likely to be the one."""
    only_a, only_b = int((a > b).sum()), int((b > a).sum())
    return min(1.0, 2 * sign_test(max(only_a, only_b), min(only_a, only_b)))


def two_sided_bootstrap(a: Floats, b: Floats, score: Callable[[list[float]], float], draws: int = DRAWS) -> float:
    """Return the two-sided p that two models score the same, no smaller than resamples can tell."""
    with np.errstate(invalid="ignore"):
        least = min(no_more(a, b, score, draws))
    return min(1.0, 2 * max(least, 1 / draws))


def holm(ps: Sequence[float]) -> list[float]:
    """Return p values after Holm's correction (1979) over all of them."""
    order, least = np.argsort(ps, kind="stable"), 0.0
    corrected = [0.0] * len(ps)
    for rank, i in enumerate(order):
        least = max(least, min(1.0, float(ps[i]) * (len(ps) - rank)))
        corrected[i] = least
    return corrected
