"""Weights from files as people have them, into a model. Nothing is unpickled: only tensors are read, with weights_only."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..errors import EvopruneError, first_line
from ..files import load_safetensors
from .models import set_state

STRANGE = "sparse, nested or quantised"  # tensors
WRAPPED = ("state_dict", "model_state_dict", "model")  # what a state dict is called in a training checkpoint
SHARDS = ".index.json"  # the end of what names the files of a sharded model


def read_weights(path: str) -> dict[str, Tensor]:
    """Read a state dict: of safetensors, whole or sharded, or as torch.save writes it, alone or in a training checkpoint.

    Raises:
        EvopruneError: no such file, a damaged one, or one that holds more than tensors and plain values.
    """
    if not Path(path).is_file():
        inside = [each.name for each in sorted(Path(path).glob("*")) if each.name.endswith((".safetensors", SHARDS, ".bin"))]
        raise EvopruneError(f"weights: {path}: " + (f"a folder, expected a file: {', '.join(inside[:3])}" if inside else
                                                    "no such file"))
    found = read_shards(path) if path.endswith(SHARDS) else read_file(path)
    for key in WRAPPED:
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    if not isinstance(found, dict) or not found or not all(
            isinstance(k, str) and isinstance(v, Tensor) for k, v in found.items()):
        raise EvopruneError(f"weights: {path}: found {type(found).__name__} of other things, expected a state dict "
                            f"of names and tensors")
    return found


def read_file(path: str) -> Any:
    """Return what a file of tensors holds."""
    try:
        if path.endswith(".safetensors"):
            return load_safetensors(Path(path))
        with warnings.catch_warnings(action="ignore"):  # of tensors that are refused
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001  # a damaged file raises whatever its parser happens to raise
        unsafe = "weights_only" in str(error)  # torch's own advice is to unpickle it all the same
        found = "holds more than tensors, or is no file of torch's" if unsafe else first_line(error)
        raise EvopruneError(f"weights: {path}: {found}; expected a plain state dict, as "
                            f"torch.save(model.state_dict(), ...) or safetensors write it") from None


def read_shards(path: str) -> dict[str, Any]:
    """Return the tensors of all files that an index names, which lie beside it."""
    try:
        named = json.loads(Path(path).read_text())["weight_map"]
        files = sorted(set(named.values()))
        if any(Path(file).name != file or file.endswith(SHARDS) for file in files):
            raise ValueError("a file that does not lie beside it")
    except Exception as error:  # noqa: BLE001  # anything may be in it
        raise EvopruneError(f"weights: {path}: {first_line(error)}; expected the index of a sharded model, with a weight_map of "
                            f"names and files") from None
    found: dict[str, Any] = {}
    for file in files:
        found |= read_weights(str(Path(path).with_name(file)))
    return found


def load_weights(model: nn.Module, state: dict[str, Tensor], where: str) -> None:
    """Load a state dict that must fit exactly, but for names of modules around the model (`module.`, `model._orig_mod.`), tied
    tensors, which need be there once, and counters of batch norms.

    Raises:
        EvopruneError: it does not fit: what is wrong with the first.
    """
    own = model.state_dict()
    if lacks := [name for name, value in own.items() if is_lazy(value) or value.is_meta]:
        raise EvopruneError(f"model: {lacks[0]} has no values yet, expected a model that has been run or loaded once")
    state = completed(model, own, without_prefix(own, state))
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
        set_state(model, state)
    except Exception as error:  # noqa: BLE001  # a model may have one of its own
        raise EvopruneError(f"weights: {where}: {first_line(error)}") from None


def without_prefix(own: dict[str, Tensor], state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict without what stands before every name of the model's `own`, as nn.DataParallel, torch.compile and
    Lightning put it there."""
    if own.keys() & state.keys() or not own:
        return state
    first = next(iter(own))
    prefixes = sorted({name.removesuffix(first) for name in state if name.endswith(f".{first}")})
    best = max(prefixes, key=lambda prefix: sum(prefix + name in state for name in own), default="")
    fits = all(best + name in state and state[best + name].shape == value.shape for name, value in own.items())
    if not (fits or all(name.startswith(best) for name in state)):
        return state  # of another model
    return {name.removeprefix(best): value for name, value in state.items()}


def completed(model: nn.Module, own: dict[str, Tensor], state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict with what need not be in a file: other names of tied parameters, and counts of batches."""
    every = dict(model.named_parameters(remove_duplicate=False))
    there = {id(every[name]): state[name] for name in state if name in every}
    missing = {name: there.get(id(every[name])) if name in every else own[name] if name.endswith(".num_batches_tracked") else None
               for name in own if name not in state}
    found = {name: value for name, value in missing.items() if value is not None}
    return {**state, **found} if found else state


def kind_of(value: Tensor) -> str:
    """Return what a tensor holds, as far as another may not be put in its place."""
    if value.layout != torch.strided or value.is_quantized or value.is_nested:
        return STRANGE
    return "floating point" if value.is_floating_point() else "complex" if value.is_complex() else \
        "bool" if value.dtype == torch.bool else "integer"
