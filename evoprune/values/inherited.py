"""Trained values as they travel: from a model to an individual and into a model again, to a worker and back, to a file."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from ..inputs.models import copied
from ..masks.genome import Arrays, Individual, Result, get_bits
from ..masks.layout import Layout
from ..masks.tensors import named_masks


def values_of(net: nn.Module, masks: Mapping[str, Tensor]) -> Arrays:
    """Return the values of a trained model as arrays: those that the masks keep, in order, and everything else whole."""
    state = {**dict(net.named_parameters()), **dict(net.named_buffers())}
    values = {name: value.detach()[masks[name]] if name in masks else value.detach() for name, value in state.items()}
    short = (torch.float16, torch.bfloat16)  # the latter numpy has not
    return {name: (value.float() if value.dtype in short else value).cpu().numpy() for name, value in values.items()}


def with_values(model: nn.Module, layout: Layout, individual: Individual) -> nn.Module:
    """Return a copy of the dense model with the values that `values_of` took, zeros where it is pruned; the dense values where
    the individual has none."""
    net = copied(model)
    kept = named_masks(individual, layout, torch.device("cpu"))
    with torch.no_grad():
        for name, value in {**dict(net.named_parameters()), **dict(net.named_buffers())}.items():
            if name in individual.values:
                inherited = torch.from_numpy(individual.values[name].copy()).to(value.dtype)
                if name in kept:
                    value.zero_()[kept[name]] = inherited
                else:
                    value.copy_(inherited)
            elif name in kept:
                value.masked_fill_(~kept[name], 0)
    return net


def fit_values(child: Individual, parent: Individual, layout: Layout) -> None:
    """Make room in the values that a child inherits for weights that its parent does not keep: they start at zero."""
    for i, layer in enumerate(layout):
        if layer.name in child.values:
            whole = np.zeros(layer.shape, child.values[layer.name].dtype)
            whole[layer.expanded(get_bits(parent, i, layout))] = child.values[layer.name]
            child.values[layer.name] = whole[layer.expanded(get_bits(child, i, layout))]


def packed(result: Result) -> dict[str, Tensor]:
    """Return what an evaluation gave as tensors, for a file."""
    parts = {"saliency": result.saliency or {}, "value": result.values or {}}
    arrays = {f"{part} {name}": value for part, found in parts.items() for name, value in found.items()}
    return {"objectives": torch.tensor(result.objectives, dtype=torch.float64),
            **{f"bits {i}": torch.from_numpy(bits) for i, bits in enumerate(result.bits or ())},
            **{name: torch.from_numpy(np.asarray(value)) for name, value in arrays.items()}}


def unpacked(tensors: Mapping[str, Tensor]) -> Result:
    """Return the result that `packed` took apart."""
    def part(start: str) -> Arrays | None:
        return {name.removeprefix(start): value.numpy() for name, value in tensors.items() if name.startswith(start)} or None

    bits = [tensors[f"bits {i}"].numpy() for i in range(sum(name.startswith("bits ") for name in tensors))]
    return Result(tuple(tensors["objectives"].tolist()), bits or None, part("saliency "), part("value "))
