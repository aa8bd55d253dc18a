"""A multilayer perceptron for MNIST: 784-300-100-10, the "LeNet-300-100" of the literature (LeCun et al., 1998)."""

from torch import nn


def mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10))
