"""Which parameters of a model are pruned: found by the kind of their module, chosen by name."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from ..errors import EvopruneError
from .layout import Layer, Layout
from .units import names_of, unit_of

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
KINDS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED)
ATTENTION = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


def find_layers(model: nn.Module, layer: str | None = None, skip: str | None = None, include: str | None = None,
                units: Sequence[tuple[str, str]] = ()) -> Layout:
    """Return the layout of `model`: weights of linear and (transposed) convolution layers and of attention; tied ones once.

    Embeddings, norms and biases are left alone unless `include` names them. `layer` and `skip` choose among the
    prunable ones, `skip` and `include` by shell patterns, each by the name of a parameter or of a module above it; the first of
    `units`, (pattern, unit), that fits a layer says what its genes decide on.

    Raises:
        EvopruneError: nothing to prune, a name that fits nothing, a prunable weight that is NaN or infinite.
    """
    prunable = prunable_parameters(model, include)
    if not prunable:
        raise EvopruneError(f"model: {type(model).__name__} has no prunable weights, expected Linear, convolution or "
                            f"attention layers; name other parameters with --include")
    for name, parameter in prunable.items():
        if is_lazy(parameter) or parameter.is_meta:
            raise EvopruneError(f"model: {name} has no values yet, expected a model that has been run or loaded once")
        if not bool(torch.isfinite(parameter).all()):
            raise EvopruneError(f"weights: {name} holds NaN or infinity, expected finite numbers")
    chosen = chosen_layers(prunable, layer, skip)
    for pattern, _ in units:
        matching({name: prunable[name] for name in chosen}, pattern, "unit")
    turned = {id(module.weight) for module in model.modules() if isinstance(module, TRANSPOSED)}  # (in, out, ...)
    layers = tuple(Layer(name, tuple(prunable[name].shape), unit_of(name, units), int(id(prunable[name]) in turned))
                   for name in chosen)
    return Layout(layers, sum(p.numel() for p in prunable.values()))


def aliases(model: nn.Module, layout: Layout) -> tuple[tuple[str, ...], ...]:
    """Return all names of each searched parameter that has several, tied ones: that of its layer first."""
    every = dict(model.named_parameters(remove_duplicate=False))
    names = [(layer.name, *(name for name, p in every.items() if p is every[layer.name] and name != layer.name))
             for layer in layout]
    return tuple(each for each in names if len(each) > 1)


def prunable_parameters(model: nn.Module, include: str | None) -> dict[str, nn.Parameter]:
    """Return the prunable parameters by name; one that an embedding shares is an embedding's."""
    named = dict(model.named_parameters())  # tied parameters once, under their first name
    wanted, embedded = set(), set()
    for module in model.modules():
        if isinstance(module, KINDS):
            wanted.add(id(module.weight))
        elif isinstance(module, nn.MultiheadAttention):
            wanted.update(id(getattr(module, name)) for name in ATTENTION if getattr(module, name) is not None)
        elif isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            embedded.add(id(module.weight))
    asked = {name for pattern in split_names(include) for name in matching(named, pattern, "include")}
    return {name: p for name, p in named.items() if (name in asked or id(p) in wanted - embedded)
            and (is_lazy(p) or p.numel())}


def chosen_layers(prunable: dict[str, nn.Parameter], layer: str | None, skip: str | None) -> list[str]:
    """Return the names of the layers to search."""
    chosen = list(prunable)
    if layer is not None:
        asked = {name for pattern in split_names(layer) for name in matching(prunable, pattern, "layer")}
        chosen = [name for name in chosen if name in asked]
    if skip is not None:
        dropped = {name for pattern in split_names(skip) for name in matching(prunable, pattern, "skip")}
        chosen = [name for name in chosen if name not in dropped]
    if not chosen:
        raise EvopruneError(f"layer, skip: nothing is left to search; the model has {', '.join(prunable)}")
    return chosen


def matching(named: dict[str, nn.Parameter], pattern: str, setting: str) -> list[str]:
    """Return the names that `pattern` matches, as parameter or as a module above it."""
    found = [name for name in named if any(fnmatchcase(each, pattern) for each in names_of(name))]
    if not found:
        raise EvopruneError(f"{setting}: nothing is called {pattern!r}; there are {', '.join(named)}")
    return found


def split_names(text: str | None) -> list[str]:
    return [name.strip() for name in (text or "").split(",") if name.strip()]
