"""The whole flow: model and data in, a folder with the front of pruned models out."""

from __future__ import annotations

import copy
import errno
import logging
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from time import monotonic
from typing import Any

import torch
from deap import base
from safetensors.torch import load as load_tensors
from torch import Tensor, nn

from .checkpoint import Folder
from .config import Config, EvopruneError, options
from .engines import Engine, Local, open_engine
from .evaluation import Evaluator, correct
from .evolution import State, default_toolbox, non_dominated
from .export import Measured, write_run
from .front import Front, load_front, thin
from .jobs import Measure, Repair, Train, Tune, registered, start_of, with_values
from .layers import Layout
from .layerwise import search_layerwise
from .run import Run, TimeUp, clock, prepare
from .search import SAY_EVERY, search, search_tuned
from .settings import settle
from .splits import Split

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
    threads, stopped = torch.get_num_threads(), ""
    torch.set_num_threads(config.threads)
    try:
        with Folder(Path(config.out), resume is not None, config.overwrite) as folder:
            run = prepare(config, model, data, folder)
            if folder.finished(config.generations):
                log.info("%s is finished: nothing to do", config.out)
            else:
                folder.remove("done.json")
                start = start_of(run, folder, isinstance(model, str), isinstance(data, str))
                with closing(open_engine(config, start)) as engine, registered(run):
                    stopped = (layer_by_layer if config.layerwise else all_at_once)(run, toolbox, folder, engine)
                if stopped:
                    log.info("stopped (%s); %s", stopped, go_on)
                if stopped == "interrupted":
                    raise KeyboardInterrupt
    except KeyboardInterrupt:
        if not stopped and (Path(config.out) / "config.json").exists():
            log.info("stopped; %s", go_on)
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise EvopruneError(f"{error.filename or config.out}: {error.strerror}; all files written before are whole: "
                                f"make room, then {go_on}") from None
        if not str(error.filename or "").startswith(config.out):
            raise
        raise EvopruneError(f"{error.filename}: {error.strerror}, expected a folder that can be written") from None
    finally:
        torch.set_num_threads(threads)
    return load_front(config.out, None if isinstance(model, str) else model)


def all_at_once(run: Run, toolbox: Toolbox, folder: Folder, engine: Local | Engine) -> str:
    """Search all layers together, then finish; return why it stopped early, "" if it did not."""
    trains = run.config.total_epochs is not None
    if trains:
        state, stopped = search_tuned(run, toolbox(Tune(run.identity), run.layout, run.config), folder, engine)
    else:
        evaluate = run.evaluator if run.config.engine == "local" else Measure(run.identity)
        state, stopped = search(run, toolbox(evaluate, run.layout, run.config), folder.checkpoint, engine)
    if not stopped:
        if run.evaluator.saved:
            log.info("the accuracy floor saved %s image evaluations", f"{run.evaluator.saved:,}")
        if not trains and run.config.method == "evolve":
            say_full_size(run, state)
        stopped = finish(run, state, folder, engine)
    if stopped:
        points = untrained(run, state)
        if run.config.precision != "fp32" and run.config.repair == "none":
            measure_plainly(run, points, engine)
        for point in points if not trains else ():
            point.repair = str(run.config.repair)
        write_run(folder, points, state.log, run.layout, run.dense_accuracy, run.config.accuracy_floor)
    return stopped


def layer_by_layer(run: Run, toolbox: Toolbox, folder: Folder, engine: Local | Engine) -> str:
    """Search one layer after the other, write the models after each; return why it stopped early, "" if it did not."""
    points, rows, stopped = search_layerwise(run, toolbox, folder, engine)
    renumbered(points)
    if not stopped:
        measure_on_test(run, points)
    if rows:
        write_run(folder, points, rows, run.layout, run.dense_accuracy, run.config.accuracy_floor)
    if not stopped:
        folder.write_done(generations=run.config.generations, evaluations=int(rows[-1]["evaluations"]),
                          points=len(points), batch_size=run.evaluator.batch_size,
                          epochs=run.config.finetune_epochs * (len(points) - 1))
    return stopped


