"""What a right answer is: how outputs are held against targets, what that is worth, and what training lowers.

`sums` gives each example numbers whose sums over all examples `value` turns into the score, so that batches and workers need not
know what they are.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import EvopruneError
from ..objectives import ACCURACY, Objective, Objectives, objectives_of
from .models import logits_of
from .named import call
from .scores import f1, mean_iou, r2, share, wilson

log = logging.getLogger("evoprune")
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
        """Return the score and its 95 % interval, from the sums (n, k) of each example: Wilson's for shares of the examples,
        otherwise from 1,000 draws of the examples with a fixed seed."""
        total = sums.sum(0).tolist()
        return self.score(total), *(wilson(*total) if self.share and self.single else self.bootstrapped(sums))

    def each(self, sums: Tensor) -> npt.NDArray[Any]:
        """Return what a run keeps of the sums (n, k) of each example, to be compared with another run's: which answers are right,
        in packed bits, where that is all there is, otherwise the sums."""
        numbers = sums.numpy()
        return np.packbits(numbers[:, 0] > 0) if self.share and self.single else np.ascontiguousarray(numbers)

    def kept_again(self, each: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Return as a run keeps it what `each` gave and a run's file has, (n, k)."""
        return np.packbits(each[:, 0] > 0) if self.share and self.single else each

    def bootstrapped(self, sums: Tensor) -> tuple[float, float]:
        """Return the 95 % interval of the score over draws of the examples."""
        rng, numbers = np.random.default_rng(0), sums.double().numpy()
        with np.errstate(invalid="ignore"):  # an error without end
            drawn = [draw @ numbers for draw in rng.multinomial(len(numbers), np.full(len(numbers), 1 / len(numbers)), DRAWS)]
        low, high = np.quantile([self.score(each.tolist()) for each in drawn], (0.025, 0.975))
        return float(low), float(high)


def logits_for(output: Any, targets: Tensor) -> Tensor:
    """Return what the model says of each target: outputs in the shape of the targets, but for a dimension of 1."""
    outputs = logits_of(output)
    if len(outputs) != len(targets) or not alike(outputs, targets):
        raise EvopruneError(f"model: returned outputs of shape {tuple(outputs.shape)} for targets of shape "
                            f"{tuple(targets.shape)}, expected as many")
    return outputs.reshape(targets.shape)


def alike(outputs: Tensor, targets: Tensor) -> bool:
    """Say whether outputs are targets in the same order: of the same shape but for dimensions of 1, or flat."""
    shapes = [[size for size in each.shape[1:] if size != 1] for each in (outputs, targets)]
    return outputs.numel() == targets.numel() and (shapes[0] == shapes[1] or min(map(len, shapes)) <= 1)


def right_answers(output: Any, labels: Tensor) -> Tensor:
    """Return right answers and ones, (batch, 2); a non-finite logit is a wrong answer."""
    logits = logits_of(output)  # (batch, classes)
    if logits.dim() != 2 or len(logits) != len(labels) or not logits.shape[1]:
        raise EvopruneError(f"model: returned logits of shape {tuple(logits.shape)} for {len(labels)} images, expected "
                            f"({len(labels)}, classes)")
    right = (logits.argmax(1) == labels) & torch.isfinite(logits).all(1)
    return torch.stack([right, torch.ones_like(right)], 1)


def right_signs(output: Any, targets: Tensor) -> Tensor:
    """Return right answers and ones, (batch, 2), of one logit an example."""
    logits = logits_for(output, targets).flatten()
    right = ((logits > 0) == (targets.flatten() > 0.5)) & torch.isfinite(logits)
    return torch.stack([right, torch.ones_like(right)], 1)


def right_labels(output: Any, targets: Tensor) -> Tensor:
    """Return true positives, false positives and false negatives, (batch, 3); a non-finite logit is a wrong answer."""
    logits, wanted = (each.reshape(len(targets), -1) for each in (logits_for(output, targets), targets > 0.5))
    said = torch.where(torch.isfinite(logits), logits > 0, ~wanted)
    return torch.stack([(said & wanted).sum(1), (said & ~wanted).sum(1), (~said & wanted).sum(1)], 1)


def squares(output: Any, targets: Tensor) -> Tensor:
    """Return, for each of d outputs, the squared error, the target and its square, then one, (batch, 3 d + 1) double."""
    outputs, wanted = (each.double().reshape(len(targets), -1) for each in (logits_for(output, targets), targets))
    errors = (outputs - wanted).square().nan_to_num(nan=math.inf)
    return torch.cat([errors, wanted, wanted.square(), torch.ones_like(wanted[:, :1])], 1)


