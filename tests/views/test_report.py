"""The report of a run: safe and the same whatever the run is called, and usable with eyes, keyboard or a phone."""

import csv
import json
import re
import shlex
import shutil
from collections import Counter
from html.parser import HTMLParser

import chromium
import numpy as np
import pytest
import torch
from torch import nn

import evoprune
from evoprune import load_front
from evoprune.views.page import SCRIPT, STYLE
from evoprune.views.report import MOST, report

HOSTILE = ["<script>alert(1)</script>", "'\"><img src=x onerror=alert(2)>", "a&b</style>", "$\\frac$", "_\x1b[2J\u202e"]

TAGS = {"html", "head", "meta", "title", "style", "body", "main", "h1", "h2", "p", "svg", "defs", "g", "path", "use", "text",
        "clippath", "rect", "div", "dl", "dt", "dd", "pre", "code", "button", "span", "table", "caption", "thead", "tbody", "tr",
        "th", "td", "img", "details", "summary", "script"}


class Page(HTMLParser):
    """Elements with their attributes, and the text of each kind."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.elements, self.text, self.open = [], {}, []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self.open.append(tag)

    def handle_endtag(self, tag):
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data):
        self.text.setdefault(self.open[-1] if self.open else "", []).append(data)

    def all(self, tag, key):
        return [attributes[key] for each, attributes in self.elements if each == tag and key in attributes]


class Hostile(nn.Module):
    """Layers whose names are no names."""

    def __init__(self):
        super().__init__()
        self.order = []
        for i, name in enumerate(HOSTILE):
            self.add_module(name, nn.Linear(16, 16 if i < len(HOSTILE) - 1 else 3))

    def forward(self, x):
        for name in HOSTILE:
            x = self._modules[name](x.relu())
        return x


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    torch.manual_seed(0)
    kind = type("<b onclick=alert(3)>", (Hostile,), {})
    model, images = kind(), torch.randn(80, 16)
    out = tmp_path_factory.mktemp("hostile") / "a run & <i>more</i> 'quoted'"
    return evoprune.prune(model, (images, model(images).argmax(1)), out=str(out), population=8, generations=2, threads=1)


@pytest.fixture(scope="module")
def pages(run_folder, hostile):
    return {"plain": (run_folder / "report.html").read_text(), "hostile": (hostile.path / "report.html").read_text()}


@pytest.mark.parametrize("which", ["plain", "hostile"])
def test_nothing_of_a_run_becomes_a_tag_a_script_or_an_address(which, pages):
    page = Page(pages[which])
    tags = Counter(tag for tag, _ in page.elements)
    assert set(tags) <= TAGS
    assert tags["script"] == 1 and "".join(page.text["script"]) == SCRIPT
    assert STYLE in page.text["style"] and tags["style"] == 3  # one of matplotlib's in each picture
    for _, attributes in page.elements:
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("src", "href", "xlink:href"):
            assert attributes.get(name, "#").startswith(("#", "data:image/png;base64,"))
    assert not re.search(r"https?:|\b(url|src|href)\W{1,3}//|@import", pages[which].replace(SCRIPT, ""), re.IGNORECASE)
    assert len(pages[which]) < 1_000_000


def test_hostile_names_are_shown_as_text(hostile, pages):
    said = Page(pages["hostile"]).text
    assert [name.split("\x1b")[0] in " ".join(said["td"]) for name in HOSTILE] == [True] * 5
    assert said["h1"] == ["<b onclick=alert(3)> on data handed in"] and "\x1b" not in pages["hostile"]
    assert said["code"][0].endswith(f" pick {shlex.quote(str(hostile.path))} --id 000")


@pytest.mark.parametrize("which", ["plain", "hostile"])
def test_each_point_is_an_element_and_a_row_and_no_id_is_there_twice(which, pages, run_folder, hostile):
    front = load_front(run_folder) if which == "plain" else hostile
    page = Page(pages[which])
    ids = Counter(attributes["id"] for _, attributes in page.elements if "id" in attributes)
    shown = [p for p in front if p.score > front.record.chance or p.kept == p.weights] or list(front)
    assert max(ids.values()) == 1
    for point in shown:
        assert ids[f"point-{point.id}"] == ids[f"row-{point.id}"] == 1
    assert len([name for name in ids if name.startswith("point-")]) == len(shown)
    assert set(re.findall(r"(?:href=.|url\()#([\w-]+)", pages[which])) <= set(ids)
    assert Counter(page.all("g", "tabindex")) == {"0": 1, **({"-1": len(shown) - 1} if len(shown) > 1 else {})}
    assert page.all("button", "data-point") == [point.id for point in shown]


def test_the_table_and_the_list_have_the_numbers_of_the_files(run_folder, pages):
    front, cells = load_front(run_folder), Page(pages["plain"]).text["td"]
    for point in [p for p in front if p.score > front.record.chance]:
        assert f"{100 * point.score:.2f}" in cells and f"{100 * point.sparsity:.2f}" in cells and f"{point.kept:,}" in cells
    said = Page(pages["plain"]).text["dd"]
    assert {"LeNet", "handed in (Data)", "started from Python", front.record.device, front.record.versions["torch"]} <= set(said)


def test_equal_runs_have_equal_pages(run_folder, pages):
    assert report(load_front(run_folder)) == report(load_front(run_folder)) == pages["plain"]
    assert "<dc:date" not in pages["plain"] and "has not finished" not in pages["plain"]
    assert "This run has not finished. " in report(load_front(run_folder), finished=False)


def test_a_page_is_small_whatever_the_run_is(run_folder, tmp_path):
    """600 points of 210 layers with long names."""
    record = json.loads((run_folder / "config.json").read_text())
    names = [f"{'encoder.' * 60}{i}.weight" for i in range(210)]
    record["layout"] = [{"name": name, "shape": [40, 1], "unit": "weight"} for name in names]
    record.update(weights=10_000, aliases=[], left_out={}, command="python " + "x" * 100_000)
    out = tmp_path / "run"
    out.mkdir()
    (out / "config.json").write_text(json.dumps(record))
    shutil.copy(run_folder / "log.csv", out)
    with open(run_folder / "front.csv", newline="") as file:
        first, *_ = csv.DictReader(file)
    with open(out / "front.csv", "w", newline="") as file, open(out / "layers.csv", "w", newline="") as layers:
        table = csv.DictWriter(file, list(first))
        table.writeheader()
        lines = csv.writer(layers)
        lines.writerow(["id", "layer", "weights", "kept", "sparsity"])
        for i, kept in enumerate(np.geomspace(10_000, 250, 600).astype(int)):
            table.writerow({**first, "id": f"{i:04d}", "accuracy": 0.99 - i / 1000, "sparsity": 1 - kept / 10_000, "kept": kept,
                            "weights": 10_000, "origin": "x" * 2000})
            lines.writerows([f"{i:04d}", name, 40, kept // 250, 0] for name in names)
    text = report(load_front(out))
    assert text.count('class="point"') == MOST and f"{MOST} of 600, the others are in front.csv" in text
    assert len(text.encode()) < 1_000_000 and f"{MOST} of 210, the others are in layers.csv" in text


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if chromium.FOUND is None:
        pytest.skip("no chromium here to look at pages with")
    with chromium.Chromium(tmp_path_factory.mktemp("chromium")) as found:
        yield found


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("which", ["plain", "hostile"])
def test_tab_and_enter_reach_a_point_and_show_its_command(which, width, browser, run_folder, hostile):
    path = (run_folder if which == "plain" else hostile.path) / "report.html"
    browser.open(path, width)
    taken = browser.value("document.querySelector('#taken').dataset.point")
    browser.press("Tab")
    assert browser.value("document.activeElement.id") == f"point-{taken}"
    browser.press("ArrowRight")
    there = browser.value("document.activeElement.id").removeprefix("point-")
    browser.press("Enter")
    assert browser.value("document.querySelector('#taken code').textContent").endswith(f" --id {there}")
    assert browser.value("document.querySelector('#taken dd').textContent") == there
    assert browser.value("document.querySelector('tr.taken').id") == f"row-{there}"
    browser.press("Tab")
    assert browser.value("document.activeElement.className") == "copy"
    browser.value("document.querySelector('svg').scrollIntoView()")
    x, y = browser.value(f"(b => [b.x + b.width / 2, b.y + b.height / 2])(document.querySelector('#point-{taken}')"
                         f".getBoundingClientRect())")
    browser.click(x + 2, y + 2)
    assert browser.value("document.querySelector('#taken code').textContent").endswith(f" --id {taken}")
    assert browser.value("document.documentElement.scrollWidth") <= width
    assert browser.errors == []
