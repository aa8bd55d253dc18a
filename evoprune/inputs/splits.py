"""Images and labels of a run, cut into three: train, search (for every decision), test (only reported).

Images stay as they came, uint8 where possible, and become normalised float32 a batch at a time, on the device.
Anything a model takes as one tensor will do: images (n, c, h, w), signals (n, c, t), features (n, d), tokens (n, t).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import EvopruneError, shown, where_raised, with_type


@dataclass(frozen=True, eq=False)
class Split:
    """Inputs (n, ...) and labels (n,) int64; uint8 images are scaled to 0..1, then normalised by mean and std."""

    images: Tensor
    labels: Tensor
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    dtype: torch.dtype = torch.float32  # of the model's parameters, so of its floating inputs

    def __len__(self) -> int:
        return len(self.labels)

    def inputs(self, index: slice | Tensor) -> Tensor:
        """Return a batch as the model takes it; the arithmetic of torchvision's ToTensor and Normalize."""
        batch = self.images[index]
        if batch.dtype != torch.uint8:
            return batch.to(self.dtype) if batch.is_floating_point() else batch
        batch = batch.to(torch.float32).div_(255)
        if self.mean is None or self.std is None:
            return batch.to(self.dtype)
        shape = (-1, *[1] * (batch.dim() - 2))  # (channels, 1, 1)
        mean, std = (torch.tensor(v, device=batch.device).view(shape) for v in (self.mean, self.std))
        return batch.sub_(mean).div_(std).to(self.dtype)

    def to(self, device: torch.device, dtype: torch.dtype = torch.float32) -> Split:
        """Return the same on a device, for a model of this dtype."""
        return replace(self, images=self.images.to(device), labels=self.labels.to(device), dtype=dtype)


def calibration(split: Split, images: int, seed: int) -> Split:
    """Return so many images of the split, drawn at random, or all it has."""
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(seed))[:images].sort().values
    order = order.to(split.labels.device)
    return Split(split.images[order], split.labels[order], split.mean, split.std, split.dtype)


@dataclass(frozen=True, eq=False)
class Data:
    """The three splits of a run; each is `(images, labels)`, a torch Dataset or a `Split`. No train, no training.

    Mean and std (a number a channel, of images scaled to 0..1) apply to uint8 images.

    Raises:
        EvopruneError: a split is empty, or its images and labels do not go together.
    """

    train: Any
    search: Any
    test: Any
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    classes: int = 0  # found from the labels unless given

    def __post_init__(self) -> None:
        for name in ("train", "search", "test"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, as_split(value, name, self.mean, self.std))
        if type(self.classes) is not int or self.classes < 0:
            raise EvopruneError(f"classes: found {shown(self.classes)}, expected how many there are, or 0 to count them")
        if self.search is None:
            raise EvopruneError("data: no search split; Data(train, search, test) needs at least search")
        splits = (self.train, self.search, self.test)
        found = 1 + max(int(split.labels.max()) for split in splits if split is not None)
        object.__setattr__(self, "classes", max(found, self.classes))

    def sizes(self) -> dict[str, int]:
        """Return how many images of each split this run holds."""
        return {name: len(split) if (split := getattr(self, name)) is not None else 0
                for name in ("train", "search", "test")}

    def to(self, device: torch.device, dtype: torch.dtype = torch.float32) -> Data:
        """Return the same splits on a device, for a model of this dtype."""
        train, search, test = (None if s is None else s.to(device, dtype) for s in (self.train, self.search, self.test))
        return Data(train, search, test, classes=self.classes)


