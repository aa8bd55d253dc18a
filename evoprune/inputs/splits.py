"""Images and labels of a run, cut into three: train, search (for every decision), test (only reported), and what models score.

Images stay as they came, uint8 where possible, and become normalised float32 a batch at a time, on the device.
Anything a model takes will do: images (n, c, h, w), signals (n, c, t), features (n, d), tokens (n, t), tuples and dicts of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..errors import EvopruneError, shown, where_raised, with_type
from ..files import as_bytes_of, fingerprint
from .datasets import as_tensor, is_nested, nested_tensors, read_dataset, read_loader
from .nested import Inputs, applied, check_together, leaves, mapped, taken
from .tasks import CLASSIFICATION, Task

CHANNELS = (1, 3, 4)  # of uint8 images; the fourth is alpha


@dataclass(frozen=True, eq=False)
class Split:
    """Inputs (n, ...) and targets (n, ...), labels int64 or numbers float32; uint8 images are scaled to 0..1, then normalised by
    mean and std."""

    images: Inputs
    labels: Tensor
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    dtype: torch.dtype = torch.float32  # of the model's parameters, so of its floating inputs
    task: Task = CLASSIFICATION

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def name(self) -> str:
        """What tells these images and labels from others."""
        return fingerprint(*map(as_bytes_of, (self.labels, *leaves(self.images))))

    def inputs(self, index: slice | Tensor) -> Inputs:
        """Return a batch as the model takes it."""
        return mapped(self.normalised, taken(self.images, index))

    def normalised(self, batch: Tensor) -> Tensor:
        """Return floats in the type of the model, and uint8 images normalised by the arithmetic of torchvision's ToTensor and
        Normalize."""
        if not self.in_bytes(batch):
            return batch.to(self.dtype) if batch.is_floating_point() else batch
        batch = batch.to(torch.float32).div_(255)
        if self.mean is None or self.std is None:
            return batch.to(self.dtype)
        shape = (-1, *[1] * (batch.dim() - 2))  # (channels, 1, 1)
        mean, std = (torch.tensor(v, device=batch.device).view(shape) for v in (self.mean, self.std))
        return batch.sub_(mean).div_(std).to(self.dtype)

    def in_bytes(self, value: Tensor) -> bool:
        """Say whether inputs are uint8 images; of several, what has less than three dimensions is none."""
        return value.dtype == torch.uint8 and (value.dim() >= 3 or isinstance(self.images, Tensor))

    @property
    def scaled(self) -> bool:
        """Whether there are images in bytes, which models have in 0..1."""
        return any(map(self.in_bytes, leaves(self.images)))

    def to(self, device: torch.device, dtype: torch.dtype = torch.float32) -> Split:
        """Return the same on a device, for a model of this dtype."""
        images = mapped(lambda value: value.to(device), self.images)
        return replace(self, images=images, labels=self.labels.to(device), dtype=dtype)


def example_sums(model: nn.Module, split: Split, batch_size: int) -> Tensor:
    """Return what the split's task makes of each example, (n, k) on the CPU. Call under eval()."""
    here = [slice(i, i + batch_size) for i in range(0, len(split), batch_size)]
    with torch.inference_mode():
        return torch.cat([split.task.sums(applied(model, split.inputs(batch)), split.labels[batch]).cpu() for batch in here])


def score(model: nn.Module, split: Split, batch_size: int) -> float:
    """Return the score of a model on a split: with the usual task its accuracy. Call under eval()."""
    return split.task.score(example_sums(model, split, batch_size).sum(0).tolist())


def drawn(split: Split, images: int, seed: int, after: int = 0) -> Tensor:
    """Return the places of so many images of the split, drawn at random, on its device; `after` as many."""
    return torch.randperm(len(split), generator=torch.Generator().manual_seed(seed))[after:after + images].to(split.labels.device)


def calibration(split: Split, images: int, seed: int, after: int = 0) -> Split:
    """Return so many images of the split, drawn at random, or all it has; `after` the first so many that are drawn."""
    order = drawn(split, images, seed, after).sort().values
    return replace(split, images=taken(split.images, order), labels=split.labels[order])


