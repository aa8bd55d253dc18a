"""The points of a run at its end: trained if asked, measured as the user will, written."""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import partial

from torch import Tensor

from ..engines.engine import Engine, Local
from ..errors import EvopruneError
from ..evaluation.evaluator import Evaluator
from ..evolution.generations import State
from ..evolution.selection import non_dominated
from ..files import from_safetensors
from ..inputs.splits import score
from ..inputs.tasks import constant_score
from ..masks.genome import Individual
from ..masks.tensors import named_masks
from ..results.folder import Folder, write_right, write_run
from ..results.front import load_front
from ..results.points import Pruned, before_and_after, numbered, pruned, thin, undominated
from ..results.written import DOMINATED, FRONT, model_file
from ..values.inherited import values_of, with_values
from ..views.pictures import write_views
from .jobs import STOPPED, RepairPoint, TrainPoint, note_repaired, stop_if, sums_under, tested_on, with_state
from .layerwise import Rows
from .progress import SAY_EVERY, Pace, progress_of
from .refine import joined, rows_of, trained
from .run import Run

REPAIRED = "repaired-"  # what keeps a point by its mask, beside one trained from it
log = logging.getLogger("evoprune")


def finished_points(run: Run, state: State, later: State | None, folder: Folder, engine: Local | Engine) -> list[Pruned]:
    """Return the points of a whole search, and of what was trained `later`, trained if asked, and measured as the user will.

    Raises:
        Stopped: `max_seconds` have passed; what is trained is kept for --resume.
    """
    config = run.config
    points = untrained(run, state)
    if config.finetune_epochs:
        dense = pruned(state.archive[0], run.layout, run.dense.score)
        chosen = thin([p for p in undominated(points, config.accuracy_floor) if p.density < 1], config.front)
        measure_plainly(run, chosen, folder, engine)
        points = [dense, *train_points(run, chosen, folder, engine)]
    elif config.total_epochs is None:
        measure_plainly(run, points, folder, engine)
    if later is not None:
        points = all_together(run, points, state, later)
    elif run.kept is not None:
        points = joined(run, [points])
    measure_on_test(run, numbered(points))
    return points


def all_together(run: Run, points: list[Pruned], state: State, later: State) -> list[Pruned]:
    """Return the points of a search and of the training that followed, as far as they stand out."""
    simple, found = ([p for p in points if bool(p.individual.generation) == evolved] for evolved in (False, True))
    return joined(run, (simple, found, trained_later(run, state, later)))


def trained_later(run: Run, state: State, later: State, before: bool = True) -> list[Pruned]:
    """Return what the training that followed a search made; its generations count on from those of the search, as in log.csv."""
    points = [point for point in untrained(trained(run), later, before) if point.density < 1]
    for point in points:
        point.note(generation=state.generation + 1 + point.measured.generation)
    return points


def trained_further(run: Run, more_from: int, folder: Folder, engine: Local | Engine) -> list[Pruned]:
    """Return the points of a finished run, as they are, and those of them that are better by more than chance when they have been
    trained further, gently where their values are not the dense ones.

    Raises:
        Stopped: `max_seconds` have passed; what is trained is kept for --resume.
        EvopruneError: the search or test images are others than the run's.
    """
    there = read_points(run, more_from, folder)
    front = [point for point in undominated(there, run.config.accuracy_floor) if point.density < 1]
    further = [begun(run, point) for point in thin(front, run.config.front)]
    found = joined(run, (there, train_points(run, further, folder, engine)))
    new = [point for point in found if not point.measured.id]
    for i, point in enumerate(new):
        point.note(id=f"{more_from + i:03d}")
    log.info("%d of %d points are better than what was there by more than chance", len(new), len(further))
    measure_on_test(run, found)
    return found


def read_points(run: Run, more_from: int, folder: Folder) -> list[Pruned]:
    """Return the points that a run had when it was finished, as its files have them, by id; later ones are not looked at."""
    front, test = load_front(folder.path), run.data.test
    if front.record.searched not in (None, run.data.search.name):
        raise EvopruneError(f"data: found other search images than those of the run in {folder.path}; expected the same")
    files = front.written
    there = {p.id: p for name in (DOMINATED, FRONT) if files.has(name) for p in front.read(name) if int(p.id) < more_from}
    right = None if test is None else files.per_image(list(there.values()), len(test))
    if right is not None and test is not None and right.split != test.name:
        raise EvopruneError(f"data: found other test images than those of the run in {folder.path}; expected the same")
    points = []
    for id, found in sorted(there.items()):
        state = None
        if files.has(model_file(id)):
            files.file(model_file(id))  # a damaged one is told before anything is trained
            state = partial(files.tensors, model_file(id))
        points.append(Pruned(found.plain(), files.individual(id, run.layout), state))
        if right is None:  # of an older run, which has not kept it: measured again
            points[-1].note(test=None)
        else:
            points[-1].right = run.data.search.task.kept_again(right.points[id])
    return points


