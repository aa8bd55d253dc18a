"""The scripts that the project's evidence comes from: the table of the rules, and the runs with one thing changed."""

import ast
import csv
import importlib.util
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from scipy.stats import ttest_rel

from evoprune.config import Config
from evoprune.errors import EvopruneError
from evoprune.evolution.budget import Budget, children_of, kept_at_targets
from evoprune.evolution.generations import State
from evoprune.evolution.toolbox import default_toolbox
from evoprune.evolution.tuned import FIRST_STRATEGY, weakest_targets
from evoprune.inputs.models import LeNet
from evoprune.masks.genome import dense_individual, from_masks, kept_weights
from evoprune.masks.layout import Layer, Layout
from evoprune.results import machine
from evoprune.results.record import read_record
from evoprune.run import jobs
from evoprune.run.run import pieces_of


def script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


table, without_selection, gradual_variants, train_dense = map(script, (
    "rules_table", "without_selection", "gradual_variants", "train_dense"))

# ------------------------------------------------------------------------------------------------------------ rules_table.py

A, B = "evolve-80", "gradual-fisher-80"  # a pair of its `PAIRS`


def write(path, *records):
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(records[0]))
        writer.writeheader()
        writer.writerows(records)


def add_run(folder, method, seed, points, epochs=80.0, done=True):
    """A made-up run: of each sparsity in percent, its test accuracy in percent; the search split prefers denser points."""
    path = folder / method / f"seed-{seed}"
    path.mkdir(parents=True)
    shutil.copy(ROOT / "results" / "lenet5_mnist" / "config.json", path)
    write(path / "front.csv", *({"sparsity": sparsity / 100, "accuracy": 1 - sparsity / 1000, "test_accuracy": test / 100}
                                for sparsity, test in points.items()))
    write(path / "log.csv", {"epochs": 0, "seconds": 1, "hvlog": 0.5}, {"epochs": epochs, "seconds": 9, "hvlog": 0.75})
    if done:
        (path / "done.json").write_text("{}")


@pytest.fixture
def printed(tmp_path, capsys):
    """Print the table of the runs in `tmp_path` at 90 and 98 %; return its text and what stands in a line of it."""
    def run():
        table.main([str(tmp_path), "90", "98"])
        text = capsys.readouterr().out
        return text, lambda name: [line[42:].split() for line in text.splitlines() if line[:42].strip() == name]
    return run


def pair(folder, a, b, names=(A, B), **more):
    """Two methods' test accuracies at 90 and 98 %, (seeds, 2)."""
    for method, accuracies in zip(names, (a, b)):
        for seed, (at_90, at_98) in enumerate(accuracies):
            add_run(folder, method, seed, {90: at_90, 98: at_98}, **more)


def accuracies(*differences):
    """Of two methods, so that they differ by these at 90 and 98 %, with five seeds."""
    b = np.round([[95 + 0.1 * seed, 80 - 0.2 * seed] for seed in range(5)], 2)
    return np.round(b + np.array(differences).T, 2), b  # decimals, whose differences are equal but for rounding


CLEAR, NARROW, NARROWER = [1.1, 0.9, 1.0, 1.2, 0.8], [1.0, 0.3, 0.5, 0.2, 0.8], [1.0, 0.1, 0.5, 0.2, 0.9]
NONE = [1, -1, 0.5, -0.7, 0.1]


def test_the_table_has_every_seed_the_medians_and_paired_intervals(tmp_path, printed):
    a, b = accuracies(CLEAR, NONE)
    pair(tmp_path, a, b)
    text, cells = printed()
    assert [float(c) for c in cells(f"{A} seed-1")[0]] == pytest.approx(
        [a[1, 0], a[1, 1], (a[1, 0] * np.log(5) + a[1, 1] * np.log(5)) / np.log(100) / 100, 80, 9], abs=1e-3)  # 50 to 10, to 2 %
    assert [float(c) for c in cells(f"{A} median")[0][:2]] == pytest.approx(np.median(a, axis=0), abs=1e-3)
    intervals = [ttest_rel(x, y).confidence_interval(0.95) for x, y in zip(a.T, b.T)]
    for name, expected in (("mean paired difference", (a - b).mean(0)), ("lower end of its 95 %", [i.low for i in intervals]),
                           ("upper end of its 95 %", [i.high for i in intervals])):
        assert [float(c) for c in cells(name)[0][:2]] == pytest.approx(expected, abs=1e-3)
    assert cells("by that interval")[0][:2] == ["win", "tie"] and f"{A} against {B}, 5 shared seeds\n" in text


