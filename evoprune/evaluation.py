"""Masked forward passes: the objectives of individuals, equal in integer counts to copying the model, zeroing its pruned
weights by hand, calling eval() and counting right answers. The user's model is never touched.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Iterable
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .config import EvopruneError, first_line
from .genome import Individual, Inherited, Result, set_bits, sparsity
from .layers import Layout
from .models import logits_of
from .paths import Channels, drop_dead, find_channels
from .prepared import Prepared
from .repair import Repairer, norms_of
from .saliency import SALIENCIES, logarithm
from .splits import Split, as_split

ACTIVATION_BYTES = {"cpu": 16 << 20, "cuda": 256 << 20}  # largest activation of a batch; page faults slow a CPU far beyond
Measurement = tuple[float, float] | Result
log = logging.getLogger("evoprune")
LARGEST_BATCH = {"cpu": 256, "cuda": 8192}


def correct(model: nn.Module, split: Split, batch_size: int) -> Tensor:
    """Count right answers, as a tensor () on the device; a non-finite logit is a wrong answer. Call under eval()."""
    count = torch.zeros((), dtype=torch.int64, device=split.labels.device)
    with torch.inference_mode():
        for i in range(0, len(split), batch_size):
            count += right_answers(model(split.inputs(slice(i, i + batch_size))), split.labels[i:i + batch_size])
    return count


def right_answers(output: Any, labels: Tensor) -> Tensor:
    """Count right answers in what a model returned, as a tensor (); a non-finite logit is a wrong answer."""
    logits = logits_of(output)  # (batch, classes)
    return ((logits.argmax(1) == labels) & torch.isfinite(logits).all(1)).sum()


def accuracy(model: nn.Module, data: Any, batch_size: int | None = None) -> float:
    """Return the share of right answers of `model` on a split, (images, labels) or a Dataset, as a run measures it.

    Runs on the model's own device; its training flags are put back. The batch size is a run's own unless given.
    """
    parameter = next(model.parameters(), torch.empty(0))
    split = as_split(data, "data").to(parameter.device, dtype_of(model))
    batch_size = batch_size or batch_size_for(probe(model, split, 0)[1], parameter.device)
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        return int(correct(model, split, batch_size)) / len(split)
    finally:
        for module, mode in modes.items():
            module.training = mode


def private_copy(model: nn.Module) -> nn.Module:
    """Return a copy of the user's model on the CPU; raise `EvopruneError` where Python cannot copy it."""
    try:
        return copy.deepcopy(model).cpu()
    except Exception as error:  # noqa: BLE001  # the user's model
        raise EvopruneError(f"model: {type(model).__name__} cannot be copied: {first_line(error)}; remove hooks and "
                            f"reparametrisations first (torch.nn.utils.prune.remove, remove_weight_norm)") from None


