"""A small vision transformer for MNIST: 16 patches of 7x7 pixels and a class token, four blocks of width 64, 134,848 weights."""

from torch import nn
from torchvision.models import VisionTransformer


def vit() -> nn.Module:
    net = VisionTransformer(28, 7, num_layers=4, num_heads=4, hidden_dim=64, mlp_dim=128, num_classes=10)
    net.conv_proj = nn.Conv2d(1, 64, 7, 7)
    nn.init.normal_(net.heads.head.weight, std=0.02)
    return net