def test_worse_is_a_loss(tmp_path, printed):
    pair(tmp_path, *accuracies([-d for d in CLEAR], CLEAR))
    text, cells = printed()
    assert cells("by that interval")[0][:2] == cells("after Holm's correction, hvlog apart")[0][:2] == ["loss", "win"]
    assert f"{A} worse than {B} at 90 % (" in text and f"{A} better than {B} at 98 % (" in text


def test_the_search_split_chooses_the_point():
    front = [{"sparsity": s, "accuracy": a, "test_accuracy": t} for s, a, t in
             (("0.9", "0.97", "0.90"), ("0.95", "0.99", "0.80"), ("0.99", "0.50", "0.95"))]
    def at(sparsity):
        return table.tested(table.at_or_above(front, sparsity))

    assert [at(s) for s in (0.9, 0.95, 0.951, 0.99)] == [80, 80, 95, 95]
    assert np.isnan(at(0.991)) and table.hvlog([]) == 0
    obvious = [np.nan_to_num(at(1 - density)) for density in np.geomspace(0.5, 0.005, 2001)]
    assert table.hvlog(front) == pytest.approx(np.mean(obvious) / 100, abs=1e-12)


def test_an_unfinished_run_is_left_out_and_named(tmp_path, printed):
    a, b = accuracies(CLEAR, CLEAR)
    pair(tmp_path, a, b)
    add_run(tmp_path, A, 5, {90: 10, 98: 10}, done=False)
    add_run(tmp_path, "evolve-48", 0, {90: 10, 98: 10}, done=False)
    text, cells = printed()
    assert f"\nunfinished, left out: evolve-48 seed-0, {A} seed-5\n" in text
    assert not cells(f"{A} seed-5") and float(cells(f"{A} median")[0][0]) == pytest.approx(np.median(a[:, 0]), abs=1e-3)
    assert f"{A} against {B}, 5 shared seeds\n" in text


def test_a_folder_without_a_finished_run_is_refused(tmp_path, printed):
    add_run(tmp_path, A, 0, {90: 10}, done=False)
    with pytest.raises(SystemExit, match="found no finished run, expected METHOD/seed-N/ with done.json"):
        printed()


def test_a_seed_without_a_point_so_sparse_stays_visible_and_is_in_no_median_mean_or_test(tmp_path, printed):
    a, b = accuracies(CLEAR, CLEAR)
    pair(tmp_path, a[:4], b)
    add_run(tmp_path, A, 4, {90: a[4, 0]})
    text, cells = printed()
    assert f"\nnan, no point so sparse, and no median or test of it: {A} seed-4 at 98 %\n" in text
    names = (f"{A} seed-4", f"{A} median", "mean paired difference", "lower end of its 95 %", "upper end of its 95 %")
    assert [cells(name)[0][1] for name in names] == ["nan"] * 5 and "nan" not in [cells(name)[0][0] for name in names]
    assert cells("by that interval")[0][:2] == cells("after Holm's correction, hvlog apart")[0][:2] == ["win", "-"]
    assert "of 1 differences" in text and "at 98 % (" not in text


def test_only_shared_seeds_are_compared_and_the_missing_ones_named(tmp_path, printed):
    a, b = accuracies(CLEAR, CLEAR)
    pair(tmp_path, a, b[:4])
    add_run(tmp_path, B, 7, {90: 1, 98: 1})
    text, cells = printed()
    assert f"{A} against {B}, 4 shared seeds; seed-7 missing from {A}; seed-4 missing from {B}\n" in text
    assert float(cells("mean paired difference")[0][0]) == pytest.approx(np.mean(CLEAR[:4]), abs=1e-3)


def test_one_shared_seed_is_too_few(tmp_path, printed):
    a, b = accuracies(CLEAR, CLEAR)
    pair(tmp_path, a[:1], b)
    text, cells = printed()
    assert f"{A} against {B}, 1 shared seed; seed-1, seed-2, seed-3, seed-4 missing from {A}; too few to compare\n" in text
    assert not cells("mean paired difference") and "beyond chance" not in text


