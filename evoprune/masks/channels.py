"""Which channels lie between layers: who makes them, who reads them.

`torch.fx` follows each layer's outputs through elementwise functions, norms, pools, flattening and sums to the layers that
read them. Where the graph cannot be told, everything counts as read.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from ..inputs.models import copied
from ..inputs.nested import Inputs, arguments_of
from .layout import Layout

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
READERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
ELEMENTWISE = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish, nn.Hardsigmoid,
               nn.Hardtanh, nn.Softplus, nn.Tanh, nn.Sigmoid, nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
CHANNELWISE = (*ELEMENTWISE, *NORMS, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d,
               nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d,
               nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d, nn.Flatten)
FUNCTIONS = {torch.relu, torch.tanh, torch.sigmoid, F.relu, F.tanh, F.sigmoid, F.gelu, F.silu, F.leaky_relu, F.dropout,
             "relu", "relu_", "tanh", "sigmoid", "contiguous"}  # and methods, each of one element at a time
SHAPING = {torch.flatten, F.avg_pool2d, F.max_pool2d, F.adaptive_avg_pool2d, "flatten", "view", "reshape"}
SUMS = {operator.add, operator.iadd, torch.add, "add", "add_"}
log = logging.getLogger("evoprune")


@dataclass
class Channels:
    """Values with one meaning along dimension 1, or the last of several, of tokens: who makes them, who reads them."""

    count: int
    makers: list[int] = field(default_factory=list)  # layers, by place in the layout
    readers: list[int] = field(default_factory=list)
    open: bool = False  # something else reads them
    last: bool = False  # along the last dimension
    padded: bool = False  # with zeros, or summed with something else, so that a channel of one number does not stay one

    def join(self, other: Channels) -> None:
        """Take over what `other` stands for: the two are summed."""
        self.makers, self.readers = self.makers + other.makers, self.readers + other.readers
        self.open |= other.open


def find_channels(model: nn.Module, layout: Layout, inputs: Inputs) -> list[Channels]:
    """Return the channels between the layers of `model`, later ones first; none where it cannot be traced."""
    try:
        net = copied(model).eval()
        with opened(net):
            graph = fx.GraphModule(net, Tracer().trace(net))
        with torch.no_grad():
            Shapes(graph).run(*arguments_of(net, inputs))
    except Exception:  # noqa: BLE001  # tracing runs the user's code on stand-ins, which may raise anything
        log.info("dead paths are not looked for: torch.fx cannot trace the model")
        return []
    return Reader(graph, layout).read()


class Shapes(fx.Interpreter):
    """Notes the shape of every tensor, as torch's own ShapeProp does, which imports a second's worth of symbolic algebra."""

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor):
            n.meta["shape"] = tuple(result.shape)
        return result


class Tracer(fx.Tracer):
    """Looks into transformer encoders too, where `opened` lets it."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return not isinstance(m, (nn.TransformerEncoder, nn.TransformerEncoderLayer)) and \
            super().is_leaf_module(m, module_qualified_name)


@contextmanager
def opened(net: nn.Module) -> Iterator[None]:
    """Let transformer encoders compute in plain steps for a while, without the shortcuts that tracing cannot follow."""
    encoders = [m for m in net.modules() if isinstance(m, (nn.TransformerEncoder, nn.TransformerEncoderLayer))]
    for module in encoders:
        forward = one_after_another if isinstance(module, nn.TransformerEncoder) else in_steps
        module.forward = MethodType(forward, module)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for module in encoders:
            del module.forward


def one_after_another(self: nn.TransformerEncoder, src: Any, mask: Any = None, src_key_padding_mask: Any = None,
                      is_causal: Any = None) -> Any:
    """Compute what a transformer encoder does."""
    for layer in self.layers:
        src = layer(src, src_mask=mask, src_key_padding_mask=src_key_padding_mask)
    return src if self.norm is None else self.norm(src)


def in_steps(self: nn.TransformerEncoderLayer, src: Any, src_mask: Any = None, src_key_padding_mask: Any = None,
             is_causal: Any = None) -> Any:
    """Compute what a layer of a transformer encoder does (Vaswani et al., 2017, arXiv:1706.03762; with norms first, Xiong et al.,
    2020, arXiv:2002.04745)."""
    def attended(x: Any) -> Any:
        return self.dropout1(self.self_attn(x, x, x, attn_mask=src_mask, key_padding_mask=src_key_padding_mask,
                                            need_weights=False)[0])

    def fed(x: Any) -> Any:
        return self.dropout2(self.linear2(self.dropout(self.activation(self.linear1(x)))))

    if self.norm_first:
        src = src + attended(self.norm1(src))
        return src + fed(self.norm2(src))
    src = self.norm1(src + attended(src))
    return self.norm2(src + fed(src))


