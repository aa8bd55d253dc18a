"""A run before its first generation: model and data checked against each other, the dense model measured, all recorded."""

from __future__ import annotations

import copy
import importlib.metadata
import json
import logging
import platform
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file
from torch import nn

from .checkpoint import Folder, fingerprint, load, to_safetensors
from .config import RESUMABLE, Config, EvopruneError, first_line
from .evaluation import Evaluator, batch_size_for, correct, dtype_of, private_copy, probe
from .front import wilson
from .layers import Layout, find_layers
from .named import build_model, load_model, load_weights, read_weights
from .prepared import fastest_batch_size
from .repair import BATCHES, IMAGES, LAST_IMAGES, default_repair
from .sources import constants, limit, load_data
from .splits import Data, Split, as_data, calibration
from .starts import default_start, rule_names
from .tuning import recipe_for, tune

PLACES = ("out", "overwrite", "data_dir", "weights", "model", "data")  # not part of a run's identity: what they name is
log = logging.getLogger("evoprune")


class TimeUp(Exception):
    """`max_seconds` have passed."""


@dataclass
class Run:
    """What stays the same from the first generation to the last."""

    config: Config
    model: nn.Module  # dense, on the CPU
    data: Data  # on the device
    layout: Layout
    batch_size: int  # of every number that is reported
    evaluator: Evaluator  # of the search split
    dense_accuracy: float
    identity: str  # of model, data and settings: a checkpoint belongs to it or is refused
    deadline: float  # of the monotonic clock

    @cached_property
    def last(self) -> Evaluator:
        """The evaluator of the points at the end."""
        return self.plain_evaluator(LAST_IMAGES)

    def plain_evaluator(self, images: int) -> Evaluator:
        """Return an evaluator of the model as the user has it, which repairs on so many images: more than the search takes."""
        return Evaluator(self.model, self.layout, self.data.search, self.batch_size, plain=True, repair=str(self.config.repair),
                         calibration=calibration_images(self.config, self.data, self.batch_size, images),
                         knowledge=self.config.knowledge)


def prepare(config: Config, model: nn.Module | str, data: Any, folder: Folder) -> Run:
    """Check that model and data go together, train the dense model if asked, measure it, and record it all.

    A run that is there already is left alone until everything has been checked.
    """
    device, dense_file = torch.device(config.device), folder.path / "dense.safetensors"
    old = folder.read_json("config.json") if folder.resuming else None
    resumed = folder.resuming and dense_file.exists()
    splits = get_data(config, data)
    net = get_model(config, model, splits, old, dense_file if resumed else None)
    splits = splits.to(device, dtype_of(net))
    layout = find_layers(net, config.layer, config.skip, config.include)
    outputs, activation = probe(net, splits.search, splits.classes)
    check_together(net, splits, config)
    batch_size = batch_size_for(activation, device)
    repair = config.repair or default_repair(net, config)
    config = replace(config, repair=repair,
                     start=default_start(config.knowledge, repair) if config.start == "auto" else config.start)
    about = {"settings": config.settings(), "command": (old or {}).get("command") or command_line(),
             "rebuildable": isinstance(model, str), "named_data": isinstance(data, str), "outputs": outputs,
             "channels": channels_of(splits), "splits": splits.sizes(), "mean": splits.search.mean, "std": splits.search.std,
             "layout": [vars(layer) for layer in layout], "weights": layout.total, "batch_size": batch_size,
             "threads": config.threads, "device": device_name(device), "versions": versions()}
    log.info("%s on %s: %s weights in %d layers, %s, %d torch thread%s; images: %s", config.model, config.data,
             f"{layout.weights:,}", len(layout), about["device"], config.threads, "s" * (config.threads != 1),
             ", ".join(f"{count:,} {name}" for name, count in splits.sizes().items() if count))
    if config.train_epochs and not resumed:
        if not folder.holds_run:
            folder.write("config.json", json.dumps(about, indent=2) + "\n")  # so that a killed training can be resumed
        train_dense(net, splits.train, config)
        find_layers(net, config.layer, config.skip, config.include)  # it may have ended in NaN
    accuracy, dense = measure_dense(net, splits, batch_size, outputs)
    about["search_batch_size"] = search_batch_size(config, net, layout, splits, batch_size, old)
    evaluator = make_evaluator(net, layout, splits, config, about["search_batch_size"], batch_size)
    if config.repair == "least-squares" and evaluator.repairer and (left := evaluator.repairer.left()):
        log.info("least squares leaves as they are: %s", ", ".join(left))
    about["dense"] = dense
    identity = identity_of(config, layout, batch_size, splits, net)
    if folder.resuming:
        check_checkpoint(folder, layout, identity, config)
    else:
        folder.clear()
    if not resumed:
        folder.write("dense.safetensors", to_safetensors(net.state_dict()))
    if not folder.finished(config.generations):
        folder.write("config.json", json.dumps(about, indent=2) + "\n")
    deadline = float("inf") if config.max_seconds is None else monotonic() + config.max_seconds
    return Run(config, net, splits, layout, batch_size, evaluator, accuracy, identity, deadline)