def test_unequal_epochs_are_marked_and_in_no_test(tmp_path, printed):
    a, b = accuracies(CLEAR, NARROW)
    pair(tmp_path, a, b, ("evolve-80", "gradual-fisher-80-paced"))
    pair(tmp_path, a, b, ("evolve-48", "gradual-fisher-80"), epochs=48)
    text, cells = printed()
    marked = text[text.index("evolve-80 against gradual-fisher-80,"):].partition("\n\n")[0]
    assert marked.startswith("evolve-80 against gradual-fisher-80, 5 shared seeds; UNEQUAL EPOCHS, 80 against 48, not tested\n")
    assert [line[:42].strip() for line in marked.splitlines()[1:]] == [
        "mean paired difference", "lower end of its 95 %", "upper end of its 95 %"]
    assert text.count("UNEQUAL") == 2 and len(cells("by that interval")) == 2  # gradual-fisher-80 trained 48 epochs here
    assert "of 4 differences" in text and "than gradual-fisher-80 at" not in text.replace("evolve-48 better than", "")


def test_one_seed_with_other_epochs_is_enough_to_be_unequal(tmp_path, printed):
    a, b = accuracies(CLEAR, CLEAR)
    pair(tmp_path, a[:4], b)
    add_run(tmp_path, A, 4, {90: 99, 98: 99}, epochs=80.1)
    text, cells = printed()
    assert "UNEQUAL EPOCHS, 80, 80.1 against 80, not tested" in text and not cells("by that interval")


@pytest.mark.parametrize(("seconds", "tested"), [((60, 60), True), ((62, 60), True), ((50, 60), True), ((70, 60), False)])
def test_where_the_time_is_known_epochs_do_not_count(seconds, tested, tmp_path, printed):
    a, b = accuracies(CLEAR, NARROW)
    pair(tmp_path, a[:4], b, epochs=48)
    add_run(tmp_path, A, 4, {90: 99, 98: 99}, epochs=80)
    for name, wall in zip((A, B), seconds):
        for run in (tmp_path / name).iterdir():
            (run / "seconds.txt").write_text(f"{wall}\n")
    text, cells = printed()
    assert ("MORE TIME, not tested" in text) != tested == bool(cells("by that interval"))


@pytest.mark.parametrize(("differences", "word"), [([0.0] * 5, "equal"), ([0.3] * 5, "-"), ([-0.7] * 5, "-")])
def test_differences_without_variance_are_not_tested(differences, word, tmp_path, printed):
    pair(tmp_path, *accuracies(differences, CLEAR))
    text, cells = printed()
    assert [cells(name)[0][:2] for name in ("by that interval", "after Holm's correction, hvlog apart")] == [[word, "win"]] * 2
    assert [cells(f"{end} end of its 95 %")[0][0] for end in ("lower", "upper")] == ["nan"] * 2 and "of 1 differences" in text
    assert ("not tested, every seed differs by the same: 90\n" in text) == (word == "-")


def test_a_win_by_its_interval_may_be_a_tie_after_the_correction(tmp_path, printed):
    a, b = accuracies(NARROWER, NONE)
    assert ttest_rel(a[:, 0], b[:, 0]).pvalue < 0.05 < 2 * ttest_rel(a[:, 0], b[:, 0]).pvalue
    pair(tmp_path, a, b)
    text, cells = printed()
    assert cells("by that interval")[0][:2] == ["win", "tie"]
    assert cells("after Holm's correction, hvlog apart")[0][:2] == ["tie"] * 2
    assert text.partition("over all:\n")[2].startswith("  none\n")