def begun(run: Run, point: Pruned) -> Pruned:
    """Return a point that starts from the values of another, without an id."""
    origin = point.measured.origin + "+repair" * (point.measured.repair != "none") + "+tune"
    measured = replace(point.measured, id="", test=None, before=point.measured.score, origin=origin)
    individual = Individual(point.individual)
    if point.has_state:
        individual.values = values_of(with_state(run, point.state), named_masks(individual, run.layout))
    return Pruned(measured, individual)


def write_finished(run: Run, points: list[Pruned], rows: Rows, folder: Folder) -> None:
    """Write the files of a run that came to its end."""
    config, retrained = run.config, sum(p.has_state for p in points)
    write_run(folder, points, rows, run.layout, run.dense, config.accuracy_floor, run.more_from is not None)
    if run.data.test is not None:
        write_right(folder, points, run.data.test.name)
    write_views(folder, finished=True)
    say_whether_better(run, points)
    epochs = config.total_epochs or config.refine_epochs or config.finetune_epochs * retrained
    folder.write_done(generations=config.generations, evaluations=int(rows[-1]["evaluations"]), points=len(points),
                      batch_size=run.evaluator.batch_size, epochs=epochs)


def say_whether_better(run: Run, points: list[Pruned]) -> None:
    """Warn where no pruned model is worth anything."""
    search, score, floor = run.data.search, run.objectives[run.objectives.score], run.config.accuracy_floor
    if floor and not any(point.measured.score >= floor for point in points if point.density < 1):
        log.warning("warning: no pruned model reaches --accuracy-floor, %s: lower it, search longer or train", score.said(floor))
        return
    constant = constant_score(search.task, search.labels)
    if constant is not None and all(point.measured.score <= constant for point in points if point.density < 1):
        log.warning("warning: no pruned model is better than one answer for every image (%s %s): more --population, "
                    "--generations or training may find some", score.title, score.said(constant))


def write_stopped(run: Run, state: State, later: State | None, folder: Folder, engine: Local | Engine) -> None:
    """Write the front of a search that was stopped, as far as it got, and of what was trained `later`; without the test split."""
    config, points = run.config, untrained(run, state)
    if config.repair == "none" and config.precision != "fp32":
        measure_plainly(run, points, folder, engine)
    for point in points if config.total_epochs is None else ():
        point.note(repair=str(config.repair) if point.density < 1 else "none")
    if later is not None:
        points = numbered([*points, *trained_later(run, state, later, before=False)])
    write_run(folder, points, rows_of(state, later), run.layout, run.dense, config.accuracy_floor)
    write_views(folder)


def untrained(run: Run, state: State, before: bool = True) -> list[Pruned]:
    """Return the search's front, as it was measured, and where masked models are repaired the dense one as it came: repair may
    have made it worse. What trained children scored `before` their training is measured unless that takes too long."""
    points, dense = [], state.archive[0]
    plain = run.evaluator if run.config.precision == "fp32" and not run.config.accuracy_floor else run.last
    front = state.archive if run.config.keeps_first else non_dominated(state.archive, run.config.accuracy_floor)
    if run.config.repair != "none" and run.config.total_epochs is None:
        points.append(pruned(dense, run.layout, run.dense.score))
        front = [individual for individual in front if individual is not dense]
    for individual in front:
        point = pruned(individual, run.layout, individual.fitness.score)
        if run.config.total_epochs is not None and individual.values:
            if before:
                point.note(before=plain.score(individual))
            point.kept = partial(state_with, run, individual)
        points.append(point)
    return numbered(points)


def state_with(run: Run, individual: Individual) -> dict[str, Tensor]:
    """Return the state dict of the model with an individual's values."""
    return dict(with_values(run.model, run.layout, individual).state_dict())


