"""A run before its first generation: model and data checked against each other, the dense model measured, all recorded."""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from time import monotonic
from typing import Any

import torch
from torch import nn

from ..config import AUTO, RESUMABLE, Config
from ..errors import EvopruneError
from ..evaluation.accuracy import batch_size_for, dtype_of, probe
from ..evaluation.evaluator import Evaluator
from ..evaluation.usage import unused_parameters
from ..evolution.budget import budget_of, kept_at_targets
from ..evolution.checkpoint import load
from ..files import as_bytes_of, fingerprint, piece_of, remove, to_safetensors
from ..inputs.images import handed
from ..inputs.models import private_copy
from ..inputs.named import build_model, load_model, load_objectives
from ..inputs.nested import described, leaves, shapes
from ..inputs.sources import limit, load_data
from ..inputs.splits import Data, Split
from ..inputs.tasks import CLASSIFICATION, check_task, constant_score, guessed, optimised, task_of
from ..inputs.weights import STRANGE, kind_of, load_weights, read_weights
from ..masks.layers import USUAL, LeftOut, aliases, find_layers, left_out, prunable_parameters
from ..masks.layout import Layout
from ..objectives import Objectives
from ..results.folder import Folder
from ..results.front import load_front
from ..results.machine import device_name, versions
from ..results.points import columns
from ..results.record import Record
from ..results.written import CONFIG, DENSE, DOMINATED, FRONT, TRAINED
from ..rules import read_method, read_units, rule_names
from ..values.repair import LAST_IMAGES
from ..values.training import recipe_for
from .dense import measure_dense, train_dense
from .plan import by_clock, with_precision
from .run import Run, calibration_images, kept_apart, make_evaluator
from .settings import search_batch_size, settle_for_model, training_config

PLACES = ("out", "overwrite", "data_dir", "weights", "model", "data", "plan", "minutes")  # no part of a run's identity
NAMED = 3  # parameters of a kind that a line names
LIKE = 256  # examples that the record of what they are like looks at
log = logging.getLogger("evoprune")


def prepare(config: Config, model: nn.Module | str, data: Any, folder: Folder, command: str | None = None,
            toolbox: str | None = None) -> Run:  # 6 arguments: the last two are for the record
    """Check that model and data go together, train the dense model if asked, measure it, plan if asked, and record it all. A run
    that is there already is left alone until everything has been checked, and set aside then."""
    started = monotonic()
    load_objectives(config.objectives)
    device = torch.device(config.device)
    old = folder.read_record() if folder.resuming else None
    resumed = folder.path / DENSE if old and (old.dense is not None or (folder.path / DENSE).exists()) else None
    splits = get_data(config, data)
    net = get_model(config, model, splits, old, resumed)
    splits = splits.to(device, dtype_of(net))
    layout, apart, answers, activation = looked_at(net, splits, config)
    config, splits = with_task(config, splits, answers)
    outputs = int(answers.shape[splits.search.task.dimension]) if answers.dim() > 1 else 1
    config, splits, kept = check_together(net, splits, config, layout, old)
    config = with_precision(config if config.plan == AUTO else settle_for_model(config, net), net, splits)
    record = Record(
        outputs=outputs, named_data=isinstance(data, str), settings=config.settings(), rebuildable=isinstance(model, str),
        command=(old and old.command) or command, splits=splits.sizes(), channels=channels_of(splits), mean=splits.search.mean,
        constant=constant_score(task_of(config.task), splits.search.labels), layout=tuple(layout), std=splits.search.std,
        threads=config.threads or torch.get_num_threads(), weights=layout.total, batch_size=batch_size_for(activation, device),
        objectives=optimised(config.objectives, config.task), device=device_name(device), versions=versions(),
        aliases=aliases(net, layout), inputs=described(splits.search.inputs(slice(0, LIKE))), toolbox=toolbox, left_out=apart,
        more_from=points_before(folder, old, config), searched=splits.search.name, scaled=splits.search.scaled)
    say(record, old)
    if config.train_epochs and resumed is None:
        train_first(net, splits, record, folder, deadline(config.max_seconds, started))
    dense = measure_dense(net, splits, record.batch_size, outputs, layout, record.optimised)
    size = search_batch_size(config, net, layout, splits, record.batch_size, old)
    record = replace(record, search_batch_size=size, dense=dense)
    config = by_clock(config, net, splits, record, old, started)
    evaluator = make_evaluator(net, layout, splits, config, size, record.batch_size)
    say_unsolved(evaluator, config)
    identity = identity_of(config, layout, (record.batch_size, size), splits, net)
    run = Run(config, net, splits, layout, record.batch_size, evaluator, record.measured, identity,
              deadline(config.max_seconds, started), kept, record.more_from, (folder.checkpoint / TRAINED).resolve())
    write_start(run, record, folder, old is not None and old.dense is not None)
    return run


