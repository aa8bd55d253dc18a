"""The whole flow: model and data in, a folder with the front of pruned models out."""

from __future__ import annotations

import errno
import logging
import os
import re
import shlex
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .config import AUTO, PROGRAM, Config, flags, keywords, options
from .engines.engine import Engine, Local, open_engine
from .engines.processes import workers_of
from .errors import EvopruneError, Stopped, first_line, shown, where_raised, with_type
from .evolution.generations import State
from .evolution.toolbox import Evaluation, Make, default_toolbox, made, name_of
from .files import piece_of
from .results.folder import Folder, write_run
from .results.front import Front, load_front
from .results.points import Pruned, numbered
from .results.written import DENSE, FRONT, LOG
from .rules import read_method
from .run.finish import finished_points, measure_on_test, trained_further, write_finished, write_stopped
from .run.jobs import RunEvaluator, TrainChild, map_kept
from .run.layerwise import Layerwise
from .run.prepare import prepare
from .run.progress import progress_shown, say_full_size
from .run.rebuild import builder_of, registered
from .run.refine import refined, rows_of
from .run.run import Run, stoppable
from .run.search import map_measured, search
from .run.settings import settle
from .views.pictures import write_views

SAID = ("method", "start", "repair", "population", "generations", "layerwise", "finetune_epochs", "total_epochs", "refine_epochs")
NOTHING = (None, 0, False)  # values of these: nothing is done
log = logging.getLogger("evoprune")


def prune(model: nn.Module | str = "lenet", data: Any = "digits", *, resume: str | Path | None = None,
          toolbox: Make = default_toolbox, command: str | None = None, progress: bool | None = None,
          on_generation: Callable[[dict[str, float]], None] | None = None, **settings: Any) -> Front:
    # 7 arguments: beside the settings, what is none
    """Search masks for `model` on `data` and return the front of pruned models; everything stays in the run's folder.

    `model` is a module, or a name as for --model; `data` is `(images, labels)`, a Dataset, an `evoprune.Data`, or a name
    as for --data; settings are the fields of `evoprune.Config`. `toolbox(evaluator, layout, config)` may return a DEAP
    toolbox with other operators. `command` is the command line that this call stands for, for the record. The model handed in is
    left as it was. Messages go to the logger "evoprune".

    With `progress`, a terminal or a notebook shows a bar, and anything else lines on standard error, unless that logger has a
    handler; by default only where a person looks. `on_generation` gets each row of log.csv (of `layerwise`, each layer's).

    Raises:
        EvopruneError: bad input, told in one line; nothing is overwritten.
        KeyboardInterrupt: after the files are written; `resume=DIR` goes on.
    """
    check_given(toolbox, command, progress, on_generation)
    with advising(command):
        config = settle(model, data, resume, settings, plans=toolbox is default_toolbox)
        assert config.out is not None
        folder = Folder(Path(config.out), resume is not None, config.overwrite)
        again = how_to_go_on(config.out, command, model, data)
        with told(folder, toolbox is default_toolbox, again), with_threads(config), progress_shown(progress), folder:
            finished = config.more_epochs is None and folder.finished(config.generations)
            handed_in = not (isinstance(model, str) or isinstance(data, str))
            if handed_in or not (finished and folder.resuming):  # else functions that the folder names would be called
                run = prepare(config, model, data, folder, command, name_of(toolbox))
                run.on_generation = on_generation
            if finished and folder.resuming:
                log.info("%s is finished: nothing to do", config.out)
            else:
                start = builder_of(run, folder, isinstance(model, str), isinstance(data, str))
                with closing(open_engine(config, start)) as engine, registered(run):
                    if config.more_epochs is not None:
                        train_more(run, folder, engine)
                    else:
                        (layer_by_layer if config.layerwise else all_at_once)(run, toolbox, folder, engine)
        return load_front(config.out, None if isinstance(model, str) else model)


@contextmanager
def advising(command: str | None) -> Iterator[None]:
    """Let errors speak of keywords, not flags, where the user is in Python."""
    try:
        yield
    except EvopruneError as error:
        if command is None:
            error.args = (keywords(error.args[0]),)
        raise


