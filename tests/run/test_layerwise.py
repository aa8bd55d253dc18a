import json

import numpy as np
import pytest
import torch
from conftest import group_of
from test_pruning import SMALL, Stops, results

import evoprune
from evoprune.config import Config
from evoprune.evolution.generations import State
from evoprune.masks.layout import Layer, Layout
from evoprune.run.layerwise import choose_mask

SETTINGS = {"layerwise": True, "finetune_epochs": 1, "rounds": 2, "caps": "0.3,0.9", **SMALL}


@pytest.fixture(scope="module")
def whole(lenet, digits, tmp_path_factory):
    out = tmp_path_factory.mktemp("layerwise") / "run"
    return evoprune.prune(lenet, digits, out=str(out), **SETTINGS)


def test_layers_are_pruned_one_after_the_other_and_caps_hold(whole, lenet, digits):
    dominated = whole.read("dominated.csv")
    assert dominated and all(any(p.accuracy >= d.accuracy and p.sparsity >= d.sparsity for p in whole) for d in dominated)
    points = sorted([*whole, *dominated], key=lambda p: p.id)
    assert len(points) == 9 and points[0].sparsity == 0
    names = list(points[0].masks())
    for number, (before, after) in enumerate(zip(points, points[1:])):
        assert after.kept <= before.kept  # the knee may be the mask that was there
        masks = before.masks(), after.masks()
        for i, name in enumerate(names):
            if i != number % 4:
                assert torch.equal(masks[0][name], masks[1][name])
            assert not (masks[1][name] & ~masks[0][name]).any()  # what is gone stays gone
            assert 1 - masks[1][name].float().mean() <= (0.3 if number < 4 else 0.9) + 1e-6  # binding: without, more goes
    assert len({point.kept for point in points}) >= 6
    done = json.loads((whole.path / "done.json").read_text())
    assert done["epochs"] == 8 and done["points"] == 9


def test_every_model_has_the_accuracy_and_the_zeros_that_are_stated(whole, digits):
    for point in whole:
        model = point.model()
        assert evoprune.accuracy(model, digits.search) == point.accuracy
        assert sum(int(mask.sum()) for mask in point.masks().values()) == point.kept
        assert all(not dict(model.named_parameters())[name][~mask].any() for name, mask in point.masks().items())


@pytest.mark.parametrize("after", [5, 60, 200, 330])
def test_interrupted_and_resumed_is_never_interrupted(after, whole, lenet, digits, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        evoprune.prune(lenet, digits, out=str(tmp_path / "run"), toolbox=Stops(after), **SETTINGS)
    evoprune.prune(lenet, digits, resume=tmp_path / "run")
    assert results(tmp_path / "run") == results(whole.path)
    assert not list((tmp_path / "run" / "checkpoint").glob("stage*"))


def test_stages_go_on_in_other_processes_with_the_same_bytes(whole, lenet, digits, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        evoprune.prune(lenet, digits, out=str(tmp_path / "run"), toolbox=Stops(100), **SETTINGS)
    evoprune.prune(lenet, digits, resume=tmp_path / "run", engine="processes", workers=2)
    assert results(tmp_path / "run") == results(whole.path)
    assert not list((tmp_path / "run" / "checkpoint").glob("stage*"))


def state_of(values, layout):
    group = group_of(values)
    for individual, (_, sparsity) in zip(group, values):
        bits = np.ones(100, bool)
        bits[:round(sparsity * 100)] = False
        individual[:] = [np.packbits(bits)]
    return State(0, group, group, {}, ())


def test_the_knee_the_floor_and_the_cap_choose():
    layer, all_alive = Layer("a", (100,)), np.packbits(np.ones(100, bool))
    layout = Layout((layer,), 100)
    state = state_of([(1.0, 0.0), (0.98, 0.5), (0.95, 0.8), (0.6, 0.9), (0.2, 0.95)], layout)
    floor = Config(accuracy_floor=0.5, layer_rule="floor")
    for config, alive, cap, chosen in (
            (Config(), all_alive, 1.0, (0.95, 0.8)), (Config(), all_alive, 0.6, (0.98, 0.5)), (floor, all_alive, 1.0, (0.6, 0.9)),
            (floor, all_alive, 0.85, (0.95, 0.8)),
            (Config(), np.packbits(np.arange(100) < 80), 0.6, (1.0, 0.0))):  # 0.5 more than the 0.2 of earlier rounds
        assert choose_mask(state, layer, alive, config, cap).fitness.values == chosen


@pytest.mark.parametrize(("settings", "said"), [
    ({"rounds": 2}, "caps: found '1.0', expected 2 numbers above 0 and up to 1, one a round"),
    ({"caps": "high"}, "caps: found 'high', expected 1 number above 0 and up to 1, one a round"),
    ({"layer_rule": "floor"}, "layer_rule: found 'floor' without a floor; give --accuracy-floor"),
])
def test_wrong_settings_are_refused(settings, said):
    with pytest.raises(evoprune.EvopruneError) as error:
        Config(layerwise=True, **settings)
    assert str(error.value) == said