def test_holm_corrects_within_a_comparison_and_over_all_and_leaves_hvlog_apart(tmp_path, printed):
    a, b = accuracies(NARROW, NARROW[::-1])
    p = ttest_rel(a[:, 0], b[:, 0]).pvalue
    assert p * 2 < 0.05 < p * 3
    pair(tmp_path, a, b)
    text, cells = printed()
    assert cells("by that interval")[0] == cells("after Holm's correction, hvlog apart")[0] == ["win", "win", "win"]
    assert text.count(f"than {B} at") == text.count(f"({2 * p:.2g})") == 2 and "of 2 differences" in text
    pair(tmp_path, accuracies(NARROW, NONE)[0], b, ("gradual-fisher-80-paced",))
    text, cells = printed()
    assert [line for line in text.splitlines() if " against " in line] == [f"{pair}, 5 shared seeds" for pair in (
        f"{A} against {B}", f"{A} against {B}-paced", f"{B}-paced against {B}")]
    assert "of 5 differences" in text  # evolve-80 and the paced rule are equal at 90 %
    assert cells("after Holm's correction, hvlog apart")[0][:2] == ["win", "win"]
    assert cells("by that interval")[2][:2] == ["win", "tie"]
    assert text.partition("over all:\n")[2].startswith("  none\n")


def test_what_a_search_without_training_gained_and_where_it_ran_is_printed(tmp_path, printed):
    for seed, epochs in ((0, 0.0), (1, 0.0)):
        add_run(tmp_path, "evolve-blind", seed, {90: 90, 95: 88, 98: 80}, epochs)
    add_run(tmp_path, A, 0, {90: 90, 98: 80})
    text, cells = printed()
    assert cells("evolve-blind") == [["0.500", "0.750,", "0.500", "0.750"], ["0.606", "0.594"]] and cells(A) == []
    record = read_record(ROOT / "results" / "lenet5_mnist" / "config.json")
    assert f"\n{record.device}, python {record.versions['python']}, " in text


def test_holm_by_hand_and_by_its_definition(rng):
    assert table.holm(np.array([0.01, 0.04, np.nan, 0.03, 0.005])) == pytest.approx([0.03, 0.06, np.nan, 0.06, 0.02], nan_ok=True)
    assert table.holm(np.array([0.6, 0.7])).tolist() == [1, 1] and len(table.holm(np.array([]))) == 0
    for size in range(1, 9):
        ps = rng.random(size) ** 3
        for level in (0.01, 0.05, 0.3):
            rejected = set()
            for step, i in enumerate(sorted(range(size), key=lambda i: ps[i])):
                if ps[i] >= level / (size - step):
                    break
                rejected.add(i)
            assert set(np.flatnonzero(table.holm(ps) < level)) == rejected


def test_every_pair_that_answers_a_question_is_compared():
    assert {("evolve-48", "gradual-fisher-80"), ("gradual-fisher-80-paced", "gradual-fisher-80"),
            ("evolve-80", "evolve-80-random-targets"), ("evolve-80-random-targets", "evolve-80-random-parents"),
            ("gradual-fisher-80-rate-1", "gradual-fisher-80"), ("gradual-fisher-24-rate-half", "gradual-fisher-24"),
            ("evolve-40", "gradual-fisher-40-paced"), ("gradual-fisher-40-paced", "gradual-fisher-40"),
            ("evolve", "gradual-magnitude")} <= set(table.PAIRS) and len(set(table.PAIRS)) == len(table.PAIRS)
    shell = "".join(path.read_text() for path in (ROOT / "scripts").glob("*.sh"))
    assert {name for names in table.PAIRS for name in names} <= set(re.findall(r"^ *run ([\w-]+)", shell, re.MULTILINE))


# ------------------------------------------------------------------------------------------------------ without_selection.py

SETTINGS = {"total_epochs": 6.0, "population": 16, "generations": 4, "targets": "0.5,0.8,0.9"}
LAYOUT = Layout((Layer("a", (200,)),), 200)
TARGETS = [100, 40, 20]  # weights kept


def evaluate(job):
    raise AssertionError("nothing is measured here")


def state_of(order, generation=2):
    """The dense model and four masks at each target, their scores in an order."""
    masks = [dense_individual(LAYOUT)]
    for kept in TARGETS:
        masks += [from_masks([np.roll(np.arange(200) < kept, 7 * i)], "tune") for i in range(4)]
    for mask, score in zip(masks, order):
        mask.fitness.values = 0.5 + score / 100, 1 - kept_weights(mask, LAYOUT) / 200
    return State(generation, masks, [masks[0], *masks[1::4]], {}, ())


