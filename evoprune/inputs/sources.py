"""Gets data from wherever the user has it: bundled, torchvision's files, folders, arrays, an importable function.

Nothing is unpickled: .npz is read without pickle.
"""

from __future__ import annotations

import importlib.util
import warnings
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..config import Config
from ..errors import EvopruneError, first_line
from .datasets import as_tensor
from .images import Transform, handed, how_to_normalise, how_to_prepare
from .named import call
from .nested import taken
from .splits import Data, Split, as_split, check_split, outputs_for

DATA = ("digits", "mnist", "cifar10", "folder:DIR", "npz:FILE", "package.module:function", "FILE.py:function")
Index = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Raw:
    """One part of a data set before any image is read: only what a split needs is read later."""

    labels: npt.NDArray[Any]  # (n, ...)
    read: Callable[[Index, Transform | None], Tensor]  # indices -> uint8 (len(indices), c, h, w)


@dataclass(frozen=True)
class Source:
    """A data set: its parts, and the constants its images are normalised with (of images scaled to 0..1)."""

    train: Raw
    test: Raw | None  # None: cut from train
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None


def load_data(config: Config, most: int | None) -> Data:
    """Return the splits that the settings name; of the train images so many are read at most, None: all.

    Raises:
        EvopruneError: an unknown name, missing files, unreadable images, a subset larger than its whole.
    """
    if config.data in SOURCES or config.data.startswith(("folder:", "npz:")):
        kind, _, where = config.data.partition(":")
        if not where and config.data not in SOURCES:
            raise EvopruneError(f"data: found {config.data!r}, expected {kind}:PATH")
        source = {**SOURCES, "folder": read_folder, "npz": read_npz}[kind](where if where else config.data_dir)
        return cut(source, config, most)
    if ":" not in config.data:
        raise EvopruneError(f"data: found {config.data!r}, expected one of {', '.join(DATA)}")
    made = call(config.data, "data")
    check_prepared(made, config)
    return limit(handed(config, made), config)


def check_prepared(data: Any, config: Config) -> None:
    """Raise `EvopruneError` for settings that images which come as tensors, not as files, leave nothing to do for."""
    normalised = isinstance(data, Data) and (config.mean is not None or config.std is not None)
    if config.image_size is not None or normalised:
        raise EvopruneError("image_size, mean, std: found together with data handed in or from a function; resize it before, and "
                            "give mean and std to evoprune.Data")


def limit(data: Data, config: Config) -> Data:
    """Return `data` with seeded subsets of the sizes that the settings ask for."""
    def subset(name: str) -> Split | None:
        split: Split | None = getattr(data, name)
        wanted: int | None = getattr(config, f"{name}_images")
        if split is None and wanted is not None:
            raise EvopruneError(f"{name}_images: found {wanted}, but the data has no {name} split; leave it out, or hand in "
                                f"evoprune.Data(train, search, test)")
        if split is None or wanted is None:
            return split
        check_subset(name, wanted, len(split))
        index = torch.from_numpy(np.random.default_rng(config.split_seed).permutation(len(split))[:wanted])
        return replace(split, images=taken(split.images, index), labels=split.labels[index])

    return Data(subset("train"), subset("search"), subset("test"), classes=data.classes)


def check_subset(name: str, wanted: int, there: int) -> None:
    if wanted > there:
        raise EvopruneError(f"{name}_images: found {wanted}, expected at most the {there} images there are")


