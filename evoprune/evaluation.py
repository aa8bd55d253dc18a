"""Masked forward passes: the objectives of individuals, equal in integer counts to copying the model, zeroing its pruned
weights by hand, calling eval() and counting right answers. The user's model is never touched.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .config import EvopruneError, first_line
from .genome import Individual, sparsity
from .layers import Layout
from .splits import Split, as_split

ACTIVATION_BYTES = {"cpu": 8 << 20, "cuda": 256 << 20}  # largest activation of a batch; page faults slow a CPU beyond it
LARGEST_BATCH = {"cpu": 512, "cuda": 8192}


def logits_of(output: Any) -> Tensor:
    """Return the logits (batch, classes) from what a model returned: a tensor, or one in a tuple, a dict or `.logits`."""
    if isinstance(output, Tensor):
        return output
    if hasattr(output, "logits"):
        return logits_of(output.logits)
    if isinstance(output, dict) and output:
        return logits_of(output.get("logits", next(iter(output.values()))))
    if isinstance(output, (tuple, list)) and output:
        return logits_of(output[0])
    raise EvopruneError(f"model: returned {type(output).__name__}, expected logits: a tensor, or one in a tuple, "
                        f"a dict or an object with .logits")


def correct(model: nn.Module, split: Split, batch_size: int) -> Tensor:
    """Count right answers, as a tensor () on the device; a non-finite logit is a wrong answer. Call under eval()."""
    count = torch.zeros((), dtype=torch.int64, device=split.labels.device)
    with torch.inference_mode():
        for i in range(0, len(split), batch_size):
            logits = logits_of(model(split.inputs(slice(i, i + batch_size))))  # (batch, classes)
            right = logits.argmax(1) == split.labels[i:i + batch_size]
            count += (right & torch.isfinite(logits).all(1)).sum()
    return count


def accuracy(model: nn.Module, data: Any, batch_size: int | None = None) -> float:
    """Return the share of right answers of `model` on a split, (images, labels) or a Dataset, as a run measures it.

    Runs on the model's own device; its training flags are put back. The batch size is a run's own unless given.
    """
    parameter = next(model.parameters(), torch.empty(0))
    split = as_split(data, "data").to(parameter.device)
    batch_size = batch_size or batch_size_for(probe(model, split, 0)[1], parameter.device)
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        return int(correct(model, split, batch_size)) / len(split)
    finally:
        for module, mode in modes.items():
            module.training = mode


def probe(model: nn.Module, split: Split, classes: int) -> tuple[int, int]:
    """Run two images through a copy of `model`; return (outputs, bytes of the largest activation of one image).

    Raises:
        EvopruneError: the model does not take these images, or has fewer outputs than there are classes.
    """
    model = copy.deepcopy(model).to(split.labels.device).eval()
    sizes = [split.inputs(slice(0, 1)).nbytes]

    def note(module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            sizes.append(output.nbytes // max(1, len(batch)))

    for module in model.modules():
        module.register_forward_hook(note)
    batch = split.inputs(slice(0, 2))
    shape = tuple(batch.shape[1:])
    try:
        with torch.inference_mode():
            logits = logits_of(model(batch))
    except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
        raise EvopruneError(f"data: images of shape {shape} do not go through the model: {first_line(error)}") from None
    if logits.dim() != 2 or len(logits) != len(batch):
        raise EvopruneError(f"model: returned logits of shape {tuple(logits.shape)} for {len(batch)} images, "
                            f"expected ({len(batch)}, classes)")
    if classes > logits.shape[1]:
        raise EvopruneError(f"data: found label {classes - 1}, expected 0 to {logits.shape[1] - 1}: the model has "
                            f"{logits.shape[1]} outputs")
    return logits.shape[1], max(sizes)


def batch_size_for(activation_bytes: int, device: torch.device) -> int:
    """Return the largest power of two whose largest activation fits `ACTIVATION_BYTES`: the same on every machine."""
    fits = max(1, ACTIVATION_BYTES[device.type] // activation_bytes)
    return min(LARGEST_BATCH[device.type], 1 << (fits.bit_length() - 1))


class Evaluator:
    """Measures individuals on a split: `evaluator(individual)` -> (accuracy, sparsity), `evaluator.many(individuals)`.

    The model is copied to the split's device once; each individual's mask is multiplied into the copy's weights.
    """

    def __init__(self, model: nn.Module, layout: Layout, split: Split, batch_size: int):
        self.layout, self.split, self.batch_size = layout, split, batch_size
        self.progress: Callable[[int, int], None] = lambda done, of: None  # called after each individual
        self.model = copy.deepcopy(model).to(split.labels.device).eval()
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)
        parameters = dict(self.model.named_parameters())
        self.masked = [(parameters[layer.name], parameters[layer.name].detach().clone()) for layer in layout]

    def __call__(self, individual: Individual) -> tuple[float, float]:
        return self.many([individual])[0]

    def many(self, individuals: Iterable[Individual]) -> list[tuple[float, float]]:
        """Return the objectives of each, in order; one transfer from the device for all of them."""
        individuals = list(individuals)
        if not individuals:
            return []
        counts_on_device = []
        for i, individual in enumerate(individuals):
            counts_on_device.append(self.correct(individual))
            self.progress(i + 1, len(individuals))
        counts = torch.stack(counts_on_device).tolist()
        return [(count / len(self.split), sparsity(individual, self.layout))
                for count, individual in zip(counts, individuals)]

    def correct(self, individual: Individual) -> Tensor:
        """Count the right answers of the masked model, as a tensor () on the device."""
        for (parameter, dense), mask in zip(self.masked, masks(individual, self.layout, self.split.labels.device)):
            torch.mul(dense, mask, out=parameter.data)
        return correct(self.model, self.split, self.batch_size)


def masks(individual: Individual, layout: Layout, device: torch.device | str = "cpu") -> list[Tensor]:
    """Return a bool mask a layer, of the layer's gene shape; the bits travel packed and are unpacked on the device."""
    return [unpack(bits, layer.genes, device).view(layer.gene_shape) for bits, layer in zip(individual, layout)]


def unpack(bits: np.ndarray, genes: int, device: torch.device | str) -> Tensor:
    if torch.device(device).type == "cpu":
        return torch.from_numpy(np.unpackbits(bits, count=genes).view(np.bool_))
    packed = torch.from_numpy(bits).to(device)
    shifts = torch.arange(7, -1, -1, dtype=torch.uint8, device=device)
    return ((packed[:, None] >> shifts) & 1).view(-1)[:genes].bool()
