"""The built-in architectures, by name: each takes the number of outputs and of input channels; copies and logits of any model."""

from __future__ import annotations

import copy
import math
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, jit, nn

from ..errors import EvopruneError, first_line


class LeNet(nn.Module):
    """A small LeNet for 8x8 scans, 11,208 weights in four layers."""

    def __init__(self, outputs: int = 10, channels: int = 1):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 32, 3, padding=1)
        self.fc1 = nn.Linear(32 * 2 * 2, 64)
        self.fc2 = nn.Linear(64, outputs)
        self.pool = nn.AvgPool2d(2)

    def forward(self, x):  # type: ignore[no-untyped-def]  # (batch, channels, 8, 8) -> (batch, outputs)
        x = self.pool(self.conv1(x).relu())
        x = self.pool(self.conv2(x).relu())
        return self.fc2(self.fc1(x.flatten(1)).relu())


class LeNet5(nn.Module):
    """LeNet-5 for 28x28 images, 61,470 weights in five layers (LeCun et al., 1998, doi:10.1109/5.726791)."""

    def __init__(self, outputs: int = 10, channels: int = 1):
        super().__init__()
        self.feature = nn.Sequential(
            nn.Conv2d(channels, 6, 5, padding=2), nn.Tanh(), nn.AvgPool2d(2),
            nn.Conv2d(6, 16, 5), nn.Tanh(), nn.AvgPool2d(2))
        self.classifier = nn.Sequential(
            nn.Flatten(), nn.Linear(16 * 5 * 5, 120), nn.Tanh(), nn.Linear(120, 84), nn.Tanh(), nn.Linear(84, outputs))

    def forward(self, x):  # type: ignore[no-untyped-def]  # (batch, channels, 28, 28) -> (batch, outputs)
        return self.classifier(self.feature(x))


def resnet18(outputs: int = 10, channels: int = 3) -> nn.Module:
    """ResNet-18 as used on CIFAR: a 3x3 stem of stride 1 and no first pooling (He et al., 2016, arXiv:1512.03385)."""
    from torchvision.models import resnet18

    model: nn.Module = resnet18(num_classes=outputs)
    model.conv1 = nn.Conv2d(channels, 64, 3, padding=1, bias=False)
    model.maxpool = nn.Identity()
    return model


MODELS: dict[str, Callable[[int, int], nn.Module]] = {"lenet": LeNet, "lenet5": LeNet5, "resnet18": resnet18}


def copied(model: nn.Module) -> nn.Module:
    """Return a copy of a model. What hooks computed from parameters, as `torch.nn.utils.weight_norm` does, Python could not copy:
    the copy has its values, until its own hooks compute them again."""
    computed = [value for module in model.modules() for value in vars(module).values()
                if isinstance(value, Tensor) and not value.is_leaf]
    return copy.deepcopy(model, {id(value): value.detach().clone() for value in computed})


def private_copy(model: nn.Module) -> nn.Module:
    """Return a copy of the user's model on the CPU; raise `EvopruneError` where it cannot be copied or is no module of Python."""
    model = getattr(model, "_orig_mod", model)  # of torch.compile, whose own module torch cannot look into
    if isinstance(model, jit.ScriptModule):
        raise EvopruneError(f"model: found {type(model).__name__} of TorchScript, expected the module that it was made of")
    if lacks := [name for name, parameter in model.named_parameters() if parameter.is_meta]:
        raise EvopruneError(f"model: {lacks[0]} has no values yet, expected a model that has been run or loaded once")
    try:
        with warnings.catch_warnings(action="ignore"):  # of tensors that are odd to copy
            return copied(model).cpu()
    except Exception as error:  # noqa: BLE001  # the user's model
        raise EvopruneError(f"model: {type(model).__name__} cannot be copied: {first_line(error)}; remove hooks and "
                            f"what else copy.deepcopy does not take") from None


def set_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load a state dict that fits. Files of plain tensors lack the versions of modules that torch keeps beside a state dict, and
    some modules do not load without: those of the model itself stand in."""
    versioned = OrderedDict(state)
    versions = getattr(state, "_metadata", None) or getattr(model.state_dict(), "_metadata", {})
    versioned._metadata = versions  # type: ignore[attr-defined]  # that is where torch looks for it
    model.load_state_dict(versioned)


@contextmanager
def differentiable(model: nn.Module) -> Iterator[None]:
    """Let recurrent layers in eval mode pass gradients back for a while: on a GPU cuDNN's do not."""
    before = torch.backends.cudnn.enabled
    torch.backends.cudnn.enabled = before and not any(isinstance(module, nn.RNNBase) for module in model.modules())
    try:
        yield
    finally:
        torch.backends.cudnn.enabled = before


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


def off_by(expected: Tensor, outputs: Tensor) -> float:
    """Return by how much outputs differ at most, as a share of the largest; what is no number in both agrees, if anything else is
    there. Infinity for another shape, and where nothing can be compared; NaN where one alone is no number."""
    if expected.shape != outputs.shape or not (there := ~(expected.isnan() & outputs.isnan())).any():
        return math.inf
    expected, outputs = expected[there], outputs[there]
    return float((expected - outputs).abs().max() / (expected.abs().max() + 1e-30))
