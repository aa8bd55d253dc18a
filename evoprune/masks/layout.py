"""Which gene governs which weights, as plain data.

A layer is a named parameter; its genes have the parameter's shape with some dimensions collapsed to 1, so a mask is
`genes.reshape(gene_shape)` broadcast to `shape`. With unit "weight" nothing is collapsed: one gene a weight.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Layer:
    """One pruned parameter: `genes` bits govern `weights` weights."""

    name: str
    shape: tuple[int, ...]
    unit: str = "weight"

    @property
    def gene_shape(self) -> tuple[int, ...]:
        return self.shape

    @property
    def weights(self) -> int:
        return math.prod(self.shape)

    @property
    def genes(self) -> int:
        return math.prod(self.gene_shape)


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
