"""Masked forward passes: the objectives of individuals, equal in integer counts to copying the model, zeroing its pruned
weights by hand, calling eval() and counting right answers. The user's model is never touched.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable
from functools import cached_property

import torch
from torch import Tensor, nn

from ..engines.worker import ignore
from ..errors import first_line
from ..inputs.nested import mapped
from ..inputs.splits import Split
from ..masks.channels import Channels, find_channels
from ..masks.genome import Arrays, Individual, Measurement, Result, set_bits
from ..masks.layers import aliases
from ..masks.layout import Layout
from ..masks.paths import drop_dead
from ..masks.saliency import gene_scores, logarithm
from ..masks.tensors import masks
from ..objectives import USUAL, Objectives
from ..values.norms import Fitting, norms_of
from ..values.repair import Repairer
from .prepared import PreparedModel

log = logging.getLogger("evoprune")


class Evaluator:
    """Measures individuals on a split: `evaluator(individual)` -> the values of the objectives, `evaluator.many(individuals)`.

    The model is copied and prepared once; each individual's mask is multiplied into the copy's weights. With a floor,
    an individual that can no longer reach it is stopped: its accuracy is then what it had so far, below the floor too.
    With `plain`, nothing is rewritten: integer counts are exactly those of the user's model. With `repair`, each masked
    model is repaired on the `calibration` images before it is measured, and its batch norms are then fitted on those of
    `fitting`. With `worth`, the result also says what the weights that are left are worth, "lamp": their LAMP score, "obs": what
    least squares knows, if it solves every layer, else the same: the logarithm of `saliency`, float16, an array a layer by its
    name, in the order of the kept genes.
    """

    def __init__(self, model: nn.Module, layout: Layout, split: Split, batch_size: int, *, floor: float = 0.0,
                 precision: str = "fp32", cache_mb: int = 0, plain: bool = False, repair: str = "none",
                 calibration: Split | None = None, worth: str | None = None, objectives: Objectives = USUAL,
                 fitting: Fitting | None = None):
        # 13 arguments: what the model, the images and each way to run it need, once a run
        self.model = model
        self.kind, self.calibration, self.worth = repair, calibration, worth
        self.fitting = fitting
        self.asks_repair = False  # what weights are worth
        self.layout, self.split, self.floor, self.objectives = layout, split, floor, objectives
        self.saved = 0  # images that the floor made it unnecessary to look at
        self.graph: torch.cuda.CUDAGraph | None = None
        self.graph_failed = False
        norms = [] if repair == "none" else [f"{name}.weight" for name in norms_of(model)]
        tied = {names[0]: names for names in aliases(model, layout)}
        self.names = [tied.get(layer.name, (layer.name,)) for layer in layout]  # of each layer's weights
        changed = [*(name for names in self.names for name in names), *norms]
        folds = not norms and all(len(layer.shape) > 1 for layer in layout)  # what masks change stays apart
        self.prepare(lambda size: PreparedModel(model, split, size, changed, precision, cache_mb, plain, folds), batch_size)

    def prepare(self, make: Callable[[int], PreparedModel], batch_size: int) -> None:
        """Prepare the model for a batch size, and for half of it when the device runs out of memory."""
        self.make, self.batch_size = make, batch_size
        self.prepared = make(batch_size)
        parameters = dict(self.prepared.model.named_parameters(remove_duplicate=False))
        found = [next(parameters[name] for name in names if name in parameters) for names in self.names]  # one may be unused
        self.masked = [(parameter, parameter.detach().clone()) for parameter in found]
        self.total: Tensor | None = None  # of what the task sums, (k,), always in the same place, for a CUDA graph
        self.repairer = None
        if self.calibration is not None:
            inputs = mapped(self.prepared.ready, self.calibration.inputs(slice(None)))
            self.repairer = Repairer(self.kind, self.prepared.model, self.layout, inputs, self.split.task, found)
            self.asks_repair = self.repairer.asked = self.worth == "obs" and self.repairer.knows_saliency()
            if self.fitting is not None:
                self.repairer.study(self.fitting)

    def __call__(self, individual: Individual) -> Measurement:
        return self.many([individual])[0]

    def many(self, individuals: Iterable[Individual], progress: Callable[[int, int], None] = ignore) -> list[Measurement]:
        """Return the objectives of each, in order; one transfer from the device for all of them. Calls `progress(done, of)`."""
        individuals = list(individuals)
        if not individuals:
            return []
        sums_on_device, scores = [], []
        for i, individual in enumerate(individuals):
            sums_on_device.append(self.sums(individual))
            scores.append(self.kept_saliency(individual) if self.worth else None)
            progress(i + 1, len(individuals))
        sums = torch.stack(sums_on_device).tolist()
        found: list[Measurement] = []
        for each, individual, saliency in zip(sums, individuals, scores):
            values = self.objectives.measured(self.split.task.score(each), individual, self.layout)
            found.append(values if saliency is None else Result(values, saliency=saliency))
        return found

    def kept_saliency(self, individual: Individual) -> Arrays:
        """Return the logarithms of the saliencies that the kept genes have now."""
        return {layer.name: logarithm(score[mask]).half().numpy()
                for layer, score, mask in zip(self.layout, self.saliency(), masks(individual, self.layout))}

    def saliency(self) -> list[Tensor]:
        """Return what each gene is worth as the model is set now, on the CPU, of the gene shapes, 0 where pruned: what least
        squares knows (`Repairer.saliency`) if it was asked for and solves every layer, or else the LAMP score."""
        if self.repairer is not None and self.asks_repair:
            found = self.repairer.saliency()
            return [layer.summed(found[layer.name].view(layer.shape)).cpu() for layer in self.layout]
        return gene_scores("lamp", self.layout, [parameter.detach().float().cpu() for parameter, _ in self.masked])

    def simplify(self, individual: Individual) -> None:
        """Drop the dead paths of a mask: the outputs stay, the saliency of changed layers goes."""
        for i, genes in drop_dead(individual, self.layout, self.channels, self.absorbing).items():
            set_bits(individual, i, genes)
            individual.saliency.pop(self.layout[i].name, None)

    @cached_property
    def absorbing(self) -> set[int]:
        """The places of layers whose repair makes up for constant inputs."""
        names = self.repairer.absorbing() if self.repairer is not None else set()
        return {i for i, layer in enumerate(self.layout) if layer.name in names}

    @cached_property
    def channels(self) -> list[Channels]:
        """What `simplify` needs to know of the model."""
        return find_channels(self.model, self.layout, mapped(Tensor.cpu, self.split.inputs(slice(0, 2))))

    @cached_property
    def weights(self) -> list[Tensor]:
        """The dense weights as masks meet them (batch norm folded where it is), float32 on the CPU."""
        return [dense.float().cpu() for _, dense in self.masked]

    def score(self, individual: Individual) -> float:
        """Return the score of the masked model."""
        return self.split.task.score(self.sums(individual).tolist())

    def sums(self, individual: Individual) -> Tensor:
        """Return what the task sums over all images under the masked model, (k,) on the device; with the usual task right answers
        and images."""
        return self.under(individual, self.summed)

    def example_sums(self, individual: Individual) -> Tensor:
        """Return the same of each image, (n, k) on the CPU."""
        return self.under(individual, lambda: torch.cat([self.of(i).cpu() for i in range(len(self.prepared.batches))]))

    def under(self, individual: Individual, function: Callable[[], Tensor]) -> Tensor:
        """Return what `function` gives with the masked weights set, in smaller batches where memory is short."""
        while True:
            try:
                self.set_masks(individual)
                if self.repairer is not None:
                    self.repairer.fit_norms()
                with torch.inference_mode():
                    return function()
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

    def summed(self) -> Tensor:
        """Return the sums under the weights as they are now."""
        if self.total is None:
            self.total = torch.zeros_like(self.of(0).sum(0))
        if self.total.is_cuda and not self.floor:
            if self.graph is None:
                self.capture()
            if self.graph is not None:
                self.graph.replay()
                return self.total.clone()
        needed = math.ceil(self.floor * len(self.split) - 1e-9) if self.split.task.single else 0
        self.total.zero_()
        for i, start in enumerate(self.prepared.batches):
            self.total += self.of(i).sum(0)
            left = max(0, len(self.split) - start - self.batch_size)
            if needed and left and int(self.total[0]) + left < needed:
                self.saved += left
                self.total[1] += left
                break
        return self.total.clone()

    def of(self, i: int) -> Tensor:
        """Return what the task makes of each image of batch `i`, (batch, k)."""
        start = self.prepared.batches[i]
        return self.split.task.sums(self.prepared.logits(i), self.split.labels[start:start + self.batch_size])

    def capture(self) -> None:
        """Record one evaluation as a CUDA graph, so that small models are not held up by kernel launches."""
        if self.graph_failed:
            return
        assert self.total is not None
        try:
            stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # torch has not typed it
            stream.wait_stream(torch.cuda.current_stream())
            with torch.inference_mode(), torch.cuda.stream(stream):
                for i in range(len(self.prepared.batches)):  # fills the cache, warms up
                    self.of(i)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.inference_mode(), torch.cuda.graph(graph):
                self.total.zero_()
                for i in range(len(self.prepared.batches)):
                    self.total += self.of(i).sum(0)
            self.graph = graph
        except torch.cuda.OutOfMemoryError:
            raise
        except RuntimeError as error:
            self.graph_failed = True
            log.info("evaluating without a CUDA graph: %s", first_line(error))
