"""The run as each process has it: one that only evaluates builds it from the run's own files."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from ..engines.worker import take_slot
from ..errors import EvopruneError
from ..evaluation.accuracy import dtype_of
from ..inputs.named import load_objectives
from ..inputs.splits import Data
from ..inputs.tasks import task_of
from ..results.folder import Folder
from ..results.record import read_record
from ..results.written import CHECKPOINT, CONFIG, DENSE, TRAINED
from ..values.fast import has_bf16
from .prepare import get_data, get_model, identity_of, layers_of
from .run import Run, keep_back, make_evaluator

RUNS: dict[str, Run] = {}  # of this process, by identity


@dataclass(frozen=True)
class RunBuilder:
    """Builds a run in a worker process, once."""

    folder: str
    directory: str  # that relative paths of the settings start from
    identity: str
    model: nn.Module | None = None  # handed in, not named; travels to workers of `processes` only
    data: Data | None = None
    more_epochs: int | None = None  # that a finished run gets, which its folder knows when the first has been trained

    def __call__(self) -> None:
        """Build the run unless this process has it; one that stays may have it from another folder, or with other epochs.

        Raises:
            EvopruneError: the model or data are not those of the process that searches.
        """
        there = RUNS.get(self.identity)
        if there is None or (there.config.more_epochs, there.trained_at) != (self.more_epochs, kept_in(self.folder)):
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


def builder_of(run: Run, folder: Folder, named_model: bool, named_data: bool) -> RunBuilder:
    """Return what workers build the run from."""
    return RunBuilder(str(folder.path.resolve()), os.getcwd(), run.identity, None if named_model else run.model,
                      None if named_data else run.data.to(torch.device("cpu")), run.config.more_epochs)


def rebuild(start: RunBuilder) -> Run:
    """Return the run as its folder describes it, on this process's device."""
    path = Path(start.folder)
    record = read_record(path / CONFIG)
    config = replace(record.config, more_epochs=start.more_epochs)
    load_objectives(config.objectives)
    assert record.search_batch_size is not None
    torch.set_num_threads(config.threads or 1)
    if config.device == "cuda":
        torch.cuda.set_device(take_slot() % torch.cuda.device_count())
    if config.train_precision == "bf16" and not has_bf16(torch.device(config.device)):
        raise EvopruneError(f"train_precision: the run trains in bf16, which {platform.node()} has not; give it other workers")
    splits = start.data or get_data(config, config.data)
    net = start.model or get_model(config, config.model, splits, record, path / DENSE)
    splits = splits.to(torch.device(config.device), dtype_of(net)).for_task(task_of(config.task))
    if start.data is None:
        splits, _ = keep_back(config, splits)
    layout = layers_of(net, config, record.unused)
    identity = identity_of(config, layout, (record.batch_size, record.search_batch_size), splits, net)
    if identity != start.identity:
        raise EvopruneError(f"the model or data that a worker on {platform.node()} reads are not those of {path}; give every "
                            f"worker the same files and the same evoprune")
    evaluator = make_evaluator(net, layout, splits, config, record.search_batch_size, record.batch_size)
    if config.repair == "least-squares":
        torch.optim.LBFGS([torch.zeros(1)])  # the first one imports 900 modules: seconds that are no job's (--job-timeout)
    return Run(config, net, splits, layout, record.batch_size, evaluator, record.measured, identity, float("inf"),
               trained_at=kept_in(start.folder))


def kept_in(folder: str) -> Path:
    """Return where what jobs have trained is kept."""
    return Path(folder, CHECKPOINT, TRAINED)


def registered_run(identity: str) -> Run:
    """Return the run as this process has it, with its number of threads, which torch counts for each calling thread."""
    run = RUNS[identity]
    if torch.get_num_threads() != run.config.threads:
        torch.set_num_threads(run.config.threads or 1)
    return run
