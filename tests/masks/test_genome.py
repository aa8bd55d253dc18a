import copy

import numpy as np
import torch
from torch import nn

from evoprune.masks.genome import Individual, from_masks, get_bits, pruned_weights, set_bits, sparsity
from evoprune.masks.layers import find_layers

LAYOUT = find_layers(nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 7), nn.Linear(7, 2)), skip="2")


def random_individual(rng):
    return from_masks((rng.random(layer.shape) < 0.5 for layer in LAYOUT), "random")


def test_bits_go_in_and_come_out(rng):
    masks = [rng.random(layer.shape) < 0.5 for layer in LAYOUT]
    individual = from_masks(masks, "x")
    for i, mask in enumerate(masks):
        assert np.array_equal(get_bits(individual, i, LAYOUT), mask.ravel())
        assert individual[i].dtype == np.uint8 and individual[i].shape == ((LAYOUT[i].genes + 7) // 8,)
    set_bits(individual, 0, ~masks[0].ravel())
    assert np.array_equal(get_bits(individual, 0, LAYOUT), ~masks[0].ravel())
    assert individual[0][-1] & 1 == 0  # 15 genes: the padding bit stays 0


def test_sparsity_is_counted_over_all_prunable_weights(rng):
    individual = random_individual(rng)
    pruned = sum((~get_bits(individual, i, LAYOUT)).sum() for i in range(2))
    assert LAYOUT.total == 15 + 35 + 14 and LAYOUT.weights == 50
    assert pruned_weights(individual, LAYOUT) == pruned
    assert sparsity(individual, LAYOUT) == pruned / 64


def test_equality_and_hash_go_by_the_bits(rng):
    a = random_individual(rng)
    b = a.clone()
    b.origin, b.fitness.values = "other", (0.5, 0.5)
    assert a == b and hash(a) == hash(b)
    b[1][0] ^= 128
    assert a != b and a.key() != b.key()


def test_a_clone_shares_nothing_and_keeps_its_fitness(rng):
    a = random_individual(rng)
    a.fitness.values = (0.25, 0.75)
    for b in (a.clone(), copy.deepcopy(a)):
        assert isinstance(b, Individual) and b.fitness.values == (0.25, 0.75)
        b[0][:] = 0
        del b.fitness.values
        assert a[0].any() and a.fitness.valid


def test_a_clone_shares_what_was_inherited_until_it_gets_its_own(rng):
    a = random_individual(rng)
    a.saliency["x"] = rng.random(5)
    b = a.clone()
    assert b.saliency["x"] is a.saliency["x"]
    b.saliency["x"] = rng.random(3)
    assert len(a.saliency["x"]) == 5


def test_masks_of_a_tensor_are_taken_too():
    assert from_masks([torch.ones(3, 3, dtype=torch.bool).numpy()], "x")[0].tolist() == [255, 128]