class Reader:
    """Goes through a graph once and says which channels a node's value has."""

    def __init__(self, graph: fx.GraphModule, layout: Layout):
        self.graph, self.modules = graph, dict(graph.named_modules())
        owners = [id(p) for m in graph.modules() for p in m.parameters(recurse=False)]
        used = [node.target for node in graph.graph.nodes if node.op == "call_module"]
        named = dict(graph.named_parameters(remove_duplicate=False))
        owners += [id(named[str(node.target)]) for node in graph.graph.nodes if node.op == "get_attr" and node.target in named]
        self.places: dict[str, int] = {}  # of layers that can be told, by module
        for i, layer in enumerate(layout):
            module = self.modules.get(layer.name.rpartition(".")[0])
            if (isinstance(module, READERS) and getattr(module, "groups", 1) == 1 and owners.count(id(module.weight)) == 1
                    and module.weight.shape == layer.shape and used.count(layer.name.rpartition(".")[0]) == 1):
                self.places[layer.name.rpartition(".")[0]] = i
        self.of: dict[fx.Node, Channels] = {}

    def read(self) -> list[Channels]:
        """Return all channels, later ones first."""
        for node in self.graph.graph.nodes:
            self.visit(node)
        unique = {id(channels): channels for channels in self.of.values()}
        return [channels for channels in reversed(unique.values()) if channels.makers and not channels.open]

    def visit(self, node: fx.Node) -> None:
        """Note what a node reads and makes."""
        shape = shape_of(node)
        known = [source for source in node.all_input_nodes if source in self.of]
        if node.op == "call_module" and str(node.target) in self.places and shape is not None and len(shape) > 1:
            module, place = self.modules[str(node.target)], self.places[str(node.target)]
            source = node.args[0] if node.args else None
            last = isinstance(module, nn.Linear) and len(shape) > 2
            if isinstance(source, fx.Node) and source in self.of and self.of[source].last == last:
                self.of[source].readers.append(place)
            elif known:
                self.open(known)
            self.of[node] = Channels(shape[-1 if last else 1], [place], last=last)
        elif self.passes(node, known, shape):
            first, *others = (self.of[source] for source in known)
            if node.target in SUMS:
                first.padded |= any(source not in self.of and shape_of(source) is not None for source in node.all_input_nodes)
            first.padded |= (node.op != "call_module" and node.target is F.avg_pool2d) or \
                bool(np.any(getattr(self.modules.get(str(node.target)), "padding", 0)))
            for other in others:
                if other is not first:
                    first.join(other)
                    self.of = {n: first if c is other else c for n, c in self.of.items()}
            self.of[node] = first
        else:
            self.open(known)

    def passes(self, node: fx.Node, known: Sequence[fx.Node], shape: Sequence[int] | None) -> bool:
        """Say whether each channel of a node's value depends on that channel of its inputs alone."""
        if not known or shape is None:
            return False
        if node.target in SUMS:
            tensors = [source for source in node.all_input_nodes if shape_of(source) is not None]
            alike = {(self.of[s].count, self.of[s].last) for s in known}
            return all(shape_of(source) == shape for source in tensors) and len(alike) == 1
        last = self.of[known[0]].last
        functions, modules = (FUNCTIONS, ELEMENTWISE) if last else (FUNCTIONS | SHAPING, CHANNELWISE)
        channelwise = isinstance(self.modules[str(node.target)], modules) if node.op == "call_module" else \
            node.target in functions
        before = shape_of(known[0])
        if not channelwise or len(node.all_input_nodes) > 1 or before is None or len(shape) < 2:
            return False
        if last:
            return before == shape
        flat = len(shape) == 2 and before[0] == shape[0]  # all behind the first dimension in one
        return before[:2] == shape[:2] or (flat and numel(before) == numel(shape))

    def open(self, nodes: Sequence[fx.Node]) -> None:
        for node in nodes:
            self.of[node].open = True


def shape_of(node: fx.Node) -> tuple[int, ...] | None:
    """Return the shape of a node's value, None if it is not one tensor."""
    shape: tuple[int, ...] | None = node.meta.get("shape")
    return shape


def numel(shape: Sequence[int]) -> int:
    return int(np.prod(shape))