def measure_plainly(run: Run, points: list[Pruned], folder: Folder, engine: Local | Engine) -> None:
    """Measure untrained points again with the model as the user has it, where the search rounds in another way or repairs;
    pruned points keep the repaired values, made with more images than the search takes.

    Raises:
        Stopped: `max_seconds` have passed; what is repaired is kept for --resume.
        EvopruneError: a repair was given up.
    """
    repair = str(run.config.repair)
    exact = run.evaluator.prepared.exact and run.evaluator.batch_size == run.batch_size
    if repair == "none" and exact and not (run.config.accuracy_floor and run.config.keeps_first):  # which keeps some cut short
        return
    log.info("measuring %d point%s with the model as it is, fp32", len(points), "s" * (len(points) != 1))
    if repair == "none":
        for point in points:
            point.note(score := run.last.score(point.individual), before=score)
        return
    repair_last(run, [point for point in points if point.density < 1], folder, engine)


def repair_last(run: Run, points: list[Pruned], folder: Folder, engine: Local | Engine) -> None:
    """Repair points as they are written, and measure them; those that a stopped run has done are read back."""
    keys = {id(point): f"{REPAIRED}{point.individual.key().hex()}" for point in points}
    missing: list[Pruned] = []
    stopped: list[int] = []
    for point in points:
        if (state := folder.read_trained(keys[id(point)], f"{run.identity}:{keys[id(point)]}")) is None:
            missing.append(point)
        else:
            note_repaired(run, point, folder, keys[id(point)], state)
    pace = Pace(len(missing))

    def arrived(i: int, found: bytes | None) -> None:
        if found == STOPPED:
            stopped.append(i)
            return
        if found is None:
            raise EvopruneError(f"engine {run.config.engine}: no worker survived the last repair of point {i + 1} of "
                                f"{len(missing)}; the search is saved: go on with --resume {run.config.out} and fewer --workers, "
                                f"a longer --job-timeout or --engine local")
        key, state = keys[id(missing[i])], from_safetensors(found)
        folder.write_trained(key, f"{run.identity}:{key}", state)
        note_repaired(run, missing[i], folder, key, state)
        pace.done += 1
        if pace.due(SAY_EVERY):
            log.info("measured %d of %d points", pace.done, len(missing))

    engine.map(RepairPoint(run.identity, run.until), [point.individual for point in missing], arrived)
    stop_if(stopped, folder)


def measure_on_test(run: Run, points: list[Pruned]) -> None:
    """Measure the points that have not been on the test split, for the report alone."""
    untested = [point for point in points if point.measured.test is None]
    if run.data.test is None or not untested:
        return
    log.info("measuring %d point%s on %s test images", len(untested), "s" * (len(untested) != 1), f"{len(run.data.test):,}")
    plain = Evaluator(run.model, run.layout, run.data.test, run.batch_size, plain=True)
    tell = progress_of("measuring on test images", "points")
    for i, point in enumerate(untested):
        tell(i, len(untested))
        point.note_test(*tested_on(run.data.test, sums_under(run, point, plain)))


def train_points(run: Run, points: list[Pruned], folder: Folder, engine: Local | Engine) -> list[Pruned]:
    """Train points from the values that they have, their zeros held, and measure them; those already trained are read back.

    Returns all but those whose training was given up.

    Raises:
        Stopped: `max_seconds` have passed; what is trained is kept for --resume.
    """
    names = {id(point): f"point {i + 1} of {len(points)}" for i, point in enumerate(points)}
    more = "" if run.more_from is None else f":{run.config.more_epochs} more"
    labels = {id(point): f"{run.identity}:{point.individual.key().hex()}{more}" for point in points}
    for point in points:
        point.note(repair="none")
        point.kept = folder.later(point.individual.key().hex(), labels[id(point)])
    missing = [point for point in points if not point.has_state]
    stopped = []

    def arrived(i: int, content: bytes | None) -> None:
        point = missing[i]
        if content == STOPPED:
            stopped.append(i)
            return
        if content is None:
            log.warning("%s: left out of the front", names[id(point)])
            return
        folder.write_trained(point.individual.key().hex(), labels[id(point)], from_safetensors(content))
        point.kept = partial(folder.read_again, point.individual.key().hex(), labels[id(point)])
        measure(run, point, names[id(point)])
        if not all(p.has_state for p in missing) and run.config.engine == "local":
            run.check_time()

    for point in [point for point in points if point.has_state]:
        measure(run, point, names[id(point)])
    jobs = [(point.individual, names[id(point)], labels[id(point)]) for point in missing]
    engine.map(TrainPoint(run.identity, run.until), jobs, arrived)
    stop_if(stopped, folder)
    return [point for point in points if point.has_state]


def measure(run: Run, point: Pruned, what: str) -> None:
    """Measure a trained point on the search split."""
    point.note(score(with_state(run, point.state), run.data.search, run.batch_size))
    log.info("%s: %s", what, before_and_after(point))
