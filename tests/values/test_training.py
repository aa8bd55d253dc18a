import copy
from collections import namedtuple
from dataclasses import replace

import pytest
import torch
from torch import nn

from evoprune import accuracy
from evoprune.inputs.models import resnet18
from evoprune.inputs.splits import as_split
from evoprune.inputs.tasks import TASKS
from evoprune.values import inherited
from evoprune.values.fast import has_bf16, in_fp32
from evoprune.values.training import Recipe, augmented, last_layer, moves_freely, recipe_for, schedule, tune

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


class Wrapped(nn.Module):
    """Returns what others do, in a dict, or changed."""

    def __init__(self, change):
        super().__init__()
        self.first, self.second, self.change = nn.Linear(4, 4), nn.Linear(4, 3), change

    def forward(self, x):
        return self.change(self.second(self.first(x)))


@pytest.mark.parametrize(("model", "size", "name"), [
    (nn.Linear(4, 3), (4,), "weight"), (Wrapped(lambda x: {"logits": x}), (4,), "second.weight"),
    (Wrapped(lambda x: x.softmax(1)), (4,), None), (nn.Sequential(nn.Conv2d(1, 3, 1), nn.Flatten()), (1, 1, 1), None),
    (Wrapped(lambda x: x), (5, 4), None), (resnet18().eval(), (3, 8, 8), "fc.weight")], ids=range(6))
def test_the_last_layer_is_the_one_whose_outputs_are_the_logits(model, size, name):
    assert last_layer(model, torch.randn(2, *size)) == name
    assert not any(module._forward_hooks for module in model.modules())


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


class Wide(nn.Module):
    """Two convolutions, wide enough for channels_last; `view` takes what comes out of them or not."""

    def __init__(self, view=False):
        super().__init__()
        self.conv1, self.conv2, self.norm = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3, stride=2), nn.BatchNorm2d(16)
        self.fc = nn.Linear(16 * 9, 4)
        self.view, self.orders = view, set()

    def forward(self, x):
        self.orders.add(x.is_contiguous())
        x = self.norm(self.conv2(self.conv1(x).relu())).relu()
        return self.fc(x.view(len(x), -1) if self.view else x.flatten(1))


@pytest.fixture(scope="module")
def wide_images():
    torch.manual_seed(0)
    return as_split((torch.randn(96, 16, 8, 8), torch.randint(4, (96,))), "train")


def tuned(wide_images, view=False, precision="fp32", epochs=3):
    torch.manual_seed(0)
    net = Wide(view)
    tune(net, wide_images, Recipe(epochs, "sgd", 0.05, 32, 0, False, precision), masks_for(net))
    return net


def values_of(net):
    return torch.cat([value.flatten().float() for value in net.state_dict().values()])


def test_channels_last_trains_the_same_and_leaves_values_in_their_order(wide_images, monkeypatch):
    fast = tuned(wide_images)
    assert fast.orders == {False} and all(p.is_contiguous() for p in fast.parameters())
    monkeypatch.setattr("evoprune.values.fast.channels_last_wins", lambda model: False)
    plain = tuned(wide_images)
    assert plain.orders == {True} and not torch.equal(values_of(fast), values_of(plain))
    assert torch.allclose(values_of(fast), values_of(plain), atol=1e-4)


def test_a_model_that_views_its_channels_keeps_its_order(wide_images, monkeypatch):
    net = tuned(wide_images, view=True)
    assert net.orders == {True, False}  # it was tried
    monkeypatch.setattr("evoprune.values.fast.channels_last_wins", lambda model: False)
    assert torch.equal(values_of(net), values_of(tuned(wide_images, view=True)))


@pytest.mark.skipif(not has_bf16(torch.device("cpu")), reason="no bf16 on this processor")
def test_bf16_trains_fp32_values_about_as_far_and_repeats(wide_images):
    exact, rounded, again = tuned(wide_images, epochs=20), *(tuned(wide_images, precision="bf16", epochs=20) for _ in range(2))
    assert {value.dtype for value in rounded.state_dict().values()} == {torch.float32, torch.int64}
    assert torch.equal(values_of(rounded), values_of(again)) and not torch.equal(values_of(rounded), values_of(exact))
    scores = [accuracy(net, wide_images) for net in (Wide().eval(), exact, rounded)]
    assert scores[0] < 0.5 and abs(scores[1] - scores[2]) < 0.1 and min(scores[1:]) > 0.9


@pytest.mark.parametrize(("name", "labels", "moved"), [
    ("classification", torch.zeros(8).long(), True), ("multilabel", torch.zeros(8, 2), True),
    ("regression", torch.zeros(8, 2), False), ("segmentation", torch.zeros(8, 6, 6).long(), False),
    ("multilabel", torch.zeros(8, 6, 6), False)])
def test_images_are_moved_where_their_targets_do_not_move_with_them(name, labels, moved):
    split = replace(as_split((torch.rand(8, 3, 6, 6), torch.zeros(8).long()), "train"), labels=labels, task=TASKS[name])
    assert moves_freely(split) == moved


@pytest.mark.skipif(not has_bf16(torch.device("cpu")), reason="no bf16 on this processor")
def test_a_loss_gets_fp32(wide_images):
    seen = []
    task = replace(wide_images.task, loss=lambda output, labels: seen.append(output.dtype) or output.sum())
    tuned(replace(wide_images, task=task), precision="bf16", epochs=1)
    assert set(seen) == {torch.float32}


def test_what_a_model_returns_is_judged_in_fp32():
    x = torch.ones(2, dtype=torch.bfloat16)
    said = in_fp32(namedtuple("Said", "features logits")(x, 2 * x))
    assert said.logits.dtype == torch.float32 and said.logits[0] == 2
    found = in_fp32({"logits": x, "more": (x, [x, None])})
    assert found["logits"].dtype == found["more"][0].dtype == found["more"][1][0].dtype == torch.float32
    assert found["more"][1][1] is None and in_fp32(torch.ones(2, dtype=torch.float64)).dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_values_that_travel_are_those_of_the_model(dtype):
    net = nn.Linear(5, 3, dtype=dtype)  # made in that type, so that a shorter one rounds
    found = inherited.values_of(net, {"weight": torch.ones(3, 5, dtype=torch.bool)})
    assert torch.equal(torch.from_numpy(found["weight"]).double(), net.weight.flatten().double())
