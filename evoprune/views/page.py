"""One HTML file that needs nothing else: its style and script, and pictures that can be put into it. Text is escaped, no address
is named, and the browser is told to run no script but this one and to fetch nothing.
"""

from __future__ import annotations

import base64
import hashlib
import io
import re
import warnings
from html import escape
from typing import TYPE_CHECKING, Any

from ..errors import printable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STYLE = """
:root { color-scheme: light; font: 16px/1.5 system-ui, sans-serif; color: #1b1f24; background: #fff }
body { margin: 0 } main { max-width: 60rem; margin: 0 auto; padding: 0.75rem }
h1 { font-size: 1.5rem; margin: 0.5rem 0; overflow-wrap: anywhere } h2 { font-size: 1.15rem; margin: 1.75rem 0 0.5rem }
svg, img { display: block; width: 100%; max-width: 42rem; height: auto }
.wide { overflow-x: auto } table { border-collapse: collapse; font-size: 0.875rem; font-variant-numeric: tabular-nums }
caption { text-align: left; padding: 0.25rem 0 } th, td { padding: 0.25rem 0.6rem; text-align: right; white-space: nowrap }
th:first-child, td:first-child, .text { text-align: left } thead th { border-bottom: 2px solid #8c959f }
tbody tr:nth-child(even) { background: #f6f8fa } tr.taken { background: #fff3c4 !important }
dl { display: grid; grid-template-columns: fit-content(9.5rem) 1fr; gap: 0.15rem 1rem; margin: 0.5rem 0 } dt { color: #57606a }
dd { margin: 0; overflow-wrap: anywhere } code { font-family: ui-monospace, monospace; font-size: 0.875rem }
pre { background: #f6f8fa; padding: 0.6rem; margin: 0.5rem 0; white-space: pre-wrap; overflow-wrap: anywhere }
button { font: inherit; cursor: pointer } td button { border: 0; background: none; color: #0550ae; text-decoration: underline;
  padding: 0.3rem 0.5rem; margin: -0.3rem -0.5rem } .copy { padding: 0.3rem 0.9rem }
#taken { border: 1px solid #8c959f; border-radius: 6px; padding: 0.5rem 0.75rem; max-width: 42rem; box-sizing: border-box }
.point { cursor: pointer; outline: none } .point.taken use { stroke: #cf222e !important; stroke-width: 5px !important }
.point:hover use, .point:focus use { stroke: #1b1f24 !important; stroke-width: 6px !important }
:focus-visible { outline: 3px solid #0550ae; outline-offset: 2px }
"""

SCRIPT = """
"use strict";
const points = [...document.querySelectorAll(".point")];
const panel = document.getElementById("taken"), said = document.getElementById("said");
let taken = panel.dataset.point;

function show(id) {
  const row = document.getElementById("row-" + id);
  const heads = [...row.closest("table").tHead.rows[0].cells].map(cell => cell.textContent);
  panel.querySelector("dl").replaceChildren(...[...row.cells].flatMap((cell, i) => {
    const name = document.createElement("dt"), value = document.createElement("dd");
    name.textContent = heads[i];
    value.textContent = cell.textContent;
    return cell.textContent ? [name, value] : [];
  }));
  panel.querySelector("code").textContent = panel.dataset.pick + id;
  said.textContent = "";
}

function take(id) {
  taken = id;
  for (const each of points) {
    const here = each.id === "point-" + id;
    each.classList.toggle("taken", here);
    each.setAttribute("aria-pressed", here);
    each.setAttribute("tabindex", here ? 0 : -1);
  }
  for (const row of document.querySelectorAll("tr[id]")) row.classList.toggle("taken", row.id === "row-" + id);
  show(id);
}

const of = each => each.id.slice(6);
points.forEach((each, i) => {
  each.addEventListener("mouseenter", () => show(of(each)));
  each.addEventListener("mouseleave", () => show(taken));
  each.addEventListener("focus", () => show(of(each)));
  each.addEventListener("keydown", event => {
    const step = {ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1, Home: -i, End: points.length - 1 - i}[event.key];
    if (step !== undefined) points[Math.min(points.length - 1, Math.max(0, i + step))].focus();
    else if (event.key === "Enter" || event.key === " ") take(of(each));
    else return;
    event.preventDefault();
  });
});
const drawing = points.length ? points[0].closest("svg") : null;
if (drawing) drawing.addEventListener("click", event => {
  let nearest = null, least = 40;
  for (const each of points) {
    const box = each.getBoundingClientRect();
    const away = Math.hypot(box.x + box.width / 2 - event.clientX, box.y + box.height / 2 - event.clientY);
    if (away < least) [nearest, least] = [each, away];
  }
  if (nearest) take(of(nearest));
});
for (const button of document.querySelectorAll("button[data-point]")) button.addEventListener("click", () => {
  take(button.dataset.point);
  panel.scrollIntoView({block: "nearest"});
});
panel.querySelector(".copy").addEventListener("click", async () => {
  const code = panel.querySelector("code");
  try {
    await navigator.clipboard.writeText(code.textContent);
    said.textContent = "copied";
  } catch {
    getSelection().selectAllChildren(code);
    said.textContent = "selected: copy it with Ctrl+C";
  }
});
if (taken) take(taken);
"""


def page(title: str, body: str) -> str:
    """Return a page; `body` is HTML, whose script is `SCRIPT`."""
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    return (f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
            f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{text(title)}</title>\n'
            f"<style>{STYLE}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n<script>{SCRIPT}</script>\n</body>\n</html>\n")


def text(value: Any, most: int = 8000) -> str:
    """Return anything as text of a page, its first characters: nothing in it is a tag, an attribute's end or a character that
    cannot be seen."""
    said = printable(str(value))
    return escape(said if len(said) <= most else f"{said[:most - 3]}...")


def described(facts: dict[str, Any]) -> str:
    """Return names and what they stand for as a list; what is None or empty is left out."""
    return "<dl>" + "".join(f"<dt>{text(name)}</dt><dd>{text(value, 2000)}</dd>" for name, value in facts.items()
                            if value not in (None, "")) + "</dl>"


def svg(figure: Figure, salt: str, label: str) -> str:
    """Return a picture as an element of a page, the same for the same picture. Of its ids only those stay that are needed, by the
    picture itself (which `salt` sets apart from those of others) or as point-ID."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": salt, "svg.fonttype": "none"}), warnings.catch_warnings(action="ignore"):
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    drawn = buffer.getvalue()
    drawn = re.sub(r' xmlns(:\w+)?="[^"]*"', "", drawn[drawn.index("<svg"):])
    drawn = re.sub(r'^<svg [^>]*?(viewBox="[^"]*")[^>]*>', rf'<svg \1 role="group" aria-label="{text(label)}">', drawn)
    needed = set(re.findall(r"#([\w-]+)", drawn))
    return re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in needed or found[1].startswith("point-") else "", drawn)


def image(content: bytes, label: str) -> str:
    """Return a PNG as an element of a page."""
    return f'<img alt="{text(label)}" src="data:image/png;base64,{base64.b64encode(content).decode()}">'
