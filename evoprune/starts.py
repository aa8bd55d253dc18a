"""First individuals: random masks, and the masks of rules, spread over a grid in log density.

A rule takes what is `Known` of the model and returns `mask(density, rng)`, which keeps that share of the searched weights
and returns a bool array a layer. `--knowledge` says which rules may be used.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

from .config import Config, EvopruneError
from .genome import Individual, from_masks
from .layers import Layout
from .saliency import SALIENCIES, keep_top

Masks = list[npt.NDArray[np.bool_]]
Rule = Callable[[float, np.random.Generator], Masks]

DENSEST, SPARSEST = 0.8, 0.004  # of the grid; hvlog looks at 0.5 to 0.005
SHOTS = 160  # steps of the multi-shot path from dense to `SPARSEST`


@dataclass(frozen=True)
class Known:
    """What rules may look at; what `--knowledge` forbids raises when it is called."""

    layout: Layout
    weights: Callable[[], list[Tensor]]  # dense, shaped like the layers
    squares: Callable[[], list[Tensor]]  # mean squared gradients
    settled: Callable[[Individual], list[Tensor]]  # values after dead paths are dropped, in place, and the rest repaired


def first_population(known: Known, start: str, size: int, rng: np.random.Generator) -> list[Individual]:
    """Return `size` individuals: the unpruned model, and the rules of `start` in turn over the density grid."""
    rules = [(name, STARTS[name](known)) for name in rule_names(start)]
    population = [from_masks((np.ones(layer.genes, bool) for layer in known.layout), "dense")]
    for i, density in enumerate(np.geomspace(DENSEST, SPARSEST, size - 1)):
        name, rule = rules[i % len(rules)]
        population.append(from_masks(rule(density, rng), f"{name}@{1 - density:.4g}"))
    return population


def rule_names(start: str) -> list[str]:
    """Return the rules that --start names; raise `EvopruneError` for one that does not exist."""
    names = [name.strip() for name in start.split(",")]
    for name in names:
        if name not in STARTS:
            raise EvopruneError(f"start: found {name!r}, expected {', '.join(STARTS)}, with commas between, or auto")
    return names


def check_start(config: Config) -> None:
    """Raise `EvopruneError` unless the rules of --start exist and --knowledge allows them."""
    for name in rule_names(config.start) if config.start != "auto" else []:
        needed = NEEDS[name]
        if KNOWLEDGE.index(needed) > KNOWLEDGE.index(config.knowledge):
            allowed = [rule for rule in STARTS if KNOWLEDGE.index(NEEDS[rule]) <= KNOWLEDGE.index(config.knowledge)]
            raise EvopruneError(f"start: found {name!r}, which needs --knowledge {needed}, with --knowledge {config.knowledge}; "
                                f"expected {', '.join(allowed)}")


def default_start(knowledge: str, repair: str) -> str:
    """Return the rules that make the best first masks of what is known."""
    if knowledge == "none":
        return "random"
    return "multishot" if knowledge == "data" and repair == "least-squares" else "random,magnitude,erk,lamp"


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
        return [(rng.permutation(layer.genes) < keep(d, layer.genes)).reshape(layer.gene_shape)
                for layer, d in zip(known.layout, erk_densities(known.layout, density))]

    return mask


def erk(known: Known) -> Rule:
    """Keep the largest weights of each layer, with ERK layer densities."""
    scores = SALIENCIES["magnitude"](known.weights(), None)

    def mask(density: float, rng: np.random.Generator) -> Masks:
        return [keep_top([score], keep(d, layer.genes))[0].numpy()
                for score, layer, d in zip(scores, known.layout, erk_densities(known.layout, density))]

    return mask


def by_saliency(name: str) -> Callable[[Known], Rule]:
    """Return the rule that keeps the weights of the highest scores of all layers together."""
    def rule(known: Known) -> Rule:
        scores = SALIENCIES[name](known.weights(), known.squares() if NEEDS[name] == "data" else None)

        def mask(density: float, rng: np.random.Generator) -> Masks:
            return [kept.numpy() for kept in keep_top(scores, keep(density, known.layout.weights))]

        return mask

    return rule


def multishot(known: Known) -> Rule:
    """Prune step by step from dense, each time what LAMP scores lowest of the values as repaired after the step before.

    Equal steps in log density; each drops dead paths. Without repair, that is LAMP scored again at each step.
    """
    layout, path, values = known.layout, [], known.weights()
    for density in np.geomspace(1, SPARSEST, SHOTS + 1)[1:]:
        kept = [mask & (value != 0) for mask, value in zip(
            keep_top(SALIENCIES["lamp"](values, None), keep(density, layout.weights)), values)]
        individual = from_masks((mask.numpy() for mask in kept), "multishot")
        values = known.settled(individual)
        path.append((np.log(density), [(value != 0).numpy() for value in values]))

    def mask(density: float, rng: np.random.Generator) -> Masks:
        return min(path, key=lambda step: abs(step[0] - np.log(density)))[1]

    return mask


def keep(density: float, genes: int) -> int:
    """Return how many of `genes` to keep: at least one, so that no layer is cut through."""
    return max(1, round(density * genes))


STARTS: dict[str, Callable[[Known], Rule]] = {
    "random": random, "magnitude": by_saliency("magnitude"), "erk": erk, "lamp": by_saliency("lamp"),
    "fisher": by_saliency("fisher"), "multishot": multishot}
KNOWLEDGE = ("none", "weights", "data")  # each allows what the one before it does
NEEDS = {"random": "none", "magnitude": "weights", "erk": "weights", "lamp": "weights", "fisher": "data",
         "multishot": "weights"}  # its repair needs data