def dry_run(model: nn.Module | str = "lenet", data: Any = "digits", *, resume: str | Path | None = None, **settings: Any) -> None:
    """Check model, data and settings, train the dense model if asked, plan, and say it all; leave nothing.

    Raises:
        EvopruneError: bad input, told in one line.
    """
    if resume is not None:
        raise EvopruneError("dry_run: found together with --resume, whose run is planned; expected one of them")
    config = settle(model, data, None, {**settings, "max_seconds": None})
    Folder(Path(str(config.out)), overwrite=config.overwrite)  # refuses what the run would
    with tempfile.TemporaryDirectory() as empty:
        config = replace(config, out=f"{empty}/run")
        folder = Folder(Path(str(config.out)))
        with told(folder, True, ""), with_threads(config), folder:
            settings = prepare(config, model, data, folder).config.settings()
    if config.plan != AUTO:  # whose plan has been said
        log.info("would run with %s", " ".join(flags({name: settings[name] for name in SAID if settings[name] not in NOTHING})))
    log.info("a dry run: nothing is written")


def check_given(toolbox: Any, command: Any, progress: Any, on_generation: Any) -> None:
    """Raise `EvopruneError` for what is no setting and cannot be."""
    if not callable(toolbox):
        raise EvopruneError(f"toolbox: found {shown(toolbox)}, expected a function like evoprune.evolution.default_toolbox")
    if on_generation is not None and not callable(on_generation):
        raise EvopruneError(f"on_generation: found {shown(on_generation)}, expected a function of a dict")
    if not isinstance(progress, (bool, type(None))):
        raise EvopruneError(f"progress: found {shown(progress)}, expected True, False or None")
    if not isinstance(command, (str, type(None))):
        raise EvopruneError(f"command: found {shown(command)}, expected the text of a command line")


def all_at_once(run: Run, toolbox: Make, folder: Folder, engine: Local | Engine) -> None:
    """Search all layers together, then finish, or write what there is where the run is stopped."""
    config = run.config
    run.started = folder.started
    if config.total_epochs is not None:
        box = made(toolbox, TrainChild(run.identity, run.until), run.layout, config)
        mapping: Callable[..., list[Any]] = partial(map_kept, engine=engine, folder=folder, run=run)
    else:
        measure: Evaluation = run.evaluator if config.engine == "local" else RunEvaluator(run.identity)
        box = made(toolbox, measure, run.layout, config)
        mapping = partial(map_measured, evaluate=box.evaluate, engine=engine, run=run)
    state: State | None = None
    later: State | None = None  # of the training that follows
    try:
        with stoppable():
            for newest in search(run, box, folder.checkpoint, mapping):
                if newest.evaluations and not (folder.resuming and state is None):  # the first of those is where it was
                    folder.started()
                state = newest
            assert state is not None
            say_searched(run, state)
            for later in refined(run, state, toolbox, folder, engine):  # noqa: B007  # it saves each, what counts is the last
                pass
            points = finished_points(run, state, later, folder, engine)
    except Stopped:
        if state is not None and not folder.intact() and (state.evaluations or folder.kept or not folder.holds_run):
            write_stopped(run, state, later, folder, engine)
        raise
    write_finished(run, points, rows_of(state, later), folder)


def layer_by_layer(run: Run, toolbox: Make, folder: Folder, engine: Local | Engine) -> None:
    """Search one layer after the other, and write the models after each, or after those that a stopped run has had."""
    points: list[Pruned] = []
    rows: list[dict[str, float]] = []
    run.started = folder.started
    try:
        with stoppable():
            for point, more in Layerwise(run, toolbox, folder, engine).stages():
                points.append(point)
                rows += more
            measure_on_test(run, numbered(points))
    except Stopped:
        if rows:
            write_run(folder, numbered(points), rows, run.layout, run.dense, run.config.accuracy_floor)
            write_views(folder)
        raise
    write_finished(run, points, rows, folder)


def train_more(run: Run, folder: Folder, engine: Local | Engine) -> None:
    """Train the points of a finished run further; a stop leaves them as they were."""
    assert run.more_from is not None
    rows: Any = load_front(folder.path).written.rows(LOG, ("generation", "evaluations"))
    with stoppable():
        points = trained_further(run, run.more_from, folder, engine)
    write_finished(run, points, rows, folder)