def counted(labels: Tensor) -> Tensor:
    """Return which labels count."""
    return (labels >= 0) & (labels != IGNORED)


def overlaps(output: Any, labels: Tensor) -> Tensor:
    """Return, for each class, positions where it is said and right, and where it is said or right, (batch, 2 classes)."""
    logits = logits_of(output)  # (batch, classes, ...)
    said, counts = logits.argmax(1), counted(labels)
    said = torch.where(torch.isfinite(logits).all(1), said, -1)
    classes = range(logits.shape[1])
    both = [((said == c) & (labels == c)).flatten(1).sum(1) for c in classes]
    either = [(((said == c) & counts) | (labels == c)).flatten(1).sum(1) for c in classes]
    return torch.stack([*both, *either], 1)


def right_tokens(output: Any, labels: Tensor) -> Tensor:
    """Return right answers and how many positions count, (batch, 2)."""
    logits, counts = logits_of(output), labels >= 0  # (batch, positions, classes)
    right = (logits.argmax(-1) == labels) & torch.isfinite(logits).all(-1) & counts
    return torch.stack([right.flatten(1).sum(1), counts.flatten(1).sum(1)], 1)


def cross_entropy(output: Any, labels: Tensor) -> Tensor:
    """Return the mean cross-entropy."""
    return F.cross_entropy(logits_of(output), labels)


def binary_cross_entropy(output: Any, targets: Tensor) -> Tensor:
    """Return the mean binary cross-entropy of logits."""
    logits = logits_for(output, targets)
    return F.binary_cross_entropy_with_logits(logits, targets.to(logits.dtype))


def squared_error(output: Any, targets: Tensor) -> Tensor:
    """Return the mean squared error."""
    outputs = logits_for(output, targets)
    return F.mse_loss(outputs, targets.to(outputs.dtype))


def pixel_cross_entropy(output: Any, labels: Tensor) -> Tensor:
    """Return the mean cross-entropy over the positions that count, classes in dimension 1."""
    summed = F.cross_entropy(logits_of(output), labels.masked_fill(~counted(labels), -100), reduction="sum")
    return summed / counted(labels).sum().clamp_min(1)


def token_cross_entropy(output: Any, labels: Tensor) -> Tensor:
    """Return the mean cross-entropy over the positions that count, classes in the last dimension."""
    summed = F.cross_entropy(logits_of(output).flatten(0, -2), labels.masked_fill(labels < 0, -100).flatten(), reduction="sum")
    return summed / (labels >= 0).sum().clamp_min(1)


CLASSIFICATION = Task("classification", ACCURACY.name, right_answers, share, cross_entropy, share=True, single=True,
                      link="softmax")
TASKS = {task.name: task for task in (
    CLASSIFICATION,
    Task("binary", ACCURACY.name, right_signs, share, binary_cross_entropy, share=True, single=True, link="sigmoid"),
    Task("multilabel", "F1", right_labels, f1, binary_cross_entropy, link="sigmoid"),
    Task("regression", "R2", squares, r2, squared_error, worst=-1.0),
    Task("segmentation", "mean IoU", overlaps, mean_iou, pixel_cross_entropy, link="softmax"),
    Task("tokens", ACCURACY.name, right_tokens, share, token_cross_entropy, share=True, link="softmax", dimension=-1))}


@cache
def task_of(spec: str | None) -> Task:
    """Return the task that --task names: a built-in one, or what FILE.py:function returns; classification without a name.

    Raises:
        EvopruneError: there is none, or the function returns something else.
    """
    if spec is None or spec in TASKS:
        return TASKS[spec or CLASSIFICATION.name]
    found = call(spec, "task")
    if not isinstance(found, Task):
        raise EvopruneError(f"task: {spec} returned {type(found).__name__}, expected an evoprune.Task")
    return found


def guessed(outputs: Tensor, targets: Tensor) -> Task:
    """Return the task that outputs and targets of some examples are like; classification where no other is."""
    task = like(outputs, targets)
    if task.name == "multilabel" and targets.dim() == 2 and bool((targets.sum(1) == 1).all()):
        log.warning("each target is 1 in one of %d places, which is taken for the task multilabel; if that place is a class, "
                    "hand in targets.argmax(1)", targets.shape[1])
    return task