def dtype_of(model: nn.Module) -> torch.dtype:
    """Return the type of the model's first floating parameter."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def probe(model: nn.Module, split: Split, classes: int) -> tuple[int, int]:
    """Run two images through a copy of `model`; return (outputs, bytes of the largest activation of one image).

    Raises:
        EvopruneError: the model does not take these images, or has fewer outputs than there are classes.
    """
    model = private_copy(model).to(split.labels.device).eval()
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
    except EvopruneError:
        raise
    except Exception as error:  # noqa: BLE001  # the user's model
        raise EvopruneError(f"data: images of shape {shape} do not go through the model: {first_line(error)}") from None
    if logits.dim() != 2 or len(logits) != len(batch):
        raise EvopruneError(f"model: returned logits of shape {tuple(logits.shape)} for {len(batch)} images, "
                            f"expected ({len(batch)}, classes)")
    if classes > logits.shape[1]:
        raise EvopruneError(f"data: found label {classes - 1}, expected 0 to {logits.shape[1] - 1}: the model has "
                            f"{logits.shape[1]} outputs")
    return logits.shape[1], max(sizes)


def batch_size_for(activation_bytes: int, device: torch.device) -> int:
    """Return the power of two whose largest activation is nearest to `ACTIVATION_BYTES`: the same on every machine."""
    fits = max(1.0, ACTIVATION_BYTES[device.type] / activation_bytes)
    return min(LARGEST_BATCH[device.type], 1 << round(math.log2(fits)))


class Evaluator:
    """Measures individuals on a split: `evaluator(individual)` -> (accuracy, sparsity), `evaluator.many(individuals)`.

    The model is copied and prepared once; each individual's mask is multiplied into the copy's weights. With a floor,
    an individual that can no longer reach it is stopped: its accuracy is then what it had so far, below the floor too.
    With `plain`, nothing is rewritten: integer counts are exactly those of the user's model. With `repair`, each masked
    model is repaired on the `calibration` images before it is measured. With least squares and as far as `knowledge` allows, the
    result says what the weights that are left are worth: the logarithm of `saliency`, float16, an array a layer by its name, in
    the order of the kept genes.
    """

    def __init__(self, model: nn.Module, layout: Layout, split: Split, batch_size: int, *, floor: float = 0.0,
                 precision: str = "fp32", cache_mb: int = 0, plain: bool = False, repair: str = "none",
                 calibration: Split | None = None, knowledge: str = "none"):
        self.model = model
        self.kind, self.calibration, self.knowledge = repair, calibration, knowledge
        self.inherits = knowledge != "none" and repair == "least-squares"
        self.asks_repair = False  # what weights are worth
        self.layout, self.split, self.floor = layout, split, floor
        self.progress: Callable[[int, int], None] = lambda done, of: None  # called after each individual
        self.saved = 0  # images that the floor made it unnecessary to look at
        self.graph: torch.cuda.CUDAGraph | None = None
        self.graph_failed = False
        norms = [] if repair == "none" else [f"{name}.weight" for name in norms_of(model)]
        changed = [*(layer.name for layer in layout), *norms]
        self.prepare(lambda size: Prepared(model, split, size, changed, precision, cache_mb, plain, not norms), batch_size)

    def prepare(self, make: Callable[[int], Prepared], batch_size: int) -> None:
        """Prepare the model for a batch size, and for half of it when the device runs out of memory."""
        self.make, self.batch_size = make, batch_size
        self.prepared = make(batch_size)
        parameters = dict(self.prepared.model.named_parameters())
        self.masked = [(parameters[layer.name], parameters[layer.name].detach().clone()) for layer in self.layout]
        self.count = torch.zeros((), dtype=torch.int64, device=self.split.labels.device)
        self.repairer = None
        if self.calibration is not None:
            inputs = self.prepared.ready(self.calibration.inputs(slice(None)))
            self.repairer = Repairer(self.kind, self.prepared.model, self.layout, inputs)
            self.asks_repair = self.knowledge == "data" and self.kind == "least-squares" and self.repairer.knows_saliency()

    def __call__(self, individual: Individual) -> Measurement:
        return self.many([individual])[0]

    def many(self, individuals: Iterable[Individual]) -> list[Measurement]:
        """Return the objectives of each, in order; one transfer from the device for all of them."""
        individuals = list(individuals)
        if not individuals:
            return []
        counts_on_device, inherited = [], []
        for i, individual in enumerate(individuals):
            counts_on_device.append(self.correct(individual))
            inherited.append(self.worth(individual) if self.inherits else None)
            self.progress(i + 1, len(individuals))
        counts = torch.stack(counts_on_device).tolist()
        found: list[Measurement] = []
        for count, individual, values in zip(counts, individuals, inherited):
            objectives = count / len(self.split), sparsity(individual, self.layout)
            found.append(objectives if values is None else Result(objectives, None, values))
        return found

    def worth(self, individual: Individual) -> Inherited:
        """Return the logarithms of the saliencies that the kept genes have now."""
        return {layer.name: logarithm(score[mask]).half().numpy()
                for layer, score, mask in zip(self.layout, self.saliency(), masks(individual, self.layout))}

    def saliency(self) -> list[Tensor]:
        """Return what each weight is worth as the model is set now, on the CPU, shaped like the layers, 0 where pruned: what
        least squares knows (`Repairer.saliency`) if it solves every layer and `knowledge` allows, or else the LAMP score."""
        if self.repairer is not None and self.asks_repair:
            found = self.repairer.saliency()
            return [found[layer.name].view(layer.shape).cpu() for layer in self.layout]
        return SALIENCIES["lamp"]([parameter.detach().float().cpu() for parameter, _ in self.masked], None)

    def simplify(self, individual: Individual) -> None:
        """Drop the dead paths of a mask: the outputs stay, what they inherited in changed layers goes."""
        for i, genes in drop_dead(individual, self.layout, self.channels, self.absorbing).items():
            set_bits(individual, i, genes)
            individual.inherited.pop(self.layout[i].name, None)

    @cached_property
    def absorbing(self) -> set[int]:
        """The places of layers whose repair makes up for constant inputs."""
        names = self.repairer.absorbing() if self.repairer is not None else set()
        return {i for i, layer in enumerate(self.layout) if layer.name in names}

    @cached_property
    def channels(self) -> list[Channels]:
        """What `simplify` needs to know of the model."""
        return find_channels(self.model, self.layout, self.split.inputs(slice(0, 2)).cpu())

    @cached_property
    def weights(self) -> list[Tensor]:
        """The dense weights as masks meet them (batch norm folded where it is), float32 on the CPU, flat."""
        return [dense.float().cpu().flatten() for _, dense in self.masked]

    def correct(self, individual: Individual) -> Tensor:
        """Count the right answers of the masked model, as a tensor () on the device."""
        while True:
            try:
                self.set_masks(individual)
                return self.count_right()
            except torch.cuda.OutOfMemoryError:
                if self.batch_size == 1:
                    raise
                self.graph = None
                self.prepare(self.make, self.batch_size // 2)
                torch.cuda.empty_cache()
                log.warning("the device is out of memory: going on with batches of %d", self.batch_size)

    def set_masks(self, individual: Individual) -> None:
        """Set the masked weights, and repair what is left."""
        kept = masks(individual, self.layout, self.split.labels.device)
        for (parameter, dense), mask in zip(self.masked, kept):
            torch.mul(dense, mask, out=parameter.data)
        if self.repairer is not None:
            self.repairer({layer.name: mask for layer, mask in zip(self.layout, kept)})

    def count_right(self) -> Tensor:
        """Count right answers under the weights as they are now."""
        if self.count.is_cuda and not self.floor:
            if self.graph is None:
                self.capture()
            if self.graph is not None:
                self.graph.replay()
                return self.count.clone()
        needed = math.ceil(self.floor * len(self.split) - 1e-9)
        self.count.zero_()
        with torch.inference_mode():
            for i, start in enumerate(self.prepared.batches):
                self.count += self.right(i)
                left = max(0, len(self.split) - start - self.batch_size)
                if needed and left and int(self.count) + left < needed:
                    self.saved += left
                    break
        return self.count.clone()

    def right(self, i: int) -> Tensor:
        """Count the right answers of batch `i`; a non-finite logit is a wrong answer."""
        start = self.prepared.batches[i]
        return right_answers(self.prepared.logits(i), self.split.labels[start:start + self.batch_size])

    def capture(self) -> None:
        """Record one evaluation as a CUDA graph, so that small models are not held up by kernel launches."""
        if self.graph_failed:
            return
        try:
            stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # torch has not typed it
            stream.wait_stream(torch.cuda.current_stream())
            with torch.inference_mode(), torch.cuda.stream(stream):
                for i in range(len(self.prepared.batches)):  # fills the cache, warms up
                    self.right(i)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.inference_mode(), torch.cuda.graph(graph):
                self.count.zero_()
                for i in range(len(self.prepared.batches)):
                    self.count += self.right(i)
            self.graph = graph
        except torch.cuda.OutOfMemoryError:
            raise
        except RuntimeError as error:
            self.graph_failed = True
            log.info("evaluating without a CUDA graph: %s", first_line(error))


def masks(individual: Individual, layout: Layout, device: torch.device | str = "cpu") -> list[Tensor]:
    """Return a bool mask a layer, of the layer's gene shape; the bits travel packed and are unpacked on the device."""
    return [unpack(bits, layer.genes, device).view(layer.gene_shape) for bits, layer in zip(individual, layout)]


def unpack(bits: np.ndarray, genes: int, device: torch.device | str) -> Tensor:
    if torch.device(device).type == "cpu":
        return torch.from_numpy(np.unpackbits(bits, count=genes).view(np.bool_))
    packed = torch.from_numpy(bits).to(device)
    shifts = torch.arange(7, -1, -1, dtype=torch.uint8, device=device)
    return ((packed[:, None] >> shifts) & 1).view(-1)[:genes].bool()
