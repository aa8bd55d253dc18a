"""What a model takes: a tensor, or a (nested) tuple or dict of tensors, whose first dimension counts the examples.

A tuple is handed to a model as its arguments in order, a dict by their names.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import EvopruneError, first_line, shown

Inputs = Any  # a tensor, or tuples and dicts of them


def mapped(function: Callable[[Tensor], Any], inputs: Inputs) -> Inputs:
    """Return the same structure with `function` of each tensor."""
    if isinstance(inputs, dict):
        return {name: mapped(function, value) for name, value in inputs.items()}
    return tuple(mapped(function, value) for value in inputs) if isinstance(inputs, tuple) else function(inputs)


def leaves(inputs: Inputs) -> list[Tensor]:
    """Return the tensors, in order."""
    if isinstance(inputs, Tensor):
        return [inputs]
    return [leaf for value in (inputs.values() if isinstance(inputs, dict) else inputs) for leaf in leaves(value)]


def taken(inputs: Inputs, index: slice | Tensor) -> Inputs:
    """Return some examples."""
    return mapped(lambda value: value[index], inputs)


def batches(inputs: Inputs, size: int) -> Iterator[Inputs]:
    """Yield the examples, so many at a time."""
    for i in range(0, len(leaves(inputs)[0]), size):
        yield taken(inputs, slice(i, i + size))


def applied(model: Callable[..., Any], inputs: Inputs) -> Any:
    """Return what a model returns for a batch."""
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def arguments_of(model: nn.Module, inputs: Inputs) -> tuple[Any, ...]:
    """Return a batch as positional arguments; raises TypeError where the model does not take it so."""
    if not isinstance(inputs, dict):
        return inputs if isinstance(inputs, tuple) else (inputs,)
    bound = inspect.signature(model.forward).bind(**inputs)
    bound.apply_defaults()
    return bound.args


def shapes(inputs: Inputs) -> Any:
    """Return the shapes of one example, in the same structure."""
    return mapped(lambda value: tuple(value.shape[1:]), inputs)


def joined(parts: list[Inputs], fill: float = 0) -> Inputs:
    """Return the examples of several batches in one; shorter ones, of other lengths behind the first dimension, are filled up."""
    first = parts[0]
    if isinstance(first, dict):
        if any(part.keys() != first.keys() for part in parts):
            raise ValueError("not all have the same names")
        return {name: joined([part[name] for part in parts], fill) for name in first}
    if isinstance(first, tuple):
        return tuple(joined(list(each), fill) for each in zip(*parts, strict=True))
    sizes = [max(each) for each in zip(*(part.shape[1:] for part in parts), strict=True)]

    def filled(part: Tensor) -> Tensor:
        missing = [size - there for size, there in zip(sizes, part.shape[1:])]
        return F.pad(part, [n for m in reversed(missing) for n in (0, m)], value=fill) if any(missing) else part

    return torch.cat([filled(part) for part in parts])


def check_together(inputs: Inputs, count: int, name: str) -> None:
    """Raise `EvopruneError` unless there are `count` examples in every tensor."""
    for leaf in leaves(inputs):
        if not leaf.dim() or len(leaf) != count:
            raise EvopruneError(f"{name}: found an input of shape {tuple(leaf.shape)} for {count} labels, "
                                f"expected ({count}, ...)")


def described(inputs: Inputs) -> Any:
    """Return what examples are like, as JSON: lists for tuples, and for a tensor its type, its shape without the first dimension
    and how large its numbers are: whole ones at most, others at least and at most."""
    if isinstance(inputs, Tensor):
        like = {"type": str(inputs.dtype).removeprefix("torch."), "shape": list(inputs.shape[1:]), "largest": None}
        if not inputs.numel():
            return like
        if not inputs.is_floating_point():
            return {**like, "largest": int(inputs.max())}
        return {**like, "range": [float(inputs.min()), float(inputs.max())]} if bool(inputs.isfinite().all()) else like
    if isinstance(inputs, dict):
        return {"named": {name: described(value) for name, value in inputs.items()}}
    return [described(value) for value in inputs]


def examples(like: Any, count: int) -> Inputs:
    """Return random examples of what `described` says, always the same ones.

    Raises:
        EvopruneError: it says nothing that can be.
    """
    generator = torch.Generator().manual_seed(0)

    def made(one: Any) -> Inputs:
        if isinstance(one, list):
            return tuple(made(each) for each in one)
        if "named" in one:
            return {name: made(each) for name, each in one["named"].items()}
        dtype, shape = getattr(torch, one["type"]), (count, *one["shape"])
        if one["largest"] is None:
            low, high = one.get("range", (None, None))  # older runs have none
            return (torch.randn(shape, generator=generator) if low is None else
                    torch.rand(shape, generator=generator) * (high - low) + low).to(dtype)
        return torch.randint(max(1, one["largest"] + 1), shape, generator=generator).to(dtype)

    try:
        return made(like)
    except Exception as error:  # noqa: BLE001  # of a file that somebody may have changed
        raise EvopruneError(f"inputs: found {shown(like)} ({first_line(error)}), expected what the run wrote") from None
