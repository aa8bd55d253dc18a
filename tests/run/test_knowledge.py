"""Starts, repairs and knowledge through the whole flow, on the bundled digits."""

import time
from contextlib import nullcontext

import pytest
import torch
from conftest import trained
from nets import Mixed
from torch import nn

import evoprune
from evoprune.config import keywords
from evoprune.engines.engine import Local
from evoprune.errors import EvopruneError
from evoprune.evaluation.accuracy import accuracy
from evoprune.evolution.starts import STARTS
from evoprune.evolution.toolbox import default_toolbox
from evoprune.rules import NEEDS
from evoprune.run.jobs import RepairPoint
from evoprune.run.run import Run
from evoprune.values.norms import fit_norms

SMALL = {"population": 8, "generations": 2, "threads": 1, "seed": 3, "shots": 10}


@pytest.fixture(scope="module")
def mixed(digits):
    return trained(Mixed, digits, 2)


def keeps_its_promises(front, data):
    """Zeros are zero, kept counts are right, accuracy is that of the model that is handed out."""
    for point in list(front)[::4]:
        model = point.model()
        kept = sum(int((model.get_parameter(name) != 0).sum()) for name in point.masks())
        assert all(not model.get_parameter(name)[~mask].any() for name, mask in point.masks().items())
        assert kept <= point.kept == sum(int(mask.sum()) for mask in point.masks().values())
        assert accuracy(model, data.search, front.record.batch_size) == point.accuracy
        assert accuracy(model, data.test, front.record.batch_size) == point.test_accuracy


@pytest.mark.parametrize("start", STARTS)
def test_every_start_runs_with_the_knowledge_it_needs(start, lenet, digits, tmp_path):
    front = evoprune.prune(lenet, digits, out=tmp_path / "run", start=start, knowledge=NEEDS[start], **SMALL)
    keeps_its_promises(front, digits)
    assert front.record.settings["start"] == start and {p.repair for p in front} == {"none"}


@pytest.mark.parametrize(("knowledge", "repair"), [
    ("none", "least-squares"), ("weights", "none"), ("weights", "bn"), ("data", "none"), ("data", "least-squares")])
def test_every_repair_runs_with_any_knowledge(knowledge, repair, mixed, digits, tmp_path, monkeypatch):
    fitted = []
    monkeypatch.setattr("evoprune.values.repair.fit_norms", lambda *given: fitted.append(fit_norms(*given)))
    front = evoprune.prune(mixed, digits, out=tmp_path / "run", knowledge=knowledge, repair=repair, **SMALL)
    keeps_its_promises(front, digits)
    assert {p.repair for p in front if p.density < 1} == {repair}  # the dense model may be as good as any
    pruned = sum(p.density < 1 for p in front)  # the search fits nothing
    assert pruned <= len(fitted) < 24 if repair == "least-squares" else not fitted
    assert (tmp_path / "run" / "models").exists() == (repair != "none")
    rules = {"none": "narrow", "data": "multishot" if repair == "least-squares" else "random,magnitude,erk,lamp"}
    assert front.record.settings["start"] == rules.get(knowledge, "random,magnitude,erk,lamp")


def test_a_last_repair_that_no_worker_survives_stops_the_run_and_resume_goes_on(mixed, digits, tmp_path, monkeypatch):
    def given_up(self, function, items, arrived=None, **others):
        if isinstance(function, RepairPoint):
            arrived(1, None)
        return real(self, function, items, **others)

    real = Local.map
    run, whole = tmp_path / "run", tmp_path / "whole"
    with monkeypatch.context() as patch:
        patch.setattr(Local, "map", given_up)
        with pytest.raises(EvopruneError, match=r"^engine local: no worker survived the last repair of point 2 of \d+; the "
                                                rf"search is saved: go on with resume='{run}' and fewer workers=, a longer "
                                                r"job_timeout= or engine='local'$"):
            evoprune.prune(mixed, digits, out=run, repair="bn", **SMALL)
    assert not (run / "done.json").exists()
    assert evoprune.prune(mixed, digits, resume=run).finished
    evoprune.prune(mixed, digits, out=whole, repair="bn", **SMALL)
    assert all((run / name).read_bytes() == (whole / name).read_bytes() for name in ("front.csv", "masks.npz"))


