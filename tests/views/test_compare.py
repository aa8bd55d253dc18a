"""Runs side by side, and what each keeps for it: which test images its points have right."""

import io
import json
import math
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from statistics import median
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from torch import nn

import evoprune
from evoprune import EvopruneError
from evoprune.chance import holm, mcnemar, two_sided_bootstrap
from evoprune.inputs.scores import r2, share
from evoprune.objectives import USUAL
from evoprune.results.written import DONE, RIGHT
from evoprune.views import compare as views
from evoprune.views.compare import chosen, compare, hvlog, hvlog_on_test, notes

SETTINGS = {"population": 8, "generations": 2, "threads": 1}
IMAGES = 203  # no multiple of 8


def examples(outputs):
    """A network, and images with what it says of them, some noise added."""
    torch.manual_seed(7)
    net = nn.Sequential(nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, outputs))
    images = torch.randn(2 * IMAGES, 64)
    with torch.no_grad():
        noisy = net(images)
        noisy += 0.05 * noisy.std() * torch.randn_like(noisy)
    labels = noisy if outputs == 1 else noisy.argmax(1)
    return net, evoprune.Data(None, (images[:IMAGES], labels[:IMAGES]), (images[IMAGES:], labels[IMAGES:]))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two finished runs on the same images."""
    out = tmp_path_factory.mktemp("compared")
    net, data = examples(10)
    return [evoprune.prune(net, data, out=str(out / name), **{**SETTINGS, **more})
            for name, more in (("a", {}), ("b", {"seed": 1, "start": "random", "knowledge": "none"}))]


def copy_of(front, to):
    shutil.copytree(front.path, to)
    return to


def changed(run, name, change):
    """Change a run's file as an older version, without hashes, may have left it."""
    done = json.loads((run / DONE).read_text())
    done["files"] = None
    (run / DONE).write_text(json.dumps(done))
    (run / name).write_bytes(change((run / name).read_bytes()))
    return run


def test_a_run_keeps_which_test_images_each_point_has_right(runs):
    images, labels = examples(10)[1].test.images, examples(10)[1].test.labels
    for front in runs:
        right = front.written.per_image(front.points, IMAGES)
        with np.load(front.path / RIGHT, allow_pickle=False) as file:
            assert {*file.files} == {"test", *(p.id for p in front)} and file[front[0].id].shape == (26,)
        for point in front:
            with torch.no_grad():
                expected = point.model()(images).argmax(1) == labels
            assert right.points[point.id][:, 0].tolist() == expected.int().tolist()
            assert expected.float().mean().item() == pytest.approx(point.test)


def test_it_is_the_same_on_an_engine_and_after_a_resume(tmp_path):
    net, data = examples(10)
    settings = {"population": 4, "generations": 2, "threads": 1, "repair": "least-squares", "start": "lamp"}
    whole = evoprune.prune(net, data, out=str(tmp_path / "whole"), **settings).path
    evoprune.prune(net, data, out=str(tmp_path / "processes"), engine="processes", workers=1, **settings)
    evoprune.prune(net, data, out=str(tmp_path / "resumed"), max_seconds=0.0, **settings)
    assert not (tmp_path / "resumed" / RIGHT).exists() and (tmp_path / "resumed" / "front.csv").exists()
    evoprune.prune(net, data, resume=str(tmp_path / "resumed"))
    for out in (tmp_path / "processes", tmp_path / "resumed"):
        assert (out / RIGHT).read_bytes() == (whole / RIGHT).read_bytes()
        assert (out / "front.csv").read_bytes() == (whole / "front.csv").read_bytes()


