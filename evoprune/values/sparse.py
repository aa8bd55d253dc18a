"""Layers that skip their zeros: weights as compressed sparse rows (torch.sparse CSR, fast where torch has MKL), where that is
measured to be faster than dense on this machine; batch norms are folded into the convolutions before them.

A convolution is a product with the patches of one image after the other: those of a whole batch at once would not stay in the
processor's cache.
"""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..inputs.models import copied
from ..inputs.nested import Inputs, applied, leaves
from ..masks.channels import Tracer, opened
from .fast import fold_batch_norms
from .slim import difference

TYPES = (torch.float32, torch.float64)  # that MKL multiplies
LEAST = 0.5  # sparsity from which on a layer is tried
ROUNDS, SECONDS = 7, 0.02  # of each timing, in turns
FEW, PATIENCE = 3, 30.0  # rounds that are made at least, and the seconds after which no more are begun
GAIN = 1.05  # times as fast at least
GROSS = 0.01  # of the largest output: more than rounding
log = logging.getLogger("evoprune")


class Sparse(nn.Module):
    """What both kinds share: the weights (out, p) of a layer as compressed sparse rows, its bias."""

    def __init__(self, layer: nn.Linear | nn.Conv2d):
        super().__init__()
        with warnings.catch_warnings(action="ignore"):  # torch calls CSR a beta
            self.register_buffer("weight", layer.weight.detach().flatten(1).to_sparse_csr())
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach().clone()[:, None])

    def product(self, columns: Tensor) -> Tensor:
        """Return weights times columns (p, n), plus bias, (out, n)."""
        found: Tensor = self.weight @ columns  # type: ignore[operator]
        return found if self.bias is None else found.add_(self.bias)  # type: ignore[arg-type]


class SparseLinear(Sparse):
    """A linear layer that skips its zeros."""

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x.reshape(-1, x.shape[-1]).T.contiguous()).T.reshape(*x.shape[:-1], -1)


class SparseConv2d(Sparse):
    """An ungrouped convolution that skips its zeros, image by image."""

    def __init__(self, layer: nn.Conv2d):
        super().__init__(layer)
        self.kernel, self.dilation, self.stride = layer.kernel_size, layer.dilation, layer.stride
        self.padding: Any = layer.padding
        self.plain = layer.kernel_size == layer.stride == (1, 1) and not any(layer.padding)

    def forward(self, x: Tensor) -> Tensor:
        h, w = (int((n + 2 * p - d * (k - 1) - 1) // s + 1) for n, p, d, k, s in zip(
            x.shape[2:], self.padding, self.dilation, self.kernel, self.stride))
        return torch.stack([self.product(image.flatten(1) if self.plain else self.patches(image, h, w)).view(-1, h, w)
                            for image in x])

    def patches(self, image: Tensor, h: int, w: int) -> Tensor:
        """Return the patches of an image (c, height, width) at each of h x w places: F.unfold in a tenth of its time."""
        (top, left), (down, right), (dy, dx) = self.padding, self.stride, self.dilation
        padded = F.pad(image, (left, left, top, top)).contiguous()
        c, height, width = padded.shape
        views = padded.as_strided((c, *self.kernel, h, w), (height * width, dy * width, dx, down * width, right))
        return views.reshape(-1, h * w)


