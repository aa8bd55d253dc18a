"""A run before its first generation: settings settled, model and data checked against each other, all of it recorded."""

from __future__ import annotations

import copy
import hashlib
import importlib.metadata
import json
import logging
import platform
import re
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from time import monotonic
from typing import Any

import torch
from torch import nn

from .checkpoint import Folder, fingerprint
from .config import RESUMABLE, Config, EvopruneError, options
from .evaluation import Evaluator, batch_size_for, correct, probe
from .export import to_safetensors
from .front import wilson
from .layers import Layout, find_layers
from .models import MODELS
from .processes import workers_of
from .sources import constants, limit, load_data, load_model, load_weights, read_weights
from .splits import Data, Split, as_data
from .starts import rule_names
from .tuning import recipe_for, tune

PLACES = ("out", "overwrite", "data_dir", "weights", "model", "data")  # not part of a run's identity: what they name is
log = logging.getLogger("evoprune")


@dataclass
class Run:
    """What stays the same from the first generation to the last."""

    config: Config
    model: nn.Module  # dense, on the CPU
    data: Data  # on the device
    layout: Layout
    batch_size: int
    evaluator: Evaluator  # of the search split
    dense_accuracy: float
    identity: str  # of model, data and settings: a checkpoint belongs to it or is refused
    deadline: float  # of the monotonic clock


def settle(model: nn.Module | str, data: Any, resume: str | Path | None, given: dict[str, Any]) -> Config:
    """Return the settings of a run with all choices made; when resuming, the recorded ones with the allowed changes."""
    for name in given:
        if name not in options():
            raise EvopruneError(f"{name}: no such setting, expected one of {', '.join(options())}")
    names: dict[str, Any] = {"model": model if isinstance(model, str) else type(model).__name__,
             "data": data if isinstance(data, str) else type(data).__name__}
    if resume is not None:
        return settle_resumed(Path(resume), {**given, **names})
    config = Config(**names, **given)
    rule_names(config.start)
    if config.train_epochs is None:
        own = isinstance(model, str) and config.model in MODELS and config.data == "digits" and config.weights is None
        config = replace(config, train_epochs=30 if own else 0)
    if config.device == "cuda" and not torch.cuda.is_available():
        raise EvopruneError("device: found 'cuda', but torch sees no CUDA device; expected cpu or auto")
    device = config.device if config.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    cores = torch.get_num_threads()
    threads = cores if config.engine == "local" else max(1, cores // workers_of(config.workers))
    return replace(config, device=device, threads=config.threads or threads,
                   out=config.out or free_folder(config))


def settle_resumed(path: Path, asked: dict[str, Any]) -> Config:
    """Return the settings that the folder records, with those changed that may change."""
    try:
        recorded = json.loads((path / "config.json").read_text())["settings"]
        config = Config(**{**recorded, "out": str(path), "overwrite": False})
    except FileNotFoundError:
        raise EvopruneError(f"{path}: no run to resume (no config.json in it), expected the folder of a run") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EvopruneError(f"{path / 'config.json'}: {error}; expected the settings that the run wrote") from None
    for name, value in asked.items():
        default_name = name in ("model", "data") and value == options()[name].default
        if name == "out" or default_name or getattr(config, name) == value:
            continue
        if name not in RESUMABLE or (name == "generations" and config.finetune_epochs):
            raise EvopruneError(f"{name}: found {value!r}, but the run in {path} has {getattr(config, name)!r}; --resume "
                                f"may change {', '.join(RESUMABLE)} (generations only without finetune_epochs)")
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


def prepare(config: Config, model: nn.Module | str, data: Any, folder: Folder) -> Run:
    """Check that model and data go together, train the dense model if asked, measure it, and record it all.

    Nothing is written before everything has been checked.
    """
    device = torch.device(config.device)
    splits = get_data(config, data).to(device)
    old = folder.read_json("config.json") if folder.resuming else None
    dense_file = folder.path / "dense.safetensors"
    net = get_model(config, model, splits, old, dense_file if folder.resuming and dense_file.exists() else None)
    layout = find_layers(net, config.layer, config.skip, config.include)
    outputs, activation = probe(net, splits.search, splits.classes)
    batch_size = batch_size_for(activation, device)
    about = {"settings": config.settings(), "command": command_line(), "rebuildable": isinstance(model, str),
             "outputs": outputs, "channels": channels_of(splits), "splits": splits.sizes(), "mean": splits.search.mean,
             "std": splits.search.std, "layout": [vars(layer) for layer in layout], "weights": layout.total,
             "batch_size": batch_size, "threads": config.threads, "device": device_name(device), "versions": versions()}
    log.info("%s on %s: %s weights in %d layers, %s, %d torch thread%s; images: %s", config.model, config.data,
             f"{layout.weights:,}", len(layout), about["device"], config.threads, "s" * (config.threads != 1),
             ", ".join(f"{count:,} {name}" for name, count in splits.sizes().items() if count))
    if not folder.resuming:
        folder.clear()
        folder.write("config.json", json.dumps(about, indent=2) + "\n")
    if not (folder.resuming and dense_file.exists()):
        if config.train_epochs:
            train_dense(net, splits.train, config)
            find_layers(net, config.layer, config.skip, config.include)  # it may have ended in NaN
        folder.write("dense.safetensors", to_safetensors(net.state_dict()))
    evaluator = Evaluator(net, layout, splits.search, batch_size)
    accuracy, dense = measure_dense(net, splits, batch_size, outputs)
    folder.write("config.json", json.dumps({**about, "dense": dense}, indent=2) + "\n")
    identity = identity_of(config, layout, batch_size, splits, net)
    deadline = float("inf") if config.max_seconds is None else monotonic() + config.max_seconds
    return Run(config, net, splits, layout, batch_size, evaluator, accuracy, identity, deadline)


def identity_of(config: Config, layout: Layout, batch_size: int, splits: Data, net: nn.Module) -> str:
    """Return a hash of all that decides the results of a run."""
    return fingerprint({k: v for k, v in config.settings().items() if k not in (*RESUMABLE, *PLACES)},
                       [vars(layer) for layer in layout], batch_size, splits.search.labels.cpu().numpy(),
                       hashlib.sha256(splits.search.images.cpu().numpy().tobytes()).hexdigest(),
                       *(value.cpu().numpy() for value in net.state_dict().values()))


def get_data(config: Config, data: Any) -> Data:
    """Return the splits of the run: named ones loaded, others cut; training needs a train split."""
    training = bool(config.train_epochs or config.finetune_epochs)
    if isinstance(data, str):
        splits = load_data(config, training)
    else:
        splits = limit(as_data(data, config.split_seed, *constants(config)), config)
    if training and splits.train is None:
        raise EvopruneError("data: found no train split, which train_epochs and finetune_epochs need; hand in "
                            "evoprune.Data(train, search, test), or leave training out")
    return splits


def get_model(config: Config, model: nn.Module | str, splits: Data, old: dict[str, Any] | None,
              dense: Path | None) -> nn.Module:
    """Return the dense model on the CPU: as the settings say, or with the values a run to resume started from."""
    if isinstance(model, str):
        outputs = old["outputs"] if old else splits.classes
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)  # a model that is trained first starts from the same values each time
            return load_model(replace(config, weights=str(dense)) if dense else config, outputs, channels_of(splits))
    net = copy.deepcopy(model).cpu()
    if config.weights is not None:
        load_weights(net, read_weights(config.weights), config.weights)
    if dense:
        stored = read_weights(str(dense))
        own = net.state_dict()
        if not config.train_epochs and any(name not in own or not torch.equal(own[name], v) for name, v in stored.items()):
            raise EvopruneError(f"{dense}: holds another model than the one handed in; resume with the model that "
                                f"started the run, or choose a new out")
        load_weights(net, stored, str(dense))
    return net


