"""Trains the values that a mask keeps; pruned ones stay zero. Without masks, it trains a dense model; a mask may lose more
of its weights on the way, the least salient first.

The same seed, threads and kind of processor give the same values, bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..inputs.models import differentiable, logits_of, set_state
from ..inputs.nested import Inputs, applied
from ..inputs.splits import Split
from ..inputs.tasks import CLASSIFICATION
from ..masks.layout import Layout
from ..masks.saliency import NEEDS_DATA, gene_scores, keep_top
from ..masks.tensors import expanded
from .fast import channels_last, deterministic, fast_training, in_fp32, same
from .optimizer import Optimizer

SMALL = 1_000_000  # parameters; below, Adam learns faster, above, SGD with momentum generalises better
WARM_UP = 0.05  # share of the steps
PRUNINGS, PRUNE_EVERY = 40, 50  # times that a mask loses weights, but not more than so many steps apart
SPARED = 0.25  # share of the weights that are kept, at most, that are because a class has no other


@dataclass(frozen=True)
class Recipe:
    """How values are trained: linear warm-up over 5 % of the steps, then cosine to zero."""

    epochs: float
    optimizer: str  # "adam" or "sgd"
    learning_rate: float  # at its peak
    batch_size: int
    seed: int
    augment: bool
    precision: str = "fp32"  # of what values are trained in; they themselves are as they were


@dataclass(frozen=True)
class Shrink:
    """How a mask loses weights while the others are trained: by the cube of the time that is left (Zhu and Gupta, 2017,
    arXiv:1710.01878, equation 1); with a `pace`, the logarithm of the density falls by that power of the time that is left,
    which leaves more of it to the densities near the last."""

    layout: Layout  # of the masked layers: what goes, goes gene by gene
    kept: int  # weights at the end, over all of them, at most
    saliency: str  # of `SALIENCIES`: what goes first
    until: float = 0.7  # share of the steps after which the mask stays
    first: float = 0.2  # share of all weights that the first pruning leaves at most
    pace: float | None = None
    mix: float = 1.0  # power of the mean squared gradient in a saliency that has it: 1 as it is, 0 without
    classes: str | None = None  # weights that make the logits, of which each class keeps one: else its logit is the same for all

    def kept_at(self, step: int, steps: int, before: int, weights: int) -> int:
        """Return how many weights are kept at `step`, of `before` at the start."""
        most = max(self.kept, min(before, self.first * weights))
        left = max(0.0, 1 - step / max(1.0, self.until * steps))
        if self.pace is None:
            return round(self.kept + (most - self.kept) * left ** 3)
        return round(self.kept * math.pow(most / self.kept, left ** self.pace))

    def every(self, steps: int) -> int:
        """Return how many steps there are from one pruning to the next."""
        return min(PRUNE_EVERY, max(1, int(self.until * steps) // PRUNINGS))


@dataclass(frozen=True)
class Pieces:
    """A long training may end and go on in another process, with the same values."""

    start: Mapping[str, Tensor] | None  # the state that an earlier process left
    keep: Callable[[Callable[[], dict[str, Tensor]]], None]  # called after each step with what returns its state


def recipe_for(model: nn.Module, epochs: float, seed: int, learning_rate: float | None = None,
               augment: bool = True, precision: str = "fp32") -> Recipe:
    # 6 arguments: the parts of a recipe
    """Return Adam (0.01, batch 64) for small models, SGD with momentum (0.05, batch 128) for larger ones."""
    small = sum(p.numel() for p in model.parameters()) < SMALL
    rate = learning_rate if learning_rate is not None else 0.01 if small else 0.05
    return Recipe(epochs, "adam" if small else "sgd", rate, 64 if small else 128, seed, augment, precision)


def steps_in(recipe: Recipe, images: int) -> int:
    """Return how many steps a recipe takes on so many images."""
    return round(recipe.epochs * steps_an_epoch(images, recipe.batch_size))


def steps_an_epoch(images: int, batch_size: int) -> int:
    return math.ceil(images / batch_size)


def tune(model: nn.Module, train: Split, recipe: Recipe, masks: Mapping[str, Tensor] | None = None,
         progress: Callable[[int, int], None] = lambda step, steps: None, shrink: Shrink | None = None,
         pieces: Pieces | None = None) -> dict[str, Tensor]:
    """Train `model` in place on its own device; parameters named in `masks` keep zeros where the bool mask is False.

    Returns the masks as they are at the end, which with `shrink` have lost weights. What `pieces.keep` raises ends it.
    """
    # 7 arguments: what, on what, how, and three ways to look in; 54 lines: one loop, in which nothing stands twice
    device = train.labels.device
    parameters = dict(model.named_parameters())
    kept = {name: mask.to(parameters[name].device) for name, mask in (masks or {}).items()}
    masked = [parameters[name] for name in kept]
    hold_zeros(masked, kept)
    needs_squares = shrink is not None and shrink.saliency in NEEDS_DATA
    frozen = [p for p in masked if not p.requires_grad] if needs_squares else []  # which have squares all the same
    optimizer = Optimizer(model.parameters(), recipe.optimizer, needs_squares, frozen)
    if shrink is not None and train.task.name == CLASSIFICATION.name:
        shrink = replace(shrink, classes=last_layer(model.eval(), train.inputs(slice(0, 2))))
    an_epoch, steps = steps_an_epoch(len(train), recipe.batch_size), steps_in(recipe, len(train))
    before, weights = sum(int(mask.sum()) for mask in kept.values()), sum(mask.numel() for mask in kept.values())
    order_of = torch.Generator().manual_seed(recipe.seed)
    begun = 0
    bf16 = recipe.precision == "bf16"
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), deterministic(), fast_training(model), \
            felt(frozen), \
            channels_last(model, train.inputs(slice(0, 2))) if bf16 or device.type == "cpu" else nullcontext(same) as ordered:
        torch.manual_seed(recipe.seed)  # dropout and augmentation
        if pieces is not None and pieces.start is not None:
            begun, order, kept = restored(pieces.start, model, kept, optimizer, order_of)
        model.train()
        for step in range(begun, steps):
            if step % an_epoch == 0:
                order = torch.randperm(len(train), generator=order_of).to(device)
            batch = order[step % an_epoch * recipe.batch_size:][:recipe.batch_size]
            if len(batch) >= 2 or len(train) < 2:  # batch norm cannot train on one image
                inputs = train.inputs(batch)
                if recipe.augment and isinstance(inputs, Tensor) and moves_freely(train):
                    inputs = augmented(inputs)
                with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                    outputs = applied(model, ordered(inputs))
                loss = train.task.loss(in_fp32(outputs) if bf16 else outputs, train.labels[batch])
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step(recipe.learning_rate * schedule(step, steps))
            if shrink and ((step + 1) % shrink.every(steps) == 0 or step + 1 == steps):
                count = shrink.kept if step + 1 == steps else shrink.kept_at(step + 1, steps, before, weights)
                means = [optimizer.squares.get(p, torch.zeros_like(p)).pow(shrink.mix) for p in masked] if needs_squares else None
                kept = dict(zip(kept, shrunk(masked, list(kept.values()), shrink, count, means)))
            hold_zeros(masked, kept)
            progress(step + 1, steps)
            if pieces is not None and step + 1 < steps:
                pieces.keep(partial(state_of, step + 1, order, kept, model, optimizer, order_of))
    model.eval()
    return kept


def state_of(step: int, order: Tensor, masks: Mapping[str, Tensor], model: nn.Module, optimizer: Optimizer,
             order_of: torch.Generator) -> dict[str, Tensor]:  # 6 arguments: all that one step leaves to the next
    """Return what the steps after `step` of a training start from."""
    device = order.device
    chance = {"cpu": torch.get_rng_state(), "order": order_of.get_state()}
    if device.type == "cuda":
        chance["cuda"] = torch.cuda.get_rng_state(device)
    there = model.state_dict()
    apart = {name: buffer for name, buffer in model.named_buffers() if name not in there}
    parts = {"model": there, "buffer": apart, "optimizer": optimizer.state(), "mask": masks, "chance": chance}
    return {"step": torch.tensor(step), "order": order,
            **{f"{part}/{name}": value for part, values in parts.items() for name, value in values.items()}}


def restored(state: Mapping[str, Tensor], model: nn.Module, masks: Mapping[str, Tensor], optimizer: Optimizer,
             order_of: torch.Generator) -> tuple[int, Tensor, dict[str, Tensor]]:
    """Put a state back; return its step, order and masks, in the order of `masks`."""
    parts: dict[str, dict[str, Tensor]] = {"model": {}, "buffer": {}, "optimizer": {}, "mask": {}, "chance": {}}
    for name, value in state.items():
        part, _, rest = name.partition("/")
        if rest:
            parts[part][rest] = value
    set_state(model, parts["model"])
    for name, value in parts["buffer"].items():
        model.get_buffer(name).copy_(value)
    optimizer.restore(parts["optimizer"])
    device = next(model.parameters()).device
    torch.set_rng_state(parts["chance"]["cpu"])
    order_of.set_state(parts["chance"]["order"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(parts["chance"]["cuda"], device)
    return int(state["step"]), state["order"].to(device), {name: parts["mask"][name].to(device) for name in masks}


def shrunk(parameters: Sequence[Tensor], masks: Sequence[Tensor], shrink: Shrink, count: int,
           squares: Sequence[Tensor] | None) -> Sequence[Tensor]:
    """Return masks that keep `count`, the most salient, of the weights that `masks` keep."""
    if sum(int(mask.sum()) for mask in masks) <= count:
        return masks
    with torch.no_grad():
        scores = gene_scores(shrink.saliency, shrink.layout, [p.detach() for p in parameters], squares)
        left = [torch.where(layer.any(mask), score, -1) for layer, mask, score in zip(shrink.layout, masks, scores)]
        for layer, score in zip(shrink.layout, left):
            if layer.name == shrink.classes and not layer.by_output and len(score) <= SPARED * count:
                best = score.max(1, keepdim=True)
                score.scatter_(1, best.indices, best.values.masked_fill(best.values >= 0, math.inf))
    return expanded(keep_top(left, count, shrink.layout), shrink.layout)


def last_layer(model: nn.Module, inputs: Inputs) -> str | None:
    """Return the name of the weight of the linear layer whose outputs (batch, classes) are what a model in eval mode returns as
    logits, None where there is no such layer."""
    made: dict[nn.Module, Tensor] = {}
    layers: dict[nn.Module, str] = {module: f"{name}.weight".lstrip(".") for name, module in model.named_modules()
                                    if isinstance(module, nn.Linear)}
    hooks = [module.register_forward_hook(lambda module, args, output: made.update({module: output})) for module in layers]
    try:
        with torch.no_grad():
            logits = logits_of(applied(model, inputs))
    finally:
        for hook in hooks:
            hook.remove()
    return next((layers[module] for module, output in made.items() if output is logits and logits.dim() == 2), None)


def grown(model: nn.Module, train: Split, masks: Mapping[str, Tensor], layout: Layout, more: int, images: int,
          seed: int) -> dict[str, Tensor]:
    """Return masks that keep `more` weights more: those with the largest gradients over so many images, drawn by `seed`
    (Evci et al., 2020, arXiv:1911.11134)."""
    # 7 arguments: the model, its masks, and a seeded draw of images
    parameters = dict(model.named_parameters())
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))[:images].to(train.labels.device)
    model.eval()
    with felt(parameters[name] for name in masks), differentiable(model):
        loss = train.task.loss(applied(model, train.inputs(order)), train.labels[order])
        gradients = torch.autograd.grad(loss, [parameters[name] for name in masks], materialize_grads=True)
    scores = [torch.where(layer.any(mask), -1, layer.summed(gradient.abs()))
              for layer, gradient, mask in zip(layout, gradients, masks.values())]
    new = expanded(keep_top(scores, more, layout), layout)
    return {name: mask | grow for (name, mask), grow in zip(masks.items(), new)}


@contextmanager
def felt(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Let frozen ones of the parameters have gradients for a while."""
    frozen = [p for p in parameters if not p.requires_grad]
    for p in frozen:
        p.requires_grad_()
    try:
        yield
    finally:
        for p in frozen:
            p.requires_grad_(False)
            p.grad = None


def schedule(step: int, steps: int) -> float:
    """Return the share of the peak learning rate at `step`: up in a line, down in a half cosine to zero."""
    warm = WARM_UP * steps
    if step < warm:
        return (step + 1) / (warm + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1.0, steps - warm)))


def hold_zeros(parameters: Sequence[nn.Parameter], masks: Mapping[str, Tensor]) -> None:
    """Zero what is pruned; a product would keep the sign of a negative zero and spread NaN."""
    with torch.no_grad():
        for parameter, mask in zip(parameters, masks.values()):
            parameter.masked_fill_(~mask, 0)


def moves_freely(train: Split) -> bool:
    """Say whether an image keeps its target where it is shifted or flipped: a class does, a place or a label a pixel does not."""
    return train.task.name != "regression" and train.labels.dim() < 3


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
