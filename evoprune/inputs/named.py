"""Gets a model by its name: built in, torchvision, an importable function; and its weights from a file.

Nothing is unpickled: .pt and .pth are read with weights_only.
"""

from __future__ import annotations

import importlib.util
import logging
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..config import Config
from ..errors import EvopruneError, first_line
from ..files import load_safetensors
from ..objectives import MEASURES
from .models import MODELS

STRANGE = "sparse, nested or quantised"  # tensors
log = logging.getLogger("evoprune")


def load_model(config: Config, outputs: int, channels: int) -> nn.Module:
    """Build the model that the settings name and load `config.weights` into it.

    Raises:
        EvopruneError: an unknown name, weights that do not fit, or a built-in model with neither weights nor training.
    """
    training = bool(config.train_epochs)
    if config.model in MODELS and config.weights is None and not training:
        raise EvopruneError(f"weights: the built-in {config.model} has none of its own; give --weights FILE, "
                            f"or train it first with --train-epochs N")
    model = build_model(config.model, outputs, channels, pretrained=config.weights is None and not training)
    if config.weights is not None:
        load_weights(model, read_weights(config.weights), config.weights)
    return model


def build_model(spec: str, outputs: int, channels: int, pretrained: bool = False) -> nn.Module:
    """Return the model that `spec` names; `outputs` and `channels` count for built-in and torchvision models only."""
    if spec in MODELS:
        try:
            return MODELS[spec](outputs, channels)
        except RuntimeError as error:  # for want of memory
            raise EvopruneError(f"model: {spec} of {outputs:,} outputs and {channels:,} channels cannot be made: "
                                f"{first_line(error)}") from None
    if spec.startswith("torchvision:"):
        return torchvision_model(spec.partition(":")[2], outputs, pretrained)
    if ":" not in spec:
        raise EvopruneError(f"model: found {spec!r}, expected {', '.join(MODELS)}, torchvision:NAME, "
                            f"package.module:function or FILE.py:function")
    model = call(spec, "model")
    if not isinstance(model, nn.Module):
        raise EvopruneError(f"model: {spec} returned {type(model).__name__}, expected a torch.nn.Module")
    return model


def says_what_it_calls(spec: str) -> None:
    """Warn that building a model calls a function, if that is what `spec` names: a folder of somebody else's chose it."""
    where, _, name = spec.rpartition(":")
    if where and where != "torchvision":
        file = f"file {Path(where).resolve()}" if where.endswith(".py") else f"module {where}"
        log.warning("building the model calls the function %s of the %s; load_front(dir, model=mine) calls nothing", name, file)


def torchvision_model(name: str, outputs: int, pretrained: bool) -> nn.Module:
    from torchvision import models

    if name not in models.list_models(module=models):
        near = [n for n in models.list_models(module=models) if n[:4] == name[:4]] or models.list_models(module=models)
        raise EvopruneError(f"model: torchvision has no classifier {name!r}; there are {', '.join(near)}")
    if not pretrained:
        model: nn.Module = models.get_model(name, weights=None, num_classes=outputs)
        return model
    try:
        return models.get_model(name, weights="DEFAULT")  # type: ignore[no-any-return]  # torchvision is untyped
    except OSError as error:
        raise EvopruneError(f"model: the weights of torchvision:{name} could not be fetched ({first_line(error)}); "
                            f"give a file of them with --weights FILE") from None


def torchvision_preset(name: str) -> Any:
    """Return the transforms of a torchvision model's default weights, or None for a model that has none."""
    from torchvision import models

    try:
        return models.get_model_weights(name).DEFAULT.transforms()
    except (ValueError, AttributeError):  # an unknown name: building the model will say so
        return None


def read_weights(path: str) -> dict[str, Tensor]:
    """Read a state dict; one inside a training checkpoint is found."""
    if not Path(path).is_file():
        raise EvopruneError(f"weights: {path}: no such file")
    try:
        if path.endswith(".safetensors"):
            found: Any = load_safetensors(Path(path))
        else:
            with warnings.catch_warnings(action="ignore"):  # of tensors that are refused
                found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001  # a damaged file raises whatever its parser happens to raise
        unsafe = "weights_only" in str(error)  # torch's own advice is to unpickle it all the same
        found = "holds more than tensors, or is no file of torch's" if unsafe else first_line(error)
        raise EvopruneError(f"weights: {path}: {found}; expected a plain state dict, as "
                            f"torch.save(model.state_dict(), ...) or safetensors write it") from None
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    if not isinstance(found, dict) or not found or not all(
            isinstance(k, str) and isinstance(v, Tensor) for k, v in found.items()):
        raise EvopruneError(f"weights: {path}: found {type(found).__name__} of other things, expected a state dict "
                            f"of names and tensors")
    return found


