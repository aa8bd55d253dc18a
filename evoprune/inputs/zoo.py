"""Models of other libraries, by name: torchvision's, timm's, a folder of Hugging Face's; and how their images are prepared.

timm and transformers are imported where they are asked for, and fetch nothing.
"""

from __future__ import annotations

import importlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..errors import EvopruneError, first_line, shown

RESAMPLE = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}  # as Pillow numbers them


@dataclass(frozen=True)
class Preset:
    """How a model's images are prepared: resized, the centre cropped, mean and std of images in 0..1."""

    resize: list[int]  # one number: the shorter side
    crop: list[int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: Any  # torchvision's InterpolationMode


def zoo_model(spec: str, outputs: int, channels: int, pretrained: bool) -> nn.Module:
    """Return the model that ZOO:NAME names; `outputs` and `channels` do not count for hf, nor channels for torchvision.

    Raises:
        EvopruneError: there is none, its library is not installed, or its weights are not there.
    """
    zoo, _, name = spec.partition(":")
    if zoo == "torchvision":
        return torchvision_model(name, outputs, pretrained)
    return timm_model(name, outputs, channels) if zoo == "timm" else hugging_face_model(name, pretrained)


def torchvision_model(name: str, outputs: int, pretrained: bool) -> nn.Module:
    """Return a classifier of torchvision's, with its own weights if `pretrained`."""
    from torchvision import models

    if name not in models.list_models(module=models):
        near = [n for n in models.list_models(module=models) if n[:4] == name[:4]] or models.list_models(module=models)
        raise EvopruneError(f"model: torchvision has no classifier {name!r}; there are {', '.join(near)}")
    if not pretrained:
        model: nn.Module = models.get_model(name, weights=None, num_classes=outputs, **as_pretrained(name))
        return model
    try:
        return models.get_model(name, weights="DEFAULT")  # type: ignore[no-any-return]  # torchvision is untyped
    except OSError as error:
        raise EvopruneError(f"model: the weights of torchvision:{name} could not be fetched ({first_line(error)}); "
                            f"give a file of them with --weights FILE") from None


def as_pretrained(name: str) -> dict[str, Any]:
    """Return what torchvision says of an architecture by its weights alone, so that it is made the same without them."""
    from torchvision import models

    if name.startswith("vit_"):
        return {"image_size": models.get_model_weights(name).DEFAULT.meta["min_size"][0]}
    if name == "googlenet":
        return {"transform_input": True, "aux_logits": False, "init_weights": True}
    return {"transform_input": True, "init_weights": True} if name == "inception_v3" else {}


def without_auxiliary(spec: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return weights from a file without those of heads that torchvision drops from a pretrained GoogLeNet."""
    return {name: value for name, value in state.items() if spec != "torchvision:googlenet" or not name.startswith("aux")}


def timm_model(name: str, outputs: int, channels: int) -> nn.Module:
    """Return a model of timm's with random weights: those of its authors are a file to name with --weights."""
    timm = library("timm")
    if not timm.is_model(name):
        near = timm.list_models(f"{name[:4]}*") or timm.list_models("resnet*")
        raise EvopruneError(f"model: timm has no model {name!r}; there are {', '.join(near[:20])}")
    model: nn.Module = timm.create_model(name, pretrained=False, num_classes=outputs, in_chans=channels)
    return model


def hugging_face_model(folder: str, pretrained: bool) -> nn.Module:
    """Return the model that `save_pretrained` wrote into a folder, with its weights if `pretrained`; runs no code of it."""
    transformers = library("transformers")
    if not Path(folder, transformers.CONFIG_NAME).is_file():
        raise EvopruneError(f"model: {folder}: no {transformers.CONFIG_NAME}, expected a folder that save_pretrained wrote")
    transformers.utils.logging.disable_progress_bar()
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        name = (config.architectures or [None])[0]
        kind: Any = getattr(transformers, str(name), None)
        known: bool = isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)
        if not known:
            raise ValueError(f"architectures names {shown(name)}, expected a model of transformers")
        made = kind.from_pretrained(folder, local_files_only=True, use_safetensors=True) if pretrained else kind(config)
    except Exception as error:  # noqa: BLE001  # transformers raises some ten kinds
        raise EvopruneError(f"model: {folder}: {first_line(error)}; expected what save_pretrained writes, weights in "
                            f"safetensors") from None
    model: nn.Module = made.float()
    return model


def library(name: str) -> Any:
    """Import an optional library."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise EvopruneError(f"model: {name} is not installed; pip install 'evoprune[zoo]'") from None


def preset_of(spec: str) -> Preset | None:
    """Return how the images of ZOO:NAME want to be prepared, None where that is not known."""
    zoo, _, name = spec.partition(":")
    try:
        if zoo == "torchvision":
            from torchvision import models

            found = models.get_model_weights(name).DEFAULT.transforms()
            return Preset(found.resize_size[:1], found.crop_size[:1], tuple(found.mean), tuple(found.std), found.interpolation)
        if zoo == "timm":
            cfg = library("timm").get_pretrained_cfg(name)
            return preset([round(cfg.input_size[1] / cfg.crop_pct)], [cfg.input_size[1]], cfg.mean, cfg.std, cfg.interpolation)
        if zoo == "hf":
            return hugging_face_preset(json.loads(Path(name, "preprocessor_config.json").read_text()))
    except (ValueError, AttributeError, KeyError, TypeError, OSError):  # an unknown name: building the model will say so
        return None
    return None


def hugging_face_preset(about: dict[str, Any]) -> Preset:
    """Return how a preprocessor_config.json says that images are prepared, as the image processors of transformers read it."""
    resize = sides(about["size"])
    if about.get("crop_pct") is not None and resize[0] < 384:  # of ConvNext and of ResNet
        resize, crop = [int(resize[0] / about["crop_pct"])], resize[:1] * 2
    elif about.get("do_center_crop"):
        crop = sides(about.get("crop_size") or about["size"])
        crop = crop if len(crop) == 2 else crop * 2
    elif isinstance(about["size"], int) or about.get("crop_pct") is not None:
        resize = crop = resize[:1] * 2
    else:
        crop = resize if len(resize) == 2 else resize * 2
    mean, std = (about["image_mean"], about["image_std"]) if about.get("do_normalize", True) else ([0.0] * 3, [1.0] * 3)
    return preset(resize, crop, mean, std, RESAMPLE[about.get("resample", 2)])


def sides(size: Any) -> list[int]:
    """Return a size as Hugging Face writes it: height and width, or the shorter side."""
    if not isinstance(size, dict):
        return [int(size)]
    return [int(size["shortest_edge"])] if size.get("shortest_edge") else [int(size["height"]), int(size["width"])]


def preset(resize: list[int], crop: list[int], mean: Any, std: Any, interpolation: str) -> Preset:
    """Return a preset, its interpolation by name."""
    from torchvision.transforms import InterpolationMode  # a second of every process that does without

    return Preset(resize, crop, tuple(mean), tuple(std), InterpolationMode(interpolation))
