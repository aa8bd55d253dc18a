"""Arrays, Datasets and DataLoaders, read whole into tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, SequentialSampler, SubsetRandomSampler

from ..errors import EvopruneError, shown
from .nested import Inputs, joined, mapped, shapes


def is_nested(source: Any) -> bool:
    """Return whether a pair is of several inputs and as many labels, and not a Dataset of two items."""
    first, labels = source
    if isinstance(first, dict):
        return True
    return isinstance(first, tuple) and not isinstance(labels, tuple) and all(hasattr(each, "__len__") for each in first)


def nested_tensors(value: Any) -> Inputs:
    """Return arrays as tensors, in tuples and dicts as they were."""
    if isinstance(value, dict):
        return {str(name): nested_tensors(each) for name, each in value.items()}
    return tuple(nested_tensors(each) for each in value) if isinstance(value, tuple) else as_tensor(value)


def read_dataset(dataset: Any, name: str, inputs: int) -> tuple[Inputs, Tensor]:
    """Read a map-style dataset whole; PIL images become uint8 (c, h, w)."""
    if not len(dataset):
        raise EvopruneError(f"{name}: the dataset is empty")
    images, labels = [], []
    for i in range(len(dataset)):
        image, label = parted(dataset[i], f"{name}: item {i} of the dataset", inputs)
        images.append(mapped(lambda value: value[None], nested_tensors(image)))
        labels.append(as_target(label, f"{name}: item {i} of the dataset"))
        if labels[-1].shape != labels[0].shape:
            raise EvopruneError(f"{name}: item {i} of the dataset has a target of shape {tuple(labels[-1].shape)}, the first "
                                f"{tuple(labels[0].shape)}, expected the same")
        if shapes(images[-1]) != shapes(images[0]):
            raise EvopruneError(f"{name}: item {i} of the dataset has shape {shapes(images[-1])}, the first "
                                f"{shapes(images[0])}; give the dataset a transform that makes them equal, or hand in a "
                                f"DataLoader whose collate_fn does")
    return joined(images), torch.stack(labels)


def as_target(value: Any, what: str) -> Tensor:
    """Return a target as a tensor: a number, an array, or a picture of labels (h, w)."""
    if isinstance(value, (str, bytes)) or value is None:
        raise EvopruneError(f"{what} has label {shown(value)}, expected a number or numbers")
    found = as_tensor(value)
    return found[0] if found.dim() == 3 and len(found) == 1 else found


def parted(item: Any, what: str, inputs: int) -> tuple[Any, Any]:
    """Return the inputs and the label of an item: (input, label), several inputs first, or a dict with labels."""
    if isinstance(item, Mapping):
        key = next((key for key in ("labels", "label") if key in item), None)
        if key is None:
            raise EvopruneError(f"{what} has {', '.join(map(str, item))}, expected labels among them")
        rest = {name: value for name, value in item.items() if name != key}
        for name, value in rest.items():
            if isinstance(value, (str, bytes)) or value is None:
                raise EvopruneError(f"{what}: {name} is {type(value).__name__}, expected numbers; leave such columns out")
        return rest, item[key]
    if not isinstance(item, (tuple, list)) or len(item) != inputs + 1:
        count = f" of {len(item)}" if isinstance(item, (tuple, list)) else ""
        raise EvopruneError(f"{what} is {type(item).__name__}{count}, expected " + (
            f"{inputs} inputs and a label" if inputs > 1 else "(image, label), or Data(..., inputs=N) for several inputs"))
    image = item[0] if inputs == 1 else tuple(item[:inputs])
    return tuple(image) if isinstance(image, list) and image and isinstance(image[0], Tensor) else image, item[-1]


def read_loader(loader: DataLoader[Any], name: str, inputs: int) -> tuple[Inputs, Tensor]:
    """Read what a DataLoader reads, in order, through its collate function; short batches are filled with zeros."""
    parts, labels = [], []
    size, items = loader.batch_size or 64, items_of(loader, name)
    batched = loader.batch_size is None and loader.batch_sampler is None  # each item is a batch
    for i in range(0, len(items), 1 if batched else size):
        collated = loader.collate_fn(loader.dataset[items[i]] if batched else [loader.dataset[j] for j in items[i:i + size]])
        image, label = parted(collated, f"{name}: what the DataLoader collates", inputs)
        parts.append(nested_tensors(image))
        labels.append(as_tensor(label))  # (batch, ...)
    if not parts:
        raise EvopruneError(f"{name}: the dataset is empty")
    return joined(parts), joined(labels, -100) if labels[0].dim() > 1 and not labels[0].is_floating_point() else torch.cat(labels)


def items_of(loader: DataLoader[Any], name: str) -> Sequence[int]:
    """Return which items of its dataset a DataLoader reads: all, but for those that a SubsetRandomSampler leaves out.

    Raises:
        EvopruneError: it has another sampler, which may read anything.
    """
    if isinstance(loader.dataset, IterableDataset):
        raise EvopruneError(f"{name}: found a DataLoader of an IterableDataset, expected one of a Dataset with a length and "
                            f"items by their index; list(dataset) is one, if memory holds it")
    all_items = range(len(loader.dataset))  # type: ignore[arg-type]  # one without a length raises
    own = loader.batch_sampler if loader.batch_sampler is not None and loader.batch_size is None else loader.sampler
    if type(own) is SubsetRandomSampler:
        return sorted(own.indices)
    if type(own) not in (SequentialSampler, RandomSampler):
        raise EvopruneError(f"{name}: found a DataLoader with a {type(own).__name__}, which is not followed; hand in "
                            f"one without, of the dataset or of torch.utils.data.Subset(dataset, indices)")
    return all_items


def as_tensor(value: Any) -> Tensor:
    """Return a tensor, an array, a list of numbers or a PIL image as a tensor; PIL images as uint8 (c, h, w)."""
    from PIL import Image

    if isinstance(value, Tensor):
        return value.detach()
    array = np.asarray(value)
    if isinstance(value, Image.Image):
        array = array[None] if array.ndim == 2 else array.transpose(2, 0, 1)
    if array.dtype.kind in "USO":
        raise TypeError(f"found {', '.join(map(shown, array.ravel()[:1].tolist()))}, expected numbers")
    return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), order="C", copy=True))
