import copy

import pytest
import torch
from torch import nn

from evoprune import accuracy
from evoprune.inputs.models import resnet18
from evoprune.values.training import Recipe, augmented, recipe_for, schedule, tune

RECIPE = Recipe(1, "adam", 0.01, 64, seed=0, augment=True)


def masks_for(model, density=0.3):
    torch.manual_seed(1)
    return {name: torch.rand(p.shape) < density for name, p in model.named_parameters() if p.dim() > 1}


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_pruned_weights_stay_zero_and_the_others_move(optimizer, lenet, digits):
    model, masks = copy.deepcopy(lenet), masks_for(lenet)
    tune(model, digits.train, Recipe(1, optimizer, 0.01, 64, 0, True), masks)
    for name, p in model.named_parameters():
        if name in masks:
            assert torch.equal(p[~masks[name]], torch.zeros_like(p[~masks[name]]))
            assert (p[masks[name]] != dict(lenet.named_parameters())[name][masks[name]]).float().mean() > 0.5


def test_training_brings_accuracy_back(lenet, digits):
    masks = masks_for(lenet)
    pruned = copy.deepcopy(lenet)
    tune(pruned, digits.train, Recipe(0, "adam", 0.01, 64, 0, True), masks)
    before = accuracy(pruned, digits.search)
    tune(pruned, digits.train, Recipe(4, "adam", 0.01, 64, 0, True), masks)
    assert accuracy(pruned, digits.search) > before + 0.1


def test_the_same_seed_gives_the_same_values_and_leaves_torchs_state(lenet, digits):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    a, b, c = (copy.deepcopy(lenet) for _ in range(3))
    tune(a, digits.train, RECIPE)
    torch.rand(3)
    tune(b, digits.train, RECIPE)
    tune(c, digits.train, Recipe(1, "adam", 0.01, 64, 1, True))
    assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))
    assert not torch.equal(a.fc1.weight, c.fc1.weight)
    torch.manual_seed(5)
    tune(c, digits.train, Recipe(0, "adam", 0.01, 64, 1, True))
    assert torch.equal(torch.rand(3), expected)


def test_the_schedule_warms_up_and_ends_at_zero():
    rates = [schedule(step, 1000) for step in range(1000)]
    assert rates[0] < 0.03 and max(rates) == pytest.approx(1, abs=0.02) and rates.index(max(rates)) in range(48, 53)
    assert rates[-1] < 1e-4 and all(a >= b for a, b in zip(rates[51:], rates[52:]))
    assert 0 < schedule(0, 1) <= 1


def test_recipes_go_by_size():
    assert recipe_for(nn.Linear(2, 2), 3, 0).optimizer == "adam"
    assert recipe_for(resnet18(), 3, 0).optimizer == "sgd"
    assert recipe_for(resnet18(), 3, 0, learning_rate=0.3).learning_rate == 0.3


def test_augmentation_shifts_and_flips_whole_images():
    torch.manual_seed(0)
    images = torch.rand(200, 3, 16, 16) + 1
    out = augmented(images)
    assert out.shape == images.shape
    assert torch.equal(out[:, 0].gt(0), out[:, 2].gt(0))  # the same shift for every channel
    for image, result in zip(images[:40], out[:40]):
        padded = nn.functional.pad(image, (2, 2, 2, 2))
        assert any(torch.equal(result, view[:, i:i + 16, j:j + 16] if not flip else view[:, i:i + 16, j:j + 16].flip(2))
                   for view in (padded,) for flip in (False, True) for i in range(5) for j in range(5))


def test_grey_images_are_not_augmented():
    images = torch.rand(4, 1, 8, 8)
    assert augmented(images) is images


def test_a_last_batch_of_one_is_left_out(digits):
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Linear(8, 10))
    train = type(digits.train)(digits.train.images[:65], digits.train.labels[:65])
    steps = []
    tune(model, train, RECIPE, progress=lambda step, of: steps.append((step, of)))
    assert steps == [(1, 2), (2, 2)] and int(model[2].num_batches_tracked) == 1 and not model.training
