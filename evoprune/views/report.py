"""The report of a run: one page with the front, whose points say how to take them, each layer along it, progress, and what the
run was. Made from its files; none of its code is run.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from ..config import PROGRAM, options
from ..results.front import Front, Point
from ..results.plots import front_figure, heat_map, png, progress_figure
from ..results.points import beyond_chance, thin
from ..results.tables import cells, heads
from ..results.written import FRONT, LAYERS, LOG
from .page import described, image, page, svg, text

MOST, WIDTH = 200, 5.2  # points and layers of a page; inches of its pictures
CELL = 80  # characters of a cell of a table


def report(front: Front, finished: bool | None = None) -> str:
    """Return the page of a run, below 1 MB whatever the run is; `finished` where that is known before its files say so."""
    points = thin(beyond_chance(front.points, front.record.chance), MOST)
    finished = front.finished if finished is None else finished
    parts = [f"<h1>{text(front.record.title)}</h1>", f"<p>{text(summary(front, finished))}</p>"]
    if points:
        parts += [the_front(front, points), the_table(front, points), the_layers(front, points)]
    else:
        parts.append('<div id="taken" hidden><dl></dl><code></code><button class="copy"></button><span id="said"></span></div>')
    return page(front.record.title, "\n".join([*parts, the_progress(front), the_run(front)]))


def pick_line(front: Front, id: str = "") -> str:
    """Return the command that takes a point; without an id, all before it."""
    return f"{PROGRAM} pick {shlex.quote(str(front.path))} --id {id}"


def summary(front: Front, finished: bool) -> str:
    """Return in a few words what came out."""
    record, objectives = front.record, front.record.optimised
    score, axis = objectives[objectives.score], objectives[objectives.axis]
    dense, layers = record.measured, record.layers()
    tested = "" if dense.test is None else f", {score.said(dense.test)} on the test split"
    taken = "; ".join(f"{name} takes {p.id}, {score.said(p.score)} at {axis.said(p.values[objectives.axis])} {axis.name}"
                      for name, p in (front.marks() if len(front) else {}).items())
    unfinished = "" if finished else "This run has not finished. "
    compared = "" if all(p.choice is None for p in front) else \
        f"The models were compared on the search images and {record.config.choice_images or 0:,} training images kept back. "
    return (f"{unfinished}{len(front):,} models of {layers.weights:,} weights in {len(layers)} layers. The dense model has "
            f"{score.title} {score.said(dense.score)} on the search split{tested}. {compared}{taken}{'.' * bool(taken)}")


def the_front(front: Front, points: Sequence[Point]) -> str:
    """Return the picture of the front and the panel that says what a point is."""
    objectives = front.record.optimised
    score, axis = objectives[objectives.score], objectives[objectives.axis]
    drawn = svg(front_figure(points, front.record, front.marks(), WIDTH), "front", f"{score.title} against {axis.name}")
    names = {p.id: f"point {p.id}: {score.said(p.score)} at {axis.said(p.values[objectives.axis])}" for p in points}
    first = next(iter(reversed(front.marks().values())))
    taken = first.id if first.id in names else points[0].id

    def reachable(found: re.Match[str]) -> str:
        place = 0 if found[1] == taken else -1
        return (f'<g id="point-{found[1]}" class="point" role="button" tabindex="{place}" aria-label="{text(names[found[1]])}">'
                f"<title>{text(names[found[1]])}</title>")

    drawn = re.sub(r'<g id="point-(\d+)">', reachable, drawn)
    point = next(p for p in points if p.id == taken)
    return (f"<h2>The front</h2>\n<p>Point at a model, or reach it with Tab and the arrow keys, for its numbers; a click or "
            f"Enter takes it.</p>\n{drawn}\n"
            f'<div id="taken" data-point="{taken}" data-pick="{text(pick_line(front))}" role="region" '
            f'aria-label="the model taken" aria-live="polite">'
            f"{described(dict(zip(columns(front), row(point))))}<pre><code>{text(pick_line(front, taken))}</code></pre>"
            f'<button type="button" class="copy">copy the command</button> <span id="said"></span></div>')


def columns(front: Front) -> list[str]:
    """Return the heads of the table."""
    return [*heads(front.record), "before training or repair", "generation", "repair"]


def row(point: Point) -> list[str]:
    """Return a point's row of the table."""
    score = point.objectives[point.objectives.score]
    return [*cells(point), "" if point.before == point.score else score.shown(point.before), str(point.generation), point.repair]


