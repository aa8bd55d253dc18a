"""The pictures of a run: the front, each layer along it, progress."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..masks.genome import kept_genes
from ..masks.layout import Layout
from ..objectives import Objectives
from .points import Measured, Pruned

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def plot_front(front: Sequence[Measured], dense_score: float) -> bytes:
    """The score against the axis in log density, the test split's with its 95 % interval; below it each further objective."""
    objectives = front[0].objectives
    figure, axes, *more = subplots(1 + len(objectives.others))
    density = np.array([density_of(p) for p in front])
    score = objectives[objectives.score]
    axes.axhline(score.scale * dense_score, color="0.6", linewidth=1, linestyle=":", label="dense, search split")
    if any(p.score != p.before for p in front):
        axes.plot(density, [score.scale * p.before for p in front], ".--", color="0.6", label="before training")
    axes.plot(density, [score.scale * p.score for p in front], "o-", markersize=3.5, label="search split")
    tested = [p for p in front if p.test is not None]
    if tested:
        share, low, high = np.array([(p.test, p.test_low, p.test_high) for p in tested]).T
        axes.errorbar([density_of(p) for p in tested], score.scale * share, score.scale * np.array([share - low, high - share]),
                      fmt="s", markersize=3, linewidth=1, label="test split, 95 % interval")
    axes.set_ylabel(score.label)
    axes.legend()
    for below, i in zip(more, objectives.others):
        below.plot(density, [objectives[i].scale * p.values[i] for p in front], "o", markersize=3.5)
        below.set_ylabel(objectives[i].label)
    for each in (axes, *more):
        density_axis(each, density, objectives[objectives.axis].label)
        each.grid(alpha=0.3)
    return png(figure)


def plot_layers(front: Sequence[Pruned], layout: Layout) -> bytes:
    """What is pruned of each layer along the front."""
    axis = front[0].measured.objectives[front[0].measured.objectives.axis]
    figure, axes = subplots()
    for i, layer in enumerate(layout):
        share = [100 * (1 - kept_genes(p.individual[i]) / layer.genes) for p in front]
        axes.plot([density_of(p) for p in front], share, ".-", linewidth=1, label=f"{layer.name} ({layer.weights:,})")
    density_axis(axes, np.array([density_of(p) for p in front]), axis.label)
    axes.set_ylabel("pruned of the layer, %")
    if len(layout) <= 24:
        axes.legend(fontsize="x-small", ncols=1 + len(layout) // 8)
    axes.grid(alpha=0.3)
    return png(figure)


def plot_progress(log: Sequence[dict[str, float]], objectives: Objectives) -> bytes:
    """hvlog and the far end of the axis against generation."""
    figure, axes = subplots()
    axis, score = objectives[objectives.axis], objectives[objectives.score]
    generation = [row["generation"] for row in log]
    first = axes.plot(generation, [row["hvlog"] for row in log], ".-", label="hvlog")
    axes.set_xlabel("generation")
    axes.set_ylabel("hvlog: share dominated of all objectives" if objectives.others else
                    f"hvlog: mean {score.title} over log density 0.5 to 0.005")
    other = axes.twinx()
    highest = [axis.scale * row[axis.logged] for row in log]
    second = other.plot(generation, highest, ".-", color="C1", label=f"highest {axis.name}")
    other.set_ylabel(f"highest {axis.label}")
    axes.legend(handles=[*first, *second], loc="lower right")
    axes.grid(alpha=0.3)
    return png(figure)


def density_of(p: Measured | Pruned) -> float:
    return max(p.density, 1e-7)  # an empty model has its place on a log axis too


def subplots(rows: int = 1) -> list[Any]:
    """Return an empty plot and its axes, one below the other."""
    from matplotlib.figure import Figure  # a third of a second that worker processes do without

    figure = Figure(figsize=(7, 2 + 2.2 * rows), layout="constrained")
    return [figure, *figure.subplots(rows, squeeze=False)[:, 0]]


def density_axis(axes: Axes, density: Any, label: str) -> None:
    """Make the x axis log density, labelled with what is pruned, sparser to the right."""
    axes.set_xscale("log")
    axes.set_xlim(1.1, max(1e-6, float(min(density)) / 1.2))
    ticks = [t for t in (1, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005, 0.002, 0.001) if t >= min(density) / 1.2]
    axes.set_xticks(ticks, [f"{100 * (1 - t):g}" for t in ticks])
    axes.minorticks_off()
    axes.set_xlabel(f"{label} (log density)")


def png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()