def test_two_runs_are_compared_image_by_image(runs):
    found = compare([front.path for front in runs], [0.0, 0.5, 0.9])
    a, b = (front.written.per_image(front.points, IMAGES).points for front in runs)
    rows = found.rows()
    assert [row["run"] for row in rows] == [str(front.path) for front in runs for _ in range(3)]
    for first, row in zip(rows[:3], rows[3:]):
        x, y = a[first["id"]][:, 0], b[row["id"]][:, 0]
        assert row["only_first"] == sum(i and not j for i, j in zip(x, y)) and row["p"] == pytest.approx(mcnemar(x, y))
        assert row["only_this"] == sum(j and not i for i, j in zip(x, y))
        assert row["difference"] == pytest.approx((row["only_this"] - row["only_first"]) / IMAGES)
        assert row["corrected"] >= row["p"] and row["verdict"] in ("tie", "better", "worse")
    pairs = {(first["id"], row["id"]): row["p"] for first, row in zip(rows[:3], rows[3:])}
    assert sorted({row["corrected"] for row in rows[3:]}) == sorted(set(holm(list(pairs.values()))))
    text = str(found)
    assert f"exact McNemar test on 203 test images; Holm's correction over {len(pairs)} pairs of points" in text
    assert re.search(r"^so it is +(tie|better|worse)", text, re.MULTILINE) and f"2  {runs[1].path}" in text
    assert next(row for row in compare([runs[0].path] * 2, [0.5]).rows() if row["verdict"])["verdict"] == "tie"


def test_points_are_chosen_on_the_search_split_at_or_above_a_sparsity(runs):
    for front in runs:
        for wish in (0.0, 0.6, 0.95):
            fits = [p for p in front if p.sparsity >= wish]
            assert chosen(front, wish) is (max(fits, key=lambda p: p.accuracy) if fits else None)
    assert chosen(runs[0], 1.01) is None


def test_hypervolumes_are_areas_over_log_density(runs):
    grid = np.exp(np.linspace(math.log(0.005), math.log(0.5), 20_001))
    for front in runs:
        for of, found in ((lambda p: p.test, hvlog_on_test(front)), (lambda p: p.score, hvlog(front))):
            heights = [of(p) if (p := chosen(front, 1 - density)) else 0.0 for density in grid]
            assert found == pytest.approx(np.mean(heights), abs=1e-3)


@pytest.mark.parametrize(("one", "other"), [(0, 0), (0, 1), (3, 3), (1, 9), (12, 30), (700, 601)])
def test_mcnemar_is_the_exact_binomial_test(one, other):
    a = np.array([1] * one + [0] * other + [1, 0] * 20)
    b = np.array([0] * one + [1] * other + [1, 0] * 20)
    n, least = one + other, min(one, other)
    assert mcnemar(a, b) == pytest.approx(min(1.0, 2 * sum(math.comb(n, i) for i in range(least + 1)) / 2 ** n))
    assert mcnemar(a, b) == pytest.approx(mcnemar(b, a))


def test_holm_rejects_one_after_the_other():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02]) and holm([]) == [] and holm([0.7]) == [0.7]


