"""Gets a model by its name: built in, torchvision, timm, a folder of Hugging Face's, an importable function."""

from __future__ import annotations

import importlib.util
import logging
import sys
import traceback
from pathlib import Path
from typing import Any

from torch import nn

from ..config import Config
from ..errors import EvopruneError, first_line
from ..objectives import MEASURES
from ..rules import ZOOS, function_named
from .models import MODELS
from .weights import load_weights, read_weights
from .zoo import without_auxiliary, zoo_model

log = logging.getLogger("evoprune")


def load_model(config: Config, outputs: int, channels: int) -> nn.Module:
    """Build the model that the settings name and load `config.weights` into it.

    Raises:
        EvopruneError: an unknown name, weights that do not fit, or a built-in model with neither weights nor training.
    """
    training = bool(config.train_epochs)
    if (config.model in MODELS or config.model.startswith("timm:")) and config.weights is None and not training:
        built_in = "built-in " * (config.model in MODELS)
        raise EvopruneError(f"weights: the {built_in}{config.model} has none of its own; give --weights FILE, "
                            f"or train it first with --train-epochs N")
    adapts = training and config.model.startswith("hf:")  # whose folder has weights for these very classes
    model = build_model(config.model, outputs, channels, pretrained=config.weights is None and (adapts or not training))
    if config.weights is not None:
        load_weights(model, without_auxiliary(config.model, read_weights(config.weights)), config.weights)
    return model


def build_model(spec: str, outputs: int, channels: int, pretrained: bool = False) -> nn.Module:
    """Return the model that `spec` names; `outputs` and `channels` count for built-in, torchvision and timm models only."""
    if spec in MODELS:
        try:
            return MODELS[spec](outputs, channels)
        except RuntimeError as error:  # for want of memory
            raise EvopruneError(f"model: {spec} of {outputs:,} outputs and {channels:,} channels cannot be made: "
                                f"{first_line(error)}") from None
    if spec.startswith(tuple(f"{zoo}:" for zoo in ZOOS)):
        return zoo_model(spec, outputs, channels, pretrained)
    if ":" not in spec:
        raise EvopruneError(f"model: found {spec!r}, expected {', '.join(MODELS)}, torchvision:NAME, timm:NAME, hf:DIR, "
                            f"package.module:function or FILE.py:function")
    model = call(spec, "model")
    if not isinstance(model, nn.Module):
        raise EvopruneError(f"model: {spec} returned {type(model).__name__}, expected a torch.nn.Module")
    return model


def names_function(spec: str) -> bool:
    """Return whether a model, data or a task are what a function returns."""
    return function_named(spec) is not None


def says_what_it_calls(spec: str, doing: str, otherwise: str) -> None:
    """Warn that `doing` something calls a function, if that is what `spec` names: a folder of somebody else's chose it."""
    if (function := function_named(spec)) is not None:
        log.warning("%s calls the function %s; %s calls nothing", doing, function, otherwise)


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
    if where.endswith(".py") and not Path(where).is_file():
        raise EvopruneError(f"{setting}: {where}: no such file, expected FILE.py:function")
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
        if isinstance(error, ModuleNotFoundError) and f"{where}.".startswith(f"{error.name}."):
            raise EvopruneError(f"{setting}: found no module {error.name}, neither in this folder nor installed; expected "
                                f"package.module:function or FILE.py:function") from None
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
