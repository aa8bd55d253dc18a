"""A smaller dense model with the same outputs: channels, neurons and what belongs to them cut out where nothing needs them.

Heads go from nn.MultiheadAttention only; of attention made of linear layers they stay, and so does all whose use the graph of
torch.fx does not show.
"""

from __future__ import annotations

import copy
import io
import logging
import math
import operator
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from ..errors import first_line
from ..inputs.models import copied, logits_of, off_by
from ..inputs.nested import Inputs, applied, arguments_of, mapped
from ..masks.channels import READERS, Tracer, opened
from .attention import FewerHeads, living_heads
from .fast import use_faster_pools
from .spaces import SHAPES, Ids, Reader, Spaces, groups_of, inputs_of

TOLERANCE = 1e-5  # of the largest output
UNREAD = 0.1  # share of the inputs of a layer behind a flatten from which on one `index_select` takes those that it reads
log = logging.getLogger("evoprune")


class Select(nn.Module):
    """Takes some columns of a (batch, columns) input."""

    def __init__(self, columns: Tensor):
        super().__init__()
        self.register_buffer("columns", columns)

    def forward(self, x: Tensor) -> Tensor:
        return torch.index_select(x, 1, self.columns)  # type: ignore[arg-type]


@dataclass
class Gone:
    """What was cut out, by the layer that had it."""

    channels: dict[str, int] = field(default_factory=dict)
    positions: dict[str, int] = field(default_factory=dict)  # of a flatten, by the layer that does not read them
    heads: dict[str, int] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.channels or self.positions or self.heads)


def slimmed(model: nn.Module, inputs: Inputs) -> tuple[nn.Module, Gone]:
    """Return a model with the outputs of `model`, in eval mode, as a graph of its own, whose 2x2 average pools take less time on
    a CPU, and what went from it; a copy of the model itself, where nothing can go.

    Outputs for `inputs`, a few examples, and for random ones are the same, but for rounding; what would change them by more than
    1e-5 of their scale stays, and the log says so.
    """
    same = copied(model).eval()
    with torch.no_grad():
        try:
            net = copied(same)
            with opened(net):
                spaces = Spaces(fx.GraphModule(net, Tracer().trace(net)))
            spaces.run(*arguments_of(net, inputs))
        except Exception as error:  # noqa: BLE001  # tracing runs the user's code on stand-ins, which may raise anything
            log.info("slim: nothing is cut out, torch.fx cannot trace the model (%s)", first_line(error))
            return same, Gone()
        channels, heads = removable(spaces), fewer_heads(spaces)
        small, gone = cut(spaces, channels, heads)
        if gone and not equal(same, small, inputs):
            small, gone = layer_by_layer(spaces, channels, heads, same, inputs)
        rounding = difference(same, small, inputs)
    say(spaces, gone)
    if rounding > TOLERANCE:
        log.info("slim: by rounding alone outputs differ by %.0e of the largest", rounding)
    return (small, gone) if gone else (same, gone)


def say(spaces: Spaces, gone: Gone) -> None:
    """Say what was cut out."""
    made = sum(len(ids) for name, ids in spaces.made.items() if is_layer(spaces.named[name]))
    if not gone:
        log.info("slim: no channel can be cut out")
    if gone.channels:
        log.info("slim: %d of %d channels cut out of %s", sum(gone.channels.values()), made, ", ".join(gone.channels))
    for name, count in gone.positions.items():
        log.info("slim: %d positions of a flatten cut out, which %s does not read", count, name)
    for name, count in gone.heads.items():
        log.info("slim: %d of %d heads cut out of %s", count, spaces.named[name].num_heads, name)


def layer_by_layer(spaces: Spaces, gone: set[int], heads: Mapping[str, Tensor], model: nn.Module,
                   inputs: Inputs) -> tuple[nn.Module, Gone]:
    """Cut one layer after the other; one that changes the outputs stays as it is."""
    accepted: set[int] = set()
    fewer: dict[str, Tensor] = {}
    wishes: list[tuple[str, set[int], Mapping[str, Tensor]]] = [
        *((f"channels of {name}", gone & set(spaces.roots(ids).tolist()), {}) for name, ids in spaces.made.items()),
        *((f"heads of {name}", set(), {name: living}) for name, living in heads.items())]
    left = []
    for name, channels, living in wishes:
        if channels <= accepted and not living:
            continue
        if equal(model, cut(spaces, accepted | channels, {**fewer, **living})[0], inputs):
            accepted, fewer = accepted | channels, {**fewer, **living}
        else:
            left.append(name)
    log.info("slim: other outputs without %s, which stay", ", ".join(left))
    return cut(spaces, accepted, fewer)