def as_data(source: Any, split_seed: int, mean: Sequence[float] | None, std: Sequence[float] | None) -> Data:
    """Return `source` if it is a `Data`; cut `(images, labels)` or a Dataset into equal halves, search and test."""
    if isinstance(source, Data):
        return source
    whole = as_split(source, "data", mean, std)
    if len(whole) < 2:
        raise EvopruneError(f"data: found {len(whole)} image, expected at least 2, one to search on and one to test on")
    order = torch.from_numpy(np.random.default_rng(split_seed).permutation(len(whole)))
    halves = (order[: (len(whole) + 1) // 2], order[(len(whole) + 1) // 2:])
    search, test = (replace(whole, images=whole.images[i], labels=whole.labels[i]) for i in halves)
    return Data(None, search, test)


def as_split(source: Any, name: str, mean: Sequence[float] | None = None, std: Sequence[float] | None = None) -> Split:
    """Return `source`, (images, labels) or a Dataset, as a checked `Split`."""
    if isinstance(source, Split):
        return source
    pair = isinstance(source, (tuple, list)) and len(source) == 2 and not isinstance(source[0], tuple)
    sized = hasattr(source, "__getitem__") and hasattr(source, "__len__") and not isinstance(source, (dict, str))
    if not (pair or sized):
        raise EvopruneError(f"{name}: found {type(source).__name__}, expected (images, labels), a Dataset with a length, or "
                            f"evoprune.Data")
    try:
        images, labels = map(as_tensor, source) if pair else read_dataset(source, name)
        return check_split(images, labels, name, mean, std)
    except (EvopruneError, KeyboardInterrupt):
        raise
    except BaseException as error:  # noqa: BLE001  # a Dataset is the user's code
        where = f" ({found})" if (found := where_raised(error)) else ""
        raise EvopruneError(f"{name}: images and labels cannot be read as tensors: {with_type(error)}{where}; expected arrays, "
                            f"tensors or a Dataset of (image, label)") from None


def check_split(images: Tensor, labels: Tensor, name: str, mean: Sequence[float] | None,
                std: Sequence[float] | None) -> Split:
    """Return a Split of tensors that go together: grey uint8 images get their channel, floats
    become float32."""
    if not images.dim() or not len(images):
        raise EvopruneError(f"{name}: no images")
    if labels.dim() != 1 or len(labels) != len(images):
        raise EvopruneError(f"{name}: found labels of shape {tuple(labels.shape)} for {len(images)} images, "
                            f"expected ({len(images)},), one whole number an image")
    if labels.is_floating_point() or labels.dtype == torch.bool or labels.is_complex():
        raise EvopruneError(f"{name}: found labels of type {labels.dtype}, expected whole numbers from 0")
    labels = labels.long()
    if int(labels.min()) < 0:
        raise EvopruneError(f"{name}: found label {int(labels.min())}, expected whole numbers from 0")
    if images.dtype == torch.uint8 and images.dim() == 3:
        images = images[:, None]  # (n, h, w) -> (n, 1, h, w)
    if images.dtype == torch.uint8 and images.dim() == 4 and images.shape[1] not in (1, 3) and images.shape[3] in (1, 3):
        images = images.permute(0, 3, 1, 2)  # (n, h, w, c) -> (n, c, h, w)
    if images.dtype in (torch.float64, torch.float16, torch.bfloat16):
        images = images.float()
    if images.is_floating_point() and not bool(torch.isfinite(images).all()):
        raise EvopruneError(f"{name}: images hold NaN or infinity")
    if (mean is None) != (std is None):
        raise EvopruneError(f"{name}: found only one of mean and std, expected both or none")
    if mean is not None and std is not None and images.dtype == torch.uint8:
        channels = images.shape[1]
        if {len(mean), len(std)} - {1, channels}:
            raise EvopruneError(f"{name}: found {len(mean)} means and {len(std)} stds, expected 1 or {channels}, "
                                f"a number a channel")
        if not min(std) > 0 or not all(map(math.isfinite, (*mean, *std))):
            raise EvopruneError(f"{name}: found mean {tuple(mean)} and std {tuple(std)}, expected finite numbers, std above 0")
    return Split(images.contiguous(), labels, None if mean is None else tuple(map(float, mean)),
                 None if std is None else tuple(map(float, std)))


def read_dataset(dataset: Any, name: str) -> tuple[Tensor, Tensor]:
    """Read a map-style dataset of (image, label) whole; PIL images become uint8 (c, h, w)."""
    if not len(dataset):
        raise EvopruneError(f"{name}: the dataset is empty")
    images, labels = [], []
    for i in range(len(dataset)):
        item = dataset[i]
        if not isinstance(item, (tuple, list)) or len(item) != 2:
            raise EvopruneError(f"{name}: item {i} of the dataset is {type(item).__name__}, expected (image, label)")
        images.append(as_tensor(item[0]))
        labels.append(int(item[1]))
        if labels[-1] != item[1]:
            raise EvopruneError(f"{name}: item {i} of the dataset has label {shown(item[1])}, expected a whole number")
        if images[-1].shape != images[0].shape:
            raise EvopruneError(f"{name}: item {i} of the dataset has shape {tuple(images[-1].shape)}, the first "
                                f"{tuple(images[0].shape)}; give the dataset a transform that makes them equal")
    return torch.stack(images), torch.tensor(labels)


def as_tensor(value: Any) -> Tensor:
    """Return a tensor, an array, a list of numbers or a PIL image as a tensor; PIL images as uint8 (c, h, w)."""
    from PIL import Image

    if isinstance(value, Tensor):
        return value.detach()
    array = np.asarray(value)
    if isinstance(value, Image.Image):
        array = array[None] if array.ndim == 2 else array.transpose(2, 0, 1)
    return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), order="C", copy=True))
