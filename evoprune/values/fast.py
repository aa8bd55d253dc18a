"""Modules of torch that take long on a CPU, in a faster form, to evaluate with and to train with; kernels that give the same bits
each time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def average_2x2(x: Tensor) -> Tensor:
    """Return nn.AvgPool2d(2)(x) in strided slices: the same sums in the same order, in a third of the time on a CPU."""
    h, w = x.shape[-2] // 2 * 2, x.shape[-1] // 2 * 2
    sums = x[..., 0:h:2, 0:w:2] + x[..., 0:h:2, 1:w:2]
    return sums.add_(x[..., 1:h:2, 0:w:2]).add_(x[..., 1:h:2, 1:w:2]).mul_(0.25)


def tanh_(x: Tensor) -> Tensor:
    """Return tanh(x) as 2 sigmoid(2x) - 1, written over x: a quarter of the time on a CPU, 2e-7 off at most."""
    return x.mul_(2).sigmoid_().mul_(2).sub_(1)


class Average2x2(torch.autograd.Function):
    """`average_2x2` with its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.shape = x.shape
        return average_2x2(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        *batch, h, w = gradient.shape
        whole = (gradient * 0.25)[..., :, None, :, None].expand(*batch, h, 2, w, 2).reshape(*batch, 2 * h, 2 * w)
        below, right = ctx.shape[-2] - 2 * h, ctx.shape[-1] - 2 * w  # an odd last row or column, which no pool reads
        return nn.functional.pad(whole, (0, right, 0, below)) if below or right else whole


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