def finish(run: Run, state: State, folder: Folder, engine: Local | Engine) -> str:
    """Train the points if asked, measure them, write the files; return why it stopped early, "" if it did not."""
    config = run.config
    try:
        points = untrained(run, state)
        if config.finetune_epochs:
            dense = Measured("", state.archive[0], run.dense_accuracy, run.dense_accuracy)
            chosen = thin([p for p in points if p.sparsity > 0], config.front)
            measure_plainly(run, chosen, engine)
            points = [dense, *train_points(run, chosen, folder, engine)]
        elif config.total_epochs is None:
            measure_plainly(run, points, engine)
        points = renumbered(points)
        measure_on_test(run, points)
    except TimeUp:
        return "max_seconds"
    except KeyboardInterrupt:
        return "interrupted"
    write_run(folder, points, state.log, run.layout, run.dense_accuracy, config.accuracy_floor)
    folder.write_done(generations=config.generations, evaluations=state.evaluations, points=len(points),
                      batch_size=run.evaluator.batch_size,
                      epochs=config.total_epochs or config.finetune_epochs * sum(p.state is not None for p in points))
    return ""


def measure_plainly(run: Run, points: list[Measured], engine: Local | Engine) -> None:
    """Measure untrained points again with the model as the user has it, where the search rounds in another way or repairs;
    points keep the repaired values, made with more images than the search takes.

    Raises:
        EvopruneError: a repair was given up.
    """
    repair = str(run.config.repair)
    if repair == "none" and run.evaluator.prepared.exact and run.evaluator.batch_size == run.batch_size:
        return
    log.info("measuring %d points with the model as it is, fp32", len(points))
    if repair == "none":
        for point in points:
            point.accuracy = point.accuracy_before = int(run.last.correct(point.individual)) / len(run.data.search)
        return

    said = monotonic()

    def arrived(i: int, found: tuple[int, int | None, bytes] | None) -> None:
        nonlocal said
        if found is None:
            raise EvopruneError(f"engine {run.config.engine}: no worker survived the last repair of point {i + 1} of "
                                f"{len(points)}; the search is saved: go on with --resume {run.config.out} and fewer --workers, "
                                f"a longer --job-timeout or --engine local")
        point, (right, test, content) = points[i], found
        point.accuracy = point.accuracy_before = right / len(run.data.search)
        if test is not None and run.data.test is not None:
            point.test = test, len(run.data.test)
        point.repair, point.state = repair, load_tensors(content)
        if monotonic() - said >= SAY_EVERY:
            log.info("measured %d of %d points", sum(p.state is not None for p in points), len(points))
            said = monotonic()

    engine.map(Repair(run.identity), [point.individual for point in points], arrived)


def measure_on_test(run: Run, points: list[Measured]) -> None:
    """Count right answers on the test split, for the report alone, of the points that have not been counted."""
    untested = [point for point in points if point.test is None]
    if run.data.test is None or not untested:
        return
    log.info("measuring %d points on %s test images", len(untested), f"{len(run.data.test):,}")
    plain = Evaluator(run.model, run.layout, run.data.test, run.batch_size, plain=True)
    for point in untested:
        right = plain.correct(point.individual) if point.state is None else count(run, point.state, run.data.test)
        point.test = int(right), len(run.data.test)


def untrained(run: Run, state: State) -> list[Measured]:
    """Return the search's front, as it was measured."""
    found = non_dominated(state.archive, run.config.accuracy_floor)
    values = [individual.fitness.values[0] for individual in found]
    points = renumbered([Measured("", individual, value, value) for individual, value in zip(found, values)])
    for point in points:
        if run.config.total_epochs is not None and point.individual.inherited:
            point.accuracy_before = int(run.evaluator.correct(point.individual)) / len(run.data.search)
            point.state = dict(with_values(run, point.individual).state_dict())
    return points


def renumbered(points: list[Measured]) -> list[Measured]:
    """Give the points their ids, 000, 001, ... by sparsity."""
    for i, point in enumerate(points):
        point.id = f"{i:03d}"
    return points


def train_points(run: Run, points: list[Measured], folder: Folder, engine: Local | Engine) -> list[Measured]:
    """Train points from the dense values, their zeros held, and measure them; those already trained are read back.

    Returns all but those whose training was given up.

    Raises:
        TimeUp: `max_seconds` have passed; what is trained is kept for --resume.
    """
    names = {id(point): f"point {i + 1} of {len(points)}" for i, point in enumerate(points)}
    labels = {id(point): f"{run.identity}:{point.individual.key().hex()}" for point in points}
    for point in points:
        point.repair = "none"  # training starts from the dense values
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
    assert point.state is not None
    point.accuracy = int(count(run, point.state, run.data.search)) / len(run.data.search)
    log.info("%s: %.2f %% sparsity, accuracy %.2f %% before and %.2f %% after training", what, 100 * point.sparsity,
             100 * point.accuracy_before, 100 * point.accuracy)


def count(run: Run, state: dict[str, Tensor], split: Split) -> Tensor:
    """Count the right answers of the model with these values."""
    net = copy.deepcopy(run.model)
    net.load_state_dict(state)
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
