"""The settings of a run, settled: defaults that depend on others, the device, the folder, what resuming may change."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from .config import RESUMABLE, Config, EvopruneError, first_line, options
from .engines import check_runs
from .models import MODELS
from .processes import workers_of
from .splits import Data
from .starts import check_rules
from .tuned import FIRST_SHARE, children_of

TUNED_POPULATION, CHILD_EPOCHS = 16, 3.0  # of a tuned run, unless given


def settle(model: nn.Module | str, data: Any, resume: str | Path | None, given: dict[str, Any]) -> Config:
    """Return the settings of a run with all choices made; when resuming, the recorded ones with the allowed changes.

    Raises:
        EvopruneError: a setting that does not exist or cannot be, or one that resuming may not change.
    """
    for name in given:
        if name not in options():
            raise EvopruneError(f"{name}: no such setting, expected one of {', '.join(options())}")
    if not isinstance(model, (str, nn.Module)):
        raise EvopruneError(f"model: found {model!r:.60}, expected an nn.Module or a name as for --model")
    given = {name: plain(value) for name, value in given.items()}
    names: dict[str, Any] = {"model": model if isinstance(model, str) else type(model).__name__,
             "data": data if isinstance(data, str) else type(data).__name__}
    named = isinstance(model, str) and isinstance(data, str)
    if resume is not None:
        config = settle_resumed(Path(resume), {"model": model, "data": data}, {**given, **names})
        check_runs(config, named)
        return with_a_device(config)
    config = Config(**names, **given)
    check_rules(config)
    check_runs(config, named)
    if config.train_epochs is None:
        own = isinstance(model, str) and config.model in MODELS and config.data == "digits" and config.weights is None
        config = replace(config, train_epochs=30 if own else 0)
    if not isinstance(data, str) and (config.image_size or (isinstance(data, Data) and (config.mean or config.std))):
        raise EvopruneError("image_size, mean, std: found together with data handed in; resize it before, and give mean and "
                            "std to evoprune.Data")
    if config.method != "evolve":
        config = replace(config, generations=0)
    elif config.total_epochs is not None:
        config = with_tuned_sizes(config, given)
    cores = 1 if config.model == "lenet" else torch.get_num_threads()  # 2.5 times as long with 2 on a busy machine
    threads = cores if config.engine == "local" else max(1, cores // workers_of(config.workers))
    return with_a_device(replace(config, threads=config.threads or threads,
                                 out=config.out or free_folder(config)))


def with_tuned_sizes(config: Config, given: dict[str, Any]) -> Config:
    """Return the settings of a tuned run with a population and generations, unless they were given, that let each child
    of a parent train for `CHILD_EPOCHS`."""
    population, epochs = int(given.get("population", TUNED_POPULATION)), config.total_epochs or 0.0
    config = replace(config, population=population)
    later = round((1 - FIRST_SHARE) * epochs / CHILD_EPOCHS / children_of(config))
    return replace(config, generations=int(given.get("generations", 1 + later)))


def plain(value: Any) -> Any:
    """Return paths and numpy numbers as what JSON has for them."""
    return str(value) if isinstance(value, Path) else value.item() if isinstance(value, np.generic) else value


def with_a_device(config: Config) -> Config:
    """Return the settings with the device that there is."""
    if config.device == "cuda" and not torch.cuda.is_available():
        raise EvopruneError("device: found 'cuda', but torch sees no CUDA device; expected cpu or auto")
    if config.device != "auto":
        return config
    return replace(config, device="cuda" if torch.cuda.is_available() else "cpu")


def settle_resumed(path: Path, handed: dict[str, Any], asked: dict[str, Any]) -> Config:
    """Return the settings that the folder records, with those changed that may change."""
    try:
        content = json.loads((path / "config.json").read_text())
        recorded = content["settings"]
        config = Config(**{**recorded, "out": str(path), "overwrite": False, "threads": int(recorded["threads"])})
    except FileNotFoundError:
        raise EvopruneError(f"{path}: no run to resume (no config.json in it), expected the folder of a run") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EvopruneError(f"{path / 'config.json'}: {first_line(error)}; expected the settings that the run wrote") from None
    for name, known in (("model", "rebuildable"), ("data", "named_data")):
        if not content.get(known, True) and isinstance(handed[name], str):
            raise EvopruneError(f"{name}: the run in {path} was started with one handed in ({getattr(config, name)}); resume "
                                f"with evoprune.prune(model, data, resume={str(path)!r})")
    for name, value in asked.items():
        if (name in ("model", "data") and value == options()[name].default) or getattr(config, name) == value:
            continue
        if name == "out":
            raise EvopruneError(f"out: found {value!r} together with --resume {path}; a run goes on in its own folder")
        if name not in RESUMABLE or (name == "generations" and (config.finetune_epochs or config.layerwise)):
            raise EvopruneError(f"{name}: found {value!r}, but the run in {path} has {getattr(config, name)!r}; --resume "
                                f"may change {', '.join(RESUMABLE)} (generations only without finetune_epochs, layerwise)")
        config = replace(config, **{name: value})
    return replace(config, max_seconds=asked.get("max_seconds"))


def free_folder(config: Config) -> str:
    """Return results/MODEL-DATA, numbered from 2 if it is taken."""
    def short(spec: str) -> str:
        kind, _, rest = spec.rpartition(":")
        word = Path(rest).resolve().stem if kind in ("folder", "npz") else rest
        return re.sub(r"[^a-z0-9_.]+", "-", word.lower()).strip("-.") or "run"

    path = name = f"results/{short(config.model)}-{short(config.data)}"
    number = 1
    while Path(path).exists():
        number += 1
        path = f"{name}-{number}"
    return path