def points_before(folder: Folder, old: Record | None, config: Config) -> int | None:
    """Return how many points a finished run has, or had before more training began; None: there is none."""
    if old is None or config.more_epochs is None:
        return None
    if not folder.finished(config.generations):
        return old.more_from
    front = load_front(folder.path)
    return 1 + max(int(point.id) for name in (FRONT, DOMINATED) if front.written.has(name) for point in front.read(name))


def train_first(net: nn.Module, splits: Data, record: Record, folder: Folder, deadline: float) -> None:
    """Train the dense model, in a folder that can be resumed if that is killed, or beside a run that it may replace."""
    if not folder.holds_run:
        folder.write(CONFIG, record.to_json())
    train_dense(net, splits.train, record.config, folder.trained(DENSE), deadline)
    layers_of(net, record.config, record.unused)  # it may have ended in NaN


def with_task(config: Config, splits: Data, outputs: torch.Tensor) -> tuple[Config, Data]:
    """Return the settings and splits with their task: what --task names, or what outputs and targets are like."""
    task = task_of(config.task) if config.task else guessed(outputs, splits.search.labels)
    for name, split in (("search", splits.search), ("train", splits.train), ("test", splits.test)):
        if split is not None:
            check_task(task, outputs, split.labels, f"data: {name}")
    if task.name in (CLASSIFICATION.name, "tokens") and splits.classes > outputs.shape[task.dimension]:
        raise EvopruneError(f"data: found {splits.classes} classes, expected at most {outputs.shape[task.dimension]}, as many as "
                            f"the model has outputs")
    if config.task is None and task.name != CLASSIFICATION.name:
        log.info("task: %s, measured by %s, as the targets look; --task, in Python task=, says otherwise", task.name, task.metric)
    return replace(config, task=config.task or task.name), splits.for_task(task)


def looked_at(net: nn.Module, splits: Data, config: Config) -> tuple[Layout, LeftOut, torch.Tensor, int]:
    """Return the layers to search, what is left out, some outputs, and the bytes of the largest activation of an image."""
    layers_of(net, config)  # what cannot be pruned is refused before the model runs
    outputs, activation = probe(net, splits.search)
    unused = unused_parameters(net, splits.search, prunable_parameters(net, config.include))
    layout = layers_of(net, config, unused)
    return layout, left_out(net, layout, unused), outputs, activation


def say(record: Record, old: Record | None) -> None:
    """Say what is pruned, on what, where; and whether the run goes on with another toolbox."""
    settings, threads = record.settings, record.threads
    log.info("%s on %s: %s weights in %d layers, %s, %s torch thread%s; images: %s", settings["model"], settings["data"],
             f"{record.layers().weights:,}", len(record.layout), record.device, threads, "s" * (threads != 1),
             ", ".join(f"{count:,} {name}" for name, count in record.splits.items() if count))
    say_left_out(record)
    if old and old.toolbox != record.toolbox:
        log.warning("warning: the run was made with the toolbox of %s and goes on with that of %s", old.toolbox or "evoprune",
                    record.toolbox or "evoprune")


