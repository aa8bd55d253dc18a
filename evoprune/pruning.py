"""The whole flow: model and data in, a folder with the front of pruned models out."""

from __future__ import annotations

import copy
import errno
import json
import logging
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np
import torch
from deap import base
from safetensors.torch import load as load_tensors
from torch import Tensor, nn

from .checkpoint import Folder, load, save
from .config import Config, EvopruneError, options
from .engines import Engine, Local, local, open_engine
from .evaluation import Evaluator, correct
from .evolution import State, begin, default_toolbox, evolve, non_dominated
from .export import Measured, write_run
from .front import Front, load_front, thin
from .jobs import Measure, Train, registered, start_of
from .layers import Layout
from .run import Run, clock, prepare, settle
from .splits import Split
from .starts import first_population

SAVE_EVERY = 1.0  # seconds between checkpoints: a generation can be shorter than the write that saves it
SAY_EVERY = 3.0  # seconds between lines of progress
Toolbox = Callable[[Any, Layout, Config], base.Toolbox]
log = logging.getLogger("evoprune")


def prune(model: nn.Module | str = "lenet", data: Any = "digits", *, resume: str | Path | None = None,
          toolbox: Toolbox = default_toolbox, **settings: Any) -> Front:
    """Search masks for `model` on `data` and return the front of pruned models; everything stays in the run's folder.

    `model` is a module, or a name as for --model; `data` is `(images, labels)`, a Dataset, an `evoprune.Data`, or a name
    as for --data; settings are the fields of `evoprune.Config`. `toolbox(evaluator, layout, config)` may return a DEAP
    toolbox with other operators. The model handed in is left as it was. Messages go to the logger "evoprune".

    Raises:
        EvopruneError: bad input, told in one line; nothing is overwritten.
        KeyboardInterrupt: after the files are written; `resume=DIR` goes on.
    """
    config = settle(model, data, resume, settings)
    assert config.out is not None and config.threads is not None
    go_on = f"go on with: python -m evoprune.main --resume {config.out}"
    threads = torch.get_num_threads()
    torch.set_num_threads(config.threads)
    try:
        with Folder(Path(config.out), resume is not None, config.overwrite) as folder:
            run = prepare(config, model, data, folder)
            start = start_of(run, folder, isinstance(model, str), isinstance(data, str))
            with closing(open_engine(config, start)) as engine, registered(run):
                tools = toolbox(run.evaluator if config.engine == "local" else Measure(run.identity), run.layout, config)
                state, stopped = search(run, tools, folder, engine)
                stopped = stopped or finish(run, state, folder, engine)
            if stopped:
                write_run(folder, untrained(run, state), state.log, run.layout, run.dense_accuracy)
                log.info("stopped (%s); %s", stopped, go_on)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise EvopruneError(f"{error.filename or config.out}: {error.strerror}; all files written before are whole: "
                            f"make room, then {go_on}") from None
    finally:
        torch.set_num_threads(threads)
    if stopped == "interrupted":
        raise KeyboardInterrupt
    return load_front(config.out, None if isinstance(model, str) else model)


# -------------------------------------------------------------------------------------------------------------- search


def search(run: Run, toolbox: base.Toolbox, folder: Folder, engine: Local | Engine) -> tuple[State, str]:
    """Return the last whole state, and why the search stopped early ("" if it did not)."""
    config = run.config
    state = load(folder.checkpoint, run.layout, run.identity)
    folder.remove("done.json")
    if state is None:
        log.info("making the first %d masks: %s", config.population, config.start)
        parameters = dict(run.model.named_parameters())
        weights = [parameters[layer.name].detach().numpy() for layer in run.layout]
        population = first_population(weights, run.layout, config.start, config.population,
                                      np.random.default_rng((config.seed, 0)))
    progress = Progress(config, 0 if state is None else state.evaluations)
    run.evaluator.progress = progress.evaluated
    if toolbox.map.func in (map, local):  # whoever registered another keeps it
        toolbox.register("map", engine.map, progress=progress.evaluated)
    if state is None:
        state = begin(population, toolbox, config)
        save(folder.checkpoint, state, run.identity)
    elif state.generation > config.generations:
        raise EvopruneError(f"generations: found {config.generations}, but the run in {folder.path} has had "
                            f"{state.generation}; expected at least that many")
    progress.generation(state)
    saved, stopped, longest = monotonic(), "", 0.0
    try:
        generations = evolve(state, toolbox, config)
        while not stopped:
            started = monotonic()
            if started + longest > run.deadline and state.generation < config.generations:
                stopped = "max_seconds"
            elif (following := next(generations, None)) is None:
                break
            else:
                state = following
                longest = max(longest, monotonic() - started)
                progress.generation(state)
                if monotonic() - saved >= SAVE_EVERY:
                    save(folder.checkpoint, state, run.identity)
                    saved = monotonic()
    except KeyboardInterrupt:  # the generation in hand is dropped
        stopped = "interrupted"
    save(folder.checkpoint, state, run.identity)
    return state, stopped


