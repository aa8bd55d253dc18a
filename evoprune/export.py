"""The files of a run that a person or a program reads: CSV, masks, models, plots."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from .checkpoint import Folder, to_safetensors, uninterrupted
from .front import points_csv, wilson
from .genome import Individual, kept_genes, pruned_weights
from .layers import Layout

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LAYER_COLUMNS = ("id", "layer", "weights", "kept", "sparsity")


@dataclass
class Measured:
    """A point to write: a mask, what it measured, and its trained values where it has some."""

    id: str
    individual: Individual
    accuracy: float
    accuracy_before: float
    test: tuple[int, int] | None = None  # right answers, of how many
    state: dict[str, Tensor] | None = None
    repair: str = "none"  # that made the values of `state`

    @property
    def sparsity(self) -> float:
        value: float = self.individual.fitness.values[1]
        return value


def write_run(folder: Folder, points: Sequence[Measured], log: Sequence[dict[str, float]], layout: Layout,
              dense_accuracy: float, floor: float = 0.0) -> None:
    """Write everything but config.json, dense.safetensors and done.json; front.csv last, so that it never stands beside
    masks or models of another front.

    Points that another dominates, or that are below the floor (training can do both), go to dominated.csv.
    """
    front: list[Measured] = []
    for p in sorted(points, key=lambda p: (-p.sparsity, -p.accuracy)):
        if p.accuracy > max([floor - 1e-12, *(q.accuracy for q in front[-1:])]):  # the last one is the best so far
            front.insert(len(front), p)
    front.reverse()
    dominated = [p for p in points if p not in front]
    folder.remove("front.csv")
    folder.remove("models")
    for p in points:
        if p.state is not None:
            folder.write(f"models/{p.id}.safetensors", to_safetensors(p.state))
    folder.write("masks.npz", masks_npz(points, layout))
    folder.write("layers.csv", points_csv([row for p in points for row in layer_rows(p, layout)], LAYER_COLUMNS))
    folder.write("log.csv", points_csv(log, tuple(log[0])))
    if dominated:
        folder.write("dominated.csv", points_csv([point_row(p, layout) for p in dominated]))
    else:
        folder.remove("dominated.csv")
    if front:
        folder.write("front.png", plot_front(front, dense_accuracy))
        folder.write("layers.png", plot_layers(front, layout))
    folder.write("progress.png", plot_progress(log))
    folder.write("front.csv", points_csv([point_row(p, layout) for p in front]))


def point_row(p: Measured, layout: Layout) -> dict[str, Any]:
    test: tuple[Any, ...] = ("", "", "") if p.test is None else (p.test[0] / p.test[1], *wilson(*p.test))
    return {"id": p.id, "accuracy": p.accuracy, "sparsity": p.sparsity,
            "kept": layout.total - pruned_weights(p.individual, layout), "weights": layout.total,
            "test_accuracy": test[0], "test_low": test[1], "test_high": test[2], "accuracy_before": p.accuracy_before,
            "generation": p.individual.generation, "origin": p.individual.origin, "repair": p.repair}


def layer_rows(p: Measured, layout: Layout) -> list[dict[str, Any]]:
    kept = [kept_genes(bits) * (layer.weights // layer.genes) for bits, layer in zip(p.individual, layout)]
    return [{"id": p.id, "layer": layer.name, "weights": layer.weights, "kept": k, "sparsity": 1 - k / layer.weights}
            for layer, k in zip(layout, kept)]


def masks_npz(points: Sequence[Measured], layout: Layout) -> bytes:
    """Return `ID/LAYER` -> packed bits, the same bytes for the same masks."""
    buffer = io.BytesIO()
    named: dict[str, Any] = {f"{p.id}/{layer.name}": bits for p in points for layer, bits in zip(layout, p.individual)}
    with uninterrupted():
        np.savez_compressed(buffer, **named)
    return buffer.getvalue()


# --------------------------------------------------------------------------------------------------------------- plots


def plot_front(front: Sequence[Measured], dense_accuracy: float) -> bytes:
    """Accuracy against sparsity on a log density axis; the test split's with its 95 % interval."""
    figure, axes = subplots()
    density = np.array([density_of(p) for p in front])
    axes.axhline(100 * dense_accuracy, color="0.6", linewidth=1, linestyle=":", label="dense, search split")
    if any(p.accuracy != p.accuracy_before for p in front):
        axes.plot(density, [100 * p.accuracy_before for p in front], ".--", color="0.6", label="before training")
    axes.plot(density, [100 * p.accuracy for p in front], "o-", markersize=3.5, label="search split")
    tested = [p for p in front if p.test is not None]
    if tested:
        share = np.array([p.test[0] / p.test[1] for p in tested if p.test])
        low, high = np.array([wilson(*p.test) for p in tested if p.test]).T
        axes.errorbar([density_of(p) for p in tested], 100 * share, 100 * np.array([share - low, high - share]),
                      fmt="s", markersize=3, linewidth=1, label="test split, 95 % interval")
    density_axis(axes, density)
    axes.set_ylabel("accuracy, %")
    axes.legend()
    axes.grid(alpha=0.3)
    return png(figure)


def plot_layers(front: Sequence[Measured], layout: Layout) -> bytes:
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


def density_of(p: Measured) -> float:
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
