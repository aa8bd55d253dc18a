"""First individuals: random masks, and the masks of rules (magnitude, ERK, LAMP), spread over a grid in log density.

A rule takes the weights (a float array a layer) and returns `mask(density, rng)`, which keeps that share of the searched
weights and returns a bool array a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from .config import EvopruneError
from .genome import Individual, from_masks
from .layers import Layout

Weights = npt.NDArray[np.float32]
Masks = list[npt.NDArray[np.bool_]]
Rule = Callable[[float, np.random.Generator], Masks]

DENSEST, SPARSEST = 0.8, 0.004  # of the grid; hvlog looks at 0.5 to 0.005


def first_population(weights: Sequence[Weights], layout: Layout, start: str, size: int,
                     rng: np.random.Generator) -> list[Individual]:
    """Return `size` individuals: the unpruned model, and the rules of `start` in turn over the density grid."""
    rules = [(name, STARTS[name](weights, layout)) for name in rule_names(start)]
    population = [from_masks((np.ones(layer.genes, bool) for layer in layout), "dense")]
    for i, density in enumerate(np.geomspace(DENSEST, SPARSEST, size - 1)):
        name, rule = rules[i % len(rules)]
        population.append(from_masks(rule(density, rng), f"{name}@{1 - density:.4g}"))
    return population


def rule_names(start: str) -> list[str]:
    """Return the rules that --start names; raise `EvopruneError` for one that does not exist."""
    names = [name.strip() for name in start.split(",")]
    for name in names:
        if name not in STARTS:
            raise EvopruneError(f"start: found {name!r}, expected {', '.join(STARTS)}, with commas between")
    return names


def erk_densities(layout: Layout, density: float) -> list[float]:
    """Return a density a layer with `density` overall: Erdos-Renyi-Kernel (Evci et al., 2020, arXiv:1911.11134).

    A layer's density is proportional to (sum of its dimensions) / (product of them), and at most 1.
    """
    weights = np.array([layer.weights for layer in layout], float)
    raw = np.array([max(1, sum(layer.shape)) for layer in layout]) / weights
    full = np.zeros(len(layout), bool)
    while True:
        scale = (density * weights.sum() - weights[full].sum()) / (raw * weights)[~full].sum() if not full.all() else 0
        over = ~full & (scale * raw > 1)
        if not over.any():
            return list(np.where(full, 1.0, scale * raw))
        full |= over


def random(weights: Sequence[Weights], layout: Layout) -> Rule:
    """Keep weights at random with ERK layer densities: looks at shapes, never at a weight."""
    def mask(density: float, rng: np.random.Generator) -> Masks:
        return [keep_top(rng.permutation(layer.genes), keep(d, layer.genes)).reshape(layer.gene_shape)
                for layer, d in zip(layout, erk_densities(layout, density))]

    return mask


def erk(weights: Sequence[Weights], layout: Layout) -> Rule:
    """Keep the largest weights of each layer, with ERK layer densities."""
    ranks = [rank(np.abs(w).ravel()) for w in weights]

    def mask(density: float, rng: np.random.Generator) -> Masks:
        return [keep_top(r, keep(d, len(r))).reshape(layer.gene_shape)
                for r, layer, d in zip(ranks, layout, erk_densities(layout, density))]

    return mask


def magnitude(weights: Sequence[Weights], layout: Layout) -> Rule:
    """Keep the largest weights of all layers together (Han et al., 2015, arXiv:1506.02626)."""
    return by_score([np.abs(w) for w in weights], layout)


def lamp(weights: Sequence[Weights], layout: Layout) -> Rule:
    """Keep the weights of the largest LAMP score: w^2 over the sum of the layer's w^2 that are not smaller
    (Lee et al., 2021, arXiv:2010.07611, equation 4)."""
    scores = []
    for w in weights:
        square = w.ravel().astype(np.float64) ** 2
        order = np.argsort(square, kind="stable")
        rest = np.cumsum(square[order][::-1])[::-1]  # sum of this and all larger ones
        score = np.empty_like(square)
        score[order] = square[order] / np.maximum(rest, np.finfo(float).tiny)
        scores.append(score)
    return by_score(scores, layout)


def by_score(scores: Sequence[npt.NDArray[np.floating]], layout: Layout) -> Rule:
    """Keep the genes with the highest scores of all layers together."""
    ranks = rank(np.concatenate([s.ravel() for s in scores]))
    ends = np.cumsum([layer.genes for layer in layout])

    def mask(density: float, rng: np.random.Generator) -> Masks:
        kept = np.split(keep_top(ranks, keep(density, len(ranks))), ends[:-1])
        return [k.reshape(layer.gene_shape) for k, layer in zip(kept, layout)]

    return mask


def rank(scores: npt.NDArray[np.floating]) -> npt.NDArray[np.int64]:
    """Return each item's place, 0 for the highest score; equal scores in order."""
    ranks = np.empty(len(scores), np.int64)
    ranks[np.argsort(-scores, kind="stable")] = np.arange(len(scores))
    return ranks


def keep_top(ranks: npt.NDArray[np.integer], count: int) -> npt.NDArray[np.bool_]:
    return ranks < count


def keep(density: float, genes: int) -> int:
    """Return how many of `genes` to keep: at least one, so that no layer is cut through."""
    return max(1, round(density * genes))


STARTS: dict[str, Callable[[Sequence[Weights], Layout], Rule]] = {
    "random": random, "magnitude": magnitude, "erk": erk, "lamp": lamp}
