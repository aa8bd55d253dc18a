"""The dense model of a run: trained if asked, and measured."""

from __future__ import annotations

import logging
from dataclasses import asdict, replace
from pathlib import Path
from time import monotonic, time

import torch
from torch import nn

from ..config import Config
from ..errors import EvopruneError, first_line
from ..files import as_bytes_of, fingerprint, piece_of
from ..inputs.models import copied
from ..inputs.nested import leaves
from ..inputs.splits import Data, Split, example_sums
from ..inputs.tasks import CLASSIFICATION
from ..masks.genome import dense_individual
from ..masks.layout import Layout
from ..objectives import Objectives
from ..results.record import dense_row
from ..values.training import recipe_for, tune
from .progress import training_progress
from .run import pieces_of

ADAPTING = 0.1  # times the usual learning rate, from weights that were trained already: they know more than a few epochs teach
log = logging.getLogger("evoprune")


def train_dense(net: nn.Module, train: Split, config: Config, path: Path, deadline: float) -> None:
    """Train the dense model in place; its state is kept beside `path` as long as it is not whole.

    Raises:
        Stopped: the deadline, of the monotonic clock, has passed.
    """
    recipe = recipe_for(net, config.train_epochs or 0, config.seed, config.learning_rate, config.augment,
                        config.train_precision)
    adapts = config.weights is not None or config.model.startswith("hf:")
    if adapts and config.learning_rate is None:
        recipe = replace(recipe, learning_rate=ADAPTING * recipe.learning_rate)
    log.info("%s the dense model: %d epoch%s of %s images", "adapting" if adapts else "training", recipe.epochs,
             "s" * (recipe.epochs != 1), f"{len(train):,}")
    label = fingerprint(asdict(recipe), *map(as_bytes_of, (*net.state_dict().values(), train.labels, *leaves(train.images))))
    pieces = pieces_of(piece_of(path), label, time() + deadline - monotonic(), "training the dense model")
    net.to(train.labels.device)
    tune(net, train, recipe, progress=training_progress("the dense model"), pieces=pieces)
    net.cpu()


def measure_dense(net: nn.Module, splits: Data, batch_size: int, outputs: int, layout: Layout,
                  objectives: Objectives) -> dict[str, float | None]:
    """Measure, show and return what config.json says of the model before pruning."""
    # 6 arguments: the model, the images, and what is measured
    model = copied(net).to(splits.search.labels.device).eval()

    def sums(split: Split) -> torch.Tensor:
        try:
            return example_sums(model, split, batch_size)
        except (EvopruneError, KeyboardInterrupt):
            raise
        except BaseException as error:  # noqa: BLE001  # the user's model
            raise EvopruneError(f"data: some images do not go through the model: {first_line(error)}") from None

    found = splits.search.task.score(sums(splits.search).sum(0).tolist())
    tested: list[float | None] = [None, None, None]
    score, shown = objectives[objectives.score], ""
    if splits.test is not None:
        tested[:] = splits.test.task.tested(sums(splits.test))
        shown = f", {score.said(tested[0] or 0.0)} on the test split"
    labels, task = splits.search.labels, splits.search.task
    if task.link != "identity" and labels.numel() > 1 and labels.min() == labels.max():
        log.warning("warning: every label of the search split is %d: whatever is pruned, that is easy to guess",
                    int(labels.flatten()[0]))
    log.info("dense %s: %s on the search split%s", score.title, score.said(found), shown)
    if task.name == CLASSIFICATION.name and found < 1.5 / outputs < 1:
        log.warning("warning: that is near chance (%.2f %%): are these the weights, the classes and the normalisation "
                    "(--mean, --std) that the model was trained with?", 100 / outputs)
    if task.name == "regression" and found <= task.worst:
        log.warning("warning: that is as low as it is counted, and no pruned model can be worse: are these the weights, the "
                    "targets and their scale?")
    return dense_row(objectives.measured(found, dense_individual(layout), layout), tested, objectives)
