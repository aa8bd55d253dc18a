"""Trains the values that a mask keeps; pruned ones stay zero. Without masks, it trains a dense model.

The same seed, threads and kind of processor give the same values, bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .models import logits_of
from .splits import Split

SMALL = 1_000_000  # parameters; below, Adam learns faster, above, SGD with momentum generalises better
WARM_UP = 0.05  # share of the steps


@dataclass(frozen=True)
class Recipe:
    """How values are trained: linear warm-up over 5 % of the steps, then cosine to zero."""

    epochs: int
    optimizer: str  # "adam" or "sgd"
    learning_rate: float  # at its peak
    batch_size: int
    seed: int
    augment: bool


def recipe_for(model: nn.Module, epochs: int, seed: int, learning_rate: float | None = None,
               augment: bool = True) -> Recipe:
    """Return Adam (0.01, batch 64) for small models, SGD with momentum (0.05, batch 128) for larger ones."""
    small = sum(p.numel() for p in model.parameters()) < SMALL
    rate = learning_rate if learning_rate is not None else 0.01 if small else 0.05
    return Recipe(epochs, "adam" if small else "sgd", rate, 64 if small else 128, seed, augment)


def tune(model: nn.Module, train: Split, recipe: Recipe, masks: Mapping[str, Tensor] | None = None,
         progress: Callable[[int, int], None] = lambda step, steps: None) -> None:
    """Train `model` in place on its own device; parameters named in `masks` keep zeros where the bool mask is False.

    Calls `progress(step, steps)` after each step. Leaves the model in eval mode, torch's own random state as it was.
    """
    parameters = dict(model.named_parameters())
    masked = [(parameters[name], mask.to(parameters[name].device)) for name, mask in (masks or {}).items()]
    hold_zeros(masked)
    optimizer = make_optimizer(model, recipe)
    steps_an_epoch = math.ceil(len(train) / recipe.batch_size)
    steps = recipe.epochs * steps_an_epoch
    device = train.labels.device
    order_of = torch.Generator().manual_seed(recipe.seed)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), deterministic():
        torch.manual_seed(recipe.seed)  # dropout and augmentation
        model.train()
        for step in range(steps):
            if step % steps_an_epoch == 0:
                order = torch.randperm(len(train), generator=order_of).to(device)
            batch = order[step % steps_an_epoch * recipe.batch_size:][:recipe.batch_size]
            if len(batch) < 2 <= len(train):
                continue  # batch norm cannot train on one image
            for group in optimizer.param_groups:
                group["lr"] = recipe.learning_rate * schedule(step, steps)
            inputs = train.inputs(batch)
            if recipe.augment:
                inputs = augmented(inputs)
            loss = F.cross_entropy(logits_of(model(inputs)), train.labels[batch])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            hold_zeros(masked)
            progress(step + 1, steps)
    model.eval()


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    trained = [p for p in model.parameters() if p.requires_grad]
    if recipe.optimizer == "adam":
        return torch.optim.Adam(trained, recipe.learning_rate, fused=True)
    return torch.optim.SGD(trained, recipe.learning_rate, momentum=0.9, weight_decay=5e-4, nesterov=True)


def schedule(step: int, steps: int) -> float:
    """Return the share of the peak learning rate at `step`: up in a line, down in a half cosine to zero."""
    warm = WARM_UP * steps
    if step < warm:
        return (step + 1) / (warm + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1.0, steps - warm)))


def hold_zeros(masked: list[tuple[nn.Parameter, Tensor]]) -> None:
    """Zero what is pruned; a product would keep the sign of a negative zero and spread NaN."""
    with torch.no_grad():
        for parameter, mask in masked:
            parameter.masked_fill_(~mask, 0)


def augmented(images: Tensor) -> Tensor:
    """Return colour images (b, 3, h, w) shifted by up to an eighth of their size and flipped at random; others unchanged."""
    if images.dim() != 4 or images.shape[1] != 3 or not images.is_floating_point():
        return images
    b, _, h, w = images.shape
    pad = max(1, min(h, w) // 8)
    padded = F.pad(images, (pad, pad, pad, pad))
    top, left = (torch.randint(2 * pad + 1, (b, 1), device=images.device) for _ in range(2))
    rows = (top + torch.arange(h, device=images.device))[:, None, :, None]  # (b, 1, h, 1)
    columns = left + torch.arange(w, device=images.device)  # (b, w)
    flipped = torch.rand(b, 1, device=images.device) < 0.5
    columns = torch.where(flipped, columns.flip(1), columns)[:, None, None, :]  # (b, 1, 1, w)
    image, channel = (torch.arange(n, device=images.device) for n in (b, 3))
    return padded[image[:, None, None, None], channel[None, :, None, None], rows, columns]


class deterministic:
    """Make cuDNN choose deterministic kernels for a while."""

    def __enter__(self) -> None:
        self.before = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False

    def __exit__(self, *error: object) -> None:
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = self.before
