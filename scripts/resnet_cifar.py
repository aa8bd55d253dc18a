"""ResNet-20 and ResNet-56 for CIFAR-10 with shortcuts of kind A, as published weights have them: --model
scripts/resnet_cifar.py:resnet56.

He et al., 2016, arXiv:1512.03385, section 4.2. Layers are named as in akamaster/pytorch_resnet_cifar10 (BSD-2-Clause), whose
weights take images normalised as ImageNet's: --mean 0.485,0.456,0.406 --std 0.229,0.224,0.225.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut without weights: (b, inputs, h, w) -> (b, outputs, h / stride, w / stride)."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride, self.more = stride, (outputs - inputs) // 2

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        if self.stride > 1:
            x = F.pad(x[:, :, ::self.stride, ::self.stride], (0, 0, 0, 0, self.more, self.more))
        return (y + x).relu()  # type: ignore[no-any-return]  # modules are untyped


class ResNet(nn.Module):
    """6 n + 2 layers in three stages: (b, 3, h, w) -> (b, classes)."""

    def __init__(self, n: int, classes: int = 10):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.layer1, self.layer2, self.layer3 = (
            nn.Sequential(*(Block(inputs if i == 0 else outputs, outputs, stride if i == 0 else 1) for i in range(n)))
            for inputs, outputs, stride in ((16, 16, 1), (16, 32, 2), (32, 64, 2)))
        self.linear = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(self.bn1(self.conv1(x)).relu())))
        return self.linear(x.mean((2, 3)))  # type: ignore[no-any-return]


def resnet20() -> nn.Module:
    """Return ResNet-20, 269,722 parameters."""
    return ResNet(3)


def resnet56() -> nn.Module:
    """Return ResNet-56, 853,018 parameters."""
    return ResNet(9)
