"""Norms of a repaired model: batch norms take the statistics of what enters them; scales and shifts of norms of any kind are, at
the end, fitted to what the dense model says.

Scales and shifts alone carry a network far (Frankle, Schwab and Morcos, 2021, arXiv:2003.00152), and are so few that few images
will do, without labels. They move the further, the more of what the dense model says is lost: by a rate of `RATE` times the root
of that share.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..inputs.models import logits_of
from ..inputs.nested import applied
from ..inputs.splits import Split, drawn
from ..inputs.tasks import Task
from ..masks.channels import NORMS
from .fast import deterministic
from .optimizer import Optimizer
from .training import schedule

EPOCHS = 4  # times what masks are repaired on: so many images are fitted on, or fewer as often
RATE = 0.02  # by Adam, at the peak, where everything is lost
LITTLE = 0.02  # of what the dense model says: where less is lost, nothing is gained
APART = 8  # one image in so many is kept apart, on which they must be better than before
MOST_SAID = 1 << 30  # bytes of logits that are kept: of fewer images where each has many


@dataclass(frozen=True)
class Normed:
    """What a batch norm of the dense model has, and what it would have of the calibration images, all (channels,)."""

    mean: Tensor
    variance: Tensor
    seen_mean: Tensor
    seen_variance: Tensor

    @classmethod
    def of(cls, norm: nn.Module, inputs: Tensor) -> Normed:
        """Return what a norm has now, and what would be of these inputs."""
        assert isinstance(norm, NORMS) and norm.running_mean is not None and norm.running_var is not None
        return cls(norm.running_mean.clone(), norm.running_var.clone(), *statistics(inputs))

    def take(self, norm: nn.Module, inputs: Tensor) -> None:
        """Give a norm the mean and variance of what enters it, as far from them, in its units, as the dense model's own are from
        those of the same images."""
        assert isinstance(norm, NORMS) and norm.running_mean is not None and norm.running_var is not None
        mean, variance = statistics(inputs)
        grown = (variance + norm.eps) / (self.seen_variance + norm.eps)
        norm.running_var.copy_(((self.variance + norm.eps) * grown - norm.eps).clamp_min(0))
        scale = ((norm.running_var + norm.eps) / (self.variance + norm.eps)).sqrt()
        norm.running_mean.copy_(mean + (self.mean - self.seen_mean) * scale)


def norms_of(model: nn.Module) -> dict[str, nn.Module]:
    """Return the batch norms of `model` that keep running statistics, by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, NORMS) and m.running_mean is not None}


def scales_and_shifts(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of norms of any kind: of the modules that have vectors alone."""
    found = [list(module.parameters(recurse=False)) for module in model.modules()]
    return list(dict.fromkeys(p for own in found if all(p.dim() == 1 for p in own) for p in own))


def statistics(inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and variance of each channel, (channels,)."""
    variance, mean = torch.var_mean(inputs.float(), [i for i in range(inputs.dim()) if i != 1])
    return mean, variance


@dataclass(frozen=True, eq=False)
class Fitting:
    """Images that norms are fitted on: `rows` of a split, in any order, in so many epochs."""

    split: Split
    rows: Tensor
    epochs: int

    @classmethod
    def drawn(cls, split: Split, count: int, seed: int) -> Fitting:
        """Return images of a split, `count` of which masks are repaired on: others where there are enough."""
        rows = drawn(split, EPOCHS * count, seed, after=max(0, min(count, len(split) - EPOCHS * count)))
        return cls(split, rows, min(EPOCHS, EPOCHS * count // len(rows)))

    def within(self, looks: int) -> Fitting:
        """Return as much of it as takes so many looks at an image, one at least."""
        rows = self.rows[:max(1, looks)]
        return Fitting(self.split, rows, max(1, min(self.epochs, looks // len(rows))))

    def said(self, model: nn.Module, batch_size: int) -> Tensor:
        """Return the logits (n, ...) of the first n rows that there is room for, none where an image's are not together."""
        said: list[Tensor] = []
        with torch.no_grad():
            for rows in torch.split(self.rows, batch_size):
                said.append(logits_of(applied(model, self.split.inputs(rows))).float())
                if len(said[-1]) != len(rows):
                    return torch.empty(0)
                if (len(said) + 1) * said[0].nbytes > MOST_SAID:
                    break
        return torch.cat(said)


def fit_norms(model: nn.Module, free: list[nn.Parameter], fitting: Fitting, said: Tensor, batch_size: int) -> None:
    """Fit `free`, scales and shifts, so that the model in eval mode says of the images what the dense one has `said`; leave them
    as they are where little is lost, or that is no nearer on the images kept apart."""
    count = len(said)
    fitted_on = count - count // APART
    if fitted_on == count or not free:
        return
    before = [parameter.detach().clone() for parameter in free]

    def loss(which: Tensor) -> Tensor:
        logits = logits_of(applied(model, fitting.split.inputs(fitting.rows[which])))
        return distance(logits.float(), said[which], fitting.split.task)

    def apart() -> float:
        with torch.no_grad():
            each = [float(loss(which)) * len(which) for which in torch.split(torch.arange(fitted_on, count), batch_size)]
        return sum(each) / (count - fitted_on)

    far, generator = apart(), torch.Generator().manual_seed(0)
    share = lost(far, said[fitted_on:], fitting.split.task)
    if share < LITTLE:
        return
    steps = fitting.epochs * -(-fitted_on // batch_size)
    for parameter in free:
        parameter.requires_grad_()
    optimizer, step = Optimizer(free, "adam"), 0
    with torch.enable_grad(), deterministic():
        for _ in range(fitting.epochs):
            for which in torch.split(torch.randperm(fitted_on, generator=generator), batch_size):
                optimizer.zero_grad()
                loss(which).backward()  # type: ignore[no-untyped-call]
                optimizer.step(RATE * share ** 0.5 * schedule(step, steps))
                step += 1
    optimizer.zero_grad()
    nearer = apart() < far
    for parameter, dense in zip(free, before):
        parameter.requires_grad_(False)
        if not nearer:
            parameter.data.copy_(dense)


def distance(logits: Tensor, dense: Tensor, task: Task) -> Tensor:
    """Return how far logits are from the dense model's, (): cross-entropy of what both say, or squares where that is a mean."""
    if task.link == "softmax":
        return -(dense.softmax(task.dimension) * logits.log_softmax(task.dimension)).sum(task.dimension).mean()
    if task.link == "sigmoid":
        return F.binary_cross_entropy_with_logits(logits, dense.sigmoid())
    return F.mse_loss(logits, dense)


def lost(far: float, dense: Tensor, task: Task) -> float:
    """Return what share of what the dense model's logits say is lost at a distance: 1 where one answer for all is as near."""
    if task.link == "softmax":
        same = dense.softmax(task.dimension).mean(0, keepdim=True).clamp_min(1e-30).log()
    elif task.link == "sigmoid":
        same = dense.sigmoid().mean(0, keepdim=True).logit(1e-7)
    else:
        same = dense.mean(0, keepdim=True)
    least, most = float(distance(dense, dense, task)), float(distance(same.expand_as(dense), dense, task))
    return max(0.0, min(1.0, (far - least) / (most - least))) if most - least > 1e-6 * most else 0.0
