"""Which channels of a masked model nothing needs, so that they can be cut out.

`torch.fx` runs the model once on examples. Every channel of every value has a number; what can only go together, the two sides
of a sum say, shares it. A channel can go where each layer that reads it has no weight for it, or reads what the weights alone
make the same number at all places of all inputs, which then goes into that layer's bias (not behind zero padding).
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from ..masks.channels import CHANNELWISE, ELEMENTWISE, FUNCTIONS, NORMS, READERS, SHAPING, SUMS

PRODUCTS = {operator.mul, operator.imul, torch.mul, "mul", "mul_"}
OTHERS = {operator.sub, operator.truediv, torch.sub, torch.div, "sub", "div"}
SHAPES = {"view", "reshape", torch.reshape}  # whose arguments may be the old size
Ids = npt.NDArray[np.int64]


@dataclass
class Value:
    """The channels of a node's value."""

    ids: Ids
    fixed: npt.NDArray[np.bool_]  # the same number for all inputs, by the weights alone
    last: bool  # along the last of more than two dimensions, otherwise along the second
    numbers: Tensor | None = None  # (channels,) the number that each is in all examples, NaN where it varies

    def constant(self) -> Tensor:
        """Return what each channel always is, NaN where that is not known."""
        assert self.numbers is not None
        return self.numbers.masked_fill(torch.from_numpy(~self.fixed), torch.nan)


