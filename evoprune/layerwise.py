"""One layer after the other: search its masks, apply the one that a rule chooses, train, go on to the next.

The points of the run are the models after each layer; what is searched and trained stands in a stage's own folder under
checkpoint/, so that a stopped run goes on in the stage it was in.
"""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from time import monotonic
from typing import Any

import numpy as np
import torch
from deap import base
from torch import Tensor, nn

from .checkpoint import Folder, fingerprint, to_safetensors, write_atomic
from .config import Config, round_caps
from .engines import Engine, Local
from .evaluation import Evaluator, correct
from .evolution import State, non_dominated
from .export import Measured
from .genome import Individual, dense_individual, kept_genes, sparsity
from .jobs import Measure, OneLayer
from .layers import Layout
from .run import Run, make_evaluator, training_progress
from .search import search
from .tuning import recipe_for, tune

log = logging.getLogger("evoprune")
MASK = "mask of "  # prefix of the masks among the tensors of a stage's file


@dataclass
class Stage:
    """What a stage leaves: the values of the whole model, all masks so far, and what they measured."""

    state: dict[str, Tensor]
    individual: Individual
    before: int  # right answers before training, of the search split
    after: int
    evaluations: int
    log: tuple[dict[str, float], ...]


def search_layerwise(run: Run, toolbox: Callable[[Any, Layout, Config], base.Toolbox],
                     folder: Folder, engine: Local | Engine) -> tuple[list[Measured], list[dict[str, float]], str]:
    """Return the models after each layer, the rows of the log, and why it stopped early, "" if it did not."""
    whole = dense_individual(run.layout)
    stage = Stage(run.model.state_dict(), whole, 0, 0, 0, ())
    points = [measured(run, whole, run.dense_accuracy, run.dense_accuracy, None)]
    rows: list[dict[str, float]] = []
    caps = round_caps(run.config)
    stages = [(k, i) for k in range(len(caps)) for i in range(len(run.layout))]
    for number, (k, i) in enumerate(stages):
        log.info("layer %d of %d: %s%s", i + 1, len(run.layout), run.layout[i].name,
                 f", round {k + 1} of {len(caps)}" if len(caps) > 1 else "")
        try:
            following, stopped = one_stage(run, stage, i, number, caps[k], toolbox, folder, engine)
        except KeyboardInterrupt:
            following, stopped = None, "interrupted"
        if following is None:
            return points, rows, stopped
        stage = following
        images = len(run.data.search)
        points.append(measured(run, stage.individual, stage.after / images, stage.before / images, stage.state))
        done = rows[-1]["generation"] + 1 if rows else 0
        measured_so_far, spent = (rows[-1]["evaluations"], rows[-1]["seconds"]) if rows else (0, 0)
        rows += [{**row, "generation": row["generation"] + done, "evaluations": row["evaluations"] + measured_so_far,
                  "seconds": row["seconds"] + spent, "epochs": run.config.finetune_epochs * number} for row in stage.log]
        log.info("%s: %.2f %% sparsity of the model, accuracy %.2f %% before and %.2f %% after training", run.layout[i].name,
                 100 * sparsity(stage.individual, run.layout), 100 * stage.before / images, 100 * stage.after / images)
    return points, rows, ""


