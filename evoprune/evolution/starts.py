"""First individuals: random masks, and the masks of rules, spread over a grid in log density.

A rule takes what is `Known` of the model and returns `mask(density, rng)`, which keeps that share of the searched weights
and returns the genes, a bool array a layer, of its gene shape. `--knowledge` says which rules may be used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..engines.worker import ignore
from ..masks.channels import Channels
from ..masks.genome import Individual, dense_individual, from_masks, kept_weights
from ..masks.layout import Layer, Layout
from ..masks.saliency import NEEDS_DATA, gene_scores, keep_top
from ..masks.tensors import masks
from ..rules import NEEDS, SURGEON, read_method, rule_names
from ..values.training import Pieces

Masks = list[npt.NDArray[np.bool_]]
Rule = Callable[[float, np.random.Generator], Masks]
DENSEST_START, SPARSEST_START = 0.8, 0.004  # of the grid; hvlog looks at 0.5 to 0.005


@dataclass(frozen=True)
class Known:
    """What rules may look at; what `--knowledge` forbids raises when it is called."""

    layout: Layout
    weights: Callable[[], list[Tensor]]  # dense, shaped like the layers
    squares: Callable[[], list[Tensor]]  # mean squared gradients, as are they
    repaired: Callable[[Individual], list[Tensor]]  # values after dead paths are dropped, in place, and the rest repaired
    worth: Callable[[Sequence[Tensor]], list[Tensor]]  # saliency of each gene, of the values repaired last
    channels: Callable[[], Sequence[Channels]] = list  # how layers are connected, which is no knowledge of weights
    shots: int = 160  # steps of the multi-shot path from dense to `SPARSEST_START`
    progress: Callable[[int, int], None] = ignore  # told the step of a long path, and of how many
    pieces: Callable[[], Pieces | None] = lambda: None  # what keeps the state of such a path


def first_population(known: Known, start: str, size: int, rng: np.random.Generator) -> list[Individual]:
    """Return `size` individuals: the unpruned model, and the rules of `start` in turn over the density grid, which ends where
    each layer of larger genes keeps one."""
    rules = [(name, STARTS[name](known)) for name in rule_names(start)]
    population = [dense_individual(known.layout)]
    larger = sum(layer.weights_a_gene for layer in known.layout if layer.by_output)
    sparsest = min(DENSEST_START, max(SPARSEST_START, larger / known.layout.weights))
    for i, density in enumerate(np.geomspace(DENSEST_START, sparsest, size - 1)):
        name, rule = rules[i % len(rules)]
        population.append(from_masks(rule(density, rng), f"{name}@{1 - density:.4g}"))
    return population


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


def random(known: Known) -> Rule:
    """Keep weights at random with ERK layer densities: looks at shapes, never at a weight."""
    def mask(density: float, rng: np.random.Generator) -> Masks:
        return [(rng.permutation(layer.genes) < count_kept(d, layer.genes)).reshape(layer.gene_shape)
                for layer, d in zip(known.layout, erk_densities(known.layout, density))]

    return mask


def narrow(known: Known) -> Rule:
    """Keep weights at random among some of the channels between layers: looks at shapes and at what is connected, never at a
    weight. Few weights spread over all channels leave a unit hardly any input; fewer channels leave each of them more.

    The share of channels is log-uniform from the root of the density, so that a layer can still hold that share of its weights (a
    few less, where there are few channels and the density is high); within what is left, ERK densities.
    """
    layout, channels = known.layout, known.channels()

    def mask(density: float, rng: np.random.Generator) -> Masks:
        lives = [[np.ones(size, bool) for size in layer.shape] for layer in layout]
        for each in channels:
            here = rng.permutation(each.count) < count_kept(density ** rng.uniform(0, 0.5), each.count)
            for i in each.makers:
                lives[i][0] &= here
            for i in each.readers:
                lives[i][1] &= here.repeat(len(lives[i][1]) // each.count)
        among = [layer.among(dims) for layer, dims in zip(layout, lives)]
        layers = tuple(Layer(layer.name, tuple(int(alive.sum()) for alive in dims)) for layer, (dims, _) in zip(layout, among))
        left = Layout(layers, sum(layer.weights for layer in layers))
        masks = [np.zeros(layer.gene_shape, bool) for layer in layout]
        densities = erk_densities(left, min(1.0, density * layout.weights / left.weights))
        for m, (_, dims), d in zip(masks, among, densities):
            shape = [int(alive.sum()) for alive in dims]
            genes = int(np.prod(shape))
            m[np.ix_(*dims)] = (rng.permutation(genes) < count_kept(d, genes)).reshape(shape)
        return masks

    return mask


def erk(known: Known) -> Rule:
    """Keep the largest weights of each layer, with ERK layer densities."""
    scores = gene_scores("magnitude", known.layout, known.weights())

    def mask(density: float, rng: np.random.Generator) -> Masks:
        return [keep_top([score], count_kept(d, layer.genes) * layer.weights_a_gene, [layer])[0].numpy()
                for score, layer, d in zip(scores, known.layout, erk_densities(known.layout, density))]

    return mask


def by_saliency(name: str) -> Callable[[Known], Rule]:
    """Return the rule that keeps the weights of the highest scores of all layers together."""
    def rule(known: Known) -> Rule:
        scores = gene_scores(name, known.layout, known.weights(), known.squares() if NEEDS[name] == "data" else None)

        def mask(density: float, rng: np.random.Generator) -> Masks:
            return [kept.numpy() for kept in keep_top(scores, count_kept(density, known.layout.weights), known.layout)]

        return mask

    return rule


def multishot(known: Known, saliency: str = SURGEON, densities: Sequence[float] = ()) -> Rule:
    """Prune step by step from dense, each time what scores lowest of the values as repaired after the step before.

    Equal steps in log density, and `densities` between them, the last of which ends it; each drops dead paths. `SURGEON` takes
    what repair says each weight is worth, where it knows. Without repair, the rule scores the same values again at each step.
    What `Pieces.keep` raises ends it.
    """
    layout, pieces, before = known.layout, known.pieces(), None
    squares = known.squares() if saliency in NEEDS_DATA else None

    def worth(values: Sequence[Tensor]) -> list[Tensor]:
        return known.worth(values) if saliency == SURGEON else gene_scores(saliency, layout, values, squares)

    def alive(values: Sequence[Tensor]) -> Individual:
        return from_masks((layer.any(value != 0).numpy() for layer, value in zip(layout, values)), "multishot")

    if pieces is not None and pieces.start is not None:
        path, scores = restored(pieces.start, layout)
    else:
        values = known.repaired(dense_individual(layout)) if saliency == SURGEON else known.weights()
        path, scores = [alive(values)], worth(values)  # of the dense model, then after each step
    steps = sorted({*np.geomspace(1, SPARSEST_START, known.shots + 1)[1:], *densities}, reverse=True)
    steps = [density for density in steps if density >= min(densities, default=0)]
    for i, density in enumerate(steps[len(path) - 1:], len(path)):
        top = keep_top(scores, count_kept(density, layout.weights), layout)
        individual = from_masks(((mask & there).numpy() for mask, there in zip(top, masks(path[-1], layout))), "multishot")
        if individual != before:  # a step may be smaller than a gene
            before = individual.clone()
            values = known.repaired(individual)
            scores = worth(values)
        path.append(alive(values))
        known.progress(i, len(steps))
        if pieces is not None and i < len(steps):
            pieces.keep(partial(state_of, path, scores))
    logs = np.log(steps)

    def mask(density: float, rng: np.random.Generator) -> Masks:
        return [genes.numpy() for genes in masks(path[1 + int(np.abs(logs - np.log(density)).argmin())], layout)]

    return mask


def state_of(path: Sequence[Individual], scores: Sequence[Tensor]) -> dict[str, Tensor]:
    """Return what the steps after the last of a multi-shot path start from: its masks, and what genes are worth now."""
    packed = {f"mask/{i}/{k}": torch.from_numpy(bits) for i, each in enumerate(path) for k, bits in enumerate(each)}
    return {"step": torch.tensor(len(path) - 1), **packed, **{f"score/{k}": score for k, score in enumerate(scores)}}


def restored(state: Mapping[str, Tensor], layout: Layout) -> tuple[list[Individual], list[Tensor]]:
    """Return the path and scores that `state_of` made a state of."""
    path = [Individual((state[f"mask/{i}/{k}"].numpy() for k in range(len(layout))), "multishot")
            for i in range(int(state["step"]) + 1)]
    return path, [state[f"score/{k}"] for k in range(len(layout))]


def at_targets(known: Known, method: str, targets: Sequence[int], seed: int) -> list[Individual]:
    """Return the masks of oneshot:RULE or multishot:RULE that keep so many of the searched weights each, or a few less."""
    how = read_method(method)
    densities = [kept / known.layout.weights for kept in targets]
    rule = multishot(known, how.rule, densities) if how.kind == "multishot" else STARTS[how.rule](known)
    found = []
    step = min(layer.weights_a_gene for layer in known.layout) / known.layout.weights

    def at(density: float) -> Individual:
        return from_masks(rule(density, np.random.default_rng(seed)), f"{method}@{1 - density:.4g}")

    for kept, density in zip(targets, densities):
        individual = at(density)
        while kept_weights(individual, known.layout) > kept:  # rounding, layer by layer
            density -= step
            individual = at(density)
        found.append(individual)
    return found


def count_kept(density: float, genes: int) -> int:
    """Return how many of `genes` to keep: at least one, so that no layer is cut through."""
    return max(1, round(density * genes))


STARTS: dict[str, Callable[[Known], Rule]] = {
    "random": random, "narrow": narrow, "magnitude": by_saliency("magnitude"), "erk": erk, "lamp": by_saliency("lamp"),
    "fisher": by_saliency("fisher"), "multishot": multishot}