def bred(make, state, seed=0, aims=None, **more):
    """Jobs of the next generation, whose children keep their parents' masks."""
    config = Config(**SETTINGS)
    made = make(evaluate, LAYOUT, config, **more)
    made.register("before", Budget(1.0, 100, 50, len(kept_at_targets(config, LAYOUT)), 0.4, children_of(config)).before)
    made.register("inherits", lambda generation: False)
    made.register("steps", lambda job: job)
    made.register("mate", lambda a, b, rng: (a, b))
    if aims is not None:
        made.register("aim", lambda state, targets, children, layout: aims)
    return made.breed(state, rng=np.random.default_rng(seed))


def parents(make, state, aims, **more):
    """Of 120 children, (target, weights that the parent keeps, its mask)."""
    found = [job for seed in range(40) for job in bred(make, state, seed, aims, **more)]
    return [(TARGETS.index(job.kept), kept_weights(job.individual, LAYOUT), job.individual.key()) for job in found]


RISING, FALLING = range(13), range(13)[::-1]


@pytest.mark.parametrize("kind", ["niche", "targets", "any"])
def test_parents_are_drawn_from_their_pool_whatever_their_scores(kind):
    found = parents(without_selection.toolbox, state_of(RISING), [0, 1, 2], kind=kind)
    assert found == parents(without_selection.toolbox, state_of(FALLING), [0, 1, 2], kind=kind)
    for target in range(3):
        pool = [200, *TARGETS] if kind == "any" else [[200, *TARGETS][target], TARGETS[target]]
        mine = [(kept, key) for aim, kept, key in found if aim == target]
        assert {kept for kept, _ in mine} == set(pool) and len(mine) == 40
        counts = Counter(key for kept, key in mine if kind == "any" or kept == TARGETS[target])
        assert len(counts) >= (12 if kind == "any" else 4) and max(counts.values()) < 2.5 * sum(counts.values()) / len(counts)


def test_by_default_parents_depend_on_scores():
    assert parents(default_toolbox, state_of(RISING), [0, 1, 2]) != parents(default_toolbox, state_of(FALLING), [0, 1, 2])


@pytest.mark.parametrize("kind", ["targets", "any"])
def test_targets_are_drawn_evenly_by_seed_and_generation_alone(kind):
    def aims(scores, seed=0):
        made = without_selection.toolbox(evaluate, LAYOUT, Config(**SETTINGS, seed=seed), kind=kind)
        return [made.aim(state_of(scores, generation), TARGETS, 2, LAYOUT) for generation in range(1, 76)]

    assert aims(RISING) == aims(FALLING) != aims(RISING, 1)
    assert np.bincount(np.ravel(aims(RISING))).tolist() == pytest.approx([50] * 3, abs=17)
    assert {TARGETS.index(job.kept) for generation in range(1, 10) for job in
            bred(without_selection.toolbox, state_of(RISING, generation), kind=kind)} == {0, 1, 2}


@pytest.mark.parametrize("kind", ["niche", "targets", "any"])
def test_nothing_else_changes_and_nobody_dies(kind):
    config = Config(**SETTINGS)
    usual, made = default_toolbox(evaluate, LAYOUT, config), without_selection.toolbox(evaluate, LAYOUT, config, kind)
    names = {name for name in vars(usual) if callable(getattr(usual, name))}
    assert names == {name for name in vars(made) if callable(getattr(made, name))} and len(names) > 9
    changed = {name for name in names if getattr(usual, name).func is not getattr(made, name).func}
    assert changed == {"select", "survive", "breed", *(["aim"] if kind != "niche" else [])}
    assert (made.aim.func is weakest_targets) == (kind == "niche")
    population = state_of(RISING).population
    assert made.survive(population, 4, rng=None) == population


@pytest.mark.parametrize(("kind", "settings"), [
    ("target", {}), ("niche", {"total_epochs": None}), ("niche", {"method": "gradual:fisher"})])
def test_without_selection_refuses_what_it_would_not_change(kind, settings):
    with pytest.raises(EvopruneError, match=r"^without_selection\.py: (found 'target', expected niche|expected a tuned run)"):
        without_selection.toolbox(evaluate, LAYOUT, Config(**{**SETTINGS, **settings}), kind)