def cut(source: Source, config: Config, most: int | None) -> Data:
    """Cut the search split (and the test split, where there is none) from train, by `split_seed`; read so many train images."""
    (transform, preset), own = how_to_prepare(config), (source.mean, source.std)
    order = np.random.default_rng(config.split_seed).permutation(len(source.train.labels))
    test, test_index = source.test, np.arange(len(source.test.labels) if source.test else 0)
    if test is None:
        fifth = len(order) // 5
        test, test_index, order = source.train, order[:fifth], order[fifth:]
    elif config.test_images is not None:
        test_index = np.random.default_rng(config.split_seed).permutation(test_index)
    if config.test_images is not None:
        check_subset("test", config.test_images, len(test_index))
        test_index = test_index[:config.test_images]
    searched = config.search_images or min(5000, len(order) // 5) or 1
    check_subset("search", searched, len(order))
    train_index = order[searched:]
    if config.train_images is not None:
        check_subset("train", config.train_images, len(train_index))
        train_index = train_index[:config.train_images]
    train_index = train_index[:most]

    def read(raw: Raw, index: Index, name: str) -> Split:
        images = raw.read(index, transform)
        return check_split(images, torch.from_numpy(raw.labels[index]), name, *how_to_normalise(config, preset, own, images))

    return Data(read(source.train, train_index, "train") if len(train_index) else None,
                read(source.train, order[:searched], "search"), read(test, test_index, "test"),
                classes=max(outputs_for(torch.from_numpy(part.labels)) for part in (source.train, test)))


def from_tensor(images: Tensor) -> Callable[[Index, Transform | None], Tensor]:
    """Read from uint8 images (n, c, h, w) that are in memory already."""
    def read(index: Index, transform: Transform | None) -> Tensor:
        chosen = images[torch.from_numpy(index)]
        if transform and (chosen.dim() != 4 or chosen.dtype != torch.uint8):
            if not transform.asked:
                return chosen
            raise EvopruneError(f"image_size: found {chosen.dtype} arrays of shape {tuple(chosen.shape)}, expected uint8 images "
                                f"(n, c, h, w)")
        return transform(chosen) if transform else chosen

    return read


def read_digits(_: str) -> Source:
    """scikit-learn's bundled scans: 1,797 of 8x8 in 17 grey levels (Alpaydin and Kaynak, 1998)."""
    package = importlib.util.find_spec("sklearn")  # to import it would take 2 s of every process
    assert package is not None and package.origin is not None
    rows = np.loadtxt(Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz", delimiter=",")
    images = torch.from_numpy((rows[:, :-1].reshape(-1, 8, 8) * (255 / 16)).round().astype(np.uint8))[:, None]
    return Source(Raw(rows[:, -1].astype(np.int64), from_tensor(images)), None, (0.3053,), (0.3762,))


def read_mnist(root: str) -> Source:
    from torchvision.datasets import MNIST

    parts = [torchvision_set(MNIST, root, train, "MNIST/raw/train-images-idx3-ubyte") for train in (True, False)]
    train, test = (Raw(p.targets.numpy(), from_tensor(p.data[:, None])) for p in parts)
    return Source(train, test, (0.1307,), (0.3081,))


def read_cifar10(root: str) -> Source:
    from torchvision.datasets import CIFAR10  # its files are pickles, read only after their checksums are right

    parts = [torchvision_set(CIFAR10, root, train, "cifar-10-batches-py/data_batch_1") for train in (True, False)]
    train, test = (Raw(np.array(p.targets), from_tensor(torch.from_numpy(p.data).permute(0, 3, 1, 2))) for p in parts)
    return Source(train, test, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))


def torchvision_set(kind: Any, root: str, train: bool, example: str) -> Any:
    try:
        found = kind(root, train=train)
        if len(found.data) != len(found.targets) or not 0 <= int(max(found.targets)) < 10:
            raise ValueError(f"{len(found.data)} images, {len(found.targets)} labels up to {int(max(found.targets))}")
        return found
    except Exception as error:  # noqa: BLE001  # a damaged file raises whatever its parser happens to raise
        name = kind.__name__
        raise EvopruneError(f"data_dir: no {name} in {root!r} (expected {root}/{example} and the files beside it: "
                            f"{first_line(error)}); name the folder with --data-dir, or fetch it once with "
                            f"torchvision.datasets.{name}({root!r}, download=True)") from None


def read_folder(root: str) -> Source:
    """Folders train/CLASS/* and test/CLASS/*, as torchvision's ImageFolder reads them."""
    from torchvision.datasets import ImageFolder

    parts = []
    for part in ("train", "test"):
        try:
            parts.append(ImageFolder(str(Path(root, part))))
        except (OSError, ValueError) as error:
            raise EvopruneError(f"data: {root}/{part}: {first_line(error)}; expected {root}/{part}/CLASS/IMAGE") from None
    if parts[0].classes != parts[1].classes:
        odd = sorted(set(parts[0].classes) ^ set(parts[1].classes))
        raise EvopruneError(f"data: {root}: class {odd[0]!r} is in only one of train and test, expected the same classes")
    train, test = (Raw(np.array(p.targets), from_files([path for path, _ in p.samples])) for p in parts)
    return Source(train, test)


def from_files(paths: list[str]) -> Callable[[Index, Transform | None], Tensor]:
    """Read image files when they are needed, as RGB; of 16 bits a channel the upper 8, where Pillow cuts values off at 255."""
    from PIL import Image

    def read_one(path: str, transform: Transform | None) -> Tensor:
        try:
            with Image.open(path) as file:
                mode = file.mode
                deep = Image.fromarray((np.asarray(file) >> 8).astype(np.uint8)) if mode.startswith("I;16") else file
                image = deep.convert("RGB")
        except Exception as error:  # noqa: BLE001  # Pillow has exceptions of its own
            raise EvopruneError(f"data: {path}: {first_line(error)}; expected an image") from None
        if mode in ("I", "F"):
            raise EvopruneError(f"data: {path}: found pixels of 32 bits, expected 8 or 16 a channel")
        return as_tensor(transform(image) if transform else image)

    def read(index: Index, transform: Transform | None) -> Tensor:
        with warnings.catch_warnings(action="ignore"), ThreadPoolExecutor() as pool:  # Pillow's, of large images
            images = list(pool.map(lambda i: read_one(paths[i], transform), index))
        for i, image in zip(index, images):
            if image.shape != images[0].shape:
                raise EvopruneError(f"data: {paths[i]} is {image.shape[2]}x{image.shape[1]}, {paths[index[0]]} is "
                                    f"{images[0].shape[2]}x{images[0].shape[1]}; make them equal with --image-size")
        return torch.stack(images)

    return read


def read_npz(path: str) -> Source:
    """x_train, y_train, x_test, y_test; uint8 images (n, h, w), (n, c, h, w) or (n, h, w, c), anything else as it is."""
    names = ("x_train", "y_train", "x_test", "y_test")
    try:
        if not Path(path).is_file():  # a device has no end
            raise ValueError("no such file")
        if not zipfile.is_zipfile(path):  # numpy would warn on top
            raise ValueError("no .npz file")
        with np.load(path, allow_pickle=False) as file:
            missing = [name for name in names if name not in file]
            if missing:
                raise EvopruneError(f"data: {path}: no {missing[0]}, expected {', '.join(names)}; "
                                    f"found {', '.join(file.files) or 'nothing'}")
            arrays = {name: file[name] for name in names}
    except EvopruneError:
        raise
    except Exception as error:  # noqa: BLE001  # zipfile, zlib and numpy raise some ten kinds
        raise EvopruneError(f"data: {path}: {first_line(error)}; expected an .npz file without pickles") from None

    def part(name: str) -> Raw:
        images, labels = arrays[f"x_{name}"], arrays[f"y_{name}"]
        split = as_split((images, labels), f"data: {path}: x_{name}")
        return Raw(split.labels.numpy(), from_tensor(split.images))

    return Source(part("train"), part("test"))


SOURCES: dict[str, Callable[[str], Source]] = {"digits": read_digits, "mnist": read_mnist, "cifar10": read_cifar10}