def sparsely_run(model: nn.Module, inputs: Inputs) -> nn.Module:
    """Return a copy of `model` some of whose layers skip their zeros. Its attribute `sparse_layers`, by name, says how many times
    as fast as dense each of them was, for a batch of `inputs`, in this process, with the threads that torch has now.

    Outputs differ by rounding only. Batch norms that alone follow a convolution become part of it. Layers of other kinds stay,
    and those that dense runs faster, or that the model does not run as layers: torch's transformer encoders hand weights to a
    kernel of their own.
    """
    same, able = copied(model).eval(), torch.backends.mkl.is_available()  # type: ignore[no-untyped-call]
    found: dict[str, float] = {}
    net = folded(same, inputs) if able else copied(same)
    net.sparse_layers = found  # type: ignore[assignment]  # torch knows no such attribute
    if not able:
        log.info("sparse: all layers stay dense, torch has no MKL here")
        return net
    left: list[str] = []
    with torch.no_grad():
        for name, given in inputs_of_layers(net, inputs).items():
            layer: Any = net.get_submodule(name)
            sparse = skipping(layer)
            dense, faster = timed(lambda layer=layer, x=given: layer(x), lambda sparse=sparse, x=given: sparse(x))  # type: ignore[misc]
            if dense > GAIN * faster:
                net.set_submodule(name, sparse)
                if difference(same, net, inputs) < GROSS:
                    found[name] = dense / faster
                else:
                    net.set_submodule(name, layer)
                    left.append(name)
    if left:
        log.info("sparse: the model does not run %s as layers, which stay dense", ", ".join(left))
    said, threads = ", ".join(f"{name} {times:.1f}" for name, times in found.items()), torch.get_num_threads()
    at = f"at batch {len(leaves(inputs)[0])} on {threads} thread{'s' * (threads != 1)}"
    log.info("sparse: %s", f"times as fast as dense, {at}: {said}" if found else
             f"all layers stay dense, which is as fast here {at}")
    return net


@torch.no_grad()
def folded(model: nn.Module, inputs: Inputs) -> nn.Module:
    """Return a copy whose batch norms are folded into convolutions, as far as torch.fx can tell that they may be."""
    net = copied(model)
    try:
        with opened(net):
            graph = Tracer().trace(net)
        names = fold_batch_norms(net, graph)
        for name in names:
            net.set_submodule(name, nn.Identity())
        if not names or difference(model, net, inputs) >= GROSS:
            return copied(model)
    except Exception:  # noqa: BLE001  # tracing runs the user's code on stand-ins, which may raise anything
        return copied(model)
    log.info("sparse: batch norms folded into the convolutions before them: %d", len(names))
    return net


def skipping(layer: nn.Linear | nn.Conv2d) -> Sparse:
    """Return a layer that computes the same and skips its zeros."""
    return SparseLinear(layer) if isinstance(layer, nn.Linear) else SparseConv2d(layer)


def inputs_of_layers(net: nn.Module, inputs: Inputs) -> dict[str, Tensor]:
    """Return what enters each layer that may run sparse, by name."""
    entered: dict[str, Tensor] = {}
    calls: dict[str, int] = {}

    def noting(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def note(_: nn.Module, args: tuple[Any, ...]) -> None:
            calls[name] = calls.get(name, 0) + 1
            entered.update({name: args[0]} if args else {})
        return note

    hooks = [module.register_forward_pre_hook(noting(name)) for name, module in net.named_modules() if fits(module)]
    try:
        applied(net, inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: x for name, x in entered.items() if calls[name] == 1}


def fits(module: nn.Module) -> bool:
    """Say whether a layer is of a kind that can skip zeros, with enough of them."""
    plain = type(module) is nn.Linear or (type(module) is nn.Conv2d and module.groups == 1 and module.padding_mode == "zeros"
                                          and not isinstance(module.padding, str))
    if not plain or (weight := module.get_parameter("weight")).dtype not in TYPES:
        return False
    return 1 - int(weight.count_nonzero()) / weight.numel() >= LEAST


def timed(*functions: Callable[[], Any], threads: int | None = None) -> list[float]:
    """Return the median seconds of each function, measured in turns: seven, or those begun within 30 s, three at least."""
    quiet = logging.getLogger("torch.utils.cpp_extension")
    level = quiet.level
    quiet.setLevel(logging.ERROR)  # it speaks of CUDA where there is none
    from torch.utils.benchmark import Timer

    quiet.setLevel(level)
    times: list[list[float]] = [[] for _ in functions]
    began = time.perf_counter()
    while len(times[0]) < (ROUNDS if time.perf_counter() - began < PATIENCE else FEW):
        for function, kept in zip(functions, times):
            timer = Timer("function()", globals={"function": function}, num_threads=threads or torch.get_num_threads())
            kept.append(timer.blocked_autorange(min_run_time=SECONDS).median)
    return [median(each) for each in times]
