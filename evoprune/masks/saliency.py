"""How much each weight matters: scores a layer, shaped like its weights, higher = keep; a gene is worth the sum of its weights.

A score looks at the weights, and those of `NEEDS_DATA` also at `squares`, the mean squared gradients of the loss.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..inputs.models import copied, differentiable
from ..inputs.nested import applied
from ..inputs.splits import Split
from .layout import Layer, Layout

Score = Callable[[Sequence[Tensor], Sequence[Tensor] | None], list[Tensor]]


def magnitude(weights: Sequence[Tensor], squares: Sequence[Tensor] | None = None) -> list[Tensor]:
    """Score |w| (Han et al., 2015, arXiv:1506.02626)."""
    return [w.abs() for w in weights]


def lamp(weights: Sequence[Tensor], squares: Sequence[Tensor] | None = None) -> list[Tensor]:
    """Score w^2 over the sum of the layer's w^2 that are not smaller (Lee et al., 2021, arXiv:2010.07611, equation 4)."""
    scores = []
    for w in weights:
        square, order = w.reshape(-1).double().square().sort(descending=True, stable=True)
        score = torch.zeros_like(square)
        score[order] = square / square.cumsum(0).clamp_min(torch.finfo(square.dtype).tiny)
        scores.append(score.view(w.shape))
    return scores


def fisher(weights: Sequence[Tensor], squares: Sequence[Tensor] | None = None) -> list[Tensor]:
    """Score w^2 times its mean squared gradient: what the loss would lose (Theis et al., 2018, arXiv:1801.05787)."""
    assert squares is not None
    return [w.square() * s for w, s in zip(weights, squares)]


SALIENCIES: dict[str, Score] = {"magnitude": magnitude, "lamp": lamp, "fisher": fisher}
NEEDS_DATA = {"fisher"}


def gene_scores(name: str, layout: Layout, weights: Sequence[Tensor], squares: Sequence[Tensor] | None = None) -> list[Tensor]:
    """Return what each gene is worth, of the layers' gene shapes, from weights and squares shaped like the layers."""
    return [layer.summed(scores) for layer, scores in zip(layout, SALIENCIES[name](weights, squares))]


def logarithm(scores: Tensor) -> Tensor:
    """Return the logarithms of scores, double; finite in float16 too."""
    return scores.double().clamp_min(1e-30).log()


def keep_top(scores: Sequence[Tensor], count: int, layout: Sequence[Layer]) -> list[Tensor]:
    """Return bool masks of the genes with the highest scores over all layers together that keep `count` weights, or as many as
    whole genes make, at least one; of equal ones the first. `scores` are of the gene shapes of the layers of `layout`."""
    flat = torch.cat([score.reshape(-1) for score in scores])
    if any(layer.weights_a_gene > 1 for layer in layout):
        kept = top_within(flat, torch.cat([torch.full((layer.genes,), layer.weights_a_gene) for layer in layout]), count)
    else:
        kept = top(flat, count)
    return [part.view(score.shape) for part, score in zip(torch.split(kept, [s.numel() for s in scores]), scores)]


def top_within(scores: Tensor, weights: Tensor, count: int) -> Tensor:
    """Return which scores, from the highest on, have `count` of `weights` together at most; the first whatever it has."""
    order = scores.sort(descending=True, stable=True).indices
    within = weights.to(order.device)[order].cumsum(0) <= count
    within[0] = count > 0
    return torch.zeros_like(within).index_put((order,), within)


def top(flat: Tensor, count: int) -> Tensor:
    """Return which are the `count` highest scores; of equal ones the first."""
    kept = torch.ones_like(flat, dtype=torch.bool) if count >= len(flat) else torch.zeros_like(flat, dtype=torch.bool)
    if 0 < count < len(flat):
        least = flat.kthvalue(len(flat) - count + 1).values  # its place among equals may differ, its value never does
        kept = flat > least
        kept[(flat == least).nonzero()[:count - int(kept.sum()), 0]] = True
    return kept


def gradient_squares(model: nn.Module, names: Sequence[str], split: Split, batch_size: int, images: int) -> list[Tensor]:
    """Return the squared gradients of the loss, a tensor for each named parameter, averaged over batches; 0 where the loss does
    not reach.

    The first `images` of the split count, in eval mode, on the split's device; `model` stays as it is.
    """
    net = copied(model).to(split.labels.device).eval().requires_grad_(False)
    parameters = [dict(net.named_parameters())[name].requires_grad_() for name in names]
    squares = [torch.zeros_like(p) for p in parameters]
    starts = range(0, min(images, len(split)), batch_size)
    for start in starts:
        batch = slice(start, min(start + batch_size, images))
        with differentiable(net):
            loss = split.task.loss(applied(net, split.inputs(batch)), split.labels[batch])
        for square, gradient in zip(squares, torch.autograd.grad(loss, parameters, materialize_grads=True)):
            square.addcmul_(gradient, gradient, value=1 / len(starts))
    return squares
