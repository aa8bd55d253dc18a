"""Genes as tensors: bool masks on the device that they are used on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from .genome import Individual, from_masks
from .layout import Layout


def masks(individual: Individual, layout: Layout, device: torch.device | str = "cpu") -> list[Tensor]:
    """Return a bool mask a layer, of the layer's gene shape; the bits travel packed and are unpacked on the device."""
    return [unpack(bits, layer.genes, device).view(layer.gene_shape) for bits, layer in zip(individual, layout)]


def unpack(bits: np.ndarray, genes: int, device: torch.device | str) -> Tensor:
    if torch.device(device).type == "cpu":
        return torch.from_numpy(np.unpackbits(bits, count=genes).view(np.bool_))
    packed = torch.from_numpy(bits).to(device)
    shifts = torch.arange(7, -1, -1, dtype=torch.uint8, device=device)
    return ((packed[:, None] >> shifts) & 1).view(-1)[:genes].bool()


def from_named(masks: Mapping[str, Tensor], layout: Layout, origin: str) -> Individual:
    """Return the individual of bool masks by name, of the parameters' shapes."""
    return from_masks((layer.any(masks[layer.name]).cpu().numpy() for layer in layout), origin)


def named_masks(individual: Individual, layout: Layout, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Return a bool mask a layer by name, of the parameter's shape."""
    return dict(zip((layer.name for layer in layout), expanded(masks(individual, layout, device), layout)))


def expanded(genes: Sequence[Tensor], layout: Layout) -> list[Tensor]:
    """Return masks of the parameters' shapes from those of the genes."""
    return [mask.expand(layer.shape) for mask, layer in zip(genes, layout)]