@dataclass
class Reader:
    """A layer that reads channels, each of which becomes some columns of its weights."""

    name: str
    module: Any  # Linear or convolution
    ids: Ids
    constant: Tensor  # (inputs,) what each always is, NaN where that is not known
    flat: bool  # several positions of each channel in one dimension

    def unread(self) -> npt.NDArray[np.bool_]:
        """Say which inputs all of its rows have no weight for."""
        weight, groups = self.module.weight.detach(), groups_of(self.module)
        found: npt.NDArray[np.bool_] = (weight.reshape(groups, len(weight) // groups, weight.shape[1], -1) == 0).all(3).all(
            1).flatten().numpy()
        return found

    def does_without(self) -> npt.NDArray[np.bool_]:
        """Say which inputs can be cut out: not read, or a number that can go into the bias."""
        pads = bool(np.any(getattr(self.module, "padding", 0))) and self.module.padding_mode == "zeros"
        folds = (self.constant == 0) if pads else ~self.constant.isnan()
        found: npt.NDArray[np.bool_] = self.unread() | folds.numpy()
        return found


class Spaces(fx.Interpreter):
    """Runs a graph on examples and notes which channels there are, who makes and who reads them."""

    def __init__(self, graph: fx.GraphModule):
        super().__init__(graph)
        self.named = dict(graph.named_modules())
        self.used = [node.target for node in graph.graph.nodes if node.op == "call_module"]
        self.owners = [id(p) for m in graph.modules() for p in m.parameters(recurse=False)]
        self.parents: list[int] = []
        self.closed: set[int] = set()  # something reads them that cannot do without
        self.values: dict[fx.Node, Value] = {}
        self.readers: list[Reader] = []
        self.made: dict[str, Ids] = {}  # by module whose rows they are: layers, batch norms, depthwise convolutions
        self.pads: dict[fx.Node, tuple[int, int, Ids]] = {}  # of channels: place in the arguments, how many in front, all
        self.shapes: dict[fx.Node, torch.Size] = {}
        self.by_name = {node.name: node for node in graph.graph.nodes}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor):
            self.shapes[n] = result.shape
        known = [source for source in n.all_input_nodes if source in self.values]
        value = self.value_of(n, known, result) if isinstance(result, Tensor) and result.dim() > 1 else None
        if value is not None:
            value.last &= result.dim() > 2
            value.numbers = numbers(result, value.last)
            self.values[n] = value
        elif isinstance(result, Tensor) or n.op in ("output", "call_module") or any(isinstance(r, Tensor) for r in parts(result)):
            self.close(known)
        return result

    def new(self, count: int, fixed: npt.NDArray[np.bool_] | None = None, last: bool = False) -> Value:
        """Return channels that nothing else shares."""
        ids = np.arange(len(self.parents), len(self.parents) + count)
        self.parents += ids.tolist()
        return Value(ids, np.zeros(count, bool) if fixed is None else fixed, last)

    def find(self, i: int) -> int:
        while self.parents[i] != i:
            self.parents[i] = i = self.parents[self.parents[i]]
        return i

    def roots(self, ids: Ids) -> Ids:
        """Return the numbers that channels share."""
        return np.array([self.find(i) for i in ids.tolist()], np.int64)

    def close(self, nodes: Iterable[fx.Node]) -> None:
        for node in nodes:
            self.closed.update(self.values[node].ids.tolist())

    def value_of(self, node: fx.Node, known: list[fx.Node], result: Tensor) -> Value | None:
        """Return the channels of a node's value, None where they cannot be told."""
        if node.op == "call_module":
            return self.of_module(str(node.target), node, known, result)
        if not known or node.op not in ("call_function", "call_method"):
            return None
        tensors = [source for source in node.all_input_nodes if source in self.shapes]
        if node.target in SUMS | PRODUCTS | OTHERS and len(tensors) == 2:
            return self.of_two(node, tensors, result)
        if node.target in (torch.cat, torch.concat):
            return self.of_parts(node, tensors)
        if len(tensors) != 1:
            return None
        before, shape = self.values[known[0]], self.shapes[known[0]]
        if node.target in SUMS | PRODUCTS | OTHERS or node.target in FUNCTIONS:
            return copy.copy(before)
        if node.target is F.pad:
            return self.of_pad(node, before, len(shape))
        if node.target in ("mean", torch.mean, operator.getitem) and not before.last and whole(node) and \
                result.shape[:2] == shape[:2]:
            return copy.copy(before)
        return flattened(before, shape, result.shape) if node.target in SHAPING | SHAPES else None

    def of_module(self, name: str, node: fx.Node, known: list[fx.Node], result: Tensor) -> Value | None:
        module, source = self.named[name], node.args[0] if node.args else None
        before = self.values.get(source) if isinstance(source, fx.Node) else None
        alone = self.used.count(name) == 1 and all(self.owners.count(id(p)) == 1 for p in module.parameters())
        if type(module) in READERS and alone:
            return self.of_layer(name, node, before, result)
        if before is None or len(known) > 1:
            return None
        if type(module) in NORMS and alone and not before.last:
            self.made[name] = before.ids
            return copy.copy(before)
        if isinstance(module, ELEMENTWISE if before.last else CHANNELWISE) and not isinstance(module, NORMS):
            assert isinstance(source, fx.Node)
            return flattened(before, self.shapes[source], result.shape)
        return None

    def of_layer(self, name: str, node: fx.Node, before: Value | None, result: Tensor) -> Value | None:
        module: Any = self.named[name]
        groups, dead = groups_of(module), (module.weight.detach().flatten(1) == 0).all(1).numpy()
        last = isinstance(module, nn.Linear) and result.dim() > 2
        if before is not None and (before.last != last or len(before.ids) != inputs_of(module)):
            self.closed.update(before.ids.tolist())
            before = None
        if groups > 1 and groups == inputs_of(module) == len(dead) and before is not None:  # a function of each channel
            self.made[name] = before.ids
            return Value(before.ids, before.fixed | dead, last)
        if before is not None:
            flat = len(set(before.ids.tolist())) < len(before.ids)
            self.readers.append(Reader(name, module, before.ids, before.constant(), flat))
        elif groups > 1:
            return None
        value = self.new(len(dead), dead, last)
        self.made[name] = value.ids
        return value

    def of_two(self, node: fx.Node, tensors: list[fx.Node], result: Tensor) -> Value | None:
        """Return the channels of a sum, product, difference or quotient: those of both sides go together."""
        if any(source not in self.values for source in tensors):
            return None
        a, b = (self.values[source] for source in tensors)
        axis = -1 if a.last else 1
        if a.last != b.last or len(a.ids) != len(b.ids) or result.shape[axis] != len(a.ids):
            return None
        for one, other in zip(a.ids.tolist(), b.ids.tolist()):
            self.parents[self.find(other)] = self.find(one)
        fixed = a.fixed & b.fixed
        if node.target in PRODUCTS:
            fixed = fixed | (a.constant() == 0).numpy() | (b.constant() == 0).numpy()
        return Value(a.ids, fixed, a.last)

    def of_parts(self, node: fx.Node, tensors: list[fx.Node]) -> Value | None:
        """Return the channels of tensors one behind the other."""
        dim = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0)
        if dim != 1 or any(source in self.values and self.values[source].last for source in tensors):
            return None
        parts = [self.values.get(source) or self.new(self.shapes[source][1]) for source in tensors]
        for source, part in zip(tensors, parts):
            if source not in self.values:  # the model's input, say
                self.closed.update(part.ids.tolist())
        return Value(np.concatenate([p.ids for p in parts]), np.concatenate([p.fixed for p in parts]), False)

    def of_pad(self, node: fx.Node, before: Value, dims: int) -> Value | None:
        """Return the channels of a padded value; those that padding makes are zero."""
        place = 0 if before.last else 2 * (dims - 2)
        sizes = node.args[1] if len(node.args) > 1 else node.kwargs.get("pad")
        rest = [*node.args[2:], *(value for key, value in node.kwargs.items() if key not in ("pad", "input"))]
        if not isinstance(sizes, (tuple, list)) or any(value not in ("constant", 0, None) for value in rest):
            return None
        front, back = (int(n) for n in [*sizes, *[0] * (place + 2)][place:place + 2])
        if min(front, back) < 0:
            return None
        added = [self.new(count, np.ones(count, bool)) for count in (front, back)]
        ids = np.concatenate([added[0].ids, before.ids, added[1].ids])
        if front + back:
            self.pads[node] = place, front, ids
        return Value(ids, np.concatenate([added[0].fixed, before.fixed, added[1].fixed]), before.last)


