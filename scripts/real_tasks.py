"""One real task of each kind, from the data that comes with scikit-learn: a network and its data by name, as --model and --data
take them (scripts/real_tasks.py:cancer_net and scripts/real_tasks.py:cancer).

    scripts/real_tasks.sh       trains each dense model, prunes it by evolution and by magnitude with the same training

digits (classification), cancer (binary), diabetes and angles (regression; the latter: by how much a digit is turned), attributes
(multi-label: four facts about a digit), mosaic (segmentation: which of three groups of digits each pixel of a noisy 16x16 mosaic
belongs to, and which to none).
"""

from __future__ import annotations

import numpy as np
import torch
from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import evoprune


def parts(x: Tensor, y: Tensor, shares: tuple[float, float] = (0.6, 0.2), turns: int = 1) -> evoprune.Data:
    """Cut into train, search and test, always in the same way; every `turns` examples, which are of one thing, stay together."""
    things = len(x) // turns
    order = torch.from_numpy(np.random.default_rng(0).permutation(things))
    order = (order[:, None] * turns + torch.arange(turns)).flatten()
    first, second = int(shares[0] * things) * turns, int(sum(shares) * things) * turns
    return evoprune.Data(*((x[index], y[index]) for index in (order[:first], order[first:second], order[second:])))


def table(x: np.ndarray, y: np.ndarray) -> evoprune.Data:
    """Cut a table, its columns scaled."""
    numbers = torch.from_numpy((x - x.mean(0)) / x.std(0)).float()
    return parts(numbers, torch.from_numpy(y))


def mlp(inputs: int, outputs: int, hidden: int = 64) -> nn.Module:
    """Three linear layers."""
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, outputs))


def digits() -> evoprune.Data:
    x, y = load_digits(return_X_y=True)
    return parts(torch.from_numpy(x / 16).float(), torch.from_numpy(y))


def digits_net() -> nn.Module:
    return mlp(64, 10)


def cancer() -> evoprune.Data:
    return table(*load_breast_cancer(return_X_y=True))


def cancer_net() -> nn.Module:
    return mlp(30, 1)


def diabetes() -> evoprune.Data:
    x, y = load_diabetes(return_X_y=True)
    return table(x, ((y - y.mean()) / y.std()).astype(np.float32)[:, None])


def diabetes_net() -> nn.Module:
    return mlp(10, 1)


def angles() -> evoprune.Data:
    """Each digit turned four times, by up to 60 degrees either way; the angle, of variance 1."""
    x, turns = load_digits().images / 16, 4
    by = torch.from_numpy(np.random.default_rng(0).uniform(-np.pi / 3, np.pi / 3, len(x) * turns)).float()
    turned = torch.stack([torch.stack([by.cos(), -by.sin(), by * 0], 1), torch.stack([by.sin(), by.cos(), by * 0], 1)], 1)
    pictures = torch.from_numpy(x).float()[:, None].repeat_interleave(turns, 0)
    grid = F.affine_grid(turned, list(pictures.shape), align_corners=False)
    return parts(F.grid_sample(pictures, grid, align_corners=False).flatten(1), (by / by.std())[:, None], turns=turns)


def angles_net() -> nn.Module:
    return mlp(64, 1)


def attributes() -> evoprune.Data:
    """Whether a digit is even, above 4, prime, and has a loop."""
    x, y = load_digits(return_X_y=True)
    facts = np.stack([y % 2 == 0, y > 4, np.isin(y, (2, 3, 5, 7)), np.isin(y, (0, 6, 8, 9))], 1)
    return parts(torch.from_numpy(x / 16).float(), torch.from_numpy(facts.astype(np.int64)))


def attributes_net() -> nn.Module:
    return mlp(64, 4)


def mosaic() -> evoprune.Data:
    """Four digits in a square, with noise; ink of digits 0 to 3 is 1, 4 to 6 is 2, 7 to 9 is 3, the ground 0."""
    x, y = load_digits(return_X_y=True)
    rng = np.random.default_rng(0)
    chosen = rng.integers(0, len(x), (1200, 2, 2))
    pictures = x.reshape(-1, 8, 8)[chosen].transpose(0, 1, 3, 2, 4).reshape(-1, 16, 16) / 16
    groups = (1 + (y > 3) + (y > 6))[chosen].repeat(8, axis=1).repeat(8, axis=2)
    labels = np.where(pictures > 0.3, groups, 0)
    noisy = pictures + 0.1 * rng.standard_normal(pictures.shape)
    return parts(torch.from_numpy(noisy).float()[:, None], torch.from_numpy(labels.astype(np.int64)))


def mosaic_net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 8, 5, padding=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 5, padding=2),
                         nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 12, 5, padding=2), nn.BatchNorm2d(12), nn.ReLU(),
                         nn.Conv2d(12, 4, 1))
