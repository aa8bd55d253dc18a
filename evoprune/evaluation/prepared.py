"""A model made ready for many masked forward passes over the same images.

Batch norm is folded into the convolution before it (masking afterwards is exact: (w * s) * m == (w * m) * s), weights
and images are in the faster memory format, pools and activations are faster ones, and whatever no mask can change is
computed once and kept: the normalised images, or, where only later layers are masked, the values that cross from the part
before them to the part behind. `torch.fx` finds the cuts; a model it cannot trace, or whose cut does not give the same
logits, is run whole.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..inputs.models import copied
from ..inputs.nested import Inputs, applied, leaves, mapped
from ..inputs.splits import Split
from ..values.fast import wants_channels_last
from .graph import rewritten, same, split_graph

CHECKED = 8  # images on which a rewritten model is compared with the plain one
log = logging.getLogger("evoprune")


class PreparedModel:
    """A private copy of a model on the split's device; `logits(i)` of batch i under the weights as they are now.

    `masked` names the parameters that masks will change. The values that no mask changes are kept up to `cache_mb`. Without
    `fold`, batch norms stay as they are; with `plain`, everything does.
    """

    def __init__(self, model: nn.Module, split: Split, batch_size: int, masked: Collection[str], precision: str = "fp32",
                 cache_mb: int = 0, plain: bool = False, fold: bool = True):
        # 8 arguments: five of them say what may be rewritten
        self.split, self.batch_size = split, batch_size
        self.dtype = torch.bfloat16 if precision == "bf16" else split.dtype
        self.model, self.rounded = copied(model).to(split.labels.device).eval().requires_grad_(False), 0
        last = not plain and wants_channels_last(self.model, split.inputs(slice(0, 2)))
        self.format = torch.channels_last if last else torch.contiguous_format
        if not plain:
            self.model, self.rounded = rewritten(self.model, split.inputs(slice(0, CHECKED)), fold)
        if self.dtype != split.dtype:
            self.model = self.model.to(self.dtype)
        self.model = self.model.to(memory_format=self.format)
        self.prefix, self.suffix = self.cut(masked)
        self.batches = range(0, len(split), batch_size)
        self.cache: list[Inputs] = []
        self.cache_bytes = cache_mb << 20

    @property
    def exact(self) -> bool:
        """Whether logits are bit for bit those of the plain model at this batch size."""
        return not self.rounded and self.format == torch.contiguous_format and self.dtype == self.split.dtype

    def logits(self, i: int) -> Any:
        """Return what the model returns for batch `i`, under the weights as they are now."""
        return applied(self.suffix, self.values(i))

    def values(self, i: int) -> Inputs:
        """Return what goes into the part behind the cut for batch `i`, from the cache where it is there."""
        if i < len(self.cache):
            return self.cache[i]
        values = self.before_the_cut(self.inputs(slice(self.batches[i], self.batches[i] + self.batch_size)))
        parts = leaves(values) if self.prefix is None else values
        size = sum(v.nbytes for v in parts if isinstance(v, Tensor))
        if i == len(self.cache) and size <= self.cache_bytes:
            self.cache_bytes -= size
            self.cache.append(values)
        return values

    def before_the_cut(self, inputs: Inputs) -> Inputs:
        return inputs if self.prefix is None else applied(self.prefix, inputs)

    def inputs(self, index: slice) -> Inputs:
        """Return normalised images of the split, made ready."""
        return mapped(self.ready, self.split.inputs(index))

    def ready(self, batch: Tensor) -> Tensor:
        """Return normalised images in the precision and memory format of the weights."""
        if batch.is_floating_point():
            batch = batch.to(self.dtype)
        return batch.contiguous(memory_format=self.format) if batch.dim() == 4 else batch

    def cut(self, masked: Collection[str]) -> tuple[nn.Module | None, nn.Module]:
        """Return (part that no mask changes, the rest), or (None, the model) where they cannot be told apart."""
        if not isinstance(self.model, fx.GraphModule):
            return None, self.model
        parts = split_graph(self.model, masked)
        if parts is None:
            return None, self.model
        prefix, suffix = parts
        inputs = self.inputs(slice(0, CHECKED))
        with torch.inference_mode():
            expected, values = applied(self.model, inputs), applied(prefix, inputs)
            if all(same(expected, suffix(*values)) for _ in range(2)):  # twice: it might change its inputs in place
                return prefix, suffix
        log.info("the part before the masked layers cannot be cached: the model changes values in place")
        return None, self.model


def fastest_batch_size(model: nn.Module, split: Split, usual: int, masked: Collection[str]) -> int:
    """Time half, once and twice the usual batch size on the dense model, three times each; return the fastest."""
    best: dict[int, float] = {}
    sizes = [size for size in (usual // 2, usual, 2 * usual) if 0 < size <= len(split)] or [usual]
    prepared = {size: PreparedModel(model, split, size, masked) for size in sizes}
    with torch.inference_mode():
        for size in sizes * 4:  # the first round warms up
            batches = min(len(prepared[size].batches), max(1, 512 // size))
            started = time.perf_counter()
            for i in range(batches):
                prepared[size].logits(i)
            if split.labels.is_cuda:
                torch.cuda.synchronize()
            each = (time.perf_counter() - started) / min(batches * size, len(split))
            best[size] = min(best.get(size, float("inf")), each) if size in best else float("inf")
    return min(best, key=best.__getitem__)
