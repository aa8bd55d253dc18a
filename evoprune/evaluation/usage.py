"""Which parameters a model's forward pass in eval mode does not use: auxiliary heads, layers left over."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from ..inputs.models import private_copy
from ..inputs.nested import Inputs, applied, taken
from ..inputs.splits import Split
from .graph import same, tensors

IMAGES = 64  # that outputs are compared on


def unused_parameters(model: nn.Module, split: Split, names: Iterable[str]) -> tuple[str, ...]:
    """Return which of the named parameters can be anything at all and what the model returns stays the same.

    Those that no gradient would reach, or where the model lets none through those of modules that are not called, are filled with
    NaN and outputs compared: all of them at once, then one by one.
    """
    net = private_copy(model).to(split.labels.device).eval()
    inputs = split.inputs(slice(0, IMAGES))
    suspects = unreached_parameters(net, taken(inputs, slice(0, 2)))
    unreached = [name for name in names if name in suspects]
    if not unreached or stays(net, inputs, unreached):
        return tuple(unreached)
    return tuple(name for name in unreached if stays(net, inputs, [name]))


def unreached_parameters(net: nn.Module, inputs: Inputs) -> set[str]:
    """Return the names of parameters that no gradient of what `net` returns would reach, by the graph of its forward pass; where
    there is none, of parameters of modules that were not called."""
    called: set[nn.Module] = set()
    hooks = [module.register_forward_pre_hook(lambda module, args: called.add(module)) for module in net.modules()]
    for parameter in net.parameters():
        parameter.requires_grad_(parameter.is_floating_point() or parameter.is_complex())
    try:
        with torch.enable_grad():
            waiting = [output.grad_fn for output in tensors(applied(net, inputs)) if output.grad_fn is not None]
    except Exception:  # noqa: BLE001  # the user's model: without gradients it went well
        waiting = []
        with torch.no_grad():
            applied(net, inputs)
    finally:
        net.requires_grad_(False)
        for hook in hooks:
            hook.remove()
    if not waiting:
        return {f"{prefix}.{name}".lstrip(".") for prefix, module in net.named_modules() if module not in called
                for name, _ in module.named_parameters(recurse=False)}
    seen, reached = set(waiting), set()
    while waiting:
        node = waiting.pop()
        if type(node).__name__ == "AccumulateGrad":
            reached.add(id(node.variable))  # type: ignore[attr-defined]  # that of an AccumulateGrad
        new = {after for after, _ in node.next_functions if after is not None} - seen
        seen |= new
        waiting.extend(new)
    return {name for name, parameter in net.named_parameters() if id(parameter) not in reached}


def stays(net: nn.Module, inputs: Inputs, names: Iterable[str]) -> bool:
    """Return whether outputs stay the same with NaN in these parameters, which get their values back."""
    parameters = dict(net.named_parameters())
    before = {name: parameters[name].detach().clone() for name in names}
    with torch.inference_mode():
        expected = applied(net, inputs)
        for name in names:
            parameters[name].fill_(float("nan"))
        found = same(expected, applied(net, inputs))
        for name, value in before.items():
            parameters[name].copy_(value)
    return found