def say_left_out(record: Record) -> None:
    """Say which parameters are not searched, by name but for biases and norms, and what share of all they are."""
    apart, said = record.left_out or {}, []
    for reason, each in apart.items():
        names = [name for name, _ in each]
        named = f" ({', '.join(names[:NAMED])}{f' and {len(names) - NAMED} more' if len(names) > NAMED else ''})"
        said.append(f"{sum(size for _, size in each):,} {reason}{named * (reason != USUAL)}")
    if said:
        count = sum(size for each in apart.values() for _, size in each)
        parameters = count + record.layers().weights
        log.info("not searched: %.2f %% of %s parameters: %s", 100 * count / parameters, f"{parameters:,}", "; ".join(said))


def say_unsolved(evaluator: Evaluator, config: Config) -> None:
    """Say which layers least squares leaves as they are, and what share of the weights."""
    if config.repair == "least-squares" and evaluator.repairer and (left := evaluator.repairer.left()):
        share = sum(layer.weights for layer in evaluator.layout if layer.name in left) / evaluator.layout.weights
        log.info("least squares leaves %.2f %% of the weights as they are: %s", 100 * share, ", ".join(left))


def deadline(seconds: float | None, started: float) -> float:
    """Return when a run has to stop, by the monotonic clock; what takes long to prepare has a second to go on, too."""
    return float("inf") if seconds is None else max(started + seconds, monotonic() + min(seconds, 1.0))


def write_start(run: Run, record: Record, folder: Folder, resumed: bool) -> None:
    """Write what a run starts from, now that everything has been checked; a resumed one's config.json when it has gone on."""
    record = replace(record, settings=run.config.settings())
    if run.more_from is not None:
        pass  # a finished run is read from its files
    elif folder.resuming:
        check_checkpoint(folder, run.layout, run.identity, run.config)
    else:
        folder.set_aside()
    if resumed:
        folder.config = record.to_json()
    else:
        folder.write(DENSE, to_safetensors(run.model.state_dict()))
        folder.write(CONFIG, record.to_json())
        remove(piece_of(folder.trained(DENSE)))


def check_objectives(objectives: Objectives) -> None:
    """Raise `EvopruneError` where two columns of the points' table would have one name."""
    names = columns(objectives, choice=True)
    if twice := [name for name in names if names.count(name) > 1]:
        raise EvopruneError(f"objectives: {twice[0]} is the name of a column that every run has, expected another")


def check_together(net: nn.Module, splits: Data, config: Config, layout: Layout,
                   old: Record | None) -> tuple[Config, Data, Split | None]:
    """Return settings and splits with what is kept back, and that; raise `EvopruneError` for what would fail only later: other
    splits' shapes, nothing to train, odd state dicts, targets or a budget that cannot be."""
    check_objectives(optimised(config.objectives, config.task))
    shape = shapes(splits.search.images)
    for name, split in (("train", splits.train), ("test", splits.test)):
        if split is not None and shapes(split.images) != shape:
            raise EvopruneError(f"data: {name} images have shape {shapes(split.images)}, search images {shape}; expected "
                                f"the same")
    if config.trains and not any(p.requires_grad for p in net.parameters()):
        raise EvopruneError("model: training was asked for, but every parameter is frozen (requires_grad=False)")
    for name, value in net.state_dict().items():
        if not isinstance(value, torch.Tensor) or kind_of(value) == STRANGE:
            raise EvopruneError(f"model: {name} of the state dict is no plain tensor, expected one")
    config, splits, kept = kept_apart(config, net, splits, old)
    if read_method(config.method).kind != "evolve" or config.total_epochs is not None or config.refine_epochs is not None:
        kept_at_targets(config, layout)
    for epochs, budget in ((config.total_epochs, budget_of), (config.refine_epochs, training_config)):
        if epochs is not None and splits.train is not None:
            budget(config, len(splits.train), recipe_for(net, 0, 0).batch_size)
    return config, splits, kept


