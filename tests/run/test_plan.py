import json
import logging
import re
import shutil
import sys
from dataclasses import replace
from itertools import pairwise

import pytest
from conftest import hashes

import evoprune
from evoprune import EvopruneError
from evoprune.config import AUTO, DECIDED, PLANNED, Config, keywords, options
from evoprune.inputs.models import copied
from evoprune.main import check, main
from evoprune.pruning import dry_run
from evoprune.run import jobs
from evoprune.run import plan as plans
from evoprune.run.plan import FREE, PLOTS, TARGETS, Costs, in_words, need, plan_of, rounded
from evoprune.run.rebuild import RunBuilder, rebuild
from evoprune.run.settings import settle

COSTS = Costs(path=0.05, mask=0.04, last=0.06, tested=0.01, step=0.002, steps_an_epoch=18, least_squares=True, memory=10**9,
              individual=50_000)
TARGET_LIST = TARGETS.split(",")


def plan(seconds, free=1e12, targets=TARGET_LIST, **costs):
    return plan_of(replace(COSTS, **costs), seconds, free, "bn", targets)


def seconds_of(found, costs=COSTS):
    """What a plan takes, by its parts."""
    path = found["shots"] * costs.path
    masks = found["population"] * ((found["generations"] + 1) * costs.mask + costs.last)
    steps = 0 if found["refine_epochs"] is None else found["refine_epochs"] * costs.steps_an_epoch * costs.step
    return PLOTS + path + masks + steps + (found["population"] + len(TARGET_LIST)) * costs.tested


@pytest.mark.parametrize("seconds", [20, 50, 100, 600, 3600])
def test_a_plan_fits_its_time_and_uses_most_of_it(seconds):
    found = plan(seconds)
    assert 0.6 * seconds < seconds_of(found) <= seconds
    assert found["repair"] == "least-squares" and found["generations"] >= 1


def test_a_plan_leaves_time_for_the_test_split():
    slow = plan(600, tested=2.0)
    assert seconds_of(slow, replace(COSTS, tested=2.0)) <= 600 < seconds_of(plan(600), replace(COSTS, tested=2.0))


def test_more_time_is_never_less_of_anything():
    found = [plan(seconds) for seconds in (10, 20, 40, 80, 160, 320, 640)]
    for name in ("shots", "population", "generations"):
        assert all(a[name] <= b[name] for a, b in pairwise(found) if name != "generations" or a["population"] == b["population"])
    assert all((a["refine_epochs"] or 0) <= (b["refine_epochs"] or 0) for a, b in pairwise(found))


def test_a_plan_says_how_children_come_about():
    def said(seconds):
        costs = {"step": 0.005, "steps_an_epoch": 100}
        return in_words(replace(Config(), **plan(seconds, **costs)), replace(COSTS, **costs)).rpartition("(")[2]

    assert said(50) == "each from the one before)"
    assert said(200) == "no later children, whose 3,000 steps each there is no time for)"
    assert re.fullmatch(r"\d+ generations of children\)", said(3000))


def test_where_least_squares_take_too_long_or_there_is_no_training():
    without = plan(60, least_squares=False, path=0.0)
    assert without["repair"] == "bn" and without["shots"] == options()["shots"].default
    for nothing in (plan(60, step=None), plan(60, step=9.0), plan(60, targets=[])):
        assert nothing["refine_epochs"] is None and nothing["targets"] == options()["targets"].default
    assert plan(60, step=None)["generations"] > plan(60)["generations"]
    assert plan(60, step=None) == plan(60, step=9.0) == plan(60, targets=[])  # what training cannot take, the others have


def test_a_plan_is_for_what_can_be_trained_and_what_the_first_masks_are_made_by(lenet, digits, caplog):
    caplog.set_level("INFO", "evoprune")
    dry_run(copied(lenet).requires_grad_(False), digits, minutes=5)
    dry_run(lenet, digits, minutes=5, knowledge="weights")
    dry_run(lenet, digits, minutes=5, layer="conv1")
    frozen, blind, alone = [line for line in caplog.messages if line.startswith("plan for")]
    assert "no training;" in frozen and "multi-shot path" in frozen and "no training;" in alone
    assert "multi-shot path" not in blind and "repair least-squares, " in blind and "epochs of training" in blind
    assert f"the searched layers reach none of the sparsities at which a plan trains, {TARGETS}" in caplog.messages


