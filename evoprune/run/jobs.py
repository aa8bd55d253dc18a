"""The jobs of a run: what travels to workers, and what comes back.

A job is a packed mask, and what comes back is two floats, or the bytes of repaired or trained values.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy.typing as npt
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ..engines.engine import Engine, Local
from ..engines.worker import ignore
from ..errors import Stopped
from ..evaluation.evaluator import Evaluator
from ..evolution.tuned import GENTLE, Job
from ..files import fingerprint, to_safetensors
from ..inputs.models import copied, set_state
from ..inputs.splits import Split, example_sums, score
from ..inputs.weights import load_weights
from ..masks.genome import Individual, Measurement, Result, set_bits
from ..masks.layout import Layout
from ..masks.paths import drop_dead
from ..masks.tensors import from_named, named_masks
from ..results.folder import Folder
from ..results.points import Pruned
from ..values.inherited import packed, unpacked, values_of, with_values
from ..values.training import Shrink, grown, hold_zeros, recipe_for, steps_an_epoch, tune
from .progress import training_progress
from .rebuild import registered_run
from .run import Run, late, make_evaluator

Tested = tuple[float, float, float, npt.NDArray[Any]]  # a score, its interval, and what each image contributes
GROW_STEPS = 16  # of a job, whose images say by their gradients which weights grow; they count as steps
FACTS = "evoprune/"  # before the names of what a repaired point measured, beside its state dict
STOPPED = b""  # what a training returns that has to go on after --resume
BEGUN: set[float] = set()  # when the newest training of this process had to end
STAGES: dict[str, Evaluator] = {}  # of this process, by identity, at most one


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
            net = copied(run.model)
            load_weights(net, load_file(self.file), self.file)
            layout = Layout((run.layout[self.layer],), run.layout.total, self.gone)
            STAGES[self.identity] = make_evaluator(net, layout, run.data, run.config, run.evaluator.batch_size,
                                                   run.batch_size)
        return STAGES[self.identity]


@dataclass(frozen=True)
class RunEvaluator:
    """The values of the objectives of an individual, in whichever process this is called; stands for an `Evaluator`."""

    identity: str
    layer: OneLayer | None = None

    def __call__(self, individual: Individual) -> Measurement:
        return self.many([individual])[0]

    def many(self, individuals: Iterable[Individual], progress: Callable[[int, int], None] = ignore) -> list[Measurement]:
        """Return the objectives of each, in order."""
        return self.evaluator.many(individuals, progress)

    def simplify(self, individual: Individual) -> None:
        """Drop the dead paths of a mask."""
        self.evaluator.simplify(individual)

    @property
    def weights(self) -> list[Tensor]:
        """The dense weights, shaped like the layers."""
        return self.evaluator.weights

    @property
    def evaluator(self) -> Evaluator:
        """What measures in this process."""
        run = registered_run(self.identity)
        return self.layer.evaluator(run) if self.layer else run.evaluator


@dataclass(frozen=True)
class RepairPoint:
    """An individual repaired with more images than the search takes: its state dict and what it measured (`unpacked_point`), as
    the bytes of a safetensors file; `STOPPED` where there was no time for it."""

    identity: str
    until: float  # time of day

    def __call__(self, individual: Individual) -> bytes:
        if no_time(self.until):
            return STOPPED
        run = registered_run(self.identity)
        found, model = run.last.score(individual), run.last.prepared.model
        test = None if run.config.finetune_epochs else run.data.test
        facts = {f"{FACTS}score": torch.tensor(found, dtype=torch.float64)}
        if test is not None:  # for the report alone
            *numbers, right = tested_on(test, example_sums(model, test, run.batch_size))
            facts |= {f"{FACTS}test": torch.tensor(numbers, dtype=torch.float64), f"{FACTS}right": torch.from_numpy(right)}
        return to_safetensors({**model.state_dict(), **facts})


def unpacked_point(state: dict[str, Tensor]) -> tuple[float, Tested | None]:
    """Return the score on the search split that `RepairPoint` measured, and what it tested, None where there is no test split, or
    training follows."""
    score, numbers = float(state[f"{FACTS}score"]), state.get(f"{FACTS}test")
    if numbers is None:
        return score, None
    test, low, high = numbers.tolist()
    return score, (test, low, high, state[f"{FACTS}right"].numpy())


def note_repaired(run: Run, point: Pruned, folder: Folder, key: str, state: dict[str, Tensor]) -> None:
    """Note what the last repair of a point gave, which is kept in the folder."""
    score, tested = unpacked_point(state)
    point.note(score, before=score, repair=str(run.config.repair))
    if tested is not None:
        point.note_test(*tested)
    point.kept = partial(state_alone, folder, key, f"{run.identity}:{key}")


def state_alone(folder: Folder, key: str, label: str) -> dict[str, Tensor]:
    """Return the state dict of a point that was repaired."""
    return {name: value for name, value in folder.read_again(key, label).items() if not name.startswith(FACTS)}


def no_time(until: float) -> bool:
    """Say whether a training is not begun: its time is over, and this process has begun another, be it for one step."""
    had = until in BEGUN
    BEGUN.clear()
    BEGUN.add(until)
    return had and late(until)


def sums_under(run: Run, point: Pruned, evaluator: Evaluator) -> Tensor:
    """Return what the task makes of each image of an evaluator's under a point, (n, k)."""
    if not point.has_state:
        return evaluator.example_sums(point.individual)
    return example_sums(with_state(run, point.state), evaluator.split, run.batch_size)


def tested_on(test: Split, sums: Tensor) -> Tested:
    """Return what is reported of the sums (n, k) of each test image."""
    return (*test.task.tested(sums), test.task.each(sums))