@dataclass(frozen=True, eq=False)
class Data:
    """The three splits of a run; each is `(images, labels)`, a torch Dataset, a DataLoader or a `Split`. No train, no training.

    Several inputs are a tuple or a dict of arrays, which the model gets as arguments; items of a Dataset may be
    (x, y, ..., label) with so many `inputs`, or dicts with labels. Mean and std (a number a channel, of images scaled to 0..1)
    apply to uint8 images.

    Raises:
        EvopruneError: a split is empty, or its images and labels do not go together.
    """

    train: Any = None
    search: Any = None
    test: Any = None
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    classes: int = 0  # that the labels name, or numbers that each target has; found unless given
    inputs: int = 1  # that an item of a Dataset starts with

    def __post_init__(self) -> None:
        if type(self.inputs) is not int or self.inputs < 1:
            raise EvopruneError(f"inputs: found {shown(self.inputs)}, expected how many inputs an item starts with")
        for name in ("train", "search", "test"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, as_split(value, name, self.mean, self.std, self.inputs))
        if type(self.classes) is not int or self.classes < 0:
            raise EvopruneError(f"classes: found {shown(self.classes)}, expected how many there are, or 0 to count them")
        if self.search is None:
            raise EvopruneError("data: no search split; Data(train, search, test) needs at least search")
        splits = (self.train, self.search, self.test)
        found = max(outputs_for(split.labels) for split in splits if split is not None)
        object.__setattr__(self, "classes", max(found, self.classes))

    def sizes(self) -> dict[str, int]:
        """Return how many images of each split this run holds."""
        return {name: len(split) if (split := getattr(self, name)) is not None else 0
                for name in ("train", "search", "test")}

    def to(self, device: torch.device, dtype: torch.dtype = torch.float32) -> Data:
        """Return the same splits on a device, for a model of this dtype."""
        train, search, test = (None if s is None else s.to(device, dtype) for s in (self.train, self.search, self.test))
        return Data(train, search, test, classes=self.classes)

    def for_task(self, task: Task) -> Data:
        """Return the same splits for a task."""
        train, search, test = (None if s is None else replace(s, task=task) for s in (self.train, self.search, self.test))
        return Data(train, search, test, classes=self.classes)


def outputs_for(targets: Tensor) -> int:
    """Return how many outputs such targets ask for: classes of labels, or numbers of each."""
    return math.prod(targets.shape[1:]) if targets.is_floating_point() else 1 + max(0, int(targets.max()))