def load_weights(model: nn.Module, state: dict[str, Tensor], where: str) -> None:
    """Load a state dict that must fit exactly, but for a leading `module.` (of nn.DataParallel) that is dropped."""
    own = model.state_dict()
    if not own.keys() & state.keys():
        state = {name.removeprefix("module."): value for name, value in state.items()}
    if lacks := [name for name, value in own.items() if is_lazy(value) or value.is_meta]:
        raise EvopruneError(f"model: {lacks[0]} has no values yet, expected a model that has been run or loaded once")
    wrong = [f"{name} is {kind_of(state[name])} in the file, {kind_of(own[name])} in the model"
             for name in own if name in state and kind_of(own[name]) != kind_of(state[name])]
    wrong = wrong or [f"{name} is {tuple(state[name].shape)} in the file, {tuple(own[name].shape)} in the model"
                      for name in own if name in state and own[name].shape != state[name].shape]
    missing = [f"{name} is missing" for name in own if name not in state]
    extra = [f"the model has no {name}" for name in state if name not in own]
    if problems := wrong + missing + extra:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise EvopruneError(f"weights: {where}: {problems[0]}{more}; expected the state dict of this model")
    try:
        model.load_state_dict(state)
    except Exception as error:  # noqa: BLE001  # a model may have one of its own
        raise EvopruneError(f"weights: {where}: {first_line(error)}") from None


def kind_of(value: Tensor) -> str:
    """Return what a tensor holds, as far as another may not be put in its place."""
    if value.layout != torch.strided or value.is_quantized or value.is_nested:
        return STRANGE
    return "floating point" if value.is_floating_point() else "complex" if value.is_complex() else \
        "bool" if value.dtype == torch.bool else "integer"


def load_objectives(text: str) -> None:
    """Import the functions that --objectives names, whose decorator declares what they measure.

    Raises:
        EvopruneError: there is no such function, or it measures no objective.
    """
    for spec in [part.strip() for part in text.split(",") if ":" in part]:
        function = find(spec, "objectives")
        name = spec.rpartition(":")[2]
        if MEASURES.get(name) is not function:
            raise EvopruneError(f"objectives: {spec} measures no objective; declare it with "
                                f"@evoprune.objectives.measures(evoprune.objectives.Objective({name!r}, ...))")


def call(spec: str, setting: str) -> Any:
    """Import `package.module:function` or `FILE.py:function` and return what the function returns."""
    function = find(spec, setting)
    try:
        return function()
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # noqa: BLE001  # the user's code
        raise EvopruneError(f"{setting}: {spec}: {told(error)}") from None


def find(spec: str, setting: str) -> Any:
    """Import `package.module:function` or `FILE.py:function` and return the function."""
    where, _, name = spec.rpartition(":")
    if not where or not name or where.startswith("."):
        raise EvopruneError(f"{setting}: found {spec!r}, expected package.module:function or FILE.py:function")
    try:
        if where.endswith(".py"):
            file = importlib.util.spec_from_file_location(Path(where).stem, where)
            assert file is not None and file.loader is not None
            module = importlib.util.module_from_spec(file)
            sys.modules.setdefault(Path(where).stem, module)  # so that its classes can be pickled and looked up
            file.loader.exec_module(module)
        else:
            module = importlib.import_module(where)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # noqa: BLE001  # the user's code
        raise EvopruneError(f"{setting}: {spec}: {told(error)}") from None
    function = getattr(module, name, None)
    if not callable(function):
        there = [n for n, v in vars(module).items() if callable(v) and getattr(v, "__module__", "") == module.__name__]
        raise EvopruneError(f"{setting}: {where} has no function {name!r}; there are {', '.join(there) or 'none'}")
    return function


def told(error: BaseException) -> str:
    """Return what an exception of the user's code says, and where it was raised."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{first_line(error)} ({Path(last.filename).name}, line {last.lineno})"