def test_a_paired_bootstrap_agrees_with_the_exact_test_and_with_itself():
    rng = np.random.default_rng(3)
    a = (rng.random(400) < 0.8).astype(int)
    for flips in (0, 8, 30, 120):
        b = a.copy()
        b[rng.choice(np.flatnonzero(a), flips, replace=False)] = 0
        b[rng.choice(np.flatnonzero(a == 0), flips // 2, replace=False)] = 1
        sums = [np.stack([x, np.ones(400, int)], 1) for x in (a, b)]
        assert two_sided_bootstrap(*sums, share) == pytest.approx(mcnemar(a, b), abs=0.06)
        assert two_sided_bootstrap(*sums, share) == two_sided_bootstrap(*sums, share)


def test_a_difference_can_be_beyond_chance_after_the_correction_however_many_there_are(monkeypatch):
    monkeypatch.setattr(views, "task_of", lambda front: "regression")
    monkeypatch.setattr(views, "two_sided_bootstrap", lambda a, b, score, draws=2000: 2 / draws)  # as different as can be
    points = [SimpleNamespace(id=str(i), test=0.5) for i in range(60)]
    right = SimpleNamespace(points={point.id: np.ones((9, 4)) for point in points})
    tests, count = views.tested([None], [right, right], [points, points])
    assert count == 60 and all(test.corrected < 0.05 for test in tests[1])


def test_a_regression_is_compared_by_a_paired_bootstrap_and_an_own_task_not_at_all(tmp_path):
    net, data = examples(1)
    a, b = (evoprune.prune(net, data, out=str(tmp_path / name), population=4, generations=0, seed=seed, threads=1)
            for seed, name in enumerate("ab"))
    sums = a.written.per_image(a.points, IMAGES).points[a[0].id]
    assert sums.shape == (IMAGES, 4) and 0 < r2(sums.sum(0).tolist()) == pytest.approx(a[0].test)
    found = compare([a.path, b.path], [0.0])
    assert "paired bootstrap on 203 test images" in str(found) and found.rows()[1]["only_first"] is None
    assert 0 < found.rows()[1]["p"] <= 1
    for run in (a, b):
        text = (run.path / "config.json").read_text().replace('"task": "regression"', '"task": "mine.py:evil"')
        changed(run.path, "config.json", lambda _, text=text: text.encode())
    found = compare([a.path, b.path], [0.0])
    assert found.rows()[1]["p"] is None and "Not tested: no code of a task of the user's own is run here." in found.notes


def test_runs_without_what_they_have_right_are_compared_without_a_test(runs, tmp_path):
    old = copy_of(runs[1], tmp_path / "old")
    changed(old, "log.csv", lambda content: content)
    (old / RIGHT).unlink()
    found = compare([runs[0].path, old], [0.5])
    assert found.rows()[1]["p"] is None and found.rows()[1]["test"] is not None
    assert f"Not tested, for want of right.npz, which earlier versions did not write: {old}." in str(found)
    assert "p, Holm" not in str(found)


def edited(front, **arrays):
    """The bytes of a run's right.npz with other arrays in it."""
    with np.load(front.path / RIGHT) as file:
        buffer = io.BytesIO()
        np.savez(buffer, **{**{name: file[name] for name in file.files}, **arrays})
    return buffer.getvalue()


def refused(paths):
    with pytest.raises(EvopruneError) as error:
        compare(paths)
    return str(error.value)


def test_runs_on_other_test_images_are_refused(runs, tmp_path):
    first, record = runs[0].path, (runs[1].path / "config.json").read_text()
    other = changed(copy_of(runs[1], tmp_path / "other"), RIGHT, lambda _: edited(runs[1], test=np.array("0" * 64)))
    assert refused([first, other]) == (f"{other}: was tested on other images than {first}; expected the same, so run one of them "
                                       f"again on the data of the other")
    for name, old, new, said in (
            ("fewer", '"test": 203', '"test": 100', "found a test split of 100 images of data handed in, --split-seed 0, "
             f"expected 203 images of data handed in, --split-seed 0 as {first} has"),
            ("cut", '"split_seed": 0', '"split_seed": 4', "found a test split of 203 images of data handed in, --split-seed 4, "),
            ("task", '"task": "classification"', '"task": "binary"', "found the task binary, expected classification as")):
        assert old in record
        run = changed(copy_of(runs[1], tmp_path / name), "config.json", lambda _, o=old, n=new: record.replace(o, n).encode())
        assert refused([first, run]).startswith(f"{run}: {said}")
    run = changed(copy_of(runs[1], tmp_path / "untested"), "front.csv",
                  lambda text: re.sub(rb"(,203|\d+),0\.\d+,0\.\d+,0\.\d+,(0\.\d+|1\.0),(\d+,)", rb"\1,,,,\2,\3", text))
    assert refused([first, run]).startswith(f"{run}: has no test scores to compare; resume it to its end")


def test_more_objectives_change_nothing_about_what_runs_are_compared_by(runs, tmp_path):
    (tmp_path / "mine.py").write_text("""
from evoprune.masks.genome import kept_genes
from evoprune.objectives import Objective, measures
@measures(Objective("kept_layers", weight=-1.0, worst=4.0, best=0.0))
def kept_layers(individual, layout):
    return float(sum(kept_genes(bits) > 0 for bits in individual))
def mine(): pass
""")
    net, data = examples(10)
    names = f"accuracy,sparsity,{tmp_path / 'mine.py'}:kept_layers"
    three = evoprune.prune(net, data, out=str(tmp_path / "three"), objectives=names, **SETTINGS)
    assert hvlog(three) == pytest.approx(USUAL.hvlog(np.array([p.values[:2] for p in three])), abs=1e-12)
    for order in ([three.path, runs[0].path], [runs[0].path, three.path]):
        found = compare(order)
        assert "hvlog: the mean accuracy of the front over log density, from 50 to 0.5 % of the weights, as" in found.notes[0]
        assert {run["run"]: run["hvlog"] for run in found.to_dict()["runs"]}[str(three.path)] == hvlog(three)


def test_sparsities_that_no_run_reaches_are_said_to_be_out_of_reach(runs):
    sides = [replace(side, chosen=[None]) for side in compare([runs[0].path, runs[1].path], [0.9]).sides]
    said = notes(sides, 0)
    sparsest = max(point.sparsity for run in runs for point in run)
    assert any(note.startswith("No run reaches these sparsities: the sparsest point has ") for note in said)
    assert float(re.search(r"point has ([\d.]+) %", " ".join(said))[1]) == math.floor(1e4 * sparsest) / 100
    assert not any("a task of the user's own" in note for note in said)


@pytest.mark.parametrize(("old", "new"), [
    (rb"\n000,[\d.]+,", rb"\n000,2.0,"), (rb"\n(000,[\d.]+),[\d.]+,", rb"\n\1,0.5,"),
    (rb"\n(000,.*),\d+,([^,]*,[^,]*)\n", rb"\n\1,-1,\2\n"),
    (rb"\n((000,)([\d.]+,){4})[\d.]+,", rb"\n\1nan,")])
def test_numbers_that_cannot_be_are_one_line(old, new, runs, tmp_path):
    run = changed(copy_of(runs[1], tmp_path / "run"), "front.csv", lambda text: re.sub(old, new, text, count=1))
    assert (run / "front.csv").read_bytes() != (runs[1].path / "front.csv").read_bytes()
    assert refused([run]).startswith(f"{run / 'front.csv'}: damaged (ValueError: found numbers in 000 that cannot be, of ")


def test_a_damaged_file_is_one_line(runs, tmp_path):
    hashed, forged = copy_of(runs[1], tmp_path / "hashed"), copy_of(runs[1], tmp_path / "forged")
    content = bytearray((hashed / RIGHT).read_bytes())
    content[-100] ^= 1
    (hashed / RIGHT).write_bytes(content)
    assert "right.npz: damaged or changed since the run wrote it" in refused([runs[0].path, hashed])
    for wrong, said in ((np.full(26, 255, np.uint8), "has other right answers than front.csv"),
                        (np.zeros(3, np.uint8), "is no array of 203 images"), (np.zeros((203, 2), "U3"), "is no array of 203")):
        changed(forged, RIGHT, lambda _, wrong=wrong: edited(runs[1], **{runs[1][-1].id: wrong}))
        assert "right.npz: damaged (ValueError: " in (line := refused([runs[0].path, forged])) and said in line


@pytest.mark.parametrize(("method", "medians"), [("evolve-80", "evoprune, 80, median"), ("evolve-48", "evoprune, 48, median"),
                                                 ("gradual-fisher-80", "gradual Fisher, 80, median")])
def test_the_kept_results_are_what_their_readme_says(method, medians):
    text = (ROOT / "results" / "README.md").read_text()
    row = re.search(rf"^\| {medians} \|(.*)\|$", text, re.MULTILINE)[1]
    expected = [float(cell.strip(" *")) for cell in row.split("|")]
    runs = [ROOT / "results" / "lenet5_mnist_rules" / method / f"seed-{seed}" for seed in range(5)]
    at = [0.9, 0.95, 0.97, 0.98, 0.985, 0.99, 0.993, 0.995]
    rows = compare(runs, at).rows()
    assert [round(100 * median(r["test"] for r in rows if r["at"] == wish), 2) for wish in at] == expected


def test_comparing_imports_no_torch_and_runs_no_code_of_a_folder(runs, tmp_path):
    trap = changed(copy_of(runs[1], tmp_path / "trap"), "config.json", lambda text: re.sub(
        rb'"model": "\w+"', b'"model": "trap.py:spring"', text).replace(b'"rebuildable": false', b'"rebuildable": true'))
    (tmp_path / "trap.py").write_text("raise SystemExit('sprung')")
    program = f"""
import sys
from evoprune.views.compare import compare
found = compare([{str(runs[0].path)!r}, {str(trap)!r}])
print(found), found.csv(), found.figure().savefig('picture.png')
sys.exit(3 if 'torch' in sys.modules else 0)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "so it is" in done.stdout, done.stderr
    assert (tmp_path / "picture.png").stat().st_size > 5000


def test_the_picture_has_a_line_for_each_run(runs):
    axes = compare([front.path for front in runs]).figure().axes[0]
    assert len(axes.containers) == 2
    assert all(str(front.path).endswith(bars.get_label().removeprefix("...")) for bars, front in zip(axes.containers, runs))