def one_stage(run: Run, stage: Stage, i: int, number: int, cap: float, toolbox: Callable[..., base.Toolbox],
              folder: Folder, engine: Local | Engine) -> tuple[Stage | None, str]:
    """Search layer `i` of the model as the last stage left it, apply a mask, train."""
    layer, config = run.layout[i], run.config
    identity = fingerprint(run.identity, number)
    if (stored := folder.read_trained(f"stage-{number:03d}", identity)) is not None:
        return unpack_stage(stored, run.layout), ""
    if monotonic() > run.deadline:
        return None, "max_seconds"
    net = copy.deepcopy(run.model)
    net.load_state_dict(stage.state)
    others = sum((each.genes - kept_genes(bits)) * (each.weights // each.genes)
                 for j, (each, bits) in enumerate(zip(run.layout, stage.individual)) if j != i)
    layout = Layout((layer,), run.layout.total, others)
    evaluator = make_evaluator(net, layout, run.data, config, run.evaluator.batch_size, run.batch_size)
    checkpoint = folder.checkpoint / f"stage-{number:03d}"
    checkpoint.mkdir(exist_ok=True)
    evaluate: Evaluator | Measure = evaluator
    if config.engine != "local":
        values = checkpoint.resolve() / "values.safetensors"
        write_atomic(values, to_safetensors(stage.state))
        evaluate = Measure(run.identity, OneLayer(identity, str(values), i, others))
    state, stopped = search(replace(run, model=net, layout=layout, evaluator=evaluator, identity=identity),
                            toolbox(evaluate, layout, config), checkpoint, engine)
    if stopped:
        return None, stopped
    chosen = choose(state, layout, config, cap)
    alive = np.packbits((dict(net.named_parameters())[layer.name] != 0).reshape(-1).numpy())  # zeros of earlier rounds
    individual = stage.individual.clone()
    individual[i] = chosen[0] & alive
    individual.origin, individual.generation = chosen.origin, chosen.generation
    following = train_stage(run, net, individual, number, state)
    folder.write_trained(f"stage-{number:03d}", identity, pack_stage(following, run.layout))
    for file in checkpoint.iterdir():
        file.unlink()
    checkpoint.rmdir()
    return following, ""


def train_stage(run: Run, net: nn.Module, individual: Individual, number: int, state: State) -> Stage:
    """Apply all masks, count, train the values that are left, count again."""
    config = run.config
    kept = {layer.name: torch.from_numpy(np.unpackbits(bits, count=layer.genes).view(np.bool_)).view(layer.gene_shape)
            .expand(layer.shape) for layer, bits in zip(run.layout, individual)}
    device = run.data.search.labels.device
    net.to(device)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if name in kept:
                parameter.masked_fill_(~kept[name].to(device), 0)
    before = after = int(correct(net.eval(), run.data.search, run.batch_size))
    if config.finetune_epochs and run.data.train is not None:
        recipe = recipe_for(net, config.finetune_epochs, config.seed + 1 + number, config.learning_rate, config.augment)
        tune(net, run.data.train, recipe, kept, training_progress("the layers so far"))
        after = int(correct(net.eval(), run.data.search, run.batch_size))
    values = {name: value.detach().cpu().clone() for name, value in net.state_dict().items()}
    return Stage(values, individual, before, after, state.evaluations, state.log)


def choose(state: State, layout: Layout, config: Config, cap: float) -> Individual:
    """Return the mask that the rule chooses among a layer's points no sparser than `cap`; the unpruned one if there is none.

    The knee is the point farthest above the line between the ends of the front, both objectives scaled to 0..1; the floor
    rule takes the sparsest, since every point reaches the floor.
    """
    points = [p for p in non_dominated(state.archive, config.accuracy_floor)
              if 1 - kept_genes(p[0]) / layout[0].genes <= cap]
    if not points:
        return state.archive[0]
    if config.layer_rule == "floor":
        return points[-1]
    values = np.array([p.fitness.values for p in points])
    low, high = values.min(0), values.max(0)
    above = ((values - low) / np.maximum(high - low, 1e-12)).sum(1)
    return points[int(np.flatnonzero(above == above.max())[-1])]  # of equally far ones the sparsest


def measured(run: Run, individual: Individual, accuracy: float, before: float, state: dict[str, Tensor] | None) -> Measured:
    individual.fitness.values = accuracy, sparsity(individual, run.layout)
    return Measured("", individual, accuracy, before, state=state)


def pack_stage(stage: Stage, layout: Layout) -> dict[str, Tensor]:
    """Return a stage as tensors, text among them as bytes."""
    facts: dict[str, Any] = {"origin": stage.individual.origin, "generation": stage.individual.generation, "before":
                             stage.before, "after": stage.after, "evaluations": stage.evaluations, "log": stage.log}
    text = torch.frombuffer(bytearray(json.dumps(facts).encode()), dtype=torch.uint8)
    masks = {MASK + layer.name: torch.from_numpy(bits) for layer, bits in zip(layout, stage.individual)}
    return {**stage.state, **masks, MASK: text}


def unpack_stage(stored: dict[str, Tensor], layout: Layout) -> Stage:
    """Return the stage that `pack_stage` took apart."""
    facts = json.loads(stored[MASK].numpy().tobytes())
    individual = Individual([stored[MASK + layer.name].numpy() for layer in layout], facts["origin"], facts["generation"])
    values = {name: value for name, value in stored.items() if not name.startswith(MASK)}
    return Stage(values, individual, facts["before"], facts["after"], facts["evaluations"], tuple(facts["log"]))