def channels_of(splits: Data) -> int:
    return int(splits.search.images.shape[1]) if splits.search.images.dim() > 1 else 1


def train_dense(net: nn.Module, train: Split, config: Config) -> None:
    """Train the dense model in place."""
    recipe = recipe_for(net, config.train_epochs or 0, config.seed, config.learning_rate, config.augment)
    log.info("training the dense model: %d epochs of %s images", recipe.epochs, f"{len(train):,}")
    net.to(train.labels.device)
    tune(net, train, recipe, progress=training_progress("the dense model"))
    net.cpu()


def training_progress(what: str) -> Callable[[int, int], None]:
    """Return a callback for `tune` that says now and then how long the rest will take."""
    started = said = monotonic()

    def progress(step: int, steps: int) -> None:
        nonlocal said
        now = monotonic()
        if now - said >= 5 and step < steps:
            said = now
            left = clock((now - started) / step * (steps - step))
            log.info("training %s: %d of %d steps, %s left", what, step, steps, left)

    return progress


def measure_dense(net: nn.Module, splits: Data, batch_size: int, outputs: int) -> tuple[float, dict[str, float | None]]:
    """Measure, show and return the accuracy before pruning, with what config.json records of it."""
    model = copy.deepcopy(net).to(splits.search.labels.device).eval()
    accuracy = int(correct(model, splits.search, batch_size)) / len(splits.search)
    dense: dict[str, float | None] = {"accuracy": accuracy, "test_accuracy": None, "test_low": None, "test_high": None}
    shown = ""
    if splits.test is not None:
        right = int(correct(model, splits.test, batch_size))
        low, high = wilson(right, len(splits.test))
        dense.update(test_accuracy=right / len(splits.test), test_low=low, test_high=high)
        shown = f", {100 * right / len(splits.test):.2f} % on the test split"
    log.info("dense accuracy: %.2f %% on the search split%s", 100 * accuracy, shown)
    if accuracy < 1.5 / outputs:
        log.warning("warning: that is near chance (%.2f %%): are these the weights, the classes and the normalisation "
                    "(--mean, --std) that the model was trained with?", 100 / outputs)
    return accuracy, dense


def clock(seconds: float) -> str:
    """Return a duration as 0:07, 12:30 or 3:05:00."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def command_line() -> str | None:
    if not sys.argv[0].endswith("main.py"):
        return None
    return shlex.join(["python", "-m", "evoprune.main", *sys.argv[1:]])


def device_name(device: torch.device) -> str:
    """Return what the masks run on, as a person would call it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]} CPU" if names else platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    packages = ("evoprune", "torch", "torchvision", "numpy", "deap", "moocore")
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in packages}}