def equal(model: nn.Module, small: nn.Module, inputs: Inputs) -> bool:
    """Say whether two models compute the same: in float64, so that rounding decides nothing, where the model's code takes it."""
    wide = mapped(lambda value: value.double() if value.is_floating_point() else value, inputs)
    exact = copied(model).double()
    try:
        applied(exact, wide)
    except Exception:  # noqa: BLE001  # the user's code
        return difference(model, small, inputs) <= TOLERANCE
    return difference(exact, copied(small).double(), wide) <= TOLERANCE


def difference(model: nn.Module, small: nn.Module, inputs: Inputs) -> float:
    """Return by how much outputs differ at most, as a share of the largest, for the examples and for random ones like them;
    infinity where `small` cannot run."""
    generator, found = torch.Generator().manual_seed(0), 0.0

    def like(value: Tensor) -> Tensor:
        if not value.is_floating_point():
            return value
        low, high = value.aminmax()
        return torch.rand(value.shape, generator=generator).to(value) * (high - low) + low

    for given in (inputs, mapped(like, inputs)):
        expected = logits_of(applied(model, given))
        try:
            with redirect_stderr(io.StringIO()):  # which torch.fx prints the lines of an error to
                outputs = logits_of(applied(small, given))
        except Exception:  # noqa: BLE001  # the user's code, which may know how many channels there were
            return math.inf
        by = off_by(expected, outputs)
        found = by if not by <= found else found
        if not found < math.inf:  # or no number
            return math.inf
    return found


def fewer_heads(spaces: Spaces) -> dict[str, Tensor]:
    """Return which heads each attention keeps, of those that can do without some; where dead ones have to stay, say so."""
    found: dict[str, Tensor] = {}
    for node in spaces.module.graph.nodes:  # type: ignore[union-attr]  # of fx
        module = spaces.named.get(str(node.target)) if node.op == "call_module" else None
        if type(module) is nn.MultiheadAttention and not (living := living_heads(module)).all():
            outputs_alone = all(user.target is operator.getitem and (user.args[1] == 0 or not user.users) for user in node.users)
            if outputs_alone and module.bias_k is None and not module.add_zero_attn:
                found[str(node.target)] = living
            else:
                log.info("slim: dead heads of %s stay, its attention weights are used or it adds keys", node.target)
        if node.target is F.scaled_dot_product_attention:
            log.info("slim: heads of %s stay, how many there are is in the model's own code", node.name)
    return found


def removable(spaces: Spaces) -> set[int]:
    """Return the channels, by their number, that can go."""
    stay = set(spaces.roots(np.array(sorted(spaces.closed), np.int64)).tolist())
    for reader in spaces.readers:
        stay.update(spaces.roots(reader.ids[~reader.does_without()]).tolist())
    gone = {root for ids in spaces.made.values() for root in spaces.roots(ids).tolist()} - stay
    while back := gone & set(unfit(spaces, gone)):
        gone -= back
    return gone


def unfit(spaces: Spaces, gone: set[int]) -> list[int]:
    """Return channels that have to stay for what the others are: groups that go in part, a layer's last one."""
    found: list[int] = []
    for reader in spaces.readers:
        pairs = [np.concatenate(pair).tolist() for pair in zip(*(
            np.split(spaces.roots(ids), groups_of(reader.module)) for ids in (reader.ids, spaces.made[reader.name])))]
        if len(pairs) > 1:
            found += [root for pair in pairs if not gone.issuperset(pair) for root in pair]
            found += pairs[0] if all(gone.issuperset(pair) for pair in pairs) else []
        elif gone.issuperset(spaces.roots(reader.ids).tolist()):
            found.append(int(spaces.roots(reader.ids[:1])[0]))
    for ids in spaces.made.values():
        if gone.issuperset(spaces.roots(ids).tolist()):
            found.append(int(spaces.roots(ids[:1])[0]))
    return found


