"""What a model of the user's scores, and how many images to take at a time."""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import EvopruneError, first_line, shown
from ..inputs.models import logits_of, private_copy
from ..inputs.nested import applied, leaves, mapped, shapes
from ..inputs.splits import Split, as_split, score
from ..inputs.tasks import check_task, guessed, task_of

ACTIVATION_BYTES = {"cpu": 16 << 20, "cuda": 256 << 20}  # largest activation of a batch; page faults slow a CPU far beyond
LARGEST_BATCH = {"cpu": 256, "cuda": 8192}
log = logging.getLogger("evoprune")


def accuracy(model: nn.Module, data: Any, batch_size: int | None = None, task: str | None = None) -> float:
    """Return what `model` scores on a split, (inputs, targets), a Dataset or a DataLoader, as a run measures it: the share of
    right answers, or the metric of another task, which is guessed from the targets unless named.

    Runs on the model's own device; its training flags are put back. The batch size is a run's own unless given.

    Raises:
        EvopruneError: no model, no such data, targets that the outputs do not fit, or a batch size that cannot be.
    """
    if not isinstance(model, nn.Module):
        raise EvopruneError(f"model: found {shown(model)}, expected an nn.Module")
    if batch_size is not None and (type(batch_size) is not int or batch_size < 1):
        raise EvopruneError(f"batch_size: found {shown(batch_size)}, expected a whole number of at least 1")
    parameter = next(model.parameters(), torch.empty(0))
    split = as_split(data, "data").to(parameter.device, dtype_of(model))
    outputs, activation = probe(model, split)
    split = replace(split, task=task_of(task) if task else guessed(outputs, split.labels))
    check_task(split.task, outputs, split.labels, "data")
    batch_size = batch_size or batch_size_for(activation, parameter.device)
    modes = {module: module.training for module in model.modules()}
    try:
        return score(model.eval(), split, batch_size)
    except (EvopruneError, KeyboardInterrupt):
        raise
    except BaseException as error:  # noqa: BLE001  # the user's model
        raise EvopruneError(f"data: some images do not go through the model: {first_line(error)}") from None
    finally:
        for module, mode in modes.items():
            module.training = mode


def dtype_of(model: nn.Module) -> torch.dtype:
    """Return the type of the model's first floating parameter."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def probe(model: nn.Module, split: Split) -> tuple[Tensor, int]:
    """Run two images through a copy of `model`; return (what it says of them, bytes of the largest activation of one image).

    Raises:
        EvopruneError: the model does not take these images, writes over them, or returns no tensor with a row for each.
    """
    model = private_copy(model).to(split.labels.device)
    sizes = [leaf.nbytes for leaf in leaves(split.inputs(slice(0, 1)))]

    def note(module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            sizes.append(output.nbytes // count)

    for module in model.modules():
        module.register_forward_hook(note)
    batch, count = mapped(Tensor.clone, split.inputs(slice(0, 2))), min(2, len(split))
    before = leaves(mapped(Tensor.clone, batch))
    try:
        with torch.inference_mode():
            outputs = logits_of(applied(model.eval(), batch))
            again = logits_of(applied(model, mapped(Tensor.clone, split.inputs(slice(0, 2)))))
    except (EvopruneError, KeyboardInterrupt):
        raise
    except BaseException as error:  # noqa: BLE001  # the user's model
        raise EvopruneError(f"data: images of shape {shapes(batch)} do not go through the model: {first_line(error)}") from None
    if not outputs.dim() or len(outputs) != count:
        raise EvopruneError(f"model: returned logits of shape {tuple(outputs.shape)} for {count} images, "
                            f"expected ({count}, classes)")
    if not all(a.shape == b.shape and ((a == b) | (a != a)).all() for a, b in zip(before, leaves(batch))):
        raise EvopruneError("model: writes over its inputs, which are read more than once; expected that it makes new tensors: "
                            "x = x - mean, say, not x -= mean")
    if again.shape != outputs.shape or not torch.allclose(again, outputs, rtol=1e-3, atol=1e-3, equal_nan=True):
        log.warning("model: returns other outputs for the same inputs each time, in eval mode (dropout or noise that stays on?): "
                    "what is measured of it differs from call to call, and runs do not repeat")
    return outputs, max(sizes)


def batch_size_for(activation_bytes: int, device: torch.device) -> int:
    """Return the power of two whose largest activation is nearest to `ACTIVATION_BYTES`: the same on every machine."""
    fits = max(1.0, ACTIVATION_BYTES[device.type] / activation_bytes)
    return min(LARGEST_BATCH[device.type], 1 << round(math.log2(fits)))