@pytest.mark.parametrize("stops", ["Ctrl-C", "max_seconds"])
def test_last_repairs_that_were_done_are_not_done_again(stops, mixed, digits, tmp_path, monkeypatch):
    def repaired(self, individual):
        done.append(individual)
        if len(done) == 3 and stops == "Ctrl-C" and not resumed:
            raise KeyboardInterrupt
        return real(self, individual)

    whole = evoprune.prune(mixed, digits, out=tmp_path / "whole", repair="bn", **SMALL)
    run, done, resumed, real = tmp_path / "run", [], [], RepairPoint.__call__
    monkeypatch.setattr(RepairPoint, "__call__", repaired)
    with monkeypatch.context() as patch:
        if stops == "max_seconds":
            patch.setattr("evoprune.run.jobs.no_time", lambda until: len(done) > 2)
        with pytest.raises(KeyboardInterrupt) if stops == "Ctrl-C" else nullcontext():
            assert not evoprune.prune(mixed, digits, out=run, repair="bn", **SMALL).finished
    assert not (run / "done.json").exists() and len(list((run / "checkpoint" / "trained").iterdir())) == 2
    done.clear()
    resumed.append(True)
    assert evoprune.prune(mixed, digits, resume=run).finished
    pruned = sum(point.density < 1 for point in whole)
    assert len(done) == pruned - 2 > 0 and files_of(run) == files_of(whole.path)


def test_the_default_repair_depends_on_batch_norm(mixed, lenet, digits, tmp_path):
    for model, repair in ((mixed, "bn"), (lenet, "none")):
        out = tmp_path / repair
        assert evoprune.prune(model, digits, out=out, **SMALL).record.settings["repair"] == repair


def test_the_seconds_of_the_log_count_the_path(lenet, digits, tmp_path, monkeypatch):
    rows, made = [], Run.plain_evaluator
    monkeypatch.setattr(Run, "plain_evaluator", lambda self, *given, **more: time.sleep(0.5) or made(self, *given, **more))
    evoprune.prune(lenet, digits, out=tmp_path / "run", repair="least-squares", method="multishot:obs", targets="0.5,0.8",
                   shots=2, on_generation=rows.append)
    assert [row["generation"] for row in rows] == [0] and rows[0]["seconds"] >= 0.5


def test_repair_makes_a_better_front(digits, tmp_path):
    net, hvlog = trained(Mixed, digits, 8), {}
    for repair in ("none", "bn", "least-squares"):
        evoprune.prune(net, digits, out=tmp_path / repair, repair=repair, knowledge="weights", **SMALL)
        hvlog[repair] = float((tmp_path / repair / "log.csv").read_text().splitlines()[-1].split(",")[4])
    assert hvlog["none"] + 0.01 < hvlog["bn"] and hvlog["bn"] + 0.05 < hvlog["least-squares"]