def test_a_plan_fits_the_memory_that_is_free():
    costs = replace(COSTS, individual=10**8)
    found = [plan_of(costs, 600, free, "bn", TARGET_LIST)["population"] for free in (1e12, 2e10, 1e10)]
    assert found == [64, 32, 16] and all(need(costs, n) <= FREE * free for n, free in zip(found, (1e12, 2e10, 1e10)))


def test_rounded_goes_down_to_a_few_steps():
    assert [rounded(x) for x in (0.3, 1, 7.9, 9, 17, 59, 99, 161, 1900)] == [1, 1, 7, 9, 16, 50, 90, 160, 1800]


def test_a_clock_is_read_only_where_nothing_says_how_to_search_or_train():
    assert settle("lenet", "digits", None, {"seed": 3, "out": "x", "engine": "processes"}).plan == AUTO
    values = {"repair": "none", "shots": 9, "population": 8, "generations": 1, "refine_epochs": 9.0, "targets": "0.9",
              "total_epochs": 9.0, "finetune_epochs": 1, "method": "oneshot:lamp", "start": "lamp", "layerwise": True,
              "knowledge": "data"}
    assert values.keys() == set(DECIDED)
    for name, value in values.items():
        assert settle("lenet", "digits", None, {name: value, "out": "x"}).plan is None, name
    assert settle("lenet", "digits", None, {"out": "x"}, plans=False).plan is None  # with a toolbox of the user's
    assert settle("lenet", "digits", None, {"out": "x", "start": "lamp", "minutes": 2.0}).plan == AUTO


@pytest.mark.parametrize(("settings", "message"), [
    ({"minutes": 2.0, "total_epochs": 9.0}, "minutes: found 2 with --total-epochs, --finetune-epochs, --method or --layerwise, "
                                           "which say how to search and train; expected one of them"),
    ({"plan": "auto", "finetune_epochs": 1}, "plan: found auto with --total-epochs, --finetune-epochs, --method or --layerwise, "
                                            "which say how to search and train; expected one of them"),
    ({"minutes": 2.0, "shots": 20}, "shots: found 20 with --minutes or --plan auto, which decide it; expected one of them"),
    ({"plan": "nowhere"}, "plan: found 'nowhere', expected the folder of a run, or auto"),
    ({"refine_epochs": 1.0, "finetune_epochs": 1},
     "refine_epochs: found 1 with --total-epochs, --finetune-epochs or --layerwise, which train in another way; expected one of "
     "them"),
    ({"refine_epochs": 0.1, "targets": "0.8,0.9,0.95"},
     "refine_epochs: found 0.1, which is 2 steps for 3 jobs, expected at least one each; raise it, or lower targets")])
def test_what_cannot_be_planned_is_one_line(settings, message, lenet, digits, tmp_path):
    with pytest.raises(EvopruneError) as error:
        evoprune.prune(lenet, digits, out=tmp_path / "run", **settings)
    assert str(error.value) == keywords(message)
    assert not (tmp_path / "run").exists()


def test_a_plan_of_another_run_is_all_of_it_or_refused(whole, tmp_path):
    path = shutil.copytree(whole, tmp_path / "run")
    record = json.loads((path / "config.json").read_text())

    def settled(**changes):
        settings = {**record["settings"], "knowledge": "weights"}
        (path / "config.json").write_text(json.dumps({**record, "settings": settings, **changes}))
        return settle("lenet", "digits", None, {"plan": str(path), "out": "x"})

    assert (found := settled()).knowledge == "weights" and found.start == record["settings"]["start"] and found.plan is None
    with pytest.raises(EvopruneError, match="plan: found .*, whose run was stopped before it had a plan; --resume it first"):
        settled(dense=None)


def test_a_precision_of_training_may_be_said_before_there_is_a_plan():
    for given in ({"train_precision": "auto"}, {"train_precision": "bf16", "minutes": 2.0},
                  {"train_precision": "bf16", "generations": 3}):  # the dense model is trained
        check(dict(given))
        assert settle("lenet", "digits", None, {**given, "out": "x"}).train_precision == given["train_precision"]
    with pytest.raises(EvopruneError, match="train_precision: found 'bf16', which does nothing without training"):
        settle("lenet", "digits", None, {"train_precision": "bf16", "generations": 3, "train_epochs": 0, "out": "x"})


def make_quick(patch):
    """Set costs so high that every plan is a small one."""
    costs = replace(COSTS, path=0.5, mask=0.5, last=0.5, step=0.05)
    patch.setattr(plans, "measured_costs", lambda *given: costs)
    patch.setattr(plans, "TARGETS", "0.8,0.95")


