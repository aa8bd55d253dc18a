"""How much the logits feel an error of a layer, and so what each of its weights is worth.

What least squares knows also says what a weight is worth (optimal brain surgeon: Hassibi and Stork, 1993, with the curvature in
Kronecker factors, as in Martens and Grosse, 2015, arXiv:1503.05671): w^2 / [(C_SS + d I)^-1]_jj is the squared error that the
others of its row cannot make good, and the gradients of the loss by the layer's outputs say what such an error costs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import first_line
from ..inputs.models import differentiable, logits_of
from ..inputs.nested import Inputs, applied, batches, leaves, taken
from ..inputs.tasks import Task
from .fast import deterministic
from .least_squares import Solved, outputs_of, shares_of

GRADIENT_IMAGES = 512  # of the calibration images, evenly, that saliency takes gradients by outputs of
LEAST_BATCH, MOST_BATCH, OUTPUTS = 32, 256, 1 << 20  # of images that gradients are taken of at once: their outputs fit a cache
MOST_OUTPUTS = 1 << 26  # numbers of all solved layers that a batch makes at most, for memory's sake: it has their gradients too
DIRECTIONS = 4  # of the logits, drawn at random, in which an error is felt
Layers = Mapping[nn.Module, Solved]  # that least squares solves
Outputs = dict[nn.Module, Tensor]  # of each of them
log = logging.getLogger("evoprune")


def weigh_errors(model: nn.Module, layers: Layers, images: Inputs, task: Task, classifier: Solved | None) -> bool:
    """Let each layer but the classifier know how much the logits feel its errors; return whether there are gradients."""
    ways = partial(along_ways, task=task, generator=torch.Generator().manual_seed(0))
    weighing = [module for module, layer in layers.items() if layer is not classifier]
    squares = {module: torch.zeros_like(layers[module].targets) for module in weighing}
    counts = dict.fromkeys(weighing, 0)  # of rows that have them
    off = dict.fromkeys(weighing, torch.zeros(()))  # squares: where batches are no rows of what all images made together
    try:
        done, size = 0, batch_for(layers)
        for outputs, found in gradients(model, layers, images, ways):
            here, done = slice(done, done + size), done + size
            felt: dict[nn.Module, tuple[Tensor, Tensor | None]] = {}
            for module in [module for module in weighing if module in outputs]:
                layer, at = layers[module], counts[module]
                drawn = None if layer.positions is None else layer.positions[here]
                rows = outputs_of(module, outputs[module].detach(), drawn)
                if len(wanted := layer.targets[at:at + len(rows)]) == len(rows):
                    off[module] = off[module] + (rows - wanted).square().sum()
                    counts[module] += len(rows)
                    felt[module] = squares[module][at:counts[module]], drawn
            for gradient in found:
                for module, (summed, drawn) in felt.items():
                    summed.add_(outputs_of(module, gradient[module], drawn).square_())
    except torch.cuda.OutOfMemoryError:
        raise
    except (RuntimeError, IndexError, TypeError, ValueError) as error:
        if any(word in str(error) for word in ("alloc", "CUDA", "CUBLAS")):
            raise  # the machine's and not the model's: it must not change what comes out
        log.info("least squares weighs all errors alike, and weights are worth their LAMP score: no gradients go through the "
                 "model (%s)", first_line(error))
        return False
    for module in weighing:
        layer, spread = layers[module], (layers[module].targets - layers[module].targets.mean(0)).norm()
        if counts[module] == len(layer.targets) and off[module].sqrt() <= 0.1 * spread:
            layer.shares = shares_of(squares.pop(module))
    return True


def along_ways(logits: Tensor, task: Task, generator: torch.Generator) -> list[Tensor]:
    """Return how far logits go in each of `DIRECTIONS`, ()."""
    drawn = torch.randn(DIRECTIONS, *logits.shape, generator=generator).to(logits.device)
    if task.link == "softmax":  # what all logits share is not felt
        drawn = drawn - drawn.mean(1 + task.dimension if task.dimension > 0 else task.dimension, keepdim=True)
    return [(way * logits).sum() for way in drawn]


def batch_for(layers: Layers) -> int:
    """Return of how many images gradients are taken at once."""
    each = max(1, sum(layer.size for layer in layers.values()))
    usual = min(MOST_BATCH, max(LEAST_BATCH, 1 << (OUTPUTS // each).bit_length() >> 1))
    return max(1, min(usual, MOST_OUTPUTS // each))


def gradients(model: nn.Module, layers: Layers, images: Inputs,
              losses: Callable[[Tensor], Sequence[Tensor]]) -> Iterator[tuple[Outputs, Iterator[Outputs]]]:
    """Yield, for each batch of the images, each solved layer's output, and its gradients of each loss made of the logits, one
    after the other."""
    outputs: Outputs = {}

    def by_outputs(loss: Tensor) -> Outputs:
        with deterministic():
            return dict(zip(outputs, torch.autograd.grad(loss, list(outputs.values()), retain_graph=True,
                                                         materialize_grads=True)))

    def note(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        outputs[module] = output + torch.zeros((), device=output.device, requires_grad=True)
        return outputs[module].clone()  # what comes after may write over it

    hooks = [module.register_forward_hook(note) for module in layers]
    try:
        for batch in batches(images, batch_for(layers)):
            outputs.clear()
            with torch.enable_grad(), deterministic(), differentiable(model):
                found = iter(losses(logits_of(applied(model, batch)).float()))  # at its end it lets go of the graph
            yield outputs, map(by_outputs, found)
    finally:
        for hook in hooks:
            hook.remove()


def saliency_of(model: nn.Module, layers: Layers, images: Inputs, task: Task) -> dict[str, Tensor]:
    """Return what each weight is worth under the newest mask, (out, p) a solved layer by the name of its weight: the error
    that removing it leaves, times the root mean squared gradient of the loss by that output, summed over positions.

    Targets are drawn from what the model itself says. The root, not the square: on LeNet-5/MNIST a multi-shot path with it
    has a better front (results/LOG.md).
    """
    squares = {module: torch.zeros(len(layer.dense), device=layer.dense.device) for module, layer in layers.items()}
    there = len(leaves(images)[0])
    count = min(GRADIENT_IMAGES, there)
    images = taken(images, torch.linspace(0, there - 1, count).long())
    generator = torch.Generator().manual_seed(0)

    def loss(logits: Tensor) -> list[Tensor]:
        said = logits.detach().nan_to_num()
        if task.link == "softmax":
            flat, shares = (each.movedim(task.dimension, -1).flatten(0, -2) for each in (logits, said))  # (answers, classes)
            drawn = torch.multinomial(shares.softmax(1).cpu(), 1, generator=generator)[:, 0]
            return [F.cross_entropy(flat, drawn.to(logits.device), reduction="sum")]
        if task.link == "sigmoid":
            drawn = torch.bernoulli(said.sigmoid().cpu(), generator=generator).to(logits.device)
            return [F.binary_cross_entropy_with_logits(logits, drawn, reduction="sum")]
        return [(logits * torch.randn(logits.shape, generator=generator).to(logits.device)).sum()]

    for _, (found,) in gradients(model, layers, images, loss):
        for module, gradient in found.items():
            by_channel = gradient.movedim(1, -1) if isinstance(module, nn.Conv2d) else gradient
            squares[module] += by_channel.float().square().flatten(0, -2).sum(0)
    return {layer.name: (layer.errors * (squares[module] / count).sqrt()[:, None]).nan_to_num()
            for module, layer in layers.items()}
