"""Networks of our own that are not like torchvision's: each function returns (model, inputs of one example, outputs)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Made = tuple[nn.Module, Any, int]  # the inputs are a function of the number of examples


class Recurrent(nn.Module):
    """A recurrent layer over 12 steps of 6 numbers, and a linear one of its last state."""

    def __init__(self, kind: type[nn.RNNBase], **options: Any):
        super().__init__()
        self.layer = kind(6, 16, batch_first=True, **options)
        self.head = nn.Linear(32 if options.get("bidirectional") else 16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x)[0][:, -1])


class Tied(nn.Module):
    """Two linear layers of one weight, and a head that shares it with an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up, self.again = nn.Embedding(20, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.head = nn.Linear(16, 20)
        self.again.weight, self.head.weight = self.up.weight, self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.again(self.up(self.embed(x)).relu()).mean(1))


class Branching(nn.Module):
    """Another layer for images whose sum is above zero: torch.fx cannot trace it."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.bright, self.dark = nn.Linear(64, 32), nn.Linear(32, 4), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x).relu()
        return self.bright(y) if float(x.sum()) > 0 else self.dark(y)


class TwoInputs(nn.Module):
    """Images and a table."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.table, self.head = nn.Conv2d(1, 8, 3), nn.Linear(5, 8), nn.Linear(16, 4)

    def forward(self, image: Tensor, table: Tensor) -> Tensor:
        return self.head(torch.cat([self.conv(image).relu().mean((2, 3)), self.table(table).relu()], 1))


class Encoder(nn.Module):
    """torch's transformer encoder over 10 tokens."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.embed, self.encoder, self.head = nn.Embedding(30, 16), nn.TransformerEncoder(layer, 2), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(x)).mean(1))


def numbers(*shape: int) -> Callable[[int], Tensor]:
    return lambda n: torch.randn(n, *shape)


def tokens(length: int, most: int) -> Callable[[int], Tensor]:
    return lambda n: torch.randint(most, (n, length))


def depthwise() -> nn.Module:
    """A depthwise and a pointwise convolution with batch norms."""
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8),
                         nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(16, 4))


def computed(make: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """One layer whose weight is computed from other parameters, and a plain one."""
    return nn.Sequential(make(nn.Linear(12, 16)), nn.ReLU(), nn.Linear(16, 4))


OWN: dict[str, Callable[[], Made]] = {
    "lstm": lambda: (Recurrent(nn.LSTM, num_layers=2), numbers(12, 6), 4),
    "gru": lambda: (Recurrent(nn.GRU), numbers(12, 6), 4),
    "bidirectional": lambda: (Recurrent(nn.LSTM, bidirectional=True), numbers(12, 6), 4),
    "conv1d": lambda: (nn.Sequential(nn.Conv1d(2, 8, 5), nn.ReLU(), nn.Conv1d(8, 8, 5, stride=2), nn.AdaptiveAvgPool1d(1),
                                     nn.Flatten(), nn.Linear(8, 4)), numbers(2, 40), 4),
    "conv3d": lambda: (nn.Sequential(nn.Conv3d(1, 4, 3), nn.BatchNorm3d(4), nn.ReLU(), nn.Conv3d(4, 8, 3),
                                     nn.AdaptiveMaxPool3d(1), nn.Flatten(), nn.Linear(8, 4)), numbers(1, 8, 8, 8), 4),
    "tied": lambda: (Tied(), tokens(6, 20), 20),
    "control flow": lambda: (Branching(), numbers(64), 4),
    "depthwise": lambda: (depthwise(), numbers(3, 12, 12), 4),
    "weight norm": lambda: (computed(nn.utils.parametrizations.weight_norm), numbers(12), 4),
    "spectral norm": lambda: (computed(nn.utils.parametrizations.spectral_norm), numbers(12), 4),
    "two inputs": lambda: (TwoInputs(), lambda n: (torch.randn(n, 1, 8, 8), torch.randn(n, 5)), 4),
    "transformer encoder": lambda: (Encoder(), tokens(10, 30), 4)}
