"""Which parameters of a model are pruned: found by the kind of their module, chosen by name; and which are not, and why."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from ..errors import EvopruneError
from ..inputs.models import copied
from .layout import UNUSED, Layer, Layout
from .units import names_of, unit_of

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
KINDS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED)
ATTENTION = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
TIED, COMPUTED, SKIPPED = "in weights tied to embeddings", "in weights computed from others", "left out by --layer or --skip"
BAKE = "bake them in first, with torch.nn.utils.remove_weight_norm or torch.nn.utils.parametrize.remove_parametrizations"
USUAL = "in biases and norms"
LeftOut = dict[str, list[tuple[str, int]]]  # by the reason: names and sizes of parameters that are not searched


def weight_names(module: nn.Module) -> list[str]:
    """Return the names that the prunable weights of one module have in it."""
    if isinstance(module, KINDS) or is_turned(module):
        return ["weight"]
    if isinstance(module, nn.MultiheadAttention):
        return [name for name in ATTENTION if getattr(module, name) is not None]
    if isinstance(module, nn.RNNBase):
        return [name for name in module._flat_weights_names if name.startswith("weight")]
    return ["weight_ih", "weight_hh"] if isinstance(module, nn.RNNCellBase) else []


def is_turned(module: nn.Module) -> bool:
    """Return whether a layer's weight is (in, out, ...): transposed convolutions, and the linear layer that Hugging Face calls
    Conv1D."""
    return isinstance(module, TRANSPOSED) or (type(module).__name__ == "Conv1D" and hasattr(module, "nf"))


def weights_in(model: nn.Module) -> Iterator[tuple[nn.Module, nn.Parameter, str]]:
    """Yield each parameter that holds prunable weights, its module, and "" or why it is not searched."""
    embedded = {id(module.weight) for module in model.modules() if isinstance(module, EMBEDDINGS)}
    for module in model.modules():
        for name in weight_names(module):
            own = module._parameters.get(name)
            if own is not None:
                yield module, own, TIED * (id(own) in embedded)
            for source in sources(module, name) if own is None else ():
                yield module, source, COMPUTED * (not keeps_zeros(module, name, source))


def sources(module: nn.Module, name: str) -> list[nn.Parameter]:
    """Return the parameters that a weight is computed from and that have its shape, as those of weight_norm, spectral_norm and
    torch.nn.utils.prune do, by parametrisation or by a hook."""
    if is_parametrized(module, name):
        found = list(module.parametrizations[name].parameters())  # type: ignore[index,union-attr]  # a ModuleDict
    else:
        found = [p for each in ("orig", "v") if (p := module._parameters.get(f"{name}_{each}")) is not None]
    return [parameter for parameter in found if parameter.shape == getattr(module, name).shape]


def keeps_zeros(module: nn.Module, name: str, source: Tensor) -> bool:
    """Return whether a weight that is computed from `source` is zero wherever that is, and finite: weight_norm's is not, where a
    row is zero."""
    names = [each for each, parameter in module.named_parameters() if parameter is source]
    trial = copied(module).eval()
    with torch.no_grad():
        values = trial.get_parameter(names[0])
        zeros = torch.arange(values.numel(), device=values.device).view(values.shape) % 2 == 0
        zeros[0] = True
        values.masked_fill_(zeros, 0)
        for hook in trial._forward_pre_hooks.values():
            if type(hook).__module__.startswith("torch.nn.utils."):
                hook(trial, ())
        weight = getattr(trial, name)
        return bool((weight[zeros] == 0).all() and torch.isfinite(weight).all())


def find_layers(model: nn.Module, layer: str | None = None, skip: str | None = None, include: str | None = None,
                units: Sequence[tuple[str, str]] = (), unused: Collection[str] = ()) -> Layout:
    """Return the layout of `model`: weights of linear, (transposed) convolution, recurrent and attention layers; tied ones once.

    Embeddings, norms and biases are left alone unless `include` names them. `layer` and `skip` choose among the
    prunable ones, `skip` and `include` by shell patterns, each by the name of a parameter or of a module above it; the first of
    `units`, (pattern, unit), that fits a layer says what its genes decide on. The total counts all prunable weights, searched or
    not, but for those that are `unused`: the model computes the same whatever they are.

    Raises:
        EvopruneError: nothing to prune, a name that fits nothing, a prunable weight that is NaN or infinite.
    """
    # 6 arguments: five ways to choose
    prunable = {name: p for name, p in prunable_parameters(model, include).items() if name not in unused}
    if not prunable:
        computed = any(why_not == COMPUTED for _, _, why_not in weights_in(model))
        raise EvopruneError(f"model: {type(model).__name__} has no prunable weights, expected linear, convolution, recurrent or "
                            f"attention layers; {BAKE if computed else 'name other parameters with --include'}")
    for name, parameter in prunable.items():
        if is_lazy(parameter) or parameter.is_meta:
            raise EvopruneError(f"model: {name} has no values yet, expected a model that has been run or loaded once")
        if not bool(torch.isfinite(parameter).all()):
            raise EvopruneError(f"weights: {name} holds NaN or infinity, expected finite numbers")
    chosen = chosen_layers(prunable, layer, skip)
    for pattern, _ in units:
        matching({name: prunable[name] for name in chosen}, pattern, "unit")
    held = {id(parameter): is_turned(module) for module, parameter, _ in weights_in(model)}
    layers = tuple(Layer(name, tuple(prunable[name].shape), unit_of(name, units), int(held.get(id(prunable[name]), False)))
                   for name in chosen)
    return Layout(layers, sum(p.numel() for name, p in model.named_parameters()
                              if name in prunable or (id(p) in held and name not in unused)))


def aliases(model: nn.Module, layout: Layout) -> tuple[tuple[str, ...], ...]:
    """Return all names of each searched parameter that has several, tied ones: that of its layer first."""
    every = dict(model.named_parameters(remove_duplicate=False))
    names = [(layer.name, *(name for name, p in every.items() if p is every[layer.name] and name != layer.name))
             for layer in layout]
    return tuple(each for each in names if len(each) > 1)


def prunable_parameters(model: nn.Module, include: str | None) -> dict[str, nn.Parameter]:
    """Return the prunable parameters by name; one that an embedding shares is an embedding's."""
    named = dict(model.named_parameters())  # tied parameters once, under their first name
    wanted = {id(parameter) for _, parameter, why_not in weights_in(model) if not why_not}
    asked = {name for pattern in split_names(include) for name in matching(named, pattern, "include")}
    return {name: p for name, p in named.items() if (name in asked or id(p) in wanted) and (is_lazy(p) or p.numel())}


def left_out(model: nn.Module, layout: Layout, unused: Collection[str]) -> LeftOut:
    """Return all parameters that the search leaves as they are, by the reason."""
    why = {id(parameter): why_not or SKIPPED for _, parameter, why_not in weights_in(model)}
    embedded = {id(module.weight) for module in model.modules() if isinstance(module, EMBEDDINGS)}
    searched, found = {layer.name for layer in layout}, LeftOut()
    for name, parameter in model.named_parameters():
        if name not in searched:
            usual = "in embeddings" if id(parameter) in embedded else USUAL if parameter.dim() < 2 else "in others"
            reason = UNUSED if name in unused else why.get(id(parameter), usual)
            found.setdefault(reason, []).append((name, parameter.numel()))
    return found


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