class Constant(nn.Module):
    """Always class 0, whatever the weights are: masks are all that selection sees."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.fc1, self.fc2 = nn.Linear(64, 30), nn.Linear(30, 10)

    def forward(self, x):
        logits = self.fc2(self.fc1(x.flatten(1)))
        return torch.where(torch.arange(10) == 0, 1.0, 0.0) + 0 * logits


@pytest.mark.parametrize("repair", ["none", "least-squares"])
def test_knowledge_none_makes_the_same_masks_whatever_the_weights(repair, digits, tmp_path):
    measured = {}
    for knowledge in ("none", "weights"):
        for seed in (0, 1):
            keys = measured[knowledge, seed] = []

            def make(evaluate, layout, config, keys=keys):
                toolbox = default_toolbox(evaluate, layout, config)
                toolbox.register("evaluate", lambda individual: (keys.append(individual.key()), evaluate(individual))[1])
                return toolbox

            evoprune.prune(Constant(seed), digits, out=tmp_path / f"{knowledge}{seed}", toolbox=make, knowledge=knowledge,
                           repair=repair, **SMALL)
    assert measured["none", 0] == measured["none", 1] and len(measured["none", 0]) > 10
    assert measured["weights", 0] != measured["weights", 1]


def files_of(out):
    return {name: (out / name).read_bytes() for name in ("front.csv", "masks.npz")} | {
        path.name: path.read_bytes() for path in (out / "models").iterdir()}


@pytest.mark.parametrize("model", ["mixed", "lenet"])
def test_a_resumed_run_with_repair_equals_one_that_never_stopped(model, request, digits, tmp_path):
    model, settings = request.getfixturevalue(model), {**SMALL, "repair": "least-squares"}
    evoprune.prune(model, digits, out=tmp_path / "whole", **{**settings, "generations": 2})
    evoprune.prune(model, digits, out=tmp_path / "parts", **{**settings, "generations": 1})
    evoprune.prune(model, digits, resume=tmp_path / "parts", generations=2)
    assert files_of(tmp_path / "whole") == files_of(tmp_path / "parts")


@pytest.mark.parametrize(("model", "workers"), [("mixed", 1), ("lenet", 2)])
def test_repair_in_other_processes_gives_the_same_bytes(model, workers, request, digits, tmp_path):
    model, settings = request.getfixturevalue(model), {**SMALL, "generations": 1, "repair": "least-squares"}
    for engine, many in (("local", None), ("processes", workers)):
        evoprune.prune(model, digits, out=tmp_path / engine, engine=engine, workers=many, **settings)
    assert files_of(tmp_path / "local") == files_of(tmp_path / "processes")


def test_a_stopped_run_has_no_repaired_values_yet(lenet, digits, tmp_path):
    front = evoprune.prune(lenet, digits, out=tmp_path / "run", repair="least-squares", max_seconds=0, **SMALL)
    assert not front.finished and not list((tmp_path / "run").glob("models/*")) and {p.repair for p in front} == {"least-squares"}
    with pytest.raises(EvopruneError, match="not there yet, repaired values are written when the run is finished"):
        front[-1].model()


def test_training_starts_from_the_dense_values(lenet, digits, tmp_path):
    front = evoprune.prune(lenet, digits, out=tmp_path / "run", repair="least-squares", finetune_epochs=1, front=2,
                           learning_rate=1e-9, **SMALL)  # too low to lead anywhere
    assert {p.repair for p in front} == {"none"} and any(p.accuracy != p.accuracy_before for p in front)
    for point in front:
        trained, masks = point.model().state_dict(), point.masks()
        assert all(torch.allclose(trained[name], value * masks.get(name, True), atol=1e-6)
                   for name, value in lenet.state_dict().items())


@pytest.mark.parametrize(("settings", "said"), [
    ({"start": "lamp", "knowledge": "none"},
     "start: found 'lamp', which needs --knowledge weights, with --knowledge none; expected random, narrow"),
    ({"start": "random,fisher", "knowledge": "weights"}, "start: found 'fisher', which needs --knowledge data, with --knowledge "
     "weights; expected random, narrow, magnitude, erk, lamp, multishot"),
    ({"start": "snip"}, "start: found 'snip', expected random, narrow, magnitude, erk, lamp, fisher, multishot, with commas "
     "between, or auto"),
    ({"method": "multishot:obs", "targets": "0.9"}, "method: found 'multishot:obs', which asks least squares what weights are "
     "worth; give --repair least-squares"),
    ({"method": "multishot:obs", "knowledge": "weights"}, "method: found 'obs', which needs --knowledge data, with --knowledge "
     "weights; expected magnitude, lamp"),
    ({"repair": "magic"}, "repair: found 'magic', expected one of none, bn, least-squares"),
    ({"knowledge": "labels"}, "knowledge: found 'labels', expected one of none, weights, data"),
    ({"repair": "bn", "layerwise": True}, "repair: found 'bn' with --layerwise, whose stages train instead; expected none"),
])
def test_bad_input_is_told_in_one_line(settings, said, lenet, digits, tmp_path):
    with pytest.raises(EvopruneError) as error:
        evoprune.prune(lenet, digits, out=tmp_path / "run", **settings)
    assert str(error.value) == keywords(said) and not (tmp_path / "run").exists()


def test_fisher_without_a_train_split_is_told(lenet, digits, tmp_path):
    with pytest.raises(EvopruneError) as error:
        evoprune.prune(lenet, evoprune.Data(None, digits.search, None), out=tmp_path / "run", start="fisher")
    assert str(error.value) == ("start, method: found 'fisher', whose gradients need a train split, and no train split; hand in "
                                "evoprune.Data(train, search, test), or choose other rules")
