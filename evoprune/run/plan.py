"""One button: how far the multi-shot path, the search of masks and training go, by a clock, for this model, these data and so
many minutes. The clock is read once, before an engine opens; what it decides are settings, which make the same run without it.
"""

from __future__ import annotations

import logging
import os
import re
import resource
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any

import torch
from torch import Tensor, nn

from ..config import AUTO, Config, flags, options
from ..errors import EvopruneError
from ..evaluation.evaluator import Evaluator
from ..evolution.budget import SEED_STEPS, SEEDS, kept_at_targets, seeded_budget
from ..inputs.models import copied
from ..inputs.splits import Data, Split
from ..masks.genome import Individual, from_masks
from ..masks.layout import Layout
from ..masks.saliency import gene_scores, keep_top
from ..masks.tensors import named_masks
from ..results.points import Measured
from ..results.record import Record
from ..rules import target_sparsities
from ..values.fast import has_bf16
from ..values.repair import PATH_IMAGES
from ..values.training import Recipe, recipe_for, steps_an_epoch, tune
from .run import Run, make_evaluator
from .settings import BY_CLOCK, default_repair, default_start, settle_for_model, training_config

SMALL, FEW_MINUTES, MINUTES = 100_000, 1.0, 10.0  # parameters of a model that gets few minutes
TARGETS = "0.8,0.9,0.95,0.97,0.98,0.985,0.99,0.995"
IMPORTS, PLOTS = 5.0, 3.0  # seconds that no part of a plan has
MASKS_SHARE, PATH_SHARE, SEARCH_SHARE = 0.1, 0.1, 0.1  # of the time, at most: of the first masks, a generation, and the last
# measurement; of the path; of the later generations where there is training, which has the rest
LEAST_SHOTS, MOST_EPOCHS, LEAST_STEPS = 20, 200, 50  # epochs a seed job, steps a target
POPULATIONS = (64, 48, 32, 24, 16, 8)
DENSITIES = (0.3, 0.05)  # of the masks that are timed
STEPS, FEW_STEPS = 20, 3  # of training that are timed, for a plan, and to choose a precision
PUNCTUAL = 0.9  # share of the minutes that is planned, for what takes longer than it did when it was timed
DEAR = 5.0  # seconds from which on what was to warm up is the time taken
SLOW = 1.0  # seconds, after a warm-up, from which on one mask is timed, not all
LONGEST, LONGEST_TRAINED = 0.6, 0.1  # share of the time that so many masks may take as the shortest path and search look at,
# with least squares; and where there is training, which gains more: a step of the path and a last repair take more images
FREE = 0.8  # share of the free memory that may be used
log = logging.getLogger("evoprune")


@dataclass(frozen=True)
class Costs:
    """What things take, in seconds, and memory in bytes."""

    path: float  # a step of the multi-shot path, 0 where the first masks are made without one
    mask: float  # of the search
    last: float  # repair of a point at the end, for each of the population
    tested: float  # measuring a point on the test split, for each of them and of the targets
    step: float | None  # of training; None: there is nothing to train on
    steps_an_epoch: int
    least_squares: bool
    memory: int  # of this process, after all that
    individual: int


def by_clock(config: Config, net: nn.Module, splits: Data, record: Record, old: Record | None, started: float) -> Config:
    # 6 arguments: the parts of a run before there is one
    """Return the settings with what is planned, if anything is: a whole run, or training for a finished one."""
    layout = record.layers()
    if config.plan == AUTO and (old is None or old.dense is None):
        assert record.search_batch_size is not None
        sizes = record.batch_size, record.search_batch_size
        return settle_for_model(planned(config, net, splits, layout, sizes, record.measured, started), net)
    if config.more_epochs == BY_CLOCK:
        assert old is not None and record.more_from is not None
        points = min(record.more_from - 1, config.front)
        return replace(with_epochs(config, net, splits, points, monotonic() - started), minutes=old.config.minutes)
    return config