# ------------------------------------------------------------------------------------------------------- gradual_variants.py

CHANGES = {"paced": {"until": FIRST_STRATEGY[2], "pace": FIRST_STRATEGY[3], "mix": FIRST_STRATEGY[4]},
           "rate=0.75": {"learning_rate": 0.75}}


@pytest.mark.parametrize("kind", CHANGES)
@pytest.mark.parametrize("epochs", [6.0, 60.0])  # with the usual rate, and with half of it
def test_a_variant_changes_what_it_says_of_a_rules_jobs(kind, epochs):
    config, budget = Config(**{**SETTINGS, "method": "gradual:lamp", "total_epochs": epochs}), Budget(epochs, 100, 3, 3, 0.4)
    usual, made = default_toolbox(evaluate, LAYOUT, config), gradual_variants.toolbox(evaluate, LAYOUT, config, kind)
    before, after = (each.jobs([], budget=budget) for each in (usual, made))
    assert len(before) == len(after) == 3
    for a, b in zip(before, after):
        changed = {f.name: getattr(b, f.name) for f in fields(a) if getattr(a, f.name) != getattr(b, f.name)}
        assert changed == CHANGES[kind]
    names = {name for name in vars(usual) if callable(getattr(usual, name))}
    assert {name for name in names if getattr(usual, name).func is not getattr(made, name).func} == {"jobs"}


@pytest.mark.parametrize(("kind", "method"), [
    *((kind, "gradual:lamp") for kind in ("rate", "rate=fast", "rat=0.5", "rate=0", "rate=inf", "pace")),
    ("paced", "evolve"), ("rate=0.5", "oneshot:lamp")])
def test_a_variant_refuses_what_it_would_not_change(kind, method):
    with pytest.raises(EvopruneError, match=r"^gradual_variants\.py: found .*, expected (paced, or rate=X|gradual:RULE)"):
        gradual_variants.toolbox(evaluate, LAYOUT, Config(**{**SETTINGS, "method": method}), kind)


# ------------------------------------------------------------------------------------------------------- both, as they are run


@pytest.mark.parametrize(("name", "kind", "flags"), [
    ("gradual_variants", "paced", ["--method", "gradual:fisher"]),
    ("without_selection", "any", ["--population", "8", "--generations", "3"])])
def test_a_run_trains_as_the_script_says_and_records_it(name, kind, flags, tmp_path, monkeypatch):
    torch.save(LeNet().state_dict(), tmp_path / "weights.pth")
    seen = []

    def tune(net, train, recipe, masks, progress, shrink, pieces):
        seen.append((recipe.learning_rate, shrink.until, shrink.pace, shrink.mix))
        return usual(net, train, recipe, masks, progress, shrink, pieces)

    usual = jobs.tune
    monkeypatch.setattr(jobs, "tune", tune)
    arguments = ["--model", "lenet", "--data", "digits", "--weights", str(tmp_path / "weights.pth"), "--search-images", "50",
                 "--total-epochs", "0.7", "--targets", "0.5,0.8", "--threads", "1", *flags, "--out", str(tmp_path / "run")]
    monkeypatch.setattr(sys, "argv", ["", kind, *arguments])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "scripts" / f"{name}.py"), run_name="__main__")
    assert end.value.code == 0 and (tmp_path / "run" / "done.json").exists()
    record = read_record(tmp_path / "run" / "config.json")
    assert record.command == " ".join([f"python scripts/{name}.py {kind}", *arguments])
    assert record.toolbox == f"{name}.py: toolbox(kind={kind!r})"
    commit = json.loads((tmp_path / "run" / "config.json").read_text())["versions"]["commit"]
    assert commit == machine.commit(ROOT / "evoprune" / "results" / "machine.py")
    assert len(seen) == (2 if kind == "paced" else 3)  # of a line of two, and a child after it
    assert kind != "paced" or set(seen) == {(0.01, *FIRST_STRATEGY[2:])}


