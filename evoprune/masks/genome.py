"""An individual: a list of packed bit arrays, one a layer, and a fitness.

individual[i] is uint8 of shape (ceil(layout[i].genes / 8),), `numpy.packbits` order "big", padding bits 0, 1 = kept.
Ordinary classes, not DEAP's `creator`: those overwrite themselves when unpickled, and packed arrays need their own `==`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from deap import base

from ..objectives import SPARSITY, USUAL, Objectives, measures
from .layout import Layer, Layout

Bits = npt.NDArray[np.uint8]  # packed, 8 genes a byte
Genes = npt.NDArray[np.bool_]  # unpacked, one gene an item
Arrays = dict[str, npt.NDArray[Any]]  # by name; arrays are shared between individuals and never changed in place
Strategy = npt.NDArray[np.float64]  # how a tuned individual trains: learning rate, growth, until, pace, mix


class Fitness(base.Fitness):  # type: ignore[misc]  # deap is untyped
    """The values of a run's objectives, in their order; DEAP's `weights` are those of the objectives."""

    weights: tuple[float, ...]

    def __init__(self, values: Sequence[float] = (), objectives: Objectives = USUAL):
        self.objectives, self.weights = objectives, objectives.weights
        super().__init__(values)

    def __deepcopy__(self, memo: dict[int, Any]) -> Fitness:
        return Fitness(self.values, self.objectives)

    @property
    def score(self) -> float:
        """The value that is counted on images."""
        return float(self.values[self.objectives.score])

    @property
    def axis(self) -> float:
        """The value that fronts are spread along."""
        return float(self.values[self.objectives.axis])


class Individual(list[Bits]):
    """A mask of the whole model; equal to, and hashed like, any other with the same bits."""

    def __init__(self, bits: Iterable[Bits] = (), origin: str = "", generation: int = 0):
        super().__init__(bits)
        self.fitness = Fitness()
        self.origin = origin  # how it came to be: "lamp@0.95", "mate", ...
        self.generation = generation  # when it came to be
        self.saliency: Arrays = {}  # logarithms of what kept genes are worth, by layer, where its mask is as it was measured
        self.values: Arrays = {}  # trained ones of parameters and buffers, of layers those kept; none: the dense model's
        self.strategy: Strategy | None = None  # how it was trained, for its children to inherit

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Individual) and self.key() == other.key()

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:  # type: ignore[override]  # list says it has none
        return hash(self.key())

    def key(self) -> bytes:
        """Return 16 bytes that stand for the mask; two masks share them with probability 2^-128."""
        digest = hashlib.blake2b(digest_size=16)
        for bits in self:
            digest.update(bits.data)
        return digest.digest()

    def clone(self) -> Individual:
        """Return an independent copy, fitness included; registered as `toolbox.clone`."""
        copy = Individual((bits.copy() for bits in self), self.origin, self.generation)
        copy.saliency, copy.values, copy.strategy = dict(self.saliency), dict(self.values), self.strategy
        copy.fitness = Fitness(self.fitness.values, self.fitness.objectives)
        return copy


@dataclass(frozen=True)
class Result:
    """What measuring an individual gives, where that is more than its objectives; `toolbox.evaluate` may return either."""

    objectives: tuple[float, ...]  # values, in their order
    bits: Sequence[Bits] | None = None  # the mask that was measured, where it is another than was asked for
    saliency: Arrays | None = None  # see `Individual`
    values: Arrays | None = None


Measurement = tuple[float, ...] | Result


def get_bits(individual: Individual, i: int, layout: Layout) -> Genes:
    """Return the genes of layer `i`, bool of shape (genes,), True = kept."""
    return np.unpackbits(individual[i], count=layout[i].genes).view(np.bool_)


def set_bits(individual: Individual, i: int, genes: Genes) -> None:
    """Set the genes of layer `i` from bool of shape (genes,); delete the fitness yourself, as with DEAP's operators."""
    individual[i] = np.packbits(genes)


def from_masks(masks: Iterable[npt.NDArray[np.bool_]], origin: str) -> Individual:
    """Pack genes, an array a layer of any shape, into an individual."""
    return Individual((np.packbits(mask.reshape(-1)) for mask in masks), origin)


def dense_individual(layout: Layout) -> Individual:
    """Return the unpruned model."""
    return from_masks((np.ones(layer.genes, bool) for layer in layout), "dense")


def kept_genes(bits: Bits) -> int:
    """Count the 1 bits of one layer."""
    return int(np.bitwise_count(bits).sum())


def is_mask(bits: Bits, layer: Layer) -> bool:
    """Return whether an array can be the packed genes of a layer."""
    size, padding = (layer.genes + 7) // 8, -layer.genes % 8
    return bits.dtype == np.uint8 and bits.shape == (size,) and not int(bits[-1]) & (1 << padding) - 1


def kept_weights(individual: Individual, layout: Layout) -> int:
    """Count the searched weights that are kept."""
    return sum(kept_genes(bits) * layer.weights_a_gene for bits, layer in zip(individual, layout))


def pruned_weights(individual: Individual, layout: Layout) -> int:
    """Count the weights of the whole model that are pruned."""
    return layout.pruned + layout.weights - kept_weights(individual, layout)


@measures(SPARSITY)
def sparsity(individual: Individual, layout: Layout) -> float:
    """Return the share of the model's prunable weights that is pruned, left-out layers counted as kept; in [0, 1]."""
    return pruned_weights(individual, layout) / layout.total