def planned(config: Config, net: nn.Module, splits: Data, layout: Layout, batch_sizes: tuple[int, int], dense: Measured,
            started: float) -> Config:
    """Return the settings with a plan, and say it. `batch_sizes` are those of what is reported and of the search; the run was
    `started` then, by the monotonic clock."""
    # 7 arguments: the parts of a run before there is one
    minutes = config.minutes or (FEW_MINUTES if sum(p.numel() for p in net.parameters()) < SMALL else MINUTES)
    measure = partial(measured_costs, config, net, splits, layout, batch_sizes, dense, 60 * minutes)
    costs = measure("least-squares") or measure(default_repair(net, config))
    assert costs is not None
    spent = IMPORTS + monotonic() - started
    if not (targets := [each for each in TARGETS.split(",") if reachable(replace(config, targets=each), layout)]):
        costs = replace(costs, step=None)
        log.info("the searched layers reach none of the sparsities at which a plan trains, %s", TARGETS)
    plan = partial(plan_of, costs, free=free_memory(), repair=default_repair(net, config), targets=targets)
    found = plan(PUNCTUAL * 60 * minutes - spent)
    found["choice_images"] = config.choice_images
    config = replace(config, minutes=minutes, **found)
    log.info("plan for %g minute%s: %s; %.1f GB", minutes, "s" * (minutes != 1), in_words(config, costs),
             need(costs, config.population) / 1e9)
    more = replace(config, **plan(PUNCTUAL * 600 * minutes - spent))
    log.info("--minutes %g would give: %s", 10 * minutes, in_words(more, costs))
    log.info("the same without a clock: %s", " ".join(flags({name: value for name, value in found.items()
                                                              if value != options()[name].default})))
    return config


def with_precision(config: Config, net: nn.Module, splits: Data) -> Config:
    """Return the settings with the precision in which a step of training takes less time, where that is to be found out.

    Raises:
        EvopruneError: bf16 was asked for, and the device has none.
    """
    bf16 = has_bf16(torch.device(config.device))
    if config.train_precision == "bf16" and not bf16:
        raise EvopruneError(f"train_precision: found 'bf16', which this {config.device} has not; expected fp32 or {AUTO}")
    if config.train_precision != AUTO:
        return config
    found = "fp32"
    if trainable(net, splits) and bf16:
        took = {each: step_costs(replace(config, train_precision=each), net, splits, {}, FEW_STEPS)[0]
                for each in ("fp32", "bf16")}
        found = min(took, key=lambda each: took[each])
        log.info("training in %s: a step takes %.3g s in fp32, %.3g s in bf16", found, took["fp32"], took["bf16"])
    return replace(config, train_precision=found)


def with_epochs(config: Config, net: nn.Module, splits: Data, points: int, spent: float) -> Config:
    """Return the settings with as many epochs more for each of so many points as there is time for, some of it `spent`.

    Raises:
        EvopruneError: there is no time for one.
    """
    step, an_epoch = step_costs(config, net, splits, {})
    assert config.minutes is not None
    epochs = int((PUNCTUAL * 60 * config.minutes - spent - PLOTS) / max(1, points) / step / an_epoch)
    if epochs < 1:
        raise EvopruneError(f"minutes: found {config.minutes:g}, in which {points} points cannot be trained for an epoch of "
                            f"{step * an_epoch:.3g} s; expected more, or fewer --front")
    log.info("%d points are trained for %d epochs more", points, rounded(epochs))
    return replace(config, more_epochs=rounded(epochs))


