"""The pictures of a run: the front, each layer along it, progress. Both axes of a front are logarithmic, in what is left and in
what is wrong, so that the first percent that is lost can be seen.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from textwrap import fill
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import printable
from ..masks.layout import Layout
from ..objectives import Floats, Objective
from .points import Measured, beyond_chance
from .record import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SIZE = (7.0, 2.0, 2.2)  # inches: width, height, and height of each row
WIDE = 6.5  # inches that two columns of a legend take
LINES = 10  # colours that can be told apart
APART = 0.07  # share of the y axis that two labelled ticks are apart at least
LETTER = 0.115  # inches of the x axis that a letter of a label takes, the space behind labels included
EMPTY = 1e-7  # density that stands for that of an empty model, which has no place on a log axis


def front_figure(points: Sequence[Measured], record: Record, marks: Mapping[str, Measured], width: float = SIZE[0]) -> Figure:
    """Return a picture of the score against the axis, the test split's with its 95 % interval, and of each further objective;
    without points that are no better than chance. `marks` are ringed; each point is an element of its own, point-ID."""
    objectives = record.optimised
    shown = beyond_chance(points, record.chance)
    figure, (axes, *more) = subplots(1 + len(objectives.others), width)
    score, axis = objectives[objectives.score], objectives[objectives.axis]
    dense, density = record.measured.score, [density_of(p) for p in shown]
    axes.axhline(score.scale * dense, color="0.6", linewidth=1, linestyle=":", label=f"dense, {score.said(dense)}, search split")
    seen = [dense, *(p.score for p in shown)]
    if any(p.score != p.before for p in shown):
        axes.plot(density, [score.scale * p.before for p in shown], ".--", color="0.6", label="before training or repair")
        seen += [p.before for p in shown]
    axes.plot(density, [score.scale * p.score for p in shown], "-", color="C0")
    for i, p in enumerate(shown):
        axes.plot([density_of(p)], [score.scale * p.score], "o", color="C0", markersize=4, gid=f"point-{p.id}",
                  label="" if i else "search split")
    seen += draw_tested(axes, shown, score)
    for (name, p), size in zip(marks.items(), (10, 14, 18)):
        axes.plot([density_of(p)], [score.scale * p.score], "o", color="C3", markerfacecolor="none", markersize=size,
                  label=f"{name}: {p.id}, {score.said(p.score)} at {axis.said(p.values[objectives.axis])}")
    score_axis(axes, seen, score)
    figure.set_figheight(figure.get_figheight() + 0.11 * (1 + (width < WIDE)) * len(axes.get_legend_handles_labels()[0]))
    figure.legend(loc="outside lower left", fontsize="small", ncols=1 if width < WIDE else 2)
    plain(axes.set_title, f"{record.title}: {score.title} at each {axis.name}", loc="left", fontsize="medium")
    for below, i in zip(more, objectives.others):
        below.plot(density, [objectives[i].scale * p.values[i] for p in shown], "o", markersize=3.5)
        plain(below.set_ylabel, objectives[i].label)
    for each in (axes, *more):
        density_axis(each, density, axis.label)
        each.grid(alpha=0.3)
    return figure


def draw_tested(axes: Axes, points: Sequence[Measured], score: Objective) -> list[float]:
    """Draw what was measured on the test split; return the numbers."""
    tested = [p for p in points if p.test is not None]
    if not tested:
        return []
    share, low, high = np.array([(p.test, p.test_low, p.test_high) for p in tested], float).T
    axes.errorbar([density_of(p) for p in tested], score.scale * share, score.scale * np.array([share - low, high - share]),
                  fmt="s", color="C1", markersize=3, linewidth=1, label="test split, 95 % interval")
    return [*low.tolist(), *high.tolist()]


def layers_figure(points: Sequence[Measured], shares: Floats, layout: Layout, record: Record) -> Figure:
    """Return a picture of what is pruned of each layer along the front, `shares` (layers, points) in 0..1, without points no
    better than chance; neighbours among more than ten layers go together."""
    objectives = record.optimised
    shown = beyond_chance(points, record.chance)
    axis, density = objectives[objectives.axis], [density_of(p) for p in shown]
    shares = shares[:, [p in shown for p in points]]
    figure, (axes,) = subplots()
    for group in np.array_split(np.arange(len(layout)), min(LINES, len(layout))):
        weights = np.array([layout[i].weights for i in group])
        first, last = (printable(layout[i].name) for i in (group[0], group[-1]))
        name = first if len(group) == 1 else f"{first} ... {last}, {len(group)} layers"
        axes.plot(density, 100 * weights @ shares[group] / weights.sum(), ".-", linewidth=1,
                  label=" " * name.startswith("_") + f"{name} ({weights.sum():,})")  # matplotlib hides what starts with _
    density_axis(axes, density, axis.label)
    axes.set_ylabel("pruned of the layer, %")
    for text in axes.legend(fontsize="x-small", loc="best").get_texts():
        text.set_parse_math(False)
    plain(axes.set_title, f"{record.title}: what is pruned of each layer (its weights)", loc="left", fontsize="medium")
    axes.grid(alpha=0.3)
    return figure


def progress_figure(log: Sequence[Mapping[str, Any]], record: Record, width: float = SIZE[0]) -> Figure:
    """Return a picture of hvlog and the far end of the axis against generation; `log` has the rows of log.csv."""
    objectives = record.optimised
    figure, (axes,) = subplots(width=width)
    axis = objectives[objectives.axis]
    generation = [float(row["generation"]) for row in log]
    first = axes.plot(generation, [float(row["hvlog"]) for row in log], ".-", label="hvlog")
    axes.set_xlabel("generation")
    plain(axes.set_ylabel, "hvlog")
    other = axes.twinx()
    highest = [axis.scale * float(row[axis.logged]) for row in log]
    second = other.plot(generation, highest, ".-", color="C1", label=f"highest {axis.name}")
    other.set_ylabel(f"highest {axis.label}")
    axes.legend(handles=[*first, *second], loc="lower right")
    words = fill(record.optimised.hvlog_in_words, int(11 * width))
    plain(axes.set_title, f"{record.title}: how the front grew\n{words}", loc="left", fontsize="medium")
    axes.grid(alpha=0.3)
    return figure


def heat_map(points: Sequence[Measured], shares: Floats, layout: Layout, record: Record, width: float = SIZE[0]) -> Figure:
    """Return a picture of the sparsity of each layer (row) at each point (column), `shares` (layers, points) in 0..1."""
    # 5 arguments and a width
    axis = record.optimised[record.optimised.axis]
    rows = np.linspace(0, len(layout) - 1, min(len(layout), 40)).round().astype(int)  # named ones
    columns = np.linspace(0, len(points) - 1, min(len(points), 6)).round().astype(int)
    figure, (axes,) = subplots(width=width)
    figure.set_size_inches(width, min(8.0, 1.2 + 0.25 * len(layout)))
    drawn = axes.imshow(100 * shares, aspect="auto", cmap="viridis", vmin=0, vmax=100, interpolation="nearest")
    names = [printable(layout[i].name) for i in rows]
    axes.set_yticks(rows, [n if len(n) <= 28 else f"...{n[-25:]}" for n in names], parse_math=False, fontsize="x-small")
    axes.set_xticks(columns, [axis.shown(points[i].values[record.optimised.axis]) for i in columns])
    axes.set_xlabel(f"{axis.label} of the whole model, a column a point")
    figure.colorbar(drawn, label="pruned of the layer, %")
    return figure


def density_of(p: Measured) -> float:
    return max(p.density, EMPTY)


@cache
def picture() -> type[Figure]:
    """Return matplotlib's Figure, one that a notebook shows."""
    from matplotlib.figure import Figure  # a third of a second that worker processes do without

    class Picture(Figure):
        def _repr_png_(self) -> bytes:
            return png(self)

    return Picture