def cut(spaces: Spaces, gone: set[int], heads: Mapping[str, Tensor]) -> tuple[nn.Module, Gone]:
    """Return the graph's module without the channels that are gone and with these heads only, and how many went."""
    graph: Any = copied(spaces.module)

    def kept(ids: Ids) -> Tensor:
        return torch.from_numpy(np.array([root not in gone for root in spaces.roots(ids).tolist()], bool))

    readers = {reader.name: reader for reader in spaces.readers}
    counts = Gone()
    for name, ids in spaces.made.items():
        rows = kept(ids)
        graph.set_submodule(name, smaller(spaces.named[name], rows, readers.get(name), kept))
        if is_layer(spaces.named[name]) and not rows.all():
            counts.channels[name] = int((~rows).sum())
    for node in graph.graph.nodes:
        resize(node, spaces, kept)
        if str(node.target) in readers and (unread := select(graph, node, readers[str(node.target)])):
            counts.positions[str(node.target)] = unread
    for name, living in heads.items():
        graph.set_submodule(name, FewerHeads(spaces.named[name], living))
        counts.heads[name] = int((~living).sum())
    use_faster_pools(graph)
    graph.graph.lint()
    graph.recompile()
    return graph, counts


def smaller(module: Any, rows: Tensor, reader: Reader | None, kept: Callable[[Ids], Tensor]) -> nn.Module:
    """Return a layer with some of its rows and, of a `reader`, the columns that are kept, the others' constants in its bias."""
    small = copy.copy(module)
    small._parameters, small._buffers = dict(module._parameters), dict(module._buffers)
    for values in (small._parameters, small._buffers):
        for name, value in values.items():
            if value is not None and value.dim():
                values[name] = held(value[rows], values)
    columns = kept(reader.ids) if reader is not None else rows  # of a depthwise one
    if reader is not None and groups_of(module) == 1 and not columns.all():
        weight = module.weight.detach()[rows]
        constant = reader.constant.nan_to_num().masked_fill(columns, 0).double()
        added = weight.double().reshape(*weight.shape[:2], -1).sum(2) @ constant
        small._parameters["weight"] = held(weight[:, columns], small._parameters)
        if added.any():
            added = added if module.bias is None else module.bias.detach()[rows] + added
            small._parameters["bias"] = held(added.to(weight.dtype), small._parameters)
    count, inputs = int(rows.sum()), int(columns.sum())
    if reader is None and groups_of(module) == 1:
        inputs = inputs_of(module)
    if isinstance(module, nn.Linear):
        small.in_features, small.out_features = inputs, count
    elif is_layer(module):
        small.groups = max(1, module.groups * inputs // module.in_channels)
        small.in_channels, small.out_channels = inputs, count
    else:
        small.num_features = count
    return small  # type: ignore[no-any-return]


def held(value: Tensor, values: dict[str, Any]) -> Tensor:
    """Return a value as a module holds it: a parameter among parameters."""
    value = value.detach().clone()
    return nn.Parameter(value, requires_grad=False) if any(isinstance(v, nn.Parameter) for v in values.values()) else value


def resize(node: fx.Node, spaces: Spaces, kept: Callable[[Ids], Tensor]) -> None:
    """Let a node that states how many channels there are state how many are left."""
    before = spaces.by_name[node.name]
    if before in spaces.pads:
        place, front, ids = spaces.pads[before]
        sizes = [*node.args[1], *[0] * (place + 2)][:max(len(node.args[1]), place + 2)]  # type: ignore[arg-type,misc]
        there = kept(ids)
        sizes[place:place + 2] = int(there[:front].sum()), int(there[len(ids) - sizes[place + 1]:].sum())
        node.args = (node.args[0], sizes, *node.args[2:])
    elif node.target in SHAPES and before in spaces.values and len(spaces.shapes[before]) == 2:
        node.op, node.target, node.args, node.kwargs = "call_function", torch.flatten, (node.args[0], 1), {}


def select(graph: Any, node: fx.Node, reader: Reader) -> int:
    """Put an `index_select` in front of a layer that does not read many positions of a flatten; return how many."""
    module = graph.get_submodule(node.target)
    if not isinstance(module, nn.Linear) or not reader.flat:
        return 0
    read = (module.weight != 0).any(0)
    unread = int((~read).sum())
    if unread < UNREAD * len(read) or unread == len(read):
        return 0
    name = f"{str(node.target).replace('.', '_')}_read"
    graph.add_submodule(name, Select(read.nonzero()[:, 0]))
    with graph.graph.inserting_before(node):
        node.args = (graph.graph.call_module(name, (node.args[0],)), *node.args[1:])
    module.weight = nn.Parameter(module.weight.detach()[:, read].clone(), requires_grad=False)
    module.in_features -= unread
    return unread


def is_layer(module: nn.Module) -> bool:
    """Say whether a module has channels of its own, and is no batch norm."""
    return isinstance(module, READERS)
