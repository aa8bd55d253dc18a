"""Which gene governs which weights, as plain data.

A layer is a named parameter; its genes have the parameter's shape with some dimensions collapsed to 1 (see `units`), so a mask is
`genes.reshape(gene_shape)` broadcast to `shape`. What is known of weights is known of a gene by their sum, or by whether any has
it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from ..errors import EvopruneError
from ..rules import UNITS
from .units import collapsed

UNUSED = "that the forward pass does not use"  # parameters
Values = TypeVar("Values")  # a numpy array or a tensor
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Layer:
    """One pruned parameter: `genes` bits govern `weights` weights."""

    name: str
    shape: tuple[int, ...]
    unit: str = "weight"
    output: int = 0  # the dimension of the outputs

    def __post_init__(self) -> None:
        if self.unit not in UNITS:
            raise EvopruneError(f"layer {self.name}: found unit {self.unit!r}, expected {' or '.join(UNITS)}")
        if not all(size >= 1 for size in self.shape):
            raise EvopruneError(f"layer {self.name}: found shape {self.shape}, expected sizes of at least 1")
        if not 0 <= self.output < max(1, len(self.shape)):
            raise EvopruneError(f"layer {self.name}: found output {self.output}, expected a dimension of {self.shape}")

    @property
    def collapsed(self) -> tuple[int, ...]:
        return collapsed(self.unit, len(self.shape), self.output)

    @property
    def gene_shape(self) -> tuple[int, ...]:
        return tuple(1 if d in self.collapsed else size for d, size in enumerate(self.shape))

    @property
    def weights(self) -> int:
        return math.prod(self.shape)

    @property
    def genes(self) -> int:
        return math.prod(self.gene_shape)

    @property
    def weights_a_gene(self) -> int:
        return self.weights // self.genes

    @property
    def by_output(self) -> bool:
        """Whether a gene governs several weights: all that make one output."""
        return self.genes < self.weights

    def summed(self, values: Values) -> Values:
        """Return what the genes have together, of `gene_shape`, from `values` of the weights, of `shape`."""
        found: Values = values.sum(axis=self.collapsed, keepdims=True) if self.collapsed else values  # type: ignore[attr-defined]
        return found

    def any(self, values: Values) -> Values:
        """Return whether any weight of each gene has it, of `gene_shape`, from bool `values` of `shape`."""
        found: Values = values.any(axis=self.collapsed, keepdims=True) if self.collapsed else values  # type: ignore[attr-defined]
        return found

    def expanded(self, genes: Bools) -> Bools:
        """Return what is true of each weight, of `shape`, from bool (genes,); not to be written to."""
        return np.broadcast_to(genes.reshape(self.gene_shape), self.shape)

    def among(self, alive: Sequence[Bools]) -> tuple[list[Bools], list[Bools]]:
        """Return which indices of each dimension are left where `alive` are, of the weights and of the genes: a gene that any of
        those governs stays whole."""
        weights = [np.ones_like(d) if i in self.collapsed else d for i, d in enumerate(alive)]
        return weights, [d[:1] if i in self.collapsed else d for i, d in enumerate(weights)]


@dataclass(frozen=True)
class Layout(Sequence[Layer]):
    """The searched layers in order, and how many prunable weights the whole model has, left-out layers included."""

    layers: tuple[Layer, ...]
    total: int
    pruned: int = 0  # weights of left-out layers that are pruned already

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, i):  # type: ignore[no-untyped-def]  # int or slice, as Sequence
        return self.layers[i]

    def __iter__(self) -> Iterator[Layer]:
        return iter(self.layers)

    @property
    def weights(self) -> int:
        """Weights that the search may prune."""
        return sum(layer.weights for layer in self.layers)

    @property
    def least(self) -> int:
        """Weights that are kept where each layer keeps one gene."""
        return sum(layer.weights_a_gene for layer in self.layers)
