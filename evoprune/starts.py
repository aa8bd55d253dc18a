"""First individuals: random masks, and the masks of rules (magnitude, ERK, LAMP), spread over a grid in log density.

A rule takes the weights (a float array a layer) and returns `mask(density, rng)`, which keeps that share of the searched
weights and returns a bool array a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch

from .config import EvopruneError
from .genome import Individual, from_masks
from .layers import Layout
from .saliency import SALIENCIES, keep_top

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
        return [(rng.permutation(layer.genes) < keep(d, layer.genes)).reshape(layer.gene_shape)
                for layer, d in zip(layout, erk_densities(layout, density))]

    return mask


def erk(weights: Sequence[Weights], layout: Layout) -> Rule:
    """Keep the largest weights of each layer, with ERK layer densities."""
    scores = SALIENCIES["magnitude"]([torch.from_numpy(w) for w in weights], None)

    def mask(density: float, rng: np.random.Generator) -> Masks:
        return [keep_top([score], keep(d, layer.genes))[0].numpy()
                for score, layer, d in zip(scores, layout, erk_densities(layout, density))]

    return mask


def by_saliency(name: str) -> Callable[[Sequence[Weights], Layout], Rule]:
    """Return the rule that keeps the weights of the highest scores of all layers together."""
    def rule(weights: Sequence[Weights], layout: Layout) -> Rule:
        scores = SALIENCIES[name]([torch.from_numpy(w) for w in weights], None)

        def mask(density: float, rng: np.random.Generator) -> Masks:
            return [kept.numpy() for kept in keep_top(scores, keep(density, layout.weights))]

        return mask

    return rule


def keep(density: float, genes: int) -> int:
    """Return how many of `genes` to keep: at least one, so that no layer is cut through."""
    return max(1, round(density * genes))


STARTS: dict[str, Callable[[Sequence[Weights], Layout], Rule]] = {
    "random": random, "magnitude": by_saliency("magnitude"), "erk": erk, "lamp": by_saliency("lamp")}
