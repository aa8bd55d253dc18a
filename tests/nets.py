"""Small networks that tests of several wings use."""

import torch
from torch import nn


class Block(nn.Module):
    """A residual network in small: two convolutions beside a shortcut, then a linear layer."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 6, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.conv1 = nn.Conv2d(6, 5, 3, padding=1)
        self.conv2 = nn.Conv2d(5, 6, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(6)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(6, 10)

    def forward(self, x):
        x = self.norm(self.stem(x)).relu()
        y = self.norm2(self.conv2(torch.relu(self.conv1(x))))
        x = nn.functional.relu(x + y)
        return self.fc(torch.flatten(self.pool(x), 1))


class Mixed(nn.Module):
    """Convolutions with and without a bias, strided, padded, dilated, grouped, batch norms, a linear layer without a bias."""

    def __init__(self, bias=False):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 6, 3, padding=1, bias=bias)
        self.norm1 = nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 8, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2))
        self.grouped = nn.Conv2d(8, 8, 1, groups=2)
        self.norm2 = nn.BatchNorm2d(8)
        self.fc1 = nn.Linear(8 * 4 * 6, 12, bias=False)
        self.fc2 = nn.Linear(12, 10)

    def forward(self, x):
        x = self.norm1(self.conv1(x)).relu()
        x = self.norm2(self.grouped(self.conv2(x).tanh()))
        return self.fc2(self.fc1(x.flatten(1)).relu())