def like(outputs: Tensor, targets: Tensor) -> Task:
    """Return the task that shapes and values are like."""
    whole = not targets.is_floating_point()
    binary = bool(((targets == 0) | (targets == 1)).all())
    logits = TASKS["regression" if not binary else "binary" if targets[0].numel() == 1 else "multilabel"]
    if targets.dim() > 1 and outputs.shape[1:] == targets.shape[1:]:
        return logits
    if outputs[0].numel() == targets[0].numel():
        return CLASSIFICATION if whole and not targets.any() else logits
    if whole and targets.dim() > 1 and outputs.dim() == targets.dim() + 1:
        if outputs.shape[1:-1] == targets.shape[1:]:
            return TASKS["tokens"]
        if outputs.shape[2:] == targets.shape[1:]:
            return TASKS["segmentation"]
    return CLASSIFICATION


def check_task(task: Task, outputs: Tensor, targets: Tensor, name: str) -> None:
    """Raise `EvopruneError` where a split's targets are none that the task knows, for such outputs."""
    found = f"{name}: found targets of shape {tuple(targets.shape)} and type {targets.dtype}"
    one = tuple(outputs.shape[1:])
    if task.name == CLASSIFICATION.name:
        if targets.dim() != 1:
            raise EvopruneError(f"{found} for outputs of shape {one} each, which are like no task; name one with --task")
        check_labels(task, targets, name)
        if outputs.dim() != 2:
            raise EvopruneError(f"model: returned logits of shape {tuple(outputs.shape)} for {len(outputs)} images, "
                                f"expected ({len(outputs)}, classes)")
    if task.name in ("binary", "multilabel") and not bool(((targets == 0) | (targets == 1)).all()):
        raise EvopruneError(f"{found}, expected 0 and 1 for the task {task.name}")
    if task.name in ("binary", "multilabel", "regression") and not alike(outputs[:1], targets[:1]):
        raise EvopruneError(f"{found} for outputs of shape {one} each, expected as many for the task {task.name}")
    if task.name == "binary" and targets[0].numel() > 1:
        raise EvopruneError(f"{found}, expected one target each for the task binary; several are multilabel")
    if task.name in ("segmentation", "tokens"):
        check_labels(task, targets, name)
        positions = one[:-1] if task.dimension == -1 else one[1:]
        if positions != tuple(targets.shape[1:]):
            raise EvopruneError(f"{found} for outputs of shape {one} each, expected a label for each of {positions}")
    if task.link == "softmax" and task.name in TASKS:
        classes, most = outputs.shape[task.dimension], int(targets[counted(targets)].max()) if counted(targets).any() else 0
        if most >= classes:
            raise EvopruneError(f"{name}: found label {most}, expected 0 to {classes - 1}: the model has {classes} outputs")


def check_labels(task: Task, labels: Tensor, name: str) -> None:
    """Raise `EvopruneError` for labels that are no whole numbers, from 0 unless some count for nothing."""
    if labels.is_floating_point():
        raise EvopruneError(f"{name}: found labels of type {labels.dtype}, expected whole numbers from 0")
    if task.name == CLASSIFICATION.name and int(labels.min()) < 0:
        raise EvopruneError(f"{name}: found label {int(labels.min())}, expected whole numbers from 0")


def constant_score(task: Task, targets: Tensor) -> float | None:
    """Return what the best answer scores that is the same for all examples, None where that is not known."""
    if task.name in (CLASSIFICATION.name, "binary", "tokens"):
        labels = targets.flatten()[targets.flatten() >= 0].long()
        return int(labels.bincount().max()) / len(labels) if len(labels) else None
    if task.name == "multilabel":  # yes to so many of the most frequent labels
        there = targets.flatten(1).sum(0).sort(descending=True).values.double()
        said = torch.arange(1, len(there) + 1, device=there.device) * len(targets)
        return float((2 * there.cumsum(0) / (said + there.sum())).max())
    if task.name == "segmentation":  # one class everywhere
        there = targets[counted(targets)].bincount()
        return float(there.max() / there.sum() / (there > 0).sum()) if there.any() else None
    return 0.0 if task.name == "regression" else None


def optimised(objectives: str, task: str | None) -> Objectives:
    """Return the objectives of a run: for every task but classification, its score stands in the place of the accuracy."""
    found = task_of(task)
    if found.name == CLASSIFICATION.name:
        return objectives_of(objectives)
    score = Objective("score", 1.0, found.worst, found.best, ACCURACY.splits, percent=found.share, metric=found.metric)
    return Objectives(tuple(score if each == ACCURACY else each for each in objectives_of(objectives)))