def subplots(rows: int = 1, width: float = SIZE[0]) -> tuple[Figure, list[Axes]]:
    """Return an empty plot and its axes, one below the other."""
    figure = picture()(figsize=(width, SIZE[1] + SIZE[2] * rows), layout="constrained")
    return figure, list(figure.subplots(rows, squeeze=False)[:, 0])


def plain(function: Callable[..., Any], text: str, **how: Any) -> None:
    """Write text that may be anyone's, in which $ is no formula."""
    function(printable(text), parse_math=False, **how)


def density_axis(axes: Axes, density: Sequence[float], label: str) -> None:
    """Make the x axis log density, labelled with what is pruned, sparser to the right."""
    least, most = min(density), max(density)
    axes.set_xscale("log")
    left, right = min(1.1, 1.2 * most), least / 1.2
    axes.set_xlim(left, right)
    labels = {t: f"{100 * (1 - t):.7g}" for t in reversed(series(right, min(1.0, left)))}
    apart = LETTER * max(map(len, labels.values())) / axes.figure.get_figure(root=True).get_figwidth()
    ticks = spaced(labels, np.log, (left, right), apart)
    axes.set_xticks(ticks, [labels[t] for t in ticks])
    axes.minorticks_off()
    plain(axes.set_xlabel, f"{label} (log scale of what is left)")


