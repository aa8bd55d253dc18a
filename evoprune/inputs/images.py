"""How images are prepared for a model: resized and cropped, and by which mean and std they are normalised."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..config import Config
from ..errors import EvopruneError
from .splits import Data, as_split, check_constants, halved
from .zoo import Preset, preset_of


@dataclass(frozen=True)
class Transform:
    """Resize the shorter side, or both, to `resize`, crop the centre to `crop`; what a preset does, or --image-size."""

    resize: list[int]
    crop: list[int]
    interpolation: Any
    asked: bool  # for by --image-size

    def __call__(self, image: Any) -> Any:  # a PIL image, or uint8 (..., h, w)
        from torchvision.transforms import functional as F

        return F.center_crop(F.resize(image, self.resize, interpolation=self.interpolation, antialias=True), self.crop)


def constants(config: Config) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
    """Return --mean and --std as numbers."""
    def numbers(name: str) -> tuple[float, ...] | None:
        text = getattr(config, name)
        if text is None:
            return None
        try:
            return tuple(float(x) for x in text.split(","))
        except ValueError:
            raise EvopruneError(f"{name}: found {text!r}, expected numbers with commas between: 0.49,0.48,0.45") from None

    mean, std = numbers("mean"), numbers("std")
    if (mean is None) != (std is None):
        raise EvopruneError("mean, std: found only one of the two, expected both or none")
    return mean, std


def how_to_prepare(config: Config) -> tuple[Transform | None, Preset | None]:
    """Return how images are resized, as the user says or else the model's preset, and that preset."""
    preset = preset_of(config.model)
    if config.image_size:
        from torchvision.transforms import InterpolationMode  # a second of every process that does without

        return Transform([config.image_size], [config.image_size], InterpolationMode.BILINEAR, True), preset
    return None if preset is None else Transform(preset.resize, preset.crop, preset.interpolation, False), preset


def how_to_normalise(config: Config, preset: Preset | None, own: tuple[Any, Any], images: Tensor) -> tuple[Any, Any]:
    """Return mean and std: the user's, else the model's preset, else the data set's `own`, if they fit the images' channels."""
    mean, std = constants(config)
    if mean is not None or images.dtype != torch.uint8:
        return mean, std
    channels = images.shape[1]
    for means, stds in ((None, None) if preset is None else (preset.mean, preset.std), own):
        if means is not None and len(means) in (1, channels):
            return means, stds
    if preset is not None:
        raise EvopruneError(f"mean, std: {config.model} has those of {len(preset.mean)} channels, found images with {channels}; "
                            f"give --mean and --std")
    return None, None


def handed(config: Config, data: Any) -> Data:
    """Return the splits of data handed in or from a function. Images are normalised as the user says, or by the preset of the
    named model; a `Data` or a `Split` says itself how."""
    if isinstance(data, Data):
        return data
    split, (mean, std) = as_split(data, "data"), constants(config)
    if isinstance(split.images, Tensor) and split.mean is None:
        mean, std = how_to_normalise(config, preset_of(config.model), (None, None), split.images)
    if mean is not None and std is not None:
        check_constants(split.images, mean, std, "data")
        split = replace(split, mean=mean, std=std)
    return halved(split, config.split_seed)
