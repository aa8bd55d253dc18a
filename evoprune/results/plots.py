"""The pictures of a run: the front, each layer along it, progress."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..masks.genome import kept_genes
from ..masks.layout import Layout
from .points import Measured, Pruned

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def plot_front(front: Sequence[Measured], dense_accuracy: float) -> bytes:
    """Accuracy against sparsity on a log density axis; the test split's with its 95 % interval."""
    figure, axes = subplots()
    density = np.array([density_of(p) for p in front])
    axes.axhline(100 * dense_accuracy, color="0.6", linewidth=1, linestyle=":", label="dense, search split")
    if any(p.accuracy != p.accuracy_before for p in front):
        axes.plot(density, [100 * p.accuracy_before for p in front], ".--", color="0.6", label="before training")
    axes.plot(density, [100 * p.accuracy for p in front], "o-", markersize=3.5, label="search split")
    tested = [p for p in front if p.test_accuracy is not None]
    if tested:
        share, low, high = np.array([(p.test_accuracy, p.test_low, p.test_high) for p in tested]).T
        axes.errorbar([density_of(p) for p in tested], 100 * share, 100 * np.array([share - low, high - share]),
                      fmt="s", markersize=3, linewidth=1, label="test split, 95 % interval")
    density_axis(axes, density)
    axes.set_ylabel("accuracy, %")
    axes.legend()
    axes.grid(alpha=0.3)
    return png(figure)


def plot_layers(front: Sequence[Pruned], layout: Layout) -> bytes:
    """Sparsity of each layer along the front."""
    figure, axes = subplots()
    for i, layer in enumerate(layout):
        share = [100 * (1 - kept_genes(p.individual[i]) / layer.genes) for p in front]
        axes.plot([density_of(p) for p in front], share, ".-", linewidth=1, label=f"{layer.name} ({layer.weights:,})")
    density_axis(axes, np.array([density_of(p) for p in front]))
    axes.set_ylabel("sparsity of the layer, %")
    if len(layout) <= 24:
        axes.legend(fontsize="x-small", ncols=1 + len(layout) // 8)
    axes.grid(alpha=0.3)
    return png(figure)


def plot_progress(log: Sequence[dict[str, float]]) -> bytes:
    """hvlog and the highest sparsity against generation."""
    figure, axes = subplots()
    generation = [row["generation"] for row in log]
    first = axes.plot(generation, [row["hvlog"] for row in log], ".-", label="hvlog")
    axes.set_xlabel("generation")
    axes.set_ylabel("hvlog: mean accuracy over log density 0.5 to 0.005")
    other = axes.twinx()
    second = other.plot(generation, [100 * row["max_sparsity"] for row in log], ".-", color="C1", label="highest sparsity")
    other.set_ylabel("highest sparsity, %")
    axes.legend(handles=[*first, *second], loc="lower right")
    axes.grid(alpha=0.3)
    return png(figure)


def density_of(p: Measured | Pruned) -> float:
    return max(1 - p.sparsity, 1e-7)  # an empty model has its place on a log axis too


def subplots() -> tuple[Figure, Axes]:
    """Return an empty plot."""
    from matplotlib.figure import Figure  # a third of a second that worker processes do without

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    return figure, figure.subplots()


def density_axis(axes: Axes, density: Any) -> None:
    """Make the x axis log density, labelled with the sparsity, sparser to the right."""
    axes.set_xscale("log")
    axes.set_xlim(1.1, max(1e-6, float(min(density)) / 1.2))
    ticks = [t for t in (1, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005, 0.002, 0.001) if t >= min(density) / 1.2]
    axes.set_xticks(ticks, [f"{100 * (1 - t):g}" for t in ticks])
    axes.minorticks_off()
    axes.set_xlabel("sparsity, % (log density)")


def png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()