def check_together(net: nn.Module, splits: Data, config: Config) -> None:
    """Raise `EvopruneError` for what would fail only later: other splits' shapes, nothing to train, odd state dicts."""
    shape = splits.search.images.shape[1:]
    for name, split in (("train", splits.train), ("test", splits.test)):
        if split is not None and split.images.shape[1:] != shape:
            raise EvopruneError(f"data: {name} images have shape {tuple(split.images.shape[1:])}, search images {tuple(shape)}; "
                                f"expected the same")
    if config.trains and not any(p.requires_grad for p in net.parameters()):
        raise EvopruneError("model: training was asked for, but every parameter is frozen (requires_grad=False)")
    for name, value in net.state_dict().items():
        if not isinstance(value, torch.Tensor) or value.layout != torch.strided:
            raise EvopruneError(f"model: {name} of the state dict is no plain tensor, expected one")


def check_checkpoint(folder: Folder, layout: Layout, identity: str, config: Config) -> None:
    """Raise `EvopruneError` unless the newest checkpoint belongs to this run and is not beyond its generations."""
    state = load(folder.checkpoint, layout, identity)
    if state is not None and state.generation > config.generations:
        raise EvopruneError(f"generations: found {config.generations}, but the run in {folder.path} has had "
                            f"{state.generation}; expected at least that many")


def as_bytes_of(value: torch.Tensor) -> npt.NDArray[np.uint8]:
    """Return a tensor's bytes, whatever its type."""
    return value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def search_batch_size(config: Config, net: nn.Module, layout: Layout, splits: Data, usual: int,
                      old: dict[str, Any] | None) -> int:
    """Return the batch size of the search: recorded, given, timed, or the usual one."""
    if old and "search_batch_size" in old:
        return int(old["search_batch_size"])  # timing again might choose another
    if config.batch_size == "auto":
        fastest = fastest_batch_size(net, splits.search, usual, [layer.name for layer in layout])
        log.info("fastest batch size: %d", fastest)
        return fastest
    return usual if config.batch_size is None else int(config.batch_size)


def make_evaluator(net: nn.Module, layout: Layout, splits: Data, config: Config, batch_size: int, usual: int) -> Evaluator:
    """Return the evaluator of the search; `usual` is the batch size of the reports."""
    return Evaluator(net, layout, splits.search, batch_size, floor=config.accuracy_floor, precision=config.precision,
                     cache_mb=config.cache_mb, repair=str(config.repair), knowledge=config.knowledge,
                     calibration=calibration_images(config, splits, usual, IMAGES))


def calibration_images(config: Config, splits: Data, batch_size: int, images: int) -> Split | None:
    """Return what masks are repaired on, from the train split where there is one; no label of it is looked at."""
    if config.repair == "none":
        return None
    return calibration(splits.train or splits.search, min(images, BATCHES * batch_size), config.split_seed)


def identity_of(config: Config, layout: Layout, batch_size: int, splits: Data, net: nn.Module) -> str:
    """Return a hash of all that decides the results of a run."""
    calibrated = calibration_images(config, splits, batch_size, LAST_IMAGES)
    tensors = [tensor for split in (splits.search, splits.test, calibrated) if split is not None
               for tensor in (split.labels, split.images)]
    return fingerprint({k: v for k, v in config.settings().items() if k not in (*RESUMABLE, *PLACES)},
                       [vars(layer) for layer in layout], batch_size, *(as_bytes_of(t) for t in tensors),
                       *(as_bytes_of(value) for value in net.state_dict().values()))


def get_data(config: Config, data: Any) -> Data:
    """Return the splits of the run: named ones loaded, others cut; training needs a train split."""
    training = config.trains
    asked = rule_names(config.start) if config.start != "auto" else []
    fisher = "fisher" in (*asked, config.method.partition(":")[2])
    if isinstance(data, str):
        splits = load_data(config, training or fisher or config.repair == "least-squares")
    else:
        splits = limit(as_data(data, config.split_seed, *constants(config)), config)
    if training and splits.train is None:
        raise EvopruneError("data: found no train split, which train_epochs, finetune_epochs and total_epochs need; hand in "
                            "evoprune.Data(train, search, test), or leave training out")
    if fisher and splits.train is None:
        raise EvopruneError("start, method: found 'fisher', whose gradients need a train split, and no train split; hand in "
                            "evoprune.Data(train, search, test), or choose other rules")
    return splits


def get_model(config: Config, model: nn.Module | str, splits: Data, old: dict[str, Any] | None,
              dense: Path | None) -> nn.Module:
    """Return the dense model on the CPU: as the settings say, or with the values a run to resume started from."""
    if isinstance(model, str):
        outputs = (old or {}).get("outputs", splits.classes)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)  # a model that is trained first starts from the same values each time
            if not dense:
                return load_model(config, outputs, channels_of(splits))
            net = build_model(config.model, outputs, channels_of(splits))
        load_weights(net, load_file(dense), str(dense))
        return net
    net = private_copy(model)
    if config.weights is not None:
        load_weights(net, read_weights(config.weights), config.weights)
    if dense:
        stored = load_file(dense)
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

    def count(split: Split) -> int:
        try:
            return int(correct(model, split, batch_size))
        except (RuntimeError, IndexError, ValueError) as error:
            raise EvopruneError(f"data: some images do not go through the model: {first_line(error)}") from None

    accuracy = count(splits.search) / len(splits.search)
    dense: dict[str, float | None] = {"accuracy": accuracy, "test_accuracy": None, "test_low": None, "test_high": None}
    shown = ""
    if splits.test is not None:
        right = count(splits.test)
        low, high = wilson(right, len(splits.test))
        dense.update(test_accuracy=right / len(splits.test), test_low=low, test_high=high)
        shown = f", {100 * right / len(splits.test):.2f} % on the test split"
    log.info("dense accuracy: %.2f %% on the search split%s", 100 * accuracy, shown)
    if accuracy < 1.5 / outputs < 1:
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