def plan_of(costs: Costs, seconds: float, free: float, repair: str, targets: Sequence[str]) -> dict[str, Any]:
    """Return the settings that take so many `seconds` and no more than the `free` bytes, and train at these `targets`; with
    `repair` where least squares take too long."""
    population = next((each for each in POPULATIONS if each * (2 * costs.mask + costs.last) <= MASKS_SHARE * seconds
                       and need(costs, each) <= FREE * free), POPULATIONS[-1])
    left = max(0.0, seconds - PLOTS - population * costs.last - (population + len(targets)) * costs.tested)
    trains, shots = costs.step is not None, options()["shots"].default
    if costs.path:
        affordable = int((PATH_SHARE if trains else 0.5) * left / costs.path) // LEAST_SHOTS * LEAST_SHOTS
        shots = min(max(affordable, LEAST_SHOTS), shots)
        left -= shots * costs.path
    left -= population * costs.mask
    generations, epochs = shared(costs, left, population, len(targets))
    enough = targets and epochs * costs.steps_an_epoch >= LEAST_STEPS * len(targets)
    if trains and not enough:  # the others have its time
        return plan_of(replace(costs, step=None), seconds, free, repair, targets)
    return {"repair": "least-squares" if costs.least_squares else repair, "shots": shots, "population": population,
            "generations": generations, "refine_epochs": epochs if enough else None,
            "targets": ",".join(targets) if enough else options()["targets"].default}


def shared(costs: Costs, seconds: float, population: int, targets: int) -> tuple[int, float]:
    """Return how many generations, and epochs of training at so many targets, take so many `seconds`."""
    epoch, most = (costs.step or 0.0) * costs.steps_an_epoch, MOST_EPOCHS * SEEDS * targets
    training = min(most * epoch, (1 - SEARCH_SHARE) * seconds)
    generations = rounded(max(1.0, (seconds - training) / costs.mask / population))
    left = seconds - generations * population * costs.mask
    return generations, float(rounded(min(most, left / epoch))) if epoch and left > epoch else 0.0


def reachable(config: Config, layout: Layout) -> bool:
    """Say whether the layers can give the sparsity of --targets."""
    try:
        return bool(kept_at_targets(config, layout))
    except EvopruneError:
        return False


def rounded(number: float) -> int:
    """Return the next lower of 1, 2, ... 10, 12, 14, 16, 18, 20, 25, 30, 35, 40, 50, ..., so that plans are much alike."""
    tens = (1, 1.2, 1.4, 1.6, 1.8, 2, 2.5, 3, 3.5, 4, 5, 6, 7, 8, 9)
    steps = [*range(1, 10), *(round(k * 10**e) for e in range(1, 8) for k in tens)]
    return max((step for step in steps if step <= number), default=1)


def in_words(config: Config, costs: Costs) -> str:
    """Return what a plan does."""
    path = f"a multi-shot path of {config.shots} steps, " if costs.path else ""
    masks = f"{config.population * config.generations:,} masks by NSGA-II with repair {config.repair}"
    if config.choice_images:
        masks += f", compared in the end on {config.choice_images:,} training images too"
    if config.refine_epochs is None:
        return f"{path}{masks}, no training" + ("" if costs.step is None else ", for which there is no time")
    size = costs.steps_an_epoch, 1  # images and a batch size that make as many steps an epoch
    training = training_config(config, *size)
    how = "each from the one before" if seeded_budget(training, *size).line else \
        f"{training.generations} generations of children" if training.generations else \
        f"no later children, whose {SEED_STEPS:,} steps each there is no time for"
    targets = len(target_sparsities(config.targets))
    return f"{path}{masks}, {config.refine_epochs:g} epochs of training at {targets} sparsities ({how})"