@pytest.fixture
def quick(monkeypatch):
    make_quick(monkeypatch)


def results(out):
    return {name: digest for name, digest in hashes(out).items() if name.split(".")[0].split("/")[0] in (
        "front", "dominated", "masks", "layers", "models", "dense")}


def test_a_plan_says_and_records_what_makes_the_same_run(quick, whole, small, digits, tmp_path, caplog):
    with caplog.at_level(logging.INFO, "evoprune"):
        evoprune.prune(small, digits, out=tmp_path / "run", minutes=1.0, threads=1)
    assert results(tmp_path / "run") == results(whole)
    said = next(r.getMessage() for r in caplog.records if r.getMessage().startswith("the same without a clock: "))
    settings = json.loads((tmp_path / "run" / "config.json").read_text())["settings"]
    words = said.split(": ")[1].split()
    flags = {flag[2:].replace("-", "_"): value for flag, value in zip(words[::2], words[1::2])}
    assert flags == {name: str(settings[name]) for name in PLANNED if settings[name] != options()[name].default}
    assert {"minutes", "plan"} <= settings.keys() and settings["minutes"] == 1 and settings["refine_epochs"]
    typed = {name: options()[name].kind(value) for name, value in flags.items()}
    evoprune.prune(small, digits, out=tmp_path / "flags", threads=1, **typed)
    assert results(tmp_path / "flags") == results(whole)
    with pytest.raises(EvopruneError, match="population: found with plan=.*, which says it; expected one of them"):
        evoprune.prune(small, digits, out=tmp_path / "again", plan=str(tmp_path / "run"), population=8)


@pytest.fixture(scope="module")
def whole(small, digits, tmp_path_factory):
    """The folder of a planned run; do not change it."""
    out = tmp_path_factory.mktemp("planned") / "run"
    with pytest.MonkeyPatch.context() as patch:
        make_quick(patch)
        evoprune.prune(small, digits, out=out, minutes=1.0, threads=1)
    return out


def test_a_plan_gives_the_same_bytes_on_another_engine(whole, small, digits, tmp_path):
    evoprune.prune(small, digits, out=tmp_path / "run", threads=1, plan=str(whole), engine="processes", workers=2)
    assert results(tmp_path / "run") == results(whole)


def raises_after(calls, function):
    """The function, which is interrupted after so many calls."""
    left = [calls]

    def interrupted(*given, **named):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return function(*given, **named)

    return interrupted


@pytest.mark.parametrize(("where", "calls"), [("evoprune.run.search.save", 1), ("evoprune.run.jobs.tune", 1),
                                              ("evoprune.run.finish.joined", 0)])
def test_a_stopped_and_resumed_plan_ends_with_the_same_bytes(where, calls, whole, small, digits, tmp_path, monkeypatch):
    module, name = where.rsplit(".", 1)
    function = getattr(sys.modules[module], name)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(where, raises_after(calls, function))
        evoprune.prune(small, digits, out=tmp_path / "stopped", threads=1, plan=str(whole))
    assert not (tmp_path / "stopped" / "done.json").exists() and evoprune.load_front(tmp_path / "stopped", small)
    evoprune.prune(small, digits, resume=tmp_path / "stopped")
    assert results(tmp_path / "stopped") == results(whole)