def check_checkpoint(folder: Folder, layout: Layout, identity: str, config: Config) -> None:
    """Raise `EvopruneError` unless the newest checkpoint belongs to this run and is not beyond its generations."""
    state = load(folder.checkpoint, layout, optimised(config.objectives, config.task), identity)
    if state is not None and config.total_epochs is None and state.generation > config.generations:
        raise EvopruneError(f"generations: found {config.generations}, but the run in {folder.path} has had "
                            f"{state.generation}; expected at least that many")


def identity_of(config: Config, layout: Layout, batch_sizes: tuple[int, int], splits: Data, net: nn.Module) -> str:
    """Return a hash of all that decides the results of a run; batch sizes are those of what is reported and of the search."""
    calibrated = calibration_images(config, splits, batch_sizes[0], LAST_IMAGES)
    images = splits.search.images
    tensors = [tensor for split in (splits.search, splits.test, calibrated) if split is not None
               for tensor in (split.labels, *leaves(split.images))]
    return fingerprint({k: v for k, v in config.settings().items() if k not in (*RESUMABLE, *PLACES)},
                       [vars(layer) for layer in layout], batch_sizes, *(as_bytes_of(t) for t in tensors),
                       *(as_bytes_of(value) for value in net.state_dict().values()),
                       *(() if isinstance(images, torch.Tensor) else (shapes(images),)))


def get_data(config: Config, data: Any) -> Data:
    """Return the splits of the run: named ones loaded, others cut; training needs a train split."""
    training = config.trains
    asked = rule_names(config.start) if config.start != "auto" else []
    fisher = "fisher" in (*asked, read_method(config.method).rule)
    if isinstance(data, str):
        whole = training or fisher or config.repair == "least-squares" or config.choice_images or config.plan == AUTO
        calibrates = config.repair != "none" and not config.layerwise  # perhaps: the model decides whether it is repaired
        splits = load_data(config, None if whole else LAST_IMAGES if calibrates else 0)
    else:
        splits = limit(handed(config, data), config)
    if training and splits.train is None:
        raise EvopruneError("data: found no train split, which train_epochs, finetune_epochs and total_epochs need; hand in "
                            "evoprune.Data(train, search, test), or leave training out")
    if fisher and splits.train is None:
        raise EvopruneError("start, method: found 'fisher', whose gradients need a train split, and no train split; hand in "
                            "evoprune.Data(train, search, test), or choose other rules")
    return splits


def get_model(config: Config, model: nn.Module | str, splits: Data, old: Record | None,
              dense: Path | None) -> nn.Module:
    """Return the dense model on the CPU: as the settings say, or with the values a run to resume started from."""
    if isinstance(model, str):
        outputs = outputs_of(config, splits) if old is None else old.outputs
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)  # a model that is trained first starts from the same values each time
            if not dense:
                return load_model(config, outputs, channels_of(splits))
            net = build_model(config.model, outputs, channels_of(splits))
        load_weights(net, read_weights(str(dense)), str(dense))
        return net
    net = private_copy(model)
    if config.weights is not None:
        load_weights(net, read_weights(config.weights), config.weights)
    if dense:
        stored = read_weights(str(dense))
        own = net.state_dict()
        if not config.train_epochs and any(name not in own or not torch.equal(own[name], v) for name, v in stored.items()):
            raise EvopruneError(f"{dense}: holds another model than the one handed in; resume with the model that "
                                f"started the run, or choose a new out")
        load_weights(net, stored, str(dense))
    return net


def outputs_of(config: Config, splits: Data) -> int:
    """Return how many outputs a model needs that is made for the data."""
    if config.task in ("multilabel", "regression"):
        return int(splits.search.labels[0].numel())
    return 1 if config.task == "binary" else splits.classes


def layers_of(net: nn.Module, config: Config, unused: Collection[str] = ()) -> Layout:
    """Return the layers that the settings choose, of those that the model uses."""
    return find_layers(net, config.layer, config.skip, config.include, read_units(config.unit), unused)


def channels_of(splits: Data) -> int:
    first = leaves(splits.search.images)[0]
    return int(first.shape[1]) if first.dim() > 1 else 1