def score_axis(axes: Axes, seen: Sequence[float], score: Objective) -> None:
    """Make the y axis the logarithm of what is missing to the best score, so that the top is as wide as it matters."""
    missing = [score.best - value for value in seen if score.best - value > 0] or [1.0]
    least = min(missing) / (2.0 if min(seen) < score.best <= max(seen) else 1.15)
    most = max(missing) * 1.15

    def forward(shown: Any) -> Any:
        return -np.log(np.maximum(score.best - np.asarray(shown) / score.scale, least / 2))

    axes.set_yscale("function", functions=(forward, lambda place: score.scale * (score.best - np.exp(-np.asarray(place)))))
    axes.set_ylim(score.scale * (score.best - most), score.scale * (score.best - least))
    ticks = spaced([score.best - t for t in [*series(least, most)][::-1]], lambda t: -np.log(score.best - t),
                   (score.best - most, score.best - least), APART)
    axes.set_yticks([score.scale * t for t in ticks], [f"{score.scale * t:.6g}" for t in ticks])
    axes.minorticks_off()
    plain(axes.set_ylabel, f"{score.label} (log scale of what is missing)")


def series(low: float, high: float) -> list[float]:
    """Return round numbers from low to high: 1, 2, 5, 10, ..., or more where these are few."""
    decades = [10.0 ** k for k in range(-9, 10)]
    for steps in ((1, 2, 5), (1, 2, 3, 4, 5, 6, 7, 8, 9)):
        found = [round(step * ten, 10) for ten in decades for step in steps if low <= step * ten <= high * (1 + 1e-9)]
        if len(found) > 2:
            return found
    return found or [low, high]


def spaced(ticks: Iterable[float], place: Callable[[float], Any], ends: tuple[float, float], apart: float) -> list[float]:
    """Return ticks that are at least so far apart, in shares of an axis between two ends."""
    kept: list[float] = []
    span = abs(float(place(ends[1]) - place(ends[0])))
    for tick in ticks:
        if not kept or abs(float(place(tick) - place(kept[-1]))) >= apart * span:
            kept.append(tick)
    return kept


def png(figure: Figure) -> bytes:
    """Return a picture as PNG, the same bytes for the same picture."""
    buffer = io.BytesIO()
    with warnings.catch_warnings(action="ignore"):  # letters that the font has not
        figure.savefig(buffer, format="png", dpi=120, metadata={"Software": None})
    return buffer.getvalue()
