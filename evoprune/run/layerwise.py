"""One layer after the other: search its masks, apply the one that a rule chooses, train, go on to the next.

The points of the run are the models after each layer; what is searched and trained stands in a stage's own folder under
checkpoint/, so that a stopped run goes on in the stage it was in.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..config import Config
from ..engines.engine import Engine, Local
from ..evolution.generations import State
from ..evolution.selection import non_dominated
from ..evolution.toolbox import Make, made
from ..files import fingerprint, remove, to_safetensors, write_atomic
from ..inputs.models import copied, set_state
from ..inputs.splits import score
from ..masks.genome import Fitness, Individual, dense_individual, kept_genes, pruned_weights
from ..masks.layout import Layer, Layout
from ..masks.tensors import named_masks
from ..results.folder import Folder
from ..results.points import Pruned, before_and_after, pruned
from ..results.written import STAGE_VALUES
from ..rules import round_caps
from ..values.training import Pieces, Recipe, hold_zeros, recipe_for, tune
from .jobs import OneLayer, RunEvaluator
from .progress import training_progress
from .run import Run, make_evaluator
from .search import map_measured, search

MASK = "mask of "  # prefix of the masks among the tensors of a stage's file
Rows = Sequence[dict[str, float]]  # of the log
log = logging.getLogger("evoprune")


@dataclass
class Stage:
    """What a stage leaves: the values of the whole model, all masks so far, and what they measured."""

    state: dict[str, Tensor]
    individual: Individual
    before: float  # score before training, on the search split
    after: float
    evaluations: int
    log: tuple[dict[str, float], ...]


@dataclass
class Layerwise:
    """A search layer by layer: `stages()`."""

    run: Run
    toolbox: Make
    folder: Folder
    engine: Local | Engine
    worked: bool = False  # whether a stage has gone on

    def stages(self) -> Iterator[tuple[Pruned, Rows]]:
        """Yield the dense model, then the model after each layer, and the rows of the log that each adds.

        Raises:
            Stopped: `max_seconds` have passed; --resume goes on in the stage it was in.
        """
        run, layout = self.run, self.run.layout
        stage = Stage(run.model.state_dict(), dense_individual(layout), 0, 0, 0, ())
        yield point_of(run, stage.individual, run.dense.score, run.dense.score), []
        caps = round_caps(run.config.caps, run.config.rounds)
        last: dict[str, float] = {"generation": -1, "evaluations": 0, "seconds": 0}
        for number, (k, i) in enumerate((k, i) for k in range(len(caps)) for i in range(len(layout))):
            log.info("layer %d of %d: %s%s", i + 1, len(layout), layout[i].name,
                     f", round {k + 1} of {len(caps)}" if len(caps) > 1 else "")
            stage = self.stage(stage, i, number, caps[k])
            point = point_of(run, stage.individual, stage.after, stage.before, stage.state)
            log.info("%s: %s", layout[i].name, before_and_after(point))
            rows = [{**row, "generation": row["generation"] + last["generation"] + 1,
                     "evaluations": row["evaluations"] + last["evaluations"], "seconds": row["seconds"] + last["seconds"],
                     "epochs": run.config.finetune_epochs * number} for row in stage.log]
            last = rows[-1]
            yield point, rows

    def stage(self, before: Stage, i: int, number: int, cap: float) -> Stage:
        """Search layer `i` of the model as the stage before left it, apply a mask, train; or read back what that gave."""
        run = self.run
        identity, name = fingerprint(run.identity, number), f"stage-{number:03d}"
        if (stored := self.folder.read_trained(name, identity)) is not None:
            return unpack_stage(stored, run.layout)
        if self.worked:  # at least one stage goes on, however long those before take to read
            run.check_time()
        self.worked = True
        net = copied(run.model)
        set_state(net, before.state)
        found = self.search_layer(before, net, i, identity, name)
        layer = run.layout[i]
        alive = np.packbits(layer.any(net.get_parameter(layer.name) != 0).reshape(-1).numpy())  # zeros of earlier rounds
        chosen = choose_mask(found, layer, alive, run.config, cap)
        individual = before.individual.clone()
        individual[i] = chosen[0] & alive
        individual.origin, individual.generation = chosen.origin, chosen.generation
        recipe = recipe_for(net, run.config.finetune_epochs, run.config.seed + 1 + number, run.config.learning_rate,
                            run.config.augment, run.config.train_precision)
        pieces = run.pieces(name, identity, run.until, "training the layers so far")
        after = train_stage(run, net, individual, recipe, pieces, found)
        after.state = {name: old if torch.equal(old := before.state[name].cpu(), value) else value  # all stages are kept
                       for name, value in after.state.items()}
        self.folder.write_trained(name, identity, pack_stage(after, run.layout))
        remove(self.folder.checkpoint / name)
        return after

    def search_layer(self, before: Stage, net: nn.Module, i: int, identity: str, name: str) -> State:
        """Return the last state of the search of one layer."""
        run, config = self.run, self.run.config
        layer = run.layout[i]
        own = (layer.genes - kept_genes(before.individual[i])) * layer.weights_a_gene
        others = pruned_weights(before.individual, run.layout) - own
        layout = Layout((layer,), run.layout.total, others)
        evaluator = make_evaluator(net, layout, run.data, config, run.evaluator.batch_size, run.batch_size)
        checkpoint = self.folder.checkpoint / name
        checkpoint.mkdir(exist_ok=True)
        measure = None
        if config.engine != "local":
            values = checkpoint.resolve() / STAGE_VALUES
            write_atomic(values, to_safetensors(before.state))
            measure = RunEvaluator(run.identity, OneLayer(identity, str(values), i, others))
        alone = replace(run, model=net, layout=layout, evaluator=evaluator, identity=identity)
        toolbox = made(self.toolbox, measure or evaluator, layout, config)
        mapping = partial(map_measured, evaluate=toolbox.evaluate, engine=self.engine, run=alone)
        states = search(alone, toolbox, checkpoint, mapping)
        for newest in states:
            self.folder.started()
            found = newest
        return found


def train_stage(run: Run, net: nn.Module, individual: Individual, recipe: Recipe, pieces: Pieces | None, state: State) -> Stage:
    # 6 arguments: what is trained, how, and what the search of it was like
    """Apply all masks, measure, train the values that are left, measure again."""
    config = run.config
    device = run.data.search.labels.device
    net.to(device)
    kept = named_masks(individual, run.layout, device)
    hold_zeros([net.get_parameter(name) for name in kept], kept)
    before = after = score(net.eval(), run.data.search, run.batch_size)
    if config.finetune_epochs and run.data.train is not None:
        tune(net, run.data.train, recipe, kept, training_progress("the layers so far"), pieces=pieces)
        after = score(net.eval(), run.data.search, run.batch_size)
    values = {name: value.detach().cpu().clone() for name, value in net.state_dict().items()}
    return Stage(values, individual, before, after, state.evaluations, tuple(state.log))


def choose_mask(state: State, layer: Layer, alive: np.ndarray, config: Config, cap: float) -> Individual:
    """Return the mask that the rule chooses among a layer's points that leave it, of what is `alive`, no sparser than `cap`; the
    unpruned one if there is none.

    That is the knee (`Objectives.knee`) or, with the floor rule, the sparsest, since every point reaches the floor.
    """
    points = [p for p in non_dominated(state.archive, config.accuracy_floor)
              if 1 - kept_genes(p[0] & alive) / layer.genes <= cap]
    if not points:
        return state.archive[0]
    if config.layer_rule == "floor":
        return points[-1]
    return points[points[0].fitness.objectives.knee(np.array([p.fitness.values for p in points]))]


def point_of(run: Run, individual: Individual, score: float, before: float, state: dict[str, Tensor] | None = None) -> Pruned:
    """Return a stage's individual as a point."""
    individual.fitness = Fitness(run.objectives.measured(score, individual, run.layout), run.objectives)
    return pruned(individual, run.layout, score, before, state)


def pack_stage(stage: Stage, layout: Layout) -> dict[str, Tensor]:
    """Return a stage as tensors, text among them as bytes."""
    facts: dict[str, Any] = {"origin": stage.individual.origin, "generation": stage.individual.generation, "score_before":
                             stage.before, "score": stage.after, "evaluations": stage.evaluations, "log": stage.log}
    text = torch.frombuffer(bytearray(json.dumps(facts).encode()), dtype=torch.uint8)
    masks = {MASK + layer.name: torch.from_numpy(bits) for layer, bits in zip(layout, stage.individual)}
    return {**stage.state, **masks, MASK: text}


def unpack_stage(stored: dict[str, Tensor], layout: Layout) -> Stage:
    """Return the stage that `pack_stage` took apart."""
    facts = json.loads(stored[MASK].numpy().tobytes())
    individual = Individual([stored[MASK + layer.name].numpy() for layer in layout], facts["origin"], facts["generation"])
    values = {name: value for name, value in stored.items() if not name.startswith(MASK)}
    return Stage(values, individual, facts["score_before"], facts["score"], facts["evaluations"], tuple(facts["log"]))