class Progress:
    """Says now and then how far the search is and how long the rest will take."""

    def __init__(self, config: Config, done: int):
        self.config, self.done, self.started_with = config, done, done
        self.planned = config.population * (config.generations + 1)
        self.started = self.said = monotonic()
        self.estimated = False

    def evaluated(self, i: int, of: int) -> None:
        """Count one more mask measured; `i` of `of` in this batch."""
        self.done += 1
        now = monotonic()
        if not self.estimated and (i == of or now - self.started >= SAY_EVERY):
            self.estimated, self.said = True, now
            each = (now - self.started) / (self.done - self.started_with)
            log.info("%.3g s a mask; the search of %s masks will take about %s", each, f"{self.planned:,}",
                     clock(each * (self.planned - self.started_with)))
        elif now - self.said >= 5 * SAY_EVERY:  # long generations
            self.said = now
            log.info("  %d of %d masks of this generation, %s left", i, of, self.left(now))

    def generation(self, state: State) -> None:
        """Say how the archive stands."""
        now, last = monotonic(), state.generation == self.config.generations
        if now - self.said >= SAY_EVERY or last or not state.generation:
            self.said = now
            row = state.log[-1]
            log.info("generation %d of %d: hvlog %.4f, %d points up to %.2f %% sparsity, %s masks%s", state.generation,
                     self.config.generations, row["hvlog"], row["points"], 100 * row["max_sparsity"],
                     f"{state.evaluations:,}", "" if last else f", {self.left(now)} left")

    def left(self, now: float) -> str:
        each = (now - self.started) / max(1, self.done - self.started_with)
        return clock(each * max(0, self.planned - self.done))


# -------------------------------------------------------------------------------------------------------------- finish


def finish(run: Run, state: State, folder: Folder, engine: Local | Engine) -> str:
    """Train the points if asked, measure them on the test split, write the files; return why it stopped early."""
    config = run.config
    say_full_size(run, state)
    try:
        points = untrained(run, state)
        if config.finetune_epochs:
            dense = Measured("", state.archive[0], run.dense_accuracy, run.dense_accuracy)
            chosen = thin([p for p in points if p.sparsity > 0], config.front)
            points = renumbered([dense, *train_points(run, chosen, folder, engine)])
        if run.data.test is not None:
            log.info("measuring %d points on %s test images", len(points), f"{len(run.data.test):,}")
            tester = Evaluator(run.model, run.layout, run.data.test, run.batch_size)
            for point in points:
                right = tester.correct(point.individual) if point.state is None else count(run, point, run.data.test)
                point.test = int(right), len(run.data.test)
    except TimeUp:
        return "max_seconds"
    except KeyboardInterrupt:
        return "interrupted"
    write_run(folder, points, state.log, run.layout, run.dense_accuracy, config.accuracy_floor)
    epochs = config.finetune_epochs * sum(p.state is not None for p in points)
    folder.write("done.json", json.dumps({"stopped": "generations", "generation": state.generation, "evaluations":
                                          state.evaluations, "epochs": epochs, "points": len(points)}, indent=2) + "\n")
    folder.remove_trained()
    return ""


def untrained(run: Run, state: State) -> list[Measured]:
    """Return the search's front, as it was measured."""
    found = non_dominated(state.archive, run.config.accuracy_floor)
    values = [individual.fitness.values[0] for individual in found]
    return renumbered([Measured("", individual, value, value) for individual, value in zip(found, values)])


def renumbered(points: list[Measured]) -> list[Measured]:
    """Give the points their ids, 000, 001, ... by sparsity."""
    for i, point in enumerate(points):
        point.id = f"{i:03d}"
    return points


class TimeUp(Exception):
    """`max_seconds` have passed."""


def train_points(run: Run, points: list[Measured], folder: Folder, engine: Local | Engine) -> list[Measured]:
    """Train points from the dense values, their zeros held, and measure them; those already trained are read back.

    Returns all but those whose training was given up.

    Raises:
        TimeUp: `max_seconds` have passed; what is trained is kept for --resume.
    """
    names = {id(point): f"point {i + 1} of {len(points)}" for i, point in enumerate(points)}
    labels = {id(point): f"{run.identity}:{point.individual.key().hex()}" for point in points}
    for point in points:
        point.state = folder.read_trained(point.individual.key().hex(), labels[id(point)])
    untrained = [point for point in points if point.state is None]

    def arrived(i: int, content: bytes | None) -> None:
        point = untrained[i]
        if content is None:
            log.warning("%s: left out of the front", names[id(point)])
            return
        point.state = load_tensors(content)
        folder.write_trained(point.individual.key().hex(), labels[id(point)], point.state)
        measure(run, point, names[id(point)])
        if monotonic() > run.deadline and any(p.state is None for p in untrained):
            raise TimeUp

    if untrained and monotonic() > run.deadline:
        raise TimeUp
    for point in points:
        if point.state is not None:
            measure(run, point, names[id(point)])
    engine.map(Train(run.identity), [(point.individual, names[id(point)]) for point in untrained], arrived)
    return [point for point in points if point.state is not None]


def measure(run: Run, point: Measured, what: str) -> None:
    """Measure a trained point on the search split."""
    point.accuracy = int(count(run, point, run.data.search)) / len(run.data.search)
    log.info("%s: %.2f %% sparsity, accuracy %.2f %% before and %.2f %% after training", what, 100 * point.sparsity,
             100 * point.accuracy_before, 100 * point.accuracy)


def count(run: Run, point: Measured, split: Split) -> Tensor:
    """Count the right answers of a trained point."""
    net = copy.deepcopy(run.model)
    assert point.state is not None
    net.load_state_dict(point.state)
    return correct(net.to(split.labels.device).eval(), split, run.batch_size)


def say_full_size(run: Run, state: State) -> None:
    """Say how long a search of the default size would take, after one that was smaller."""
    config, images = run.config, len(run.data.search)
    population, generations = options()["population"].default, options()["generations"].default
    masks = population * (generations + 1)
    if config.population * (config.generations + 1) < masks and images <= 5000:
        seconds = state.log[-1]["seconds"] / state.evaluations * masks * 5000 / images
        log.info("a search of the default size (%s masks, 5,000 images) would take about %s here", f"{masks:,}",
                 clock(seconds))