@dataclass(frozen=True)
class TrainPoint:
    """The state dict of an individual trained from the dense values, or, gently, from those it has, its zeros held, as the bytes
    of a safetensors file; `STOPPED` where there was no time for all of it."""

    identity: str
    until: float  # time of day

    def __call__(self, job: tuple[Individual, str, str]) -> bytes:
        individual, what, label = job
        if no_time(self.until):
            return STOPPED
        run = registered_run(self.identity)
        config, key = run.config, individual.key().hex()
        assert run.data.train is not None
        net = with_values(run.model, run.layout, individual).to(config.device)
        kept = named_masks(individual, run.layout)
        seed = int(hashlib.sha256(f"{config.seed}:{key}".encode()).hexdigest()[:12], 16)
        recipe = recipe_for(net, config.more_epochs or config.finetune_epochs, seed, config.learning_rate, config.augment,
                            config.train_precision)
        gently = replace(recipe, learning_rate=GENTLE * recipe.learning_rate) if individual.values else recipe
        try:
            tune(net, run.data.train, gently, kept, training_progress(what),
                 pieces=run.pieces(key, label, self.until, f"training {what}"))
        except Stopped:
            return STOPPED
        return to_safetensors(net.state_dict())


@dataclass(frozen=True)
class TrainChild:
    """What a tuned run's `Job` becomes: its values grow, train and are pruned, and are measured on the search split; `STOPPED`
    where there was no time for all of it."""

    identity: str
    until: float  # time of day

    def __call__(self, job: Job) -> Result | bytes:
        if no_time(self.until):
            return STOPPED
        run = registered_run(self.identity)
        train = run.data.train
        assert train is not None
        net = (repaired(run, job.individual) if job.repaired else with_values(run.model, run.layout, job.individual)).to(
            train.labels.device)
        kept = named_masks(job.individual, run.layout, train.labels.device)
        recipe = recipe_for(net, 0, job.seed, run.config.learning_rate, run.config.augment, run.config.train_precision)
        steps, more = job.steps, min(round(job.growth * job.kept), run.layout.weights) - sum(int(m.sum()) for m in kept.values())
        if more > 0 and steps > GROW_STEPS:
            kept = grown(net, train, kept, run.layout, more, GROW_STEPS * recipe.batch_size, job.seed)
            steps -= GROW_STEPS
        recipe = replace(recipe, epochs=steps / steps_an_epoch(len(train), recipe.batch_size),
                         learning_rate=recipe.learning_rate * job.learning_rate)
        shrink = Shrink(run.layout, job.kept, job.saliency, job.until, pace=job.pace, mix=job.mix)
        try:
            kept = tune(net, train, recipe, kept, training_progress(job.what), shrink,
                        run.pieces(key_of(job), self.identity, self.until, f"training {job.what}"))
        except Stopped:
            return STOPPED
        individual = from_named(kept, run.layout, job.individual.origin)
        for i, genes in drop_dead(individual, run.layout, run.evaluator.channels).items():
            set_bits(individual, i, genes)
        kept = named_masks(individual, run.layout, train.labels.device)
        hold_zeros([net.get_parameter(name) for name in kept], kept)
        found = score(net.eval(), run.data.search, run.batch_size)
        return Result(run.objectives.measured(found, individual, run.layout), list(individual),
                      values=values_of(net, kept))


def repaired(run: Run, individual: Individual) -> nn.Module:
    """Return a copy of the run's model with the repaired values of a mask."""
    run.last.set_masks(individual)
    net = copied(run.model)
    set_state(net, run.last.prepared.model.state_dict())
    return net


def with_state(run: Run, state: dict[str, Tensor]) -> nn.Module:
    """Return the model with these values, on the device of the data."""
    net = copied(run.model)
    set_state(net, state)
    return net.to(run.data.search.labels.device).eval()


def map_kept(function: Callable[[Job], Result | bytes], jobs: Sequence[Job], engine: Local | Engine, folder: Folder, run: Run,
             progress: Callable[[int, int], None] = ignore) -> list[Result | None]:  # 6 arguments: three are registered
    """Return what jobs become, in order; each is kept as soon as it has ended, so that a resumed run need not repeat it.

    Raises:
        Stopped: `max_seconds` have passed before the last of them.
    """
    keys = [key_of(job) for job in jobs]
    results = [None if (kept := folder.read_trained(key, run.identity)) is None else unpacked(kept) for key in keys]
    missing = [i for i, result in enumerate(results) if result is None]
    left, stopped = len(missing), []

    def arrived(i: int, result: Result | bytes | None) -> None:
        nonlocal left
        left -= 1
        if isinstance(result, bytes):
            stopped.append(i)
            return
        results[missing[i]] = result
        if result is not None:
            folder.write_trained(keys[missing[i]], run.identity, packed(result))
        if left and run.config.engine == "local":
            run.check_time()

    engine.map(function, [jobs[i] for i in missing], arrived, progress)
    stop_if(stopped, folder)
    return results


def stop_if(stopped: Sequence[int], folder: Folder) -> None:
    """Raise `Stopped` if jobs had no time for all of a training, now that all others have ended or kept their state too."""
    if stopped:
        folder.started()
        raise Stopped("max_seconds")


def key_of(job: Job) -> str:
    """Return a hash of all that decides what a job becomes."""
    values = job.individual.values
    numbers = [job.kept, job.steps, job.seed, *job.strategy.tolist(), job.saliency, list(values), *["repaired"] * job.repaired]
    return fingerprint(numbers, *job.individual, *values.values())