def say_searched(run: Run, state: State) -> None:
    """Say what the floor saved, and how long a search of the default size would take."""
    config, images = run.config, len(run.data.search)
    if run.evaluator.saved:
        log.info("the accuracy floor saved %s image evaluations", f"{run.evaluator.saved:,}")
    full = options()["population"].default * (options()["generations"].default + 1)
    evolves = config.total_epochs is None and read_method(config.method).kind == "evolve"
    usual = min(5000, (images + len(run.data.train or ())) // 5)  # as many as are searched on unless told
    first, last = state.log[0], state.log[-1]  # the seconds of the first count making its masks
    measured = last["evaluations"] - first["evaluations"]
    if evolves and measured >= config.population // 2 and config.population * (config.generations + 1) < full and images <= usual:
        say_full_size(full, usual, (last["seconds"] - first["seconds"]) / measured / images)


@contextmanager
def told(folder: Folder, usual: bool, again: str) -> Iterator[None]:
    """Say why a run was stopped and how to go on; turn a full disk, a folder that cannot be written, or what the user's own
    model, data or operators raise into one line.

    Raises:
        KeyboardInterrupt: that was why.
        EvopruneError: a file could not be written, or the user's own code raised.
    """
    out = str(folder.path)
    try:
        yield
    except Stopped as stopped:
        log.info("stopped (%s); %s", stopped.why, after_a_stop(folder, again))
        if stopped.why == "interrupted":
            raise KeyboardInterrupt from None
        if not folder.kept:
            kept = piece_of(folder.trained(DENSE)).exists()
            raise EvopruneError(f"max_seconds: {folder.path} has nothing of this run to go on with"
                                f"{' but a half trained model, which the same command trains on' * kept}; give it more") from None
        if not (folder.path / FRONT).exists():
            raise EvopruneError(f"max_seconds: {folder.path} has no front yet; {after_a_stop(folder, again)}") from None
    except KeyboardInterrupt:  # before the search, or while its files are written
        log.info("stopped; %s", after_a_stop(folder, again))
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise EvopruneError(f"{error.filename or out}: {error.strerror}; all files written before are whole: "
                                f"make room, then {after_a_stop(folder, again)}") from None
        name = str(error.filename or "")
        if name.startswith(out):
            raise EvopruneError(f"{name}: {error.strerror}, expected a folder that can be written") from None
        if name and folder.path.is_relative_to(name):
            raise EvopruneError(f"{out}: cannot be made in {name}: {error.strerror}; choose another --out") from None
        tell_theirs(error, usual)
        raise
    except EvopruneError:
        raise
    except BaseException as error:
        tell_theirs(error, usual)
        raise


def tell_theirs(error: BaseException, usual: bool) -> None:
    """Raise `EvopruneError` in place of an exception that the user's own code raised, or what it returned, where the toolbox is
    not the `usual` one, or for want of memory."""
    full = isinstance(error, RuntimeError) and re.search("can't allocate memory|not enough memory", str(error))  # on a CPU
    if full or isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        raise EvopruneError(f"out of memory: {first_line(error)}; lower --batch-size, --cache-mb, or --population") from error
    if (where := where_raised(error)) is not None:
        raise EvopruneError(f"{where}: {with_type(error)}, raised while evoprune called it") from error
    if not usual:
        raise EvopruneError(f"toolbox: {with_type(error)}, after what one of its functions did or returned; expected what those "
                            f"of evoprune.evolution.default_toolbox do") from error


def how_to_go_on(out: str, command: str | None, model: nn.Module | str, data: Any) -> str:
    """Return what resumes a run, where its user is: at the command line or in Python, with what was handed in."""
    if command is not None:
        return f"{PROGRAM} --resume {shlex.quote(out)}"
    handed_in = "" if isinstance(model, str) and isinstance(data, str) else "model, data, "
    return f"evoprune.prune({handed_in}resume={out!r})"


def after_a_stop(folder: Folder, again: str) -> str:
    """Return how to go on after a stop."""
    if folder.intact():
        return f"{folder.path} is as it was; the same command again goes on"
    if folder.kept:
        return f"go on with: {again}"
    return "start again" + f" ({folder.path} holds the run that it held)" * folder.holds_run


@contextmanager
def with_threads(config: Config) -> Iterator[None]:
    """Let torch use as many threads as the settings say for a while; tell of more than there are cores on this machine."""
    before = torch.get_num_threads()
    threads, cores = config.threads or before, len(os.sched_getaffinity(0))
    here = workers_of(config.workers) if config.engine == "processes" else 1
    if threads * here > cores and threads > 1:
        log.warning("%d threads%s on %d core%s wait for one another, which may take several times as long; --threads %d does not",
                    threads, f" in each of {here} workers" * (here > 1), cores, "s" * (cores > 1), max(1, cores // here))
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