def test_the_commit_is_that_of_the_checkout_a_file_belongs_to(tmp_path, monkeypatch):
    def git(*arguments):
        return subprocess.run(["git", "-C", tmp_path, *arguments], check=True, capture_output=True, text=True).stdout.strip()

    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    source = tmp_path / "package" / "machine.py"
    source.parent.mkdir()
    source.write_text("")
    assert machine.commit(source) is None  # no repository
    git("init", "--quiet")
    assert machine.commit(source) is None  # in nobody's commit
    git("add", "package")
    for name in ("AUTHOR_NAME", "AUTHOR_EMAIL", "COMMITTER_NAME", "COMMITTER_EMAIL"):
        monkeypatch.setenv(f"GIT_{name}", "n")
    git("commit", "--quiet", "--message", "m")
    git("tag", "--annotate", "--message", "m", "v1")
    head = git("rev-parse", "HEAD")
    assert machine.commit(source) == head and re.fullmatch("[0-9a-f]{40}", head)
    other = tmp_path / "package" / "mine.py"
    other.write_text("")
    assert machine.commit(source) == head and machine.commit(other) is None  # untracked
    source.write_text("1")
    assert machine.commit(source) == f"{head}-dirty"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine.commit(source) is None  # no git


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "scripts").glob("*.py")))
def test_every_script_imports_names_that_there_are(name):
    """Types are checked in the package alone."""
    for node in ast.walk(ast.parse((ROOT / "scripts" / f"{name}.py").read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "evoprune":
            module = importlib.import_module(node.module)
            assert not [alias.name for alias in node.names if not hasattr(module, alias.name)
                        and importlib.util.find_spec(f"{node.module}.{alias.name}") is None]


def test_a_dense_model_is_trained_in_pieces(tmp_path, monkeypatch, capsys):
    """Each call has time for one step."""
    flags = ["--train-epochs", "2", "--train-images", "100", "--search-images", "50", "--threads", "1"]

    def trained(name):
        monkeypatch.setattr(sys, "argv", ["", str(tmp_path / name), *flags])
        return train_dense.main()

    assert trained("whole.safetensors") == 0
    monkeypatch.setattr("evoprune.run.dense.pieces_of", lambda path, label, until, what: pieces_of(path, label, 0.0, what))
    assert [trained("a.safetensors") for _ in range(2)] == [2, 2]  # of 4 steps
    flags[1] = "3"
    assert trained("a.safetensors") == 2
    assert re.search(r"^train_dense: train_epochs: found 3, but .*a.safetensors.run was begun with 2; expected the same",
                     capsys.readouterr().err, re.MULTILINE)
    flags[1] = "2"
    assert [trained("a.safetensors") for _ in range(2)] == [2, 0]
    assert capsys.readouterr().err.count("has no front yet; go on with: ") == 1
    assert {p.name for p in tmp_path.iterdir()} == {"whole.safetensors", "a.safetensors"}
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()


def test_a_run_of_a_script_that_was_stopped_goes_on(tmp_path):
    (tmp_path / "given.py").write_text(
        "import sys, pathlib\n"
        "where = pathlib.Path(sys.argv[sys.argv.index('--resume' if '--resume' in sys.argv else '--out') + 1])\n"
        "where.mkdir(parents=True, exist_ok=True)\n"
        "(where / 'config.json').write_text(' '.join(sys.argv[1:]))\n"
        "if '--resume' not in sys.argv and 'stops' in sys.argv: sys.exit(1)\n"
        "for name in ('front.csv', 'layers.csv', 'log.csv', 'done.json'): (where / name).touch()\n")
    script = (f"set -euo pipefail; . {ROOT}/scripts/rules_runs.sh; results=results/task common=(--model a) program=(given.py); "
              "run evolve 1 --flag stops")
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}

    def once(more=""):
        return subprocess.run(["bash", "-c", more + script], cwd=tmp_path, env=env).returncode

    work, out = tmp_path / "data" / "results-task-evolve-1", tmp_path / "results" / "task" / "evolve" / "seed-1"
    engine = "--engine processes --workers 2"
    assert once() == 1 and (work / "config.json").read_text() == (
        f"--model a {engine} --threads 1 --seed 1 --out data/results-task-evolve-1 --flag stops")
    assert once("timed=1; ") == 1 and not out.exists()  # what is timed begins again
    assert once() == 0 and (out / "config.json").read_text() == f"{engine} --resume data/results-task-evolve-1"
    assert not work.exists() and once() == 0