def measured_costs(config: Config, net: nn.Module, splits: Data, layout: Layout, batch_sizes: tuple[int, int], dense: Measured,
                   seconds: float, repair: str) -> Costs | None:
    """Time a step of the path, a mask of the search, a point at the end, and a step of training. None: that is too slow for a
    run of so many `seconds`, or solves no layer."""
    # 8 arguments: see `planned`
    config = replace(config, repair=repair, plan=None)
    scores = gene_scores("lamp", layout, [net.get_parameter(layer.name).detach().float().cpu() for layer in layout])
    masks = [from_masks((mask.numpy() for mask in keep_top(scores, round(density * layout.weights), layout)), "lamp")
             for density in DENSITIES]
    evaluator = make_evaluator(net, layout, splits, config, batch_sizes[1], batch_sizes[0])
    run = Run(config, net, splits, layout, batch_sizes[0], evaluator, dense, "", float("inf"))
    mask, path = timed(evaluator, masks), 0.0
    if solves := repair == "least-squares":
        assert evaluator.repairer is not None
        longest = (LONGEST_TRAINED if trainable(net, splits) else LONGEST) * seconds
        if not evaluator.repairer.layers or (LEAST_SHOTS + 3 * POPULATIONS[-1]) * mask > longest:
            return None
        if "multishot" in (default_start(config.knowledge, repair) if config.start == AUTO else config.start):
            path = timed(partial(a_step, run.plain_evaluator(PATH_IMAGES, run.config.worth)), masks)
    last = timed(run.last, masks)
    scored = timed(Evaluator(net, layout, splits.search, batch_sizes[0], plain=True).score, masks) / len(splits.search)
    if config.choice_images:  # the first masks stay, and each point is measured on more images
        last = 2 * (last + (len(splits.search) + config.choice_images) * scored)
    step, an_epoch = (None, 1) if not trainable(net, splits) else step_costs(config, net, splits, named_masks(masks[-1], layout))
    tested = 0.0 if splits.test is None else len(splits.test) * scored
    individual = 2 * layout.weights + sum(map(len, masks[0]))
    return Costs(path, mask, last, tested, step, an_epoch, solves, peak_memory(), individual)


def a_step(evaluator: Evaluator, individual: Individual) -> None:
    """Do what a step of the multi-shot path takes."""
    evaluator.set_masks(individual)
    evaluator.saliency()


def trainable(net: nn.Module, splits: Data) -> bool:
    """Say whether there is something to train, and something to train it on."""
    return splits.train is not None and any(parameter.requires_grad for parameter in net.parameters())


def timed(function: Callable[[Individual], Any], masks: list[Individual]) -> float:
    """Return the seconds that a mask takes, once what is done and imported only once is there; see `DEAR` and `SLOW`."""
    for limit in (DEAR, SLOW):
        started = monotonic()
        function(masks[-1])
        if (took := monotonic() - started) > limit:
            return took
    started = monotonic()
    for mask in masks:
        function(mask)
    return (monotonic() - started) / len(masks)


def step_costs(config: Config, net: nn.Module, splits: Data, masks: Mapping[str, Tensor],
               count: int = STEPS) -> tuple[float, int]:
    """Return the seconds of a training step, and how many there are in an epoch."""
    assert splits.train is not None
    recipe = recipe_for(net, 0, 0, config.learning_rate, config.augment, config.train_precision)
    an_epoch = steps_an_epoch(len(splits.train), recipe.batch_size)
    return timed_step(net, splits.train, replace(recipe, epochs=count / an_epoch), masks, count), an_epoch


def timed_step(net: nn.Module, train: Split, recipe: Recipe, masks: Mapping[str, Tensor], count: int) -> float:
    """Return the seconds of one of so many training steps, that a recipe takes."""
    found = []
    for _ in range(2):  # the first one imports and warms up
        trained = copied(net).to(train.labels.device)
        started = monotonic()
        tune(trained, train, recipe, masks)
        found.append((monotonic() - started) / count)
    return min(found)


def need(costs: Costs, population: int) -> float:
    """Return the bytes that a run with such a population takes: parents, children and an archive beside what it measures with."""
    return costs.memory + 4 * population * costs.individual


def peak_memory() -> int:
    """Return the most bytes that this process has had."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def free_memory() -> float:
    """Return the bytes of memory that are free, and those that this process has had."""
    pages = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    known = Path("/proc/meminfo")
    found = re.search(r"MemAvailable: *(\d+)", known.read_text()) if known.exists() else None
    return (1024 * int(found[1]) if found else pages) + peak_memory()
