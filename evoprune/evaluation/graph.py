"""A model as a graph, rewritten to run faster: batch norms folded, faster modules, cut in front of the first mask."""

from __future__ import annotations

import logging
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..inputs.models import copied
from ..inputs.nested import Inputs, applied
from ..values.fast import CONVOLUTIONS, fold_batch_norms, tanh_, use_faster_pools

log = logging.getLogger("evoprune")


def rewritten(plain: nn.Module, inputs: Inputs, fold: bool = True) -> tuple[nn.Module, int]:
    """Return the model as a graph with batch norms folded and faster modules, and how many of these round otherwise; the
    plain model and 0 where that is not possible."""
    try:
        if plain._forward_pre_hooks or plain._forward_hooks:
            raise ValueError("its own hooks would be lost")
        with torch.no_grad():  # not inference_mode: its tensors could never be changed again
            expected = applied(plain, inputs)
            graph = fx.symbolic_trace(copied(plain))
            folded = without_batch_norms(graph) if fold else 0
            use_faster_pools(graph)
            rounded = folded + use_faster_modules(graph)
            if close(expected, applied(graph, inputs)):
                return graph, rounded
        reason = "its graph gives other logits"
    except Exception as error:  # noqa: BLE001  # tracing runs the user's code on stand-ins, which may raise anything
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    log.info("evaluating the model as it is, torch.fx cannot trace it (%s)", reason)
    return plain, 0


def without_batch_norms(graph: fx.GraphModule) -> int:
    """Fold each batch norm that alone follows a convolution into its weights; return how many."""
    folded = fold_batch_norms(graph, graph.graph)
    for node in list(graph.graph.nodes):
        if node.target in folded:
            node.replace_all_uses_with(node.args[0])
            graph.graph.erase_node(node)
    graph.recompile()
    return len(folded)


class TanhInPlace(nn.Module):
    """`fast.tanh_` as a module."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x) if torch.is_grad_enabled() else tanh_(x)


def use_faster_modules(graph: fx.GraphModule) -> int:
    """Replace modules by faster ones: activations in place (the same bits), tanh (rounded otherwise); return how many round
    otherwise.

    An activation may write over its input where that is the fresh result of a layer that nothing else reads.
    """
    on_cpu = all(not p.is_cuda for p in graph.parameters())
    rounded = 0
    modules = dict(graph.named_modules())
    used = [node.target for node in graph.graph.nodes if node.op == "call_module"]
    for node in graph.graph.nodes:
        if node.op != "call_module" or not node.args:
            continue
        module, before = modules[node.target], node.args[0]
        fresh = (used.count(node.target) == 1 and isinstance(before, fx.Node) and before.op == "call_module"
                 and len(before.users) == 1 and isinstance(modules[before.target], (nn.Linear, *CONVOLUTIONS)))
        if fresh and on_cpu and type(module) is nn.Tanh:
            graph.set_submodule(node.target, TanhInPlace())
            rounded += 1
        elif fresh and type(module) in (nn.ReLU, nn.ReLU6, nn.SiLU, nn.Hardswish):
            module.inplace = True
    return rounded


def split_graph(graph: fx.GraphModule, masked: Collection[str]) -> tuple[fx.GraphModule, fx.GraphModule] | None:
    """Split a graph into the nodes that `masked` parameters cannot reach and the rest; None if there is nothing before."""
    owners = {name.rpartition(".")[0] for name in masked}
    live: set[fx.Node] = set()
    for node in graph.graph.nodes:
        touched = (node.op == "get_attr" and node.target in masked) or (
            node.op == "call_module" and any(f"{owner}.".startswith(f"{node.target}.") for owner in owners))
        if touched or node.op == "output" or any(source in live for source in node.all_input_nodes):
            live.add(node)
    crossing = [node for node in graph.graph.nodes if node not in live and node.op != "get_attr"
                and any(user in live for user in node.users)]
    if all(node.op == "placeholder" for node in crossing):
        return None
    before, behind = fx.Graph(), fx.Graph()  # torch.fx.passes.split_module copies too, but decides itself how values cross
    copies: dict[fx.Node, fx.Node] = {}
    for node in graph.graph.nodes:
        if node not in live:
            copies[node] = before.node_copy(node, copies.__getitem__)
    before.output(tuple(copies[node] for node in crossing))
    copies = {node: behind.placeholder(f"crossing_{i}") for i, node in enumerate(crossing)}
    for node in graph.graph.nodes:
        if node in live or node.op == "get_attr":
            copies[node] = behind.node_copy(node, copies.__getitem__)
    parts = fx.GraphModule(graph, before), fx.GraphModule(graph, behind)  # they share the modules of `graph`
    for part in parts:
        part.graph.eliminate_dead_code()
        part.recompile()
    return parts


def tensors(output: Any) -> list[Tensor]:
    """Return the tensors that a model returned, in order."""
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, dict):
        output = list(output.values())
    if isinstance(output, (tuple, list)):
        return [t for part in output for t in tensors(part)]
    return tensors(vars(output)) if hasattr(output, "__dict__") else []


def same(a: Any, b: Any) -> bool:
    return len(tensors(a)) == len(tensors(b)) and all(torch.equal(x, y) for x, y in zip(tensors(a), tensors(b)))


def close(a: Any, b: Any) -> bool:
    """Say whether two outputs differ by rounding only."""
    def near(x: Tensor, y: Tensor) -> bool:
        scale = float(x.abs().max()) if x.is_floating_point() and x.numel() else 0.0
        return x.shape == y.shape and bool(torch.allclose(x, y, rtol=1e-4, atol=1e-4 * scale + 1e-30))

    pairs = list(zip(tensors(a), tensors(b)))
    return bool(pairs) and len(tensors(a)) == len(tensors(b)) and all(near(x, y) for x, y in pairs)
