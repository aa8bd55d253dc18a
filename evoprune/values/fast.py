"""Modules of torch that take long on a CPU, in a faster form, to evaluate with and to train with; batch norms as part of the
convolutions before them; kernels that give the same bits each time."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from ..inputs.nested import Inputs, applied, mapped
from ..masks.channels import NORMS

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
SLICED = 12_000  # values of an input from which on slices are faster than torch's pool
WIDE = 16  # input channels from which on channels_last is faster (measured: LeNet slower, ResNet and MobileNet faster)


def average_2x2(x: Tensor) -> Tensor:
    """Return nn.AvgPool2d(2)(x) in strided slices: the same sums in the same order, in a third of the time on a CPU."""
    h, w = x.shape[-2] // 2 * 2, x.shape[-1] // 2 * 2
    sums = x[..., 0:h:2, 0:w:2] + x[..., 0:h:2, 1:w:2]
    return sums.add_(x[..., 1:h:2, 0:w:2]).add_(x[..., 1:h:2, 1:w:2]).mul_(0.25)


def tanh_(x: Tensor) -> Tensor:
    """Return tanh(x) as 2 sigmoid(2x) - 1, written over x: a quarter of the time on a CPU, 2e-7 off at most."""
    return x.mul_(2).sigmoid_().mul_(2).sub_(1)


@fx.wrap
def faster_average_2x2(x: Tensor) -> Tensor:
    """Return nn.AvgPool2d(2)(x), by `average_2x2` where that is faster; exported or compiled it stays itself."""
    return nn.functional.avg_pool2d(x, 2) if torch.compiler.is_compiling() or x.numel() < SLICED else average_2x2(x)


class AveragePool2x2(nn.AvgPool2d):
    """`faster_average_2x2` as a module."""

    def forward(self, x: Tensor) -> Tensor:
        return faster_average_2x2(x)


class Average2x2(torch.autograd.Function):
    """`average_2x2` with its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.shape = x.shape
        return average_2x2(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        h, w = (side // 2 * 2 for side in ctx.shape[-2:])  # no pool reads an odd last row or column
        whole = (gradient.new_empty if (h, w) == ctx.shape[-2:] else gradient.new_zeros)(ctx.shape)
        quarter = gradient * 0.25
        for i, j in itertools.product((0, 1), repeat=2):
            whole[..., i:h:2, j:w:2] = quarter
        return whole


class Tanh(torch.autograd.Function):
    """`tanh_` of a copy, with its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = tanh_(x.clone())
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        y, = ctx.saved_tensors
        return torch.ops.aten.tanh_backward(gradient, y)


def is_average_2x2(module: nn.Module) -> bool:
    """Say whether a module is an nn.AvgPool2d that `average_2x2` can stand for."""
    names = "kernel_size", "stride", "padding", "ceil_mode", "divisor_override"
    return type(module) is nn.AvgPool2d and tuple(getattr(module, name) for name in names) == (2, 2, 0, False, None)


def use_faster_pools(model: nn.Module) -> None:
    """Put `faster_average_2x2`, which gives the same bits, in the place of 2x2 average pools inside a model on a CPU."""
    if channels_last_wins(model) or any(p.is_cuda for p in model.parameters()):
        return
    for name, module in list(model.named_modules()):
        if is_average_2x2(module):
            model.set_submodule(name, AveragePool2x2(2))


def channels_last_wins(model: nn.Module) -> bool:
    """Say whether most 2d convolutions are wide enough for channels_last to be faster: the same on every machine."""
    wide = [m.in_channels >= WIDE for m in model.modules() if isinstance(m, nn.Conv2d)]
    return sum(wide) > len(wide) / 2


def fold_batch_norms(model: nn.Module, graph: fx.Graph) -> list[str]:
    """Fold each batch norm that in the graph of `model` alone follows a convolution into that one's weights; return the names of
    these norms, which now have nothing to do."""
    modules = dict(model.named_modules())
    used = [node.target for node in graph.nodes if node.op == "call_module"]
    owners = [id(p) for m in model.modules() for p in m.parameters(recurse=False)]
    folded = []
    for node in graph.nodes:
        before = node.args[0] if node.op == "call_module" and node.args else None
        if not isinstance(before, fx.Node) or before.op != "call_module" or len(before.users) != 1:
            continue
        norm, conv = modules[node.target], modules[before.target]
        if not (isinstance(norm, NORMS) and isinstance(conv, CONVOLUTIONS) and norm.running_mean is not None
                and norm.running_var is not None):
            continue
        if used.count(node.target) > 1 or used.count(before.target) > 1 or owners.count(id(conv.weight)) > 1:
            continue
        conv.weight, conv.bias = fuse_conv_bn_weights(conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps,
                                                      norm.weight, norm.bias)
        folded.append(node.target)
    return folded


@contextmanager
def channels_last(model: nn.Module, inputs: Inputs) -> Iterator[Callable[[Inputs], Inputs]]:
    """Let the model have its channels last for a while, where that is faster and it can; yields what brings inputs into that
    order."""
    if not wants_channels_last(model, inputs):
        yield same
        return
    model.to(memory_format=torch.channels_last)
    try:
        yield ordered
    finally:
        model.to(memory_format=torch.contiguous_format)


def wants_channels_last(model: nn.Module, inputs: Inputs) -> bool:
    """Say whether channels_last is faster for a model, and it takes `inputs` so, which `view` in its own code may not."""
    if not channels_last_wins(model):
        return False
    modes = {module: module.training for module in model.modules()}
    try:
        with torch.no_grad():
            applied(model.to(memory_format=torch.channels_last).eval(), ordered(inputs))
    except RuntimeError:
        return False
    finally:
        model.to(memory_format=torch.contiguous_format)
        for module, mode in modes.items():
            module.training = mode
    return True


def ordered(inputs: Inputs) -> Inputs:
    """Return inputs with channels last."""
    return mapped(lambda x: x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x, inputs)


def same(inputs: Inputs) -> Inputs:
    """Return inputs as they are."""
    return inputs


def has_bf16(device: torch.device) -> bool:
    """Say whether a device trains in bf16."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def in_fp32(output: Any) -> Any:
    """Return what a model returned with its bf16 tensors in fp32."""
    if isinstance(output, Tensor):
        return output.float() if output.dtype == torch.bfloat16 else output
    if isinstance(output, dict):  # of transformers too, whose attributes these are
        return {name: in_fp32(value) for name, value in output.items()}
    if isinstance(output, tuple) and hasattr(output, "_fields"):
        return type(output)(*map(in_fp32, output))
    return tuple(map(in_fp32, output)) if isinstance(output, (tuple, list)) else output


@contextmanager
def fast_training(model: nn.Module) -> Iterator[None]:
    """Let the model's slow modules run in their faster form for a while."""
    changed = []
    if all(not p.is_cuda for p in model.parameters()):
        for module in model.modules():
            function = Average2x2 if is_average_2x2(module) else Tanh if type(module) is nn.Tanh else None
            if function is not None and "forward" not in vars(module):
                module.forward = function.apply
                changed.append(module)
    try:
        yield
    finally:
        for module in changed:
            del module.forward


class deterministic:
    """Make cuDNN choose deterministic kernels for a while; torch.backends.cudnn.flags would also set what the user may have set,
    such as allow_tf32."""

    def __enter__(self) -> None:
        self.before = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False

    def __exit__(self, *error: object) -> None:
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = self.before
