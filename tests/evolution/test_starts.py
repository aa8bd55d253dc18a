from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import knowing
from nets import Block

from evoprune.evolution.starts import SPARSEST_START, STARTS, Known, erk_densities, first_population, multishot
from evoprune.inputs.models import LeNet5
from evoprune.masks.channels import find_channels
from evoprune.masks.genome import get_bits, sparsity
from evoprune.masks.layers import find_layers
from evoprune.masks.layout import Layer, Layout

LAYOUT = Layout((Layer("a", (10, 20)), Layer("b", (40, 10, 3, 3)), Layer("c", (5, 40))), 4000)


@pytest.fixture
def weights(rng):
    return [rng.standard_normal(layer.shape).astype(np.float32) for layer in LAYOUT]


@pytest.mark.parametrize("name", STARTS)
@pytest.mark.parametrize("density", [0.9, 0.3, 0.05])
def test_a_rule_keeps_the_share_it_is_asked_for(name, density, weights, rng):
    masks = STARTS[name](knowing(weights, LAYOUT))(density, rng)
    assert [m.shape for m in masks] == [layer.shape for layer in LAYOUT]
    slack = 0.04 * density * 4000 if name == "multishot" else 3  # it has steps
    assert abs(sum(m.sum() for m in masks) - density * 4000) <= slack


def test_magnitude_keeps_the_largest_weights_of_all(weights, rng):
    masks = STARTS["magnitude"](knowing(weights, LAYOUT))(0.1, rng)
    kept = np.concatenate([np.abs(w[m]) for w, m in zip(weights, masks)])
    gone = np.concatenate([np.abs(w[~m]) for w, m in zip(weights, masks)])
    assert kept.min() >= gone.max() and len(kept) == 400


def test_lamp_scores_equal_the_definition(rng):
    layout = Layout((Layer("a", (6,)), Layer("b", (4,))), 10)
    weights = [rng.standard_normal(6).astype(np.float32), rng.standard_normal(4).astype(np.float32)]
    scores = [[w[i] ** 2 / sum(v ** 2 for v in w if v ** 2 >= w[i] ** 2) for i in range(len(w))] for w in weights]
    best = np.sort(np.concatenate(scores))[::-1]
    for kept in range(2, 10):  # the largest weight of each layer scores 1
        masks = np.concatenate(STARTS["lamp"](knowing(weights, layout))(kept / 10, rng))
        assert np.array_equal(masks, np.concatenate(scores) >= best[kept - 1])


def test_erk_densities_follow_the_formula_and_stop_at_one():
    densities = erk_densities(LAYOUT, 0.05)
    ratio = np.array(densities) / [30 / 200, 56 / 3600, 45 / 200]
    assert np.allclose(ratio, ratio[0])
    full = erk_densities(LAYOUT, 0.5)
    assert full[0] == full[2] == 1 and abs(sum(d * layer.weights for d, layer in zip(full, LAYOUT)) - 2000) < 1e-6
    assert erk_densities(LAYOUT, 1.0) == [1, 1, 1]


def test_the_first_population_spans_the_grid_and_starts_with_the_unpruned_model(weights, rng):
    population = first_population(knowing(weights, LAYOUT), ",".join(STARTS), 40, rng)
    assert len(population) == 40 and sparsity(population[0], LAYOUT) == 0 and population[0].origin == "dense"
    density = [1 - sparsity(i, LAYOUT) for i in population[1:]]
    steps = np.diff(np.log(density))
    assert 0.78 < density[0] < 0.82 and density[-1] < 0.006
    assert np.all(steps < 0.05)
    assert {i.origin.split("@")[0] for i in population[1:]} == set(STARTS)


@pytest.mark.parametrize("start", ["random", "narrow"])
def test_blind_rules_never_look_at_a_weight(start, weights):
    def forbid(*_):
        raise AssertionError("looked at a weight")

    forbidden = Known(LAYOUT, forbid, forbid, forbid, forbid)
    a, b = (first_population(k, start, 8, np.random.default_rng(1)) for k in (knowing(weights, LAYOUT), forbidden))
    assert a == b


@pytest.mark.parametrize("model", [LeNet5(), Block()])
def test_narrow_masks_leave_the_same_channels_to_makers_and_readers(model, rng):
    layout = find_layers(model)
    images = torch.zeros(2, 1, 28, 28) if isinstance(model, LeNet5) else torch.zeros(2, 1, 8, 8)
    channels = find_channels(model, layout, images)
    assert len(channels) == (4 if isinstance(model, LeNet5) else 2)
    known = replace(knowing([model.get_parameter(layer.name) for layer in layout], layout), channels=lambda: channels)
    lives = []
    for _ in range(20):
        masks = STARTS["narrow"](known)(0.3, rng)
        assert abs(sum(int(m.sum()) for m in masks) - 0.3 * layout.weights) <= 3
        for each in channels:
            made = [masks[i].reshape(each.count, -1).any(1) for i in each.makers]
            read = [masks[i].reshape(len(masks[i]), each.count, -1).any((0, 2)) for i in each.readers]
            assert all(np.mean(one == made[0]) > 0.8 for one in made + read)  # one may have lost all its weights by chance
            lives.append(float(np.mean(made[0])))
    assert min(lives) < 0.65 and max(lives) > 0.9


def test_every_layer_keeps_something(weights, rng):
    for individual in first_population(knowing(weights, LAYOUT), "random,erk", 40, rng):
        assert all(get_bits(individual, i, LAYOUT).any() for i in range(3))


def test_a_path_to_targets_ends_at_the_sparsest_and_tells_how_far_it_is(weights):
    told = []
    known = replace(knowing(weights, LAYOUT), shots=20, progress=lambda done, of: told.append((done, of)))
    rule = multishot(known, "lamp", [0.5, 0.1])
    count = int(np.log(0.1) / (np.log(SPARSEST_START) / 20)) + 2
    assert told == [(i + 1, count) for i in range(count)]
    assert sum(m.sum() for m in rule(0.1, np.random.default_rng(0))) == 400
