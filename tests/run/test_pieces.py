"""Long trainings in pieces: what is stopped, or killed, on the way ends with the same bytes."""

import copy
import math
import re
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import evoprune
from evoprune.engines.engine import Engine, Local
from evoprune.engines.worker import DONE
from evoprune.errors import EvopruneError, Stopped
from evoprune.evolution.generations import as_result
from evoprune.files import read_kept
from evoprune.masks.genome import from_masks
from evoprune.masks.layers import find_layers
from evoprune.objectives import USUAL
from evoprune.run import run as runs
from evoprune.run.run import pieces_of
from evoprune.run.search import map_measured
from evoprune.values.training import Recipe, Shrink, tune

SETTINGS = {"population": 6, "generations": 1, "threads": 1, "front": 2, "search_images": 100, "train_images": 192}
ENGINE = ("engine", "workers")


class Noisy(nn.Module):
    """Has what a training depends on: batch norm, dropout, a parameter that no loss reaches, a buffer that is not saved."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Linear(144, 10)
        self.unused = nn.Parameter(torch.zeros(3))
        self.register_buffer("seen", torch.zeros(()), persistent=False)

    def forward(self, x):
        if self.training:
            self.seen += 1
            x = x * (1 + 0.1 * self.seen)
        return self.fc(nn.functional.dropout(self.norm(self.conv(x)).relu().flatten(1), 0.2, self.training))


@pytest.fixture
def hasty(monkeypatch):
    """Every training, in whichever process, has time for one step; all else for all."""
    monkeypatch.setattr(runs.Run, "until", property(lambda run: -time.monotonic()))
    monkeypatch.setattr("evoprune.run.dense.pieces_of", lambda path, label, until, what: pieces_of(path, label, 0.0, what))


@pytest.mark.parametrize(("kind", "saliency"), [("adam", "fisher"), ("sgd", "fisher"), ("sgd", None)])
def test_a_training_stopped_after_each_step_has_the_values_of_one_that_was_not(kind, saliency, digits, tmp_path):
    torch.manual_seed(0)
    net, recipe = Noisy(), Recipe(2, kind, 0.01, 400, 0, True)
    masks = {"conv.weight": torch.rand(4, 1, 3, 3) < 0.8, "fc.weight": torch.rand(10, 144) < 0.8}
    shrink = None if saliency is None else Shrink(find_layers(net), 300, saliency)
    whole = copy.deepcopy(net)
    expected = tune(whole, digits.train, recipe, masks, shrink=shrink)
    for stops in range(7):
        again, pieces = copy.deepcopy(net), pieces_of(tmp_path / "trained" / "it", "it", 0.0, "it")
        torch.manual_seed(stops)
        with suppress(Stopped):
            kept = tune(again, digits.train, recipe, masks, shrink=shrink, pieces=pieces)
            break
    assert stops == 5  # of 6 steps, 3 an epoch
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), whole.state_dict().values(), strict=True))
    assert all(torch.equal(kept[name], expected[name]) for name in expected)
    assert read_kept(tmp_path / "trained" / "it", "other") is None  # of another training: not looked at


def in_pieces(**settings):
    """A run that is stopped again and again; return it, and how often."""
    for stops in range(100):
        try:
            front = evoprune.prune(resume=settings["out"], **{name: settings[name] for name in ENGINE if name in settings}) \
                if stops else evoprune.prune(**{**SETTINGS, **settings})
        except EvopruneError as error:
            assert re.fullmatch(r"max_seconds: .* has no front yet; go on with: evoprune\.prune\(resume='.*'\)", str(error))
        else:
            if front.finished:
                return front, stops
    raise AssertionError("it never ended")


def in_one_go(monkeypatch, out, settings):
    """The same run with time for all of it, on no engine."""
    with monkeypatch.context() as patch:
        patch.setattr(runs.Run, "until", property(lambda run: math.inf))
        return evoprune.prune(out=out, **SETTINGS | {name: value for name, value in settings.items() if name not in ENGINE})


def results(path):
    return [(path / name).read_bytes() for name in ("front.csv", "masks.npz", "dense.safetensors")] + [
        p.read_bytes() for p in sorted((path / "models").glob("*"))]


@pytest.mark.parametrize(("settings", "least"), [
    ({"finetune_epochs": 2}, 10), ({"finetune_epochs": 1, "train_images": 100, "engine": "processes", "workers": 2}, 1),
    ({"total_epochs": 4, "targets": "0.8,0.9"}, 10), ({"finetune_epochs": 1, "layerwise": True}, 5)])
def test_a_run_stopped_in_the_middle_of_trainings_has_the_same_bytes(settings, least, weights_file, tmp_path, hasty, monkeypatch):
    settings, usual = {"weights": weights_file, **settings}, runs.Run.pieces
    monkeypatch.setattr(runs.Run, "pieces", lambda run, key, *rest: None if key.startswith("masks-") else usual(run, key, *rest))
    whole = in_one_go(monkeypatch, tmp_path / "whole", settings)
    front, stops = in_pieces(out=tmp_path / "run", **settings)
    assert stops >= least and results(front.path) == results(whole.path)
    assert not list((front.path / "checkpoint").rglob("*.piece"))


@pytest.mark.parametrize("settings", [
    {"repair": "least-squares", "shots": 4},
    {"repair": "least-squares", "method": "multishot:obs", "targets": "0.8,0.9", "shots": 4},
    {"start": "multishot", "shots": 3, "layerwise": True},
    {"repair": "bn", "method": "multishot:lamp", "targets": "0.8,0.9", "shots": 4, "total_epochs": 1}])
def test_a_multi_shot_path_stops_in_time_and_goes_on(settings, weights_file, tmp_path, hasty, monkeypatch, caplog):
    caplog.set_level("INFO", "evoprune")
    settings = {"weights": weights_file, **settings}
    whole = in_one_go(monkeypatch, tmp_path / "whole", settings)
    front, stops = in_pieces(out=tmp_path / "run", **settings)
    assert stops >= settings["shots"] - 1 and results(front.path) == results(whole.path)
    assert "the multi-shot path goes on after step 2" in caplog.text and "damaged" not in caplog.text
    assert not list((front.path / "checkpoint").rglob("*.piece"))


@pytest.mark.parametrize("settings", [{"generations": 2}, {"repair": "least-squares", "start": "lamp"}])
def test_masks_that_take_long_are_measured_in_pieces(settings, weights_file, tmp_path, hasty, monkeypatch, caplog):
    caplog.set_level("INFO", "evoprune")
    settings = {"weights": weights_file, **settings}
    whole = in_one_go(monkeypatch, tmp_path / "whole", settings)
    front, stops = in_pieces(out=tmp_path / "run", **settings)
    assert stops >= 6 and results(front.path) == results(whole.path)
    assert "measuring masks goes on after step 4" in caplog.text and "damaged" not in caplog.text
    log, other = ((run.path / "log.csv").read_text().splitlines() for run in (front, whole))
    assert [row.split(",")[:2] for row in log] == [row.split(",")[:2] for row in other]


def bits_of(mask):
    return mask[0].item() / 255, 0.5


def a_run(path, until):
    """As much of a run as measuring masks needs."""
    trained = runs.Run(*[None] * 7, "it", math.inf, trained_at=path)
    return SimpleNamespace(pieces=trained.pieces, forget=trained.forget, identity="it", objectives=USUAL, until=until)


def test_masks_that_were_measured_together_are_kept_together(tmp_path, monkeypatch):
    asked, masks = [], [from_masks([np.arange(8) < i], "") for i in range(8)]

    def measure(mask):
        asked.append(mask.key())
        objectives = bits_of(mask)
        mask[0][:] = 0  # as one may that repairs what it measures
        return objectives

    expected = [bits_of(mask) for mask in masks]
    for stops in range(3):  # one, two, four together
        with pytest.raises(Stopped):
            map_measured(measure, [mask.clone() for mask in masks], measure, Local(), a_run(tmp_path / "trained", 0.0))
        assert len(asked) == stops + 1  # each begins with one
    asked.clear()
    told = []
    with monkeypatch.context() as patch:
        patch.setattr(runs, "late", lambda until: len(asked) >= 3)
        with pytest.raises(Stopped):
            map_measured(measure, [mask.clone() for mask in masks], measure, Local(), a_run(tmp_path / "trained", 0.0),
                         lambda *done: told.append(done))
    assert len(asked) == 3 and told == [(1, 5), (2, 5), (3, 5)]
    found = map_measured(measure, masks, measure, Local(), a_run(tmp_path / "trained", math.inf))
    assert len(asked) == 5 and [as_result(each, USUAL).objectives for each in found] == expected
    assert not list(tmp_path.rglob("*.piece"))
    assert map_measured(len, masks, measure, Local(), a_run(tmp_path / "trained", 0.0)) == [1] * 8  # another function: as it is


def test_what_workers_measured_before_a_stop_is_not_measured_again(tmp_path):
    class Pool:
        """Does the last job first, and gives one up."""

        def run(self, function, items):
            for i in reversed(range(len(items))):
                asked.append(items[i].key())
                yield i, (DONE, None if i == 1 else function(items[i]))

    asked, masks = [], [from_masks([np.arange(8) < i], "") for i in range(4)]
    engine, run = Engine("pool", Pool()), a_run(tmp_path / "trained", 0.0)
    for stops in range(3):
        with pytest.raises(Stopped):
            map_measured(bits_of, masks, bits_of, engine, run)
        assert len(asked) == stops + 1
    run.until = math.inf
    found = map_measured(bits_of, masks, bits_of, engine, run)
    assert asked == [mask.key() for mask in reversed(masks)]  # what was given up is not tried again
    assert [as_result(each, USUAL).objectives for each in found] == [
        USUAL.worst if i == 1 else bits_of(mask) for i, mask in enumerate(masks)]


def test_what_a_path_may_replace_goes_when_there_is_something_to_go_on_with(weights_file, tmp_path, hasty, monkeypatch):
    settings = {"weights": weights_file, "repair": "least-squares", "shots": 3, **SETTINGS}
    with monkeypatch.context() as patch:
        patch.setattr(runs.Run, "until", property(lambda run: math.inf))
        old = results(evoprune.prune(out=tmp_path / "run", weights=weights_file, **SETTINGS).path)
        whole = evoprune.prune(out=tmp_path / "whole", **settings)
        patch.setattr("evoprune.run.search.first_population", interrupted)
        with pytest.raises(KeyboardInterrupt):
            evoprune.prune(out=tmp_path / "run", overwrite=True, **settings)
    assert results(tmp_path / "run") == old
    with pytest.raises(EvopruneError, match=r"has no front yet; go on with: evoprune\.prune\(resume="):
        evoprune.prune(out=tmp_path / "run", overwrite=True, **settings)
    for _ in range(50):
        with suppress(EvopruneError):
            if evoprune.prune(resume=tmp_path / "run").finished:
                break
    assert results(tmp_path / "run") == results(whole.path)


def interrupted(*given):
    raise KeyboardInterrupt


def test_training_the_dense_model_stops_in_time_and_goes_on(tmp_path, hasty, caplog, monkeypatch):
    caplog.set_level("INFO", "evoprune")
    with monkeypatch.context() as patch:
        patch.setattr("evoprune.run.dense.pieces_of", pieces_of)
        patch.setattr(runs.Run, "until", property(lambda run: math.inf))
        whole = evoprune.prune(out=tmp_path / "whole", train_epochs=3, **SETTINGS)
    front, stops = in_pieces(out=tmp_path / "run", train_epochs=3)
    assert stops >= 8 and results(front.path) == results(whole.path)
    assert "training the dense model goes on after step 3" in caplog.text


def test_more_training_goes_on_where_it_was_stopped_as_the_line_says(weights_file, tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO", "evoprune")
    run = evoprune.prune(out=tmp_path / "run", weights=weights_file, **SETTINGS).path
    whole = shutil.copytree(run, tmp_path / "whole")
    evoprune.prune(resume=whole, finetune_epochs=2)
    monkeypatch.setattr(runs.Run, "until", property(lambda run: -time.monotonic()))
    assert not evoprune.prune(resume=run, finetune_epochs=2).finished
    assert "stopped (max_seconds); go on with: evoprune.prune(resume=" in caplog.text
    stops = 1
    while not evoprune.prune(resume=run).finished:
        stops += 1
    assert stops >= 5 and results(run) == results(whole)


def test_a_run_that_a_half_trained_model_may_replace_stays(weights_file, tmp_path, monkeypatch):
    run = evoprune.prune(out=tmp_path / "run", weights=weights_file, **SETTINGS).path
    before = results(run)
    monkeypatch.setattr("evoprune.run.dense.pieces_of", lambda path, label, until, what: pieces_of(path, label, 0.0, what))
    for _ in range(2):
        with pytest.raises(EvopruneError, match="but a half trained model, which the same command trains on; give it more"):
            evoprune.prune(out=run, overwrite=True, train_epochs=1, **SETTINGS)
        assert results(run) == before and evoprune.load_front(run).finished
    assert evoprune.prune(out=run, overwrite=True, train_epochs=1, **SETTINGS).finished and results(run) != before


def test_a_state_that_cannot_be_kept_costs_nothing_else(digits, tmp_path, monkeypatch, caplog):
    def full(*given):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(runs, "SAVE_EVERY", 0.0)
    monkeypatch.setattr(runs, "write_kept", full)
    a, b = copy.deepcopy(Noisy()), Recipe(1, "adam", 0.01, 400, 0, True)
    tune(a, digits.train, b, pieces=pieces_of(tmp_path / "it", "it", math.inf, "it"))
    assert "it: No space left on device; the state of it is not kept" in caplog.text


def test_a_kill_in_dense_training_costs_what_came_after_the_newest_state(tmp_path):
    code = ("from evoprune.run import run; from evoprune.main import main; import sys; run.SAVE_EVERY = 0.1; "
            "sys.exit(main(sys.argv[1:]))")
    given = {**SETTINGS, "train_epochs": 20}
    flags = [part for name, value in given.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    command, piece = [sys.executable, "-c", code], tmp_path / "run" / "checkpoint" / "trained" / "dense.safetensors.piece"
    evoprune.prune(out=tmp_path / "whole", **given)
    process = subprocess.Popen([*command, *flags, "--out", tmp_path / "run"], stdout=subprocess.DEVNULL)
    while not piece.exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    done = subprocess.run([*command, "--resume", tmp_path / "run"], check=True, capture_output=True, text=True)
    assert "training the dense model goes on after step" in done.stdout
    assert results(tmp_path / "run") == results(tmp_path / "whole") and not piece.exists()