def parts(result: Any) -> Iterable[Any]:
    return result if isinstance(result, (tuple, list)) else ()


def numbers(result: Tensor, last: bool) -> Tensor:
    """Return the number that each channel is all over a value, NaN where it varies."""
    flat = result.detach().float().movedim(-1 if last else 1, 0).flatten(1)
    low, high = flat.amin(1), flat.amax(1)
    return low.where(low == high, torch.nan).cpu()


def flattened(before: Value, shape: torch.Size, result: torch.Size) -> Value | None:
    """Return the channels behind a function of each channel: as they were, or several positions of each in one dimension."""
    if result[:2] == shape[:2] and (not before.last or result == shape):
        return copy.copy(before)
    if len(result) != 2 or before.last or result[0] != shape[0] or result.numel() != shape.numel():
        return None
    times = result[1] // shape[1]
    return Value(np.repeat(before.ids, times), np.repeat(before.fixed, times), False)


def whole(node: fx.Node) -> bool:
    """Say whether a mean or an index leaves examples and channels as they are."""
    given = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    if node.target is operator.getitem:
        return isinstance(given, tuple) and len(given) > 1 and all(each == slice(None) for each in given[:2])
    dims = given if isinstance(given, (tuple, list)) else (given,)
    return all(isinstance(dim, int) and (dim > 1 or dim < 0) for dim in dims)


def groups_of(module: Any) -> int:
    return int(module.groups) if isinstance(module, READERS[1:]) else 1


def inputs_of(module: Any) -> int:
    return int(next(getattr(module, name) for name in ("in_features", "in_channels", "num_features") if hasattr(module, name)))
