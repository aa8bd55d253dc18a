"""The jobs of a run, and the run as each process has it: one that only evaluates builds it from the run's own files.

A job is a packed mask, and what comes back is two floats, or the bytes of repaired or trained values.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from time import monotonic

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from .checkpoint import Folder, fingerprint, to_safetensors
from .config import Config, EvopruneError
from .engines import Engine, Local
from .evaluation import Evaluator, Measurement, correct, dtype_of, masks
from .genome import Individual, Inherited, Result, from_masks, set_bits, sparsity
from .layers import Layout, find_layers
from .named import load_weights
from .paths import drop_dead
from .run import Run, TimeUp, get_data, get_model, identity_of, make_evaluator, training_progress
from .splits import Data
from .tuned import GENES, Job
from .tuning import Shrink, grown, hold_zeros, recipe_for, steps_an_epoch, tune
from .worker import take_slot

GROW_STEPS = 16  # of a job, whose images say by their gradients which weights grow; they count as steps
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
    evaluator = make_evaluator(net, layout, splits, config, about["search_batch_size"], batch_size)
    if config.finetune_epochs or config.total_epochs or config.repair == "least-squares":
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
            STAGES[self.identity] = make_evaluator(net, layout, run.data, run.config, run.evaluator.batch_size,
                                                   run.batch_size)
        return STAGES[self.identity]


@dataclass(frozen=True)
class Measure:
    """(accuracy, sparsity) of an individual, in whichever process this is called; stands for an `Evaluator`."""

    identity: str
    layer: OneLayer | None = None

    def __call__(self, individual: Individual) -> Measurement:
        return self.many([individual])[0]

    def many(self, individuals: Iterable[Individual]) -> list[Measurement]:
        """Return the objectives of each, in order."""
        return self.evaluator.many(individuals)

    def simplify(self, individual: Individual) -> None:
        """Drop the dead paths of a mask."""
        self.evaluator.simplify(individual)

    @property
    def weights(self) -> list[Tensor]:
        """The dense weights, flat."""
        return self.evaluator.weights

    @property
    def evaluator(self) -> Evaluator:
        """What measures in this process."""
        run = here(self.identity)
        return self.layer.evaluator(run) if self.layer else run.evaluator


@dataclass(frozen=True)
class Repair:
    """An individual repaired with more images than the search takes: right answers on the search split; on the test split, for
    the report alone (None where there is none, or where training follows); the state dict as the bytes of a safetensors file."""

    identity: str

    def __call__(self, individual: Individual) -> tuple[int, int | None, bytes]:
        run = here(self.identity)
        right, model = int(run.last.correct(individual)), run.last.prepared.model
        test = None if run.config.finetune_epochs else run.data.test
        return right, None if test is None else int(correct(model, test, run.batch_size)), to_safetensors(model.state_dict())


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
        kept = named_masks(individual, run.layout, torch.device("cpu"))
        seed = int(hashlib.sha256(f"{config.seed}:{key}".encode()).hexdigest()[:12], 16)
        recipe = recipe_for(net, config.finetune_epochs, seed, config.learning_rate, config.augment)
        tune(net, run.data.train, recipe, kept, training_progress(what))
        return to_safetensors(net.state_dict())


@dataclass(frozen=True)
class Tune:
    """What a tuned run's `Job` becomes: its values grow, train and are pruned, and are measured on the search split."""

    identity: str

    def __call__(self, job: Job) -> Result:
        run = here(self.identity)
        train = run.data.train
        assert train is not None
        net = with_values(run, job.individual).to(train.labels.device)
        kept = named_masks(job.individual, run.layout, train.labels.device)
        recipe = recipe_for(net, 0, job.seed, run.config.learning_rate, run.config.augment)
        steps, more = job.steps, min(round(job.growth * job.kept), run.layout.weights) - sum(int(m.sum()) for m in kept.values())
        if more > 0 and steps > GROW_STEPS:
            kept = grown(net, train, kept, more, GROW_STEPS * recipe.batch_size, job.seed)
            steps -= GROW_STEPS
        recipe = replace(recipe, epochs=steps / steps_an_epoch(len(train), recipe.batch_size),
                         learning_rate=recipe.learning_rate * job.learning_rate)
        shrink = Shrink(job.kept, job.saliency, job.until, pace=job.pace, mix=job.mix)
        kept = tune(net, train, recipe, kept, training_progress(job.what), shrink)
        individual = from_masks((mask.cpu().numpy() for mask in kept.values()), job.individual.origin)
        for i, genes in drop_dead(individual, run.layout, run.evaluator.channels).items():
            set_bits(individual, i, genes)
        kept = named_masks(individual, run.layout, train.labels.device)
        hold_zeros([net.get_parameter(name) for name in kept], kept)
        right = int(correct(net.eval(), run.data.search, run.batch_size))
        return Result((right / len(run.data.search), sparsity(individual, run.layout)), list(individual), values_of(net, kept))


