import re
from dataclasses import replace

import numpy as np
import pytest

from evoprune import load_front
from evoprune.masks.layout import Layer, Layout
from evoprune.results.plots import EMPTY, front_figure, heat_map, layers_figure, png, progress_figure, series, spaced
from evoprune.results.tables import as_html, as_text


@pytest.fixture(scope="module")
def front(run_folder):
    return load_front(run_folder)


def points_at(front, pairs):
    """Points with these scores and densities."""
    score, axis = front.record.optimised.score, front.record.optimised.axis
    made = []
    for i, (value, density) in enumerate(pairs):
        values = [0.0, 0.0]
        values[score], values[axis] = value, 1 - density
        kept = round(density * 11_208)
        made.append(replace(front.record.measured, id=f"{i:03d}", values=tuple(values), kept=kept, before=value, test=value,
                            test_low=max(0.0, value - 0.01), test_high=min(1.0, value + 0.01)))
    return made


def labels_of(axis):
    """Boxes of the tick labels in pixels, and their texts."""
    figure = axis.get_figure()
    figure.canvas.draw()
    found = [label for label in axis.get_ticklabels() if label.get_text()]
    return [label.get_window_extent() for label in found], [label.get_text() for label in found]


@pytest.mark.parametrize("least", [1.0, 0.1, 0.0008, EMPTY])
@pytest.mark.parametrize("best", [1.0, 0.95, 0.12])
def test_no_two_tick_labels_touch_and_there_are_some(least, best, front):
    pairs = [(best * (1 - i / 12), d) for i, d in enumerate(np.geomspace(1, least, 8 if least < 1 else 1))]
    record = replace(front.record, constant=0.0)
    axes = front_figure(points_at(front, pairs), record, {}, 5.4).axes[0]
    for axis in (axes.xaxis, axes.yaxis):
        boxes, texts = labels_of(axis)
        assert len(set(texts)) == len(texts) >= (1 if least == 1 else 2)
        assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[i + 1:]), texts


def test_what_is_near_the_top_has_room(front):
    """Of three points that lose 0.2, 1 and 60 percent, the second is not beside the first."""
    axes = front_figure(points_at(front, [(0.998, 1), (0.99, 0.1), (0.4, 0.01)]), front.record, {}).axes[0]
    axes.figure.canvas.draw()
    top, second, last = (axes.transAxes.inverted().transform(axes.transData.transform((1, 100 * v)))[1] for v in (.998, .99, .4))
    assert 0.75 < top < 1 and top - second > 0.15 and 0 <= last < 0.2


def test_points_no_better_than_chance_are_neither_drawn_nor_listed(front):
    points = points_at(front, [(0.9, 0.5), (0.5, 0.1), (0.1, 0.01), (0.08, 1e-4)])
    record = replace(front.record, constant=0.1)
    drawn = [line.get_gid() for line in front_figure(points, record, {}).axes[0].lines if line.get_gid()]
    assert drawn == ["point-000", "point-001"]
    shares = np.ones((len(front.layout), len(points)))
    assert {len(line.get_xdata()) for line in layers_figure(points, shares, front.layout, record).axes[0].lines} == {2}
    text = as_text(points, record)
    assert [row.split()[0] for row in text.splitlines()] == ["id", "dense", "000", "001", "2"]
    assert text.endswith("\n2 no better than one answer for all (10.00 %) left out")
    assert "<td>001</td>" in as_html(points, record) and "<td>002</td>" not in as_html(points, record)
    assert "left out" not in as_text(points, replace(record, constant=0.0))
    assert "left out" not in as_text(points[2:], record)  # there is nothing else


def test_chance_is_what_was_recorded_or_what_the_classes_say(front, digits):
    record, labels = front.record, digits.search.labels
    assert record.chance == record.constant == pytest.approx(labels.bincount().max().item() / len(labels))
    older = replace(record, constant=None)
    assert older.chance == 0.1 and replace(older, settings={**older.settings, "task": "regression"}).chance is None


def test_what_knee_and_best_take_is_marked(front):
    marked = {line.get_label(): line for line in front.plot().axes[0].lines if line.get_markersize() >= 10}
    knee, best = front.knee(), front.best(drop=0.01) if len(front.marks()) > 1 else None
    for name, point in {"knee()": knee, **({"best(drop=0.01)": best} if best else {})}.items():
        label, = (label for label in marked if label.startswith(f"{name}: {point.id}, {100 * point.score:.2f} % at "))
        assert marked[label].get_ydata() == [100 * point.score]
    assert len(marked) == len(front.marks())


def test_titles_say_model_and_data_and_hvlog_is_explained(front):
    for figure in (front.plot(), layers_figure(front.points, front.layer_shares(), front.layout, front.record),
                   progress_figure([{"generation": "0", "hvlog": "0.5", "max_sparsity": "0.9"}], front.record)):
        assert figure.axes[0].get_title(loc="left").startswith("LeNet on data handed in: ")
    assert "the mean accuracy of the front over log density" in figure.axes[0].get_title(loc="left")


def test_colours_do_not_repeat_and_groups_of_layers_count_their_weights(front):
    layout = Layout([Layer(f"layer{i}.weight", (i + 1, 10)) for i in range(23)], 10_000)
    points = points_at(front, [(0.9, 0.5), (0.8, 0.1)])
    shares = np.linspace(0, 1, 46).reshape(23, 2)
    axes = layers_figure(points, shares, layout, front.record).axes[0]
    assert len(axes.lines) == 10 == len({line.get_color() for line in axes.lines})
    weights = np.array([10, 20, 30])
    assert axes.lines[0].get_ydata() == pytest.approx(100 * (weights @ shares[:3]) / 60)
    assert axes.lines[0].get_label() == "layer0.weight ... layer2.weight, 3 layers (60)"


def test_names_of_layers_are_text_whatever_is_in_them(front):
    names = ["<script>alert(1)</script>", "_hidden", "$\\frac$", "a\x1b[2Jb", "layer " * 30, "\u5c64"]
    layout = Layout([Layer(name, (10, 10)) for name in names], 10_000)
    points, shares = points_at(front, [(0.9, 0.5), (0.8, 0.1)]), np.full((6, 2), 0.5)
    figure = layers_figure(points, shares, layout, front.record)
    said = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert len(said) == 6 and said[2] == "$\\frac$ (100)" and said[1] == " _hidden (100)" and "\\x1b[2J" in said[3]
    for make in (layers_figure, heat_map):
        assert png(make(points, shares, layout, front.record)) == png(make(points, shares, layout, front.record))


def test_a_notebook_shows_fronts_and_plots(front):
    assert front.plot()._repr_png_().startswith(b"\x89PNG")
    page = front._repr_html_()
    rows = re.findall(r"<tr>(.*?)</tr>", page)
    assert [re.sub(r"</?t[dh]>", " ", row).split()[0] for row in rows[:2]] == ["id", "dense"]
    assert "LeNet on data handed in" in page
    assert repr(front).startswith(f"{len(front)} points of {front.path}\n   id  accuracy")
    said = front.to_dict()
    assert said["points"] == [p.row() for p in front] and said["dense"]["id"] == "dense" and said["finished"]


def test_round_numbers_are_round_and_spaced():
    assert series(0.008, 1.0) == [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0] and series(0.3, 0.7) == [0.3, 0.4, 0.5, 0.6, 0.7]
    assert series(0.42, 0.44) == [0.42, 0.44]
    assert spaced([1.0, 1.5, 2.0, 4.0], lambda t: t, (0.0, 10.0), 0.1) == [1.0, 2.0, 4.0]
