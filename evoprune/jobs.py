"""The jobs of a run, and the run as each process has it: one that only evaluates builds it from the run's own files.

A job is a packed mask, and what comes back is two floats, or the bytes of trained values.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import platform
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from .checkpoint import Folder, to_safetensors
from .config import Config, EvopruneError
from .evaluation import Evaluator, dtype_of, masks
from .genome import Individual
from .layers import Layout, find_layers
from .run import Run, get_data, get_model, identity_of, make_evaluator, training_progress
from .sources import load_weights
from .splits import Data
from .tuning import recipe_for, tune
from .worker import take_slot

RUNS: dict[str, Run] = {}  # of this process, by identity
STAGES: dict[str, Evaluator] = {}  # likewise, at most one


@dataclass(frozen=True)
class Start:
    """Builds a run in a worker process, once."""

    folder: str
    directory: str  # that relative paths of the settings start from
    identity: str
    model: nn.Module | None = None  # handed in, not named; travels to workers of `processes` only
    data: Data | None = None

    def __call__(self) -> None:
        """Build the run unless this process has it.

        Raises:
            EvopruneError: the model or data are not those of the process that searches.
        """
        if self.identity not in RUNS:
            os.chdir(self.directory)
            RUNS[self.identity] = rebuild(self)


@contextmanager
def registered(run: Run) -> Iterator[None]:
    """Let jobs that run in this process find the run, for a while."""
    RUNS[run.identity] = run
    try:
        yield
    finally:
        del RUNS[run.identity]


def start_of(run: Run, folder: Folder, named_model: bool, named_data: bool) -> Start:
    """Return what workers build the run from."""
    return Start(str(folder.path.resolve()), os.getcwd(), run.identity, None if named_model else run.model,
                 None if named_data else run.data.to(torch.device("cpu")))


def rebuild(start: Start) -> Run:
    """Return the run as its folder describes it, on this process's device."""
    path = Path(start.folder)
    about = json.loads((path / "config.json").read_text())
    config = Config(**about["settings"])
    torch.set_num_threads(config.threads or 1)
    if config.device == "cuda":
        torch.cuda.set_device(take_slot() % torch.cuda.device_count())
    splits = start.data or get_data(config, config.data)
    net = start.model or get_model(config, config.model, splits, about, path / "dense.safetensors")
    splits = splits.to(torch.device(config.device), dtype_of(net))
    layout = find_layers(net, config.layer, config.skip, config.include)
    batch_size = about["batch_size"]
    identity = identity_of(config, layout, batch_size, splits, net)
    if identity != start.identity:
        raise EvopruneError(f"the model or data that a worker on {platform.node()} reads are not those of {path}; give every "
                            f"worker the same files and the same evoprune")
    evaluator = make_evaluator(net, layout, splits, config, about["search_batch_size"])
    if config.finetune_epochs:
        torch.optim.SGD([torch.zeros(1)])  # the first one imports 900 modules: seconds that are no job's (--job-timeout)
    return Run(config, net, splits, layout, batch_size, evaluator, about["dense"]["accuracy"], identity, float("inf"))


@dataclass(frozen=True)
class OneLayer:
    """One layer of the run's model with the values that an earlier stage of --layerwise left in a file."""

    identity: str
    file: str
    layer: int
    gone: int  # weights of the other layers that are pruned

    def evaluator(self, run: Run) -> Evaluator:
        """Return the evaluator of this stage; a process keeps that of the newest."""
        if self.identity not in STAGES:
            STAGES.clear()
            net = copy.deepcopy(run.model)
            load_weights(net, load_file(self.file), self.file)
            layout = Layout((run.layout[self.layer],), run.layout.total, self.gone)
            STAGES[self.identity] = make_evaluator(net, layout, run.data, run.config, run.evaluator.batch_size)
        return STAGES[self.identity]


@dataclass(frozen=True)
class Measure:
    """(accuracy, sparsity) of an individual, in whichever process this is called; stands for an `Evaluator`."""

    identity: str
    layer: OneLayer | None = None

    def __call__(self, individual: Individual) -> tuple[float, float]:
        return self.many([individual])[0]

    def many(self, individuals: Iterable[Individual]) -> list[tuple[float, float]]:
        """Return the objectives of each, in order."""
        run = here(self.identity)
        return (self.layer.evaluator(run) if self.layer else run.evaluator).many(individuals)


@dataclass(frozen=True)
class Train:
    """The state dict of an individual trained from the dense values, its zeros held, as the bytes of a safetensors file."""

    identity: str

    def __call__(self, job: tuple[Individual, str]) -> bytes:
        individual, what = job
        run = here(self.identity)
        config, key = run.config, individual.key().hex()
        assert run.data.train is not None
        net = copy.deepcopy(run.model).to(config.device)
        kept = {layer.name: mask.expand(layer.shape) for layer, mask in zip(run.layout, masks(individual, run.layout))}
        seed = int(hashlib.sha256(f"{config.seed}:{key}".encode()).hexdigest()[:12], 16)
        recipe = recipe_for(net, config.finetune_epochs, seed, config.learning_rate, config.augment)
        tune(net, run.data.train, recipe, kept, training_progress(what))
        return to_safetensors(net.state_dict())


def here(identity: str) -> Run:
    """Return the run as this process has it, with its number of threads, which torch counts for each calling thread."""
    run = RUNS[identity]
    if torch.get_num_threads() != run.config.threads:
        torch.set_num_threads(run.config.threads or 1)
    return run