def named_masks(individual: Individual, layout: Layout, device: torch.device) -> dict[str, Tensor]:
    """Return a bool mask a layer by name, of the parameter's shape."""
    return {layer.name: mask.expand(layer.shape) for layer, mask in zip(layout, masks(individual, layout, device))}


def values_of(net: nn.Module, masks: Mapping[str, Tensor]) -> Inherited:
    """Return the values of a trained model as arrays: those that the masks keep, in order, and everything else whole."""
    state = {**dict(net.named_parameters()), **dict(net.named_buffers())}
    values = {name: value.detach()[masks[name]] if name in masks else value.detach() for name, value in state.items()}
    return {name: (value.float() if value.is_floating_point() else value).cpu().numpy() for name, value in values.items()}


def with_values(run: Run, individual: Individual) -> nn.Module:
    """Return the run's model with the values that `values_of` took, zeros where it is pruned; the dense values where the
    individual has inherited none."""
    net = copy.deepcopy(run.model)
    kept = named_masks(individual, run.layout, torch.device("cpu"))
    with torch.no_grad():
        for name, value in {**dict(net.named_parameters()), **dict(net.named_buffers())}.items():
            if name in individual.inherited:
                inherited = torch.from_numpy(individual.inherited[name].copy()).to(value.dtype)
                if name in kept:
                    value.zero_()[kept[name]] = inherited
                else:
                    value.copy_(inherited)
            elif name in kept:
                value.masked_fill_(~kept[name], 0)
    return net


def map_kept(engine: Local | Engine, folder: Folder, run: Run, function: Callable[[Job], Result],
             jobs: Sequence[Job]) -> list[Result | None]:
    """Return what jobs become, in order; each is kept as soon as it has ended, so that a resumed run need not repeat it.

    Raises:
        TimeUp: `max_seconds` have passed before the last of them.
    """
    keys = [key_of(job) for job in jobs]
    results = [None if (kept := folder.read_trained(key, run.identity)) is None else unpacked(kept) for key in keys]
    missing = [i for i, result in enumerate(results) if result is None]
    left = len(missing)

    def arrived(i: int, result: Result | None) -> None:
        nonlocal left
        left -= 1
        results[missing[i]] = result
        if result is not None:
            folder.write_trained(keys[missing[i]], run.identity, packed(result))
        if left and monotonic() > run.deadline:
            raise TimeUp

    engine.map(function, [jobs[i] for i in missing], arrived)
    return results


def key_of(job: Job) -> str:
    """Return a hash of all that decides what a job becomes."""
    inherited = {name: value for name, value in job.individual.inherited.items() if name != GENES}
    numbers = [job.kept, job.steps, job.seed, *job.genes.tolist(), job.saliency, list(inherited)]
    return fingerprint(numbers, *job.individual, *inherited.values())


def packed(result: Result) -> dict[str, Tensor]:
    """Return a result as tensors."""
    assert result.bits is not None and result.inherited is not None
    return {"objectives": torch.tensor(result.objectives, dtype=torch.float64),
            **{f"bits {i}": torch.from_numpy(bits) for i, bits in enumerate(result.bits)},
            **{f"value {name}": torch.from_numpy(np.atleast_1d(value)) for name, value in result.inherited.items()}}


def unpacked(tensors: dict[str, Tensor]) -> Result:
    """Return the result that `packed` took apart."""
    accuracy, sparsity = tensors.pop("objectives").tolist()
    bits = [tensors[f"bits {i}"].numpy() for i in range(sum(name.startswith("bits ") for name in tensors))]
    values = {name.removeprefix("value "): value.numpy() for name, value in tensors.items() if name.startswith("value ")}
    return Result((accuracy, sparsity), bits, values)


def here(identity: str) -> Run:
    """Return the run as this process has it, with its number of threads, which torch counts for each calling thread."""
    run = RUNS[identity]
    if torch.get_num_threads() != run.config.threads:
        torch.set_num_threads(run.config.threads or 1)
    return run
