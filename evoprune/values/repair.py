"""Makes a masked model as good as it can be without training and without labels: batch-norm statistics, least squares.

One forward pass of all calibration images through the masked model: hooks see what enters a layer from the prefix already
repaired, give the layer new values, and its own forward goes on with them. For the kept inputs S of an output row

    w_S = (C_SS + d I)^-1 (K_S + d w0_S),   bias = mean(Z) - w mean(X)

with X what enters the layer, Z the *dense* model's output of it (so that errors of the prefix are made good), C = cov(X),
K = cov(X, Z), w0 the dense weights and d = 0.01 tr(C) / p. Means and covariances weigh each image, at each place, by how much
the dense model's logits would feel an error of that output there (root mean square), plus a little that is the same for all:
where an activation is saturated, or does not matter, nothing need be right. A last linear layer is then fitted to the
dense model's probabilities. Errors weigh alike where a mask keeps so much that weighing them would take long, gradients do not go
through the model, or images do not come first. Batch norms take the statistics of the same pass, and are then as far from them as
the dense model's are from its own of these images: those were of others, mostly augmented, and stay where nothing is pruned.
`Repairer.fit_norms` then fits scales and shifts of all norms to what the dense model says of more images.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from typing import Any
from weakref import ReferenceType, ref

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from ..inputs.models import logits_of, off_by
from ..inputs.nested import Inputs, applied, leaves, taken
from ..inputs.tasks import CLASSIFICATION, Task
from ..masks.channels import NORMS
from ..masks.layout import Layout
from .attention import Plain, plain_attention
from .least_squares import MOST_KEPT, STEPS, Errors, Solved, fitted, moments, rows_of, solve_rows, solve_weighed
from .norms import Fitting, Normed, fit_norms, norms_of, scales_and_shifts
from .sensitivity import batch_for, saliency_of, weigh_errors

IMAGES = 768  # that a mask is repaired on in the search
PATH_IMAGES = 2048  # and on the multi-shot path of the first masks
LAST_IMAGES = 4096  # and the points of the front at the end
BATCHES = 32  # usual batches that the calibration images may fill at most: they go through the model in one pass
LEAST = 1e-5  # of that of the dense model's: where nothing but rounding noise comes in, weights must not follow it
MOST_WORK = 2e12  # operations that one layer's conjugate gradients may take: wider ones are left as they are
MOST_FITTED = 4e13  # operations that fitting norms may take, about what repairing a ResNet-18 on 4,096 images does
WEIGHING_LIMIT = 8.0  # times the work of plain covariances that weighed ones may take; masks too dense for that hardly gain
log = logging.getLogger("evoprune")


class Repairer:
    """Repairs `model` in place, on calibration images: `repairer(masks)`, once the masked weights are set.

    `model` holds dense values now and is in eval mode; names are those of its parameters, batches come from `inputs`. `masked`
    are the parameters of the layout where one may be there by another name alone.
    """

    def __init__(self, kind: str, model: nn.Module, layout: Layout, inputs: Inputs, task: Task = CLASSIFICATION,
                 masked: Sequence[nn.Parameter] | None = None):
        # 6 arguments: a model, what masks change in it, and what it is for
        self.masked = masked or [model.get_parameter(layer.name) for layer in layout]
        self.model, self.inputs, self.layout, self.task = model, inputs, layout, task
        self.searched = {layer.name for layer in layout}
        self.norms = list(norms_of(model).values())
        self.dense_norms: dict[nn.Module, Normed] = {}
        self.attention = self.plain() if kind == "least-squares" else {}
        self.layers = self.solvable(layout) if kind == "least-squares" else {}
        self.first: nn.Module | None = None
        self.classifier: Solved | None = None  # a linear layer that makes the logits
        self.fitting: tuple[Fitting, Tensor] | None = None  # what norms are fitted on, and what the dense model says of it
        self.free: dict[nn.Parameter, Tensor] = {}  # scales and shifts to fit, and what the dense model has
        self.asked = True  # whether `saliency` will be
        self.study_dense()
        self.written = {value: value.clone() for value in self.what_is_written()}
        with plain_attention(self.attention):
            self.differentiable = bool(self.layers) and weigh_errors(self.model, self.layers, self.inputs, self.task,
                                                                     self.classifier)

    def plain(self) -> dict[nn.MultiheadAttention, Plain]:
        """Return the plain steps of all attention, none where they do not give what the model does."""
        found = {module: Plain(module) for module in self.model.modules() if isinstance(module, nn.MultiheadAttention)}
        if found:
            few = taken(self.inputs, slice(0, 2))
            with torch.no_grad():
                expected = logits_of(applied(self.model, few))
                with plain_attention(found):
                    off = (logits_of(applied(self.model, few)) - expected).abs().max()
                return found if off <= 1e-3 * expected.abs().max() else {}
        return found

    def solvable(self, layout: Layout) -> dict[nn.Module, Solved]:
        """Return the Linear and ungrouped Conv2d layers, and projections of attention, whose weights have that one owner, but
        for those too wide."""
        owners: dict[int, int] = {}
        for module in self.model.modules():
            for parameter in module.parameters(recurse=False):
                owners[id(parameter)] = owners.get(id(parameter), 0) + 1
        found: dict[nn.Module, Solved] = {}
        modules = dict(self.model.named_modules())
        for layer in layout:
            owner, _, name = layer.name.rpartition(".")
            if owner not in modules:  # tied, and called by another name alone
                continue
            module = modules[owner]
            if isinstance(module, nn.MultiheadAttention):
                module = self.attention[module].inputs[name] if module in self.attention else module
            plain = isinstance(module, nn.Linear) or (
                isinstance(module, nn.Conv2d) and module.groups == 1 and not isinstance(module.padding, str)
                and module.padding_mode == "zeros")
            if plain and name.endswith("weight") and owners[id(module.weight)] == 1:
                assert isinstance(module, (nn.Linear, nn.Conv2d))
                dense = module.weight.detach().reshape(layer.shape[0], -1).float().clone()
                if 2 * STEPS * dense.numel() * dense.shape[1] <= MOST_WORK:
                    found[module] = Solved(layer.name, module, dense, layer.by_output)
        return found

    def owners(self) -> list[nn.Module]:
        """Return the modules that have parameters which masks change."""
        ids = set(map(id, self.masked))
        return [module for module in self.model.modules() if ids.intersection(map(id, module.parameters(recurse=False)))]

    def study_dense(self) -> None:
        """Run the dense model once: keep the outputs of the layers to solve; leave out what cannot be."""
        called: dict[nn.Module, int] = {}
        outputs: dict[int, tuple[ReferenceType[Tensor], Solved]] = {}  # by id: no two that are there have the same
        images = len(leaves(self.inputs)[0])
        most = MOST_KEPT // max(1, sum(len(solved.dense) for solved in self.layers.values()))

        def maker(tensor: Tensor) -> Solved | None:
            made, solved = outputs.get(id(tensor), (None, None))
            return solved if made is not None and made() is tensor else None

        def before(module: nn.Module, args: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
            called[module] = called.get(module, 0) + 1
            if isinstance(module, NORMS) and (solved := maker(entering(args, named))) is not None:
                normed[module] = solved
            if module in self.layers:
                self.layers[module].least = LEAST * float(entering(args, named).float().var())

        def after(module: nn.Module, args: tuple[Tensor, ...], named: dict[str, Tensor], output: Tensor) -> None:
            solved = self.layers[module]
            rows = len(output) if isinstance(module, nn.Conv2d) else output.shape[:-1].numel()
            if rows % images or not is_plain(module, entering(args, named), output):
                odd.add(module)
                return
            outputs[id(output)] = ref(output), solved
            solved.keep(output.detach(), images, most)

        odd: set[nn.Module] = set()
        normed: dict[nn.Module, Solved] = {}
        masked = self.owners()
        hooks = [module.register_forward_pre_hook(before, with_kwargs=True) for module in {*self.norms, *self.layers, *masked}]
        hooks += [norm.register_forward_pre_hook(self.keep_statistics, with_kwargs=True) for norm in self.norms]
        hooks += [module.register_forward_hook(after, with_kwargs=True) for module in self.layers]
        logits = logits_of(self.forward(hooks))
        last = maker(logits)
        if last is not None and called[last.module] == 1 and self.classifies(last, logits):
            self.classifier = last
        self.leave_out(called, masked, odd)
        for norm in set(normed).intersection(self.norms):
            normed[norm].centred = normed[norm].normed = True

    def classifies(self, last: Solved, logits: Tensor) -> bool:
        """Say whether a layer makes the logits of classes, and nothing has written over what it made."""
        return self.task.link == "softmax" and logits.dim() == 2 and isinstance(last.module, nn.Linear) and torch.equal(
            logits.float(), last.targets)

    def leave_out(self, called: Mapping[nn.Module, int], masked: Sequence[nn.Module], odd: Collection[nn.Module]) -> None:
        """Leave out norms before all masks, and what is not called exactly once, or is odd; `called` in order."""
        self.first = next((module for module in called if module in masked), None)
        behind = list(called)[list(called).index(self.first) + 1:] if self.first is not None else []
        self.norms = [m for m in self.norms if called.get(m) == 1 and m in behind]
        self.layers = {m: solved for m, solved in self.layers.items() if called.get(m) == 1 and m not in odd}

    def left(self) -> list[str]:
        """Return the names of the layers that are left as they are."""
        solved = {each.name for each in self.layers.values()}
        return [layer.name for layer in self.layout if layer.name not in solved]

    def absorbing(self) -> set[str]:
        """Return the names of the layers whose new bias makes up for inputs that are the same for all images."""
        return {layer.name for layer in self.layers.values() if layer.module.bias is not None and layer.bias not in self.searched
                and (isinstance(layer.module, nn.Linear) or not any(layer.module.padding))}

    def what_is_written(self) -> list[Tensor]:
        """Return what a repair writes beside masked weights: that of a layer which this mask's images do not reach is the dense
        model's, not that of the mask before."""
        biases = [layer.module.bias for layer in self.layers.values() if layer.bias not in self.searched]
        statistics = [value for norm in self.norms for value in (norm.running_mean, norm.running_var)]
        return [value.detach() for value in (*biases, *statistics) if isinstance(value, Tensor)]

    def __call__(self, masks: Mapping[str, Tensor]) -> None:
        """Repair the model, whose masked weights are set; `masks` are bool, by name, shaped like the weights."""
        def solve(module: nn.Module, args: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
            layer = self.layers[module]
            if layer.takes(inputs := entering(args, named)):
                self.solve(layer, inputs, masks[layer.name], masks.get(layer.bias))

        for value, dense in (*self.free.items(), *self.written.items()):
            value.data.copy_(dense)
        hooks = [module.register_forward_pre_hook(solve, with_kwargs=True) for module in self.layers]
        hooks += [module.register_forward_pre_hook(self.take_statistics, with_kwargs=True) for module in self.norms]
        self.forward(hooks)

    def keep_statistics(self, norm: nn.Module, args: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
        """Keep what a batch norm of the dense model has, and what enters it."""
        self.dense_norms[norm] = Normed.of(norm, entering(args, named))

    def take_statistics(self, norm: nn.Module, args: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
        """Give a batch norm what belongs to what enters it."""
        self.dense_norms[norm].take(norm, entering(args, named))

    def study(self, fitting: Fitting) -> None:
        """Keep what the model, still dense, says of images for `fit_norms`, where it has norms to fit that no mask changes."""
        masked = set(map(id, self.masked))
        free = [p for p in scales_and_shifts(self.model) if id(p) not in masked]
        if self.differentiable and free:
            a_look = 6 * sum(layer.size * layer.dense.shape[1] for layer in self.layers.values())  # operations, back too
            fitting = fitting.within(int(MOST_FITTED / a_look))
            self.fitting = fitting, fitting.said(self.model, batch_for(self.layers))
            self.free = {p: p.detach().clone() for p in free}

    def fit_norms(self) -> None:
        """Fit scales and shifts of norms, once the model is repaired by least squares; nothing without `study`."""
        if self.fitting is not None:
            fit_norms(self.model, list(self.free), *self.fitting, batch_for(self.layers))

    def forward(self, hooks: Sequence[RemovableHandle]) -> Any:
        """Run all calibration images through the model once, then take the hooks away; return what the model returned."""
        try:
            with torch.no_grad(), plain_attention(self.attention):
                return applied(self.model, self.inputs)
        finally:
            for hook in hooks:
                hook.remove()

    def solve(self, layer: Solved, inputs: Tensor, mask: Tensor, bias_mask: Tensor | None) -> None:
        """Give one layer its new values, for what enters it now; `bias_mask` where its bias is searched too."""
        mask = mask.expand(layer.module.weight.shape).reshape(layer.dense.shape)
        if layer.shares is not None and float(mask.sum(1).double().square().sum()) <= WEIGHING_LIMIT * mask.shape[1] ** 2:
            weights, bias, errors = self.weighed(layer, inputs, mask)
        else:
            found = layer.moments or moments(rows_of(layer.module, inputs, layer.positions).float(), layer.targets, layer.centred)
            if layer.module is self.first:
                layer.moments = found
            covariance, cross, mean, target_mean = found
            weights, errors = solve_rows(covariance, cross, layer.dense, mask, layer.least, layer.by_row, self.asked)
            bias = target_mean - weights @ mean
        if layer is self.classifier:
            with torch.inference_mode(False):  # the model's own forward may have set it; nothing of it goes into the fit
                weights, fit = fitted(inputs.float().clone(), layer.targets.softmax(1).clone(), weights.clone(),
                                      None if layer.module.bias is None else bias.clone(), mask.clone())
                bias = bias if fit is None else fit
        if errors is not None:
            layer.errors = errors(weights)
        layer.module.weight.data.copy_(weights.view(layer.module.weight.shape))
        if layer.module.bias is not None:
            layer.module.bias.data.copy_(bias if bias_mask is None else bias * bias_mask.expand(bias.shape))

    def weighed(self, layer: Solved, inputs: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Errors | None]:
        """Return the weights (out, p), the bias (out,) and, if asked, what removing weights costs, with errors weighed."""
        assert layer.shares is not None
        rows, targets = rows_of(layer.module, inputs, layer.positions).float(), layer.targets  # (rows, p), (rows, out)
        mean, target_mean = rows.mean(0), targets.mean(0)
        if layer.centred:
            rows, targets = rows - mean, targets - target_mean
        weights, errors, shift = solve_weighed(rows, targets, layer.shares, layer.dense, mask, layer.least,
                                               layer.module.bias is not None and not layer.normed, layer.by_row, self.asked)
        return weights, target_mean + shift - weights @ mean, errors

    def knows_saliency(self) -> bool:
        """Whether `saliency` can tell of every layer."""
        return self.differentiable and not self.left()

    def saliency(self) -> dict[str, Tensor]:
        """Return what each weight is worth under the newest mask, see `sensitivity.saliency_of`."""
        with plain_attention(self.attention):
            return saliency_of(self.model, self.layers, self.inputs, self.task)


def entering(args: tuple[Tensor, ...], named: dict[str, Tensor]) -> Tensor:
    """Return what enters a module of one input, by place or by name."""
    return args[0] if args else next(iter(named.values()))


def is_plain(module: nn.Module, inputs: Tensor, output: Tensor) -> bool:
    """Say whether a layer computes what its kind does in torch: one derived from it may pad first, or scale its weights."""
    if type(module) in (nn.Linear, nn.Conv2d):
        return True
    few = inputs[:2]
    found = F.conv2d(few, module.weight, module.bias, module.stride, module.padding, module.dilation) if isinstance(
        module, nn.Conv2d) else F.linear(few, module.weight, module.bias)  # type: ignore[arg-type]  # a layer to solve
    return found.shape == output[:2].shape and off_by(output[:2], found) < 1e-4
