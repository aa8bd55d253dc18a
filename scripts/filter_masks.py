"""A tuned run of `--method oneshot:random` with other masks: the usual ways to choose filters, to compare evolution with.

    python scripts/filter_masks.py uniform --method oneshot:random --unit filter --total-epochs 300 --targets 0.5,0.9 ...
    python scripts/filter_masks.py norm --method oneshot:random --unit filter --weights dense.safetensors ...

With `uniform`, the same share of every layer's filters, drawn at random. With `norm`, those of the largest L1 norm over their
layer's mean (Li et al., 2017, arXiv:1608.08710, made comparable between layers as Torch-Pruning does), of all layers together,
and the largest of each layer.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from deap import base
from torch import Tensor

from evoprune import main
from evoprune.config import Config
from evoprune.evolution import default_toolbox
from evoprune.evolution.budget import Budget, kept_at_targets
from evoprune.evolution.tuned import Job, rule_jobs
from evoprune.inputs.named import read_weights
from evoprune.masks.genome import Individual, from_masks, kept_weights
from evoprune.masks.layout import Layout


def within(kept: int, scores: Sequence[Tensor], layout: Layout, origin: str) -> Individual:
    """Return a mask of the best scores of each layer and of all, as many as keep `kept` weights at most."""
    order = torch.cat([score.flatten() for score in scores]).sort(descending=True).values
    for least in reversed(order.tolist()):
        mask = from_masks(((score >= min(least, float(score.max()))).numpy() for score in scores), origin)
        if kept_weights(mask, layout) <= kept:
            return mask
    raise AssertionError("fewer weights than one gene a layer")


def scores_of(kind: str, layout: Layout, config: Config) -> list[Tensor]:
    """Return a score a gene, the higher the better."""
    if kind == "uniform":  # ranks in each layer: the same share of each is above any of them
        drawn = np.random.default_rng(config.seed)
        return [torch.from_numpy((drawn.permutation(layer.genes) + 0.5) / layer.genes) for layer in layout]
    weights = read_weights(str(config.weights))
    norms = [layer.summed(weights[layer.name].abs()) for layer in layout]
    return [norm / norm.mean() for norm in norms]


def toolbox(evaluate: Any, layout: Layout, config: Config, kind: str) -> base.Toolbox:
    """Return the usual toolbox with other masks for those of the rule."""
    def jobs(masks: Sequence[Individual], budget: Budget) -> list[Job]:
        scores = scores_of(kind, layout, config)
        return rule_jobs([within(kept, scores, layout, kind) for kept in kept_at_targets(config, layout)], budget, config, layout)

    made = default_toolbox(evaluate, layout, config)
    made.register("jobs", jobs)
    return made


if __name__ == "__main__":
    kind = sys.argv.pop(1)
    sys.exit(main.main(toolbox=partial(toolbox, kind=kind), program=f"python scripts/filter_masks.py {kind}"))