def the_table(front: Front, points: Sequence[Point]) -> str:
    """Return the points as a table, which says with each how to take it."""
    head = "".join(f'<th scope="col">{text(name)}</th>' for name in columns(front))
    body = []
    for point in points:
        id, *rest = row(point)
        cell = "".join(f"<td>{text(value, CELL)}</td>" for value in rest)
        body.append(f'<tr id="row-{id}"><td><button type="button" '
                    f'data-point="{id}">{id}</button></td>{cell}</tr>')
    left = "" if len(points) == len(front) else f"; {len(points):,} of {len(front):,}, the others are in {FRONT}"
    percents = ", ".join(o.name for o in front.record.optimised if o.percent)
    return (f'<h2>The models</h2>\n<p>{text(percents)} in %{left}</p>\n<div class="wide"><table><thead><tr>{head}</tr>'
            f"</thead><tbody>\n" + "\n".join(body) + "\n</tbody></table></div>")


def the_layers(front: Front, points: Sequence[Point]) -> str:
    """Return each layer along the front, as a picture, and as a table of the marked points."""
    shares, layout = front.layer_shares(), front.layout
    places = {p.id: i for i, p in enumerate(front)}
    drawn = image(png(heat_map(points, shares[:, [places[p.id] for p in points]], layout, front.record, WIDTH)),
                  f"what is pruned of each of {len(layout)} layers along the front; the table below has numbers")
    marks = front.marks()
    head = "".join(f'<th scope="col">{text(name)}</th>' for name in ("layer", "weights", *(f"pruned by {m}, %" for m in marks)))
    body = "\n".join(f"<tr><td>{text(layer.name, CELL)}</td><td>{layer.weights:,}</td>" + "".join(
        f"<td>{100 * shares[i, places[p.id]]:.2f}</td>" for p in marks.values()) + "</tr>"
        for i, layer in list(enumerate(layout))[:MOST])
    left = "" if len(layout) <= MOST else f"<caption>{MOST} of {len(layout):,}, the others are in {LAYERS}</caption>"
    return (f'<h2>The layers</h2>\n{drawn}\n<details><summary>As a table</summary><div class="wide"><table>{left}<thead><tr>'
            f"{head}</tr></thead><tbody>\n{body}\n</tbody></table></div></details>")


def the_progress(front: Front) -> str:
    """Return how the front grew."""
    rows = front.written.rows(LOG, ("generation", "hvlog"))
    if not rows:
        return ""
    words = (f"From generation {rows[0]['generation']} to {rows[-1]['generation']} hvlog went from {float(rows[0]['hvlog']):.4f} "
             f"to {float(rows[-1]['hvlog']):.4f} on the search split.")
    drawn = svg(progress_figure(thin_rows(rows), front.record, WIDTH), "progress", "hvlog against generation")
    return f"<h2>Progress</h2>\n<p>{text(words)}</p>\n{drawn}"


def thin_rows(rows: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    """Return at most some `MOST` rows of the log, the last among them."""
    step = 1 + len(rows) // MOST
    return [*rows[:-1:step], rows[-1]]


def the_run(front: Front) -> str:
    """Return what the run was: what it was given, what it settled on, where it ran."""
    record, config = front.record, front.record.config
    rows = front.written.rows(LOG, ("evaluations", "seconds"))
    usual = {name: about.default for name, about in options().items()}
    settled: dict[str, Any] = {name.replace("_", " "): value for name, value in asdict(config).items()
                               if value != usual[name] and name not in ("model", "data", "overwrite")}
    facts = {"model": config.model, "data": config.data if record.named_data else f"handed in ({config.data})",
             "images": ", ".join(f"{count:,} {name}" for name, count in record.splits.items() if count),
             "command": record.command or "started from Python", **settled,
             "masks measured": f"{int(float(rows[-1]['evaluations'])):,}" if rows else None,
             "search": f"{float(rows[-1]['seconds']):,.0f} s" if rows else None, "device": record.device,
             "threads": record.threads, "toolbox": record.toolbox,
             **{name: version for name, version in record.versions.items() if name != "evoprune"},
             "evoprune": record.versions.get("evoprune")}
    return f"<h2>The run</h2>\n{described(facts)}"
