"""What a right answer is: how outputs are held against targets, what that is worth, and what training lowers.

`sums` gives each example numbers whose sums over all examples `value` turns into the score, so that batches and workers need not
know what they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import EvopruneError
from ..objectives import ACCURACY
from .models import logits_of

DRAWS = 1000  # of test examples, with replacement, of an interval by bootstrap (Efron, 1979, doi:10.1214/aos/1176344552)
IGNORED = 255  # a label of segmentation that counts for nothing, as negative ones do


@dataclass(frozen=True)
class Task:
    """What a model is for.

    `sums(output, targets)` returns (batch, k), counts or float64, of what the model returned; they are added over all examples in
    a fixed order; `value(sums)` is the score, larger is better, from `worst` to `best`; `loss(output, targets)` () is what
    training lowers, averaged over a batch.
    """

    name: str
    metric: str  # what the field calls the score
    sums: Callable[[Any, Tensor], Tensor]
    value: Callable[[Sequence[float]], float]
    loss: Callable[[Any, Tensor], Tensor]
    worst: float = 0.0
    best: float = 1.0
    share: bool = False  # the score is the share sums[0] / sums[1]
    single: bool = False  # sums[1] of each example is 1
    link: str = "identity"  # what makes outputs the parameters of a distribution: softmax, sigmoid, or they are its mean
    dimension: int = 1  # of the classes

    def score(self, sums: Sequence[float]) -> float:
        """Return the score of sums over all examples, the worst where it is no number."""
        found = float(self.value(sums))
        return self.worst if math.isnan(found) else min(self.best, max(self.worst, found))

    def tested(self, sums: Tensor) -> tuple[float, float, float]:
        """Return the score and its 95 % interval, from the sums (n, k) of each example: Wilson's for shares, otherwise from 1,000
        draws of the examples with a fixed seed."""
        total = sums.sum(0).tolist()
        return self.score(total), *(wilson(*total) if self.share else self.bootstrapped(sums))

    def bootstrapped(self, sums: Tensor) -> tuple[float, float]:
        """Return the 95 % interval of the score over draws of the examples."""
        rng, numbers = np.random.default_rng(0), sums.double().numpy()
        drawn = (rng.multinomial(len(numbers), np.full(len(numbers), 1 / len(numbers))) @ numbers for _ in range(DRAWS))
        low, high = np.quantile([self.score(each.tolist()) for each in drawn], (0.025, 0.975))
        return float(low), float(high)


def wilson(right: int, of: int) -> tuple[float, float]:
    """Return the 95 % Wilson score interval of a share (Wilson, 1927, doi:10.1080/01621459.1927.10502953)."""
    z, p = 1.959963984540054, right / of
    centre, half = p + z * z / (2 * of), z * math.sqrt(p * (1 - p) / of + z * z / (4 * of * of))
    low, high = (centre - half) / (1 + z * z / of), (centre + half) / (1 + z * z / of)
    return max(0.0, min(low, p)), min(1.0, max(high, p))  # rounding must not put the share outside


def share(sums: Sequence[float]) -> float:
    """Return the share of right answers."""
    return sums[0] / sums[1] if sums[1] else 0.0


def right_answers(output: Any, labels: Tensor) -> Tensor:
    """Return right answers and ones, (batch, 2); a non-finite logit is a wrong answer."""
    logits = logits_of(output)  # (batch, classes)
    if logits.dim() != 2 or len(logits) != len(labels) or not logits.shape[1]:
        raise EvopruneError(f"model: returned logits of shape {tuple(logits.shape)} for {len(labels)} images, expected "
                            f"({len(labels)}, classes)")
    right = (logits.argmax(1) == labels) & torch.isfinite(logits).all(1)
    return torch.stack([right, torch.ones_like(right)], 1)


def cross_entropy(output: Any, labels: Tensor) -> Tensor:
    """Return the mean cross-entropy."""
    return F.cross_entropy(logits_of(output), labels)


CLASSIFICATION = Task("classification", ACCURACY.name, right_answers, share, cross_entropy, share=True, single=True,
                      link="softmax")
