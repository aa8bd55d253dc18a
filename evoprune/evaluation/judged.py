"""The accuracy of masks, estimated from few labelled images and many that need no label, for the search alone.

Of many masks that are measured on few images, the best is partly lucky. How often a mask answers as the dense model does can be
told on any images, and most of the luck is in that. So the estimate is prediction-powered (Angelopoulos et al., 2023,
doi:10.1126/science.adi6000): on the S search images the share of right answers less the share of the dense model's, and the
latter's share on the S search images and M others together. It is right on average where the others are like the search images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import EvopruneError
from ..inputs.models import copied, logits_of
from ..inputs.nested import joined
from ..inputs.splits import Split, example_sums

UNKNOWN = -1  # label of an image that has none


def judged(net: nn.Module, search: Split, others: Split, batch_size: int) -> Split:
    """Return the search images and the others as one split, whose task's score is the estimate; `net` is dense.

    Labels are (S + M, 2): the label, or `UNKNOWN`, and the dense model's answer.

    Raises:
        EvopruneError: the task has no single right answer among classes.
    """
    task = search.task
    if not (task.single and task.link == "softmax"):
        raise EvopruneError(f"judge_images: found {len(others):,} for the task {task.name}, expected 0: only answers "
                            f"among classes are compared with the dense model's")
    labels = torch.cat([search.labels, torch.full_like(others.labels, UNKNOWN)])
    split = replace(search, images=joined([search.images, others.images]), labels=labels)
    asked = replace(split, task=replace(task, sums=lambda output, labels: logits_of(output).argmax(1)))
    answers = example_sums(copied(net).to(labels.device).eval(), asked, batch_size).to(labels)

    def counts(output: Any, labels: Tensor) -> Tensor:
        """Return right answers, answers like the dense model's where there is a label, and all of those, and ones, (batch, 4);
        where a logit is not finite there is no answer."""
        logits = logits_of(output)
        said = torch.where(torch.isfinite(logits).all(1), logits.argmax(1), UNKNOWN - 1)
        right, alike = (said[:, None] == labels).unbind(1)
        return torch.stack([right, alike & (labels[:, 0] != UNKNOWN), alike, torch.ones_like(alike)], 1)

    def value(sums: Sequence[float]) -> float:
        return (sums[0] - sums[1]) / len(search) + sums[2] / sums[3]

    task = replace(task, sums=counts, value=value, share=False, single=False)
    return replace(split, labels=torch.stack([labels, answers], 1), task=task)