def test_a_model_that_least_squares_take_too_long_for_gets_another_repair(small, digits, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(plans, "timed", lambda *given: 0.5)
    with caplog.at_level(logging.INFO, "evoprune"):
        evoprune.prune(small, digits, out=tmp_path / "run", minutes=0.1, threads=1)
    assert "multi-shot" not in caplog.text and "NSGA-II with repair none" in caplog.text


def test_least_squares_leave_the_time_to_training_where_there_is_any(lenet, digits, monkeypatch, caplog):
    caplog.set_level("INFO", "evoprune")
    monkeypatch.setattr(plans, "timed", lambda *given: 0.2)
    for net, minutes in ((lenet, 1.5), (lenet, 1.4), (copied(lenet).requires_grad_(False), 1.4)):
        dry_run(net, digits, minutes=minutes)
    longer, trained, frozen = [line for line in caplog.messages if line.startswith("plan for")]
    assert "multi-shot path" in longer and "epochs of training" in longer and "multi-shot path" in frozen
    assert "with repair none, " in trained and "epochs of training" in trained


def test_a_dry_run_says_the_plan_and_leaves_nothing(quick, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["--dry-run", "--minutes", "1", "--train-epochs", "1"]) == 0
    assert "plan for 1 minute: " in (said := capsys.readouterr().out) and said.endswith("a dry run: nothing is written\n")
    assert "would run with" not in said
    assert main(["--dry-run", "--population", "8", "--generations", "1", "--train-epochs", "1"]) == 0
    said = "\nwould run with --method evolve --start random,magnitude,erk,lamp --repair none --population 8 --generations 1\n"
    assert said in capsys.readouterr().out
    with pytest.raises(EvopruneError, match="dry_run: found together with --resume, whose run is planned; expected one of them"):
        dry_run(resume="run")
    assert not list(tmp_path.iterdir())
    (tmp_path / "other").write_text("")
    with pytest.raises(EvopruneError, match="holds other files and no run, expected a new or an empty folder"):
        dry_run(out=tmp_path)


def test_costs_are_those_of_the_model_and_the_data(small, digits, tmp_path, caplog):
    with caplog.at_level(logging.INFO, "evoprune"):
        evoprune.prune(small, digits, out=tmp_path / "run", minutes=0.1, threads=1, layer="fc2")
    settings = Config(**json.loads((tmp_path / "run" / "config.json").read_text())["settings"])
    assert settings.refine_epochs is None  # one small layer of the model cannot be so sparse
    assert any(r.getMessage().startswith("plan for 0.1 minutes: ") for r in caplog.records)


@pytest.mark.parametrize(("took", "cost", "calls"), [
    ([5.0] + 9 * [0.1], 0.1, 2 + len(plans.DENSITIES)), ([5.0, 2.0], 2.0, 2), ([25.0], 25.0, 1)])
def test_what_is_imported_once_is_no_cost_of_a_mask(took, cost, calls, monkeypatch):
    clock, seen = [0.0], []
    monkeypatch.setattr(plans, "monotonic", lambda: clock[0])

    def function(mask):
        seen.append(mask)
        clock[0] += took[len(seen) - 1]

    assert plans.timed(function, list(plans.DENSITIES)) == pytest.approx(cost) and len(seen) == calls


def test_a_step_of_the_path_is_timed_with_what_each_weight_is_worth(small, digits, monkeypatch):
    told, usual = [], plans.a_step

    def step(evaluator, individual):
        usual(evaluator, individual)
        told.append(sum(layer.errors.numel() for layer in evaluator.repairer.layers.values()))

    monkeypatch.setattr(plans, "a_step", step)
    dry_run(small, digits, minutes=60.0, threads=1)  # so that no machine is too slow for least squares
    assert set(told) == {sum(p.numel() for p in small.parameters() if p.dim() > 1)}


def test_the_precision_of_training_is_timed_once_recorded_and_what_trains(small, digits, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(plans, "has_bf16", lambda device: True)
    monkeypatch.setattr(plans, "timed_step", lambda net, train, recipe, *rest: 0.1 if recipe.precision == "bf16" else 0.2)
    tune = jobs.tune
    monkeypatch.setattr(jobs, "tune", lambda *given, **more: seen.append(given[2].precision) or tune(*given, **more))
    settings = {"population": 4, "generations": 0, "finetune_epochs": 1, "front": 2, "threads": 1, "start": "random"}
    front = evoprune.prune(small, digits, out=tmp_path / "run", train_precision="auto", **settings)
    assert front.record.config.train_precision == "bf16" and set(seen) == {"bf16"}
    monkeypatch.setattr(plans, "has_bf16", lambda device: False)
    front = evoprune.prune(small, digits, out=tmp_path / "without", train_precision="auto", **settings)
    assert front.record.config.train_precision == "fp32"
    with pytest.raises(EvopruneError, match="train_precision: found 'bf16', which this cpu has not; expected fp32 or auto"):
        evoprune.prune(small, digits, out=tmp_path / "none", train_precision="bf16", **settings)
    with pytest.raises(EvopruneError, match="train_precision: found 'bf16', which does nothing without training"):
        evoprune.prune(small, digits, out=tmp_path / "none", train_precision="bf16", generations=1)
    monkeypatch.setattr("evoprune.run.rebuild.has_bf16", lambda device: False)
    with pytest.raises(EvopruneError, match="train_precision: the run trains in bf16, which .* has not; give it other workers"):
        rebuild(RunBuilder(str(tmp_path / "run"), ".", "", small, digits))