def halved(whole: Split, split_seed: int) -> Data:
    """Return a split cut into equal halves, search and test."""
    if len(whole) < 2:
        raise EvopruneError(f"data: found {len(whole)} image, expected at least 2, one to search on and one to test on")
    order = torch.from_numpy(np.random.default_rng(split_seed).permutation(len(whole)))
    halves = (order[: (len(whole) + 1) // 2], order[(len(whole) + 1) // 2:])
    search, test = (replace(whole, images=taken(whole.images, i), labels=whole.labels[i]) for i in halves)
    return Data(None, search, test)


def as_split(source: Any, name: str, mean: Sequence[float] | None = None, std: Sequence[float] | None = None,
             inputs: int = 1) -> Split:
    """Return `source`, (inputs, labels), a Dataset or a DataLoader, as a checked `Split`; items of a Dataset start with so many
    inputs, unless they are dicts."""
    if isinstance(source, Split):
        return source
    pair = isinstance(source, (tuple, list)) and len(source) == 2 and not isinstance(source[0], tuple)
    pair = pair or (isinstance(source, tuple) and len(source) == 2 and is_nested(source))
    arrays, sized = (Tensor, np.ndarray), hasattr(source, "__getitem__") and hasattr(source, "__len__")
    sized = sized and not isinstance(source, (dict, str, *arrays))
    if isinstance(source, tuple) and not pair and any(isinstance(each, arrays) for each in source):
        raise EvopruneError(f"{name}: found a tuple of {len(source)}, expected (inputs, labels), with several inputs as a tuple: "
                            f"((a, b), labels)")
    loads = isinstance(source, DataLoader)
    if not (pair or sized or loads):
        raise EvopruneError(f"{name}: found {type(source).__name__}, expected (images, labels), a Dataset with a length, a "
                            f"DataLoader or evoprune.Data")
    try:
        if pair:
            images, labels = nested_tensors(source[0]), as_tensor(source[1])
        else:
            images, labels = read_loader(source, name, inputs) if loads else read_dataset(source, name, inputs)
        return check_split(images, labels, name, mean, std)
    except (EvopruneError, KeyboardInterrupt):
        raise
    except BaseException as error:  # noqa: BLE001  # a Dataset is the user's code
        where = f" ({found})" if (found := where_raised(error)) else ""
        raise EvopruneError(f"{name}: images and labels cannot be read as tensors: {with_type(error)}{where}; expected arrays, "
                            f"tensors or a Dataset of (image, label)") from None


def check_split(images: Inputs, labels: Tensor, name: str, mean: Sequence[float] | None,
                std: Sequence[float] | None) -> Split:
    """Return a Split of tensors that go together: grey uint8 images get their channel, floats become float32."""
    if not leaves(images):
        raise EvopruneError(f"{name}: no inputs")
    if isinstance(images, Tensor) and (not images.dim() or not len(images)):
        raise EvopruneError(f"{name}: no images")
    count = len(leaves(images)[0]) if leaves(images)[0].dim() else 0
    if not labels.dim() or len(labels) != count or not labels.numel():
        raise EvopruneError(f"{name}: found labels of shape {tuple(labels.shape)} for {count} images, "
                            f"expected ({count},), or ({count}, ...) of several targets each")
    if labels.is_complex() or (labels.is_floating_point() and not bool(torch.isfinite(labels).all())):
        raise EvopruneError(f"{name}: found targets that are {'complex' if labels.is_complex() else 'NaN or infinite'}, "
                            f"expected whole numbers or finite ones")
    labels = labels.float() if labels.is_floating_point() else labels.long()
    check_together(images, count, name)
    images = mapped(lambda each: as_images(each, name), images)
    if (mean is None) != (std is None):
        raise EvopruneError(f"{name}: found only one of mean and std, expected both or none")
    if mean is not None and std is not None:
        check_constants(images, mean, std, name)
    return Split(mapped(Tensor.contiguous, images), labels, None if mean is None else tuple(map(float, mean)),
                 None if std is None else tuple(map(float, std)))


def as_images(images: Tensor, name: str) -> Tensor:
    """Return one checked input: images with their channels in dimension 1, floats in float32."""
    if images.dtype == torch.uint8 and images.dim() == 3:
        images = images[:, None]  # (n, h, w) -> (n, 1, h, w)
    if images.dtype == torch.uint8 and images.dim() == 4 and images.shape[1] not in CHANNELS and images.shape[3] in CHANNELS:
        images = images.permute(0, 3, 1, 2)  # (n, h, w, c) -> (n, c, h, w)
    if images.dtype in (torch.float64, torch.float16, torch.bfloat16):
        images = images.float()
    if images.is_floating_point() and not bool(torch.isfinite(images).all()):
        raise EvopruneError(f"{name}: images hold NaN or infinity")
    return images


def check_constants(images: Inputs, mean: Sequence[float], std: Sequence[float], name: str) -> None:
    """Raise `EvopruneError` for a mean and std that do not fit the uint8 images, or where there are none."""
    bytes_of_images = [each for each in leaves(images) if each.dtype == torch.uint8 and (each.dim() > 2 or each is images)]
    if not bytes_of_images:
        raise EvopruneError(f"{name}: found mean and std without uint8 images, which alone are normalised; leave them out")
    for each in bytes_of_images:
        if {len(mean), len(std)} - {1, each.shape[1]}:
            raise EvopruneError(f"{name}: found {len(mean)} means and {len(std)} stds, expected 1 or {each.shape[1]}, "
                                f"a number a channel")
        if not min(std) > 0 or not all(map(math.isfinite, (*mean, *std))):
            raise EvopruneError(f"{name}: found mean {tuple(mean)} and std {tuple(std)}, expected finite numbers, std above 0")
