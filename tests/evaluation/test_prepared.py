import copy

import numpy as np
import pytest
import torch
from conftest import knowing
from test_evaluation import count_obviously, population
from torch import nn

import evoprune
from evoprune.evaluation.evaluator import Evaluator
from evoprune.evaluation.graph import TanhInPlace, rewritten
from evoprune.evaluation.prepared import PreparedModel, fastest_batch_size
from evoprune.evolution.starts import first_population
from evoprune.inputs.models import LeNet5, logits_of, resnet18
from evoprune.masks.genome import get_bits
from evoprune.masks.layers import find_layers
from evoprune.values.fast import AveragePool2x2, average_2x2, channels_last_wins
from evoprune.values.training import Recipe, tune


class Views(nn.Module):
    """Two wide convolutions, whose outputs `view` does not take with channels last."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(1, 16, 3), nn.Conv2d(16, 16, 3), nn.Conv2d(16, 16, 3)
        self.fc = nn.Linear(64, 10)

    def forward(self, x):
        return self.fc(self.c(self.b(self.a(x))).view(-1, 64))


def test_a_model_that_views_its_channels_is_evaluated_in_its_own_order(digits):
    model = Views().eval()
    assert channels_last_wins(model)
    prepared = PreparedModel(model, digits.search, 64, {"c.weight"})
    with torch.inference_mode():
        assert torch.allclose(prepared.logits(0), model(digits.search.inputs(slice(0, 64))), atol=1e-5)
    assert prepared.format == torch.contiguous_format and not prepared.model.training


class Overwrites(nn.Linear):
    """Subtracts a mean from its inputs, in place."""

    def forward(self, x):
        x -= 0.5
        return super().forward(x)


def test_a_model_that_writes_over_its_inputs_is_refused_and_the_data_stay():
    images = torch.rand(40, 6)
    before, model = images.clone(), Overwrites(6, 2)
    for call in (lambda: evoprune.accuracy(model, (images, torch.zeros(40).long())),
                 lambda: evoprune.prune(model, (images, torch.zeros(40).long()))):
        with pytest.raises(evoprune.EvopruneError, match=r"model: writes over its inputs, .* x = x - mean, say, not x -= mean"):
            call()
    assert torch.equal(images, before)


@pytest.fixture(scope="module")
def resnet(digits):
    """ResNet-18 that tells digits apart after one epoch; do not change it."""
    torch.manual_seed(0)
    model = resnet18(channels=1)
    tune(model, digits.train, Recipe(1, "sgd", 0.02, 32, seed=0, augment=False))
    return model


def masks_of(model, layout, rules="magnitude,erk", size=13):
    weights = [dict(model.named_parameters())[layer.name].detach().numpy() for layer in layout]
    return first_population(knowing(weights, layout), rules, size, np.random.default_rng(0))[:5]


def test_lenet5_counts_equal_the_obvious_way_on_5000_images(digits):
    """Eight masks: the copy zeroed by hand, layer after layer, against the prepared model."""
    def enlarged(split, count):
        index = torch.arange(count) % len(split)
        images = nn.functional.interpolate(split.images[index].float(), 28) + 30 * torch.rand(count, 1, 28, 28)
        return type(split)(images.clamp(0, 255).to(torch.uint8), split.labels[index], split.mean, split.std)

    torch.manual_seed(0)
    model = LeNet5()
    tune(model, enlarged(digits.train, 2000), Recipe(1, "adam", 0.005, 32, seed=0, augment=False))
    search, layout = enlarged(digits.search, 5000), find_layers(model)
    fast, counts = Evaluator(model, layout, search, 256, cache_mb=500), set()
    for individual in population(model, layout, 8):
        zeroed = copy.deepcopy(model)
        for i, layer in enumerate(layout):
            zeroed.get_parameter(layer.name).data[~torch.from_numpy(get_bits(individual, i, layout)).view(layer.shape)] = 0
        with torch.inference_mode():
            expected = torch.cat([zeroed(search.inputs(slice(i, i + 256))) for i in range(0, 5000, 256)])
        flipped = flips(individual, expected, all_logits(fast, individual))
        right = int((expected.argmax(1) == search.labels).sum())
        assert abs(int(fast.sums(individual)[0]) - right) <= len(flipped)
        counts.add(right)
    assert len(counts) > 4


def all_logits(evaluator, individual):
    evaluator.set_masks(individual)
    with torch.inference_mode():
        return torch.cat([logits_of(evaluator.prepared.logits(i)) for i in range(len(evaluator.prepared.batches))])


def flips(individual, expected, found):
    """List the images that two ways tell apart, and check that rounding alone does: their two best logits are all but equal."""
    flipped = (expected.argmax(1) != found.argmax(1)).nonzero().flatten().tolist()
    best = expected.topk(2).values
    for image in flipped:
        margin = float(best[image, 0] - best[image, 1])
        print(f"{individual.origin}: image {image} flips at a margin of {margin:.3g}")
        assert margin < 1e-5 * float(expected[image].abs().max())
    return flipped


STAGES = (None, "layer1.1.conv1", "layer2.0.conv1", "layer3.0.downsample.0", "layer4.1.conv2", "fc")


@pytest.mark.parametrize("layer", STAGES)
def test_every_count_equals_the_plain_models(layer, resnet, digits):
    """Whole-model masks and one layer a stage; an image may flip only where its two best logits are equal but for rounding."""
    layout = find_layers(resnet, layer)
    plain = Evaluator(resnet, layout, digits.search, 64, plain=True)
    fast = Evaluator(resnet, layout, digits.search, 64, cache_mb=500)
    assert fast.prepared.rounded == 20 and fast.prepared.format == torch.channels_last
    assert (fast.prepared.prefix is not None) == (layer is not None)
    informative = 0
    for individual in masks_of(resnet, layout):
        expected, found = all_logits(plain, individual), all_logits(fast, individual)
        flipped = flips(individual, expected, found)
        assert abs(int(plain.sums(individual)[0]) - int(fast.sums(individual)[0])) <= len(flipped)
        informative += len(expected.argmax(1).unique()) > 3
    assert informative >= 2


def test_the_cache_changes_nothing(resnet, digits):
    layout = find_layers(resnet, "layer3.1.conv1")
    group = masks_of(resnet, layout)
    kept = Evaluator(resnet, layout, digits.search, 64, cache_mb=500)
    part = Evaluator(resnet, layout, digits.search, 64, cache_mb=1)
    none = Evaluator(resnet, layout, digits.search, 64, cache_mb=0)
    expected = kept.many(group)
    assert kept.many(group[::-1])[::-1] == part.many(group) == none.many(group) == expected
    assert len(kept.prepared.cache) == 5 and 0 < len(part.prepared.cache) < 5 and not none.prepared.cache
    assert torch.equal(all_logits(kept, group[2]), all_logits(none, group[2]))


class ChangesInPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(64, 16), nn.Linear(16, 16), nn.Linear(16, 10)

    def forward(self, x):
        h = self.a(x.flatten(1)).relu()
        h.add_(self.b(h))
        return self.c(h)


class Untraceable(ChangesInPlace):
    def forward(self, x):
        return super().forward(x) if x.sum() > -1e9 else x


@pytest.mark.parametrize(("kind", "said"), [
    (ChangesInPlace, "the part before the masked layers cannot be cached: the model changes values in place"),
    (Untraceable, "evaluating the model as it is, torch.fx cannot trace it (symbolically traced variables cannot be used"),
])
def test_models_that_cannot_be_cut_run_whole_and_say_so(kind, said, digits, caplog):
    caplog.set_level("INFO", "evoprune")
    torch.manual_seed(0)
    model = kind()
    layout = find_layers(model, "b")
    evaluator = Evaluator(model, layout, digits.search, 50, cache_mb=10)
    assert said in caplog.text and evaluator.prepared.prefix is None
    for individual in population(model, layout, 6):
        for _ in range(2):
            assert int(evaluator.sums(individual)[0]) == count_obviously(model, layout, individual, digits.search, 50)


@pytest.mark.parametrize("shape", [(64, 6, 28, 28), (33, 16, 10, 11), (3, 16, 10, 11), (1, 1, 3, 2)])
def test_the_sliced_pool_has_the_bits_of_torchs(shape):
    x = torch.randn(shape)
    assert torch.equal(average_2x2(x), nn.functional.avg_pool2d(x, 2))
    assert torch.equal(AveragePool2x2(2)(x), nn.functional.avg_pool2d(x, 2))


def test_tanh_by_sigmoid_is_off_by_rounding_only():
    x = torch.cat([torch.linspace(-20, 20, 100_001), torch.randn(1000) * 1e-3, torch.tensor([float("inf"), -float("inf")])])
    assert (TanhInPlace()(x.clone()) - torch.tanh(x)).abs().max() <= 2e-7


def test_faster_modules_leave_their_inputs_and_other_uses_alone():
    torch.manual_seed(0)
    model, images = LeNet5().eval(), torch.randn(33, 1, 28, 28)
    before = images.clone()
    graph, rounded = rewritten(model, images)
    replaced = [type(m).__name__ for m in graph.modules()]
    assert replaced.count("AveragePool2x2") == 2 and replaced.count("TanhInPlace") == rounded == 4
    assert torch.allclose(graph(images), model(images), atol=1e-6) and torch.equal(images, before)

    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.act = nn.Linear(4, 4), nn.Linear(4, 4), nn.Tanh()

        def forward(self, x):
            return self.act(self.a(x)) + self.act(x) + self.b(x)

    graph, rounded = rewritten(Shared().eval(), torch.randn(3, 4))
    assert rounded == 0


def test_a_shared_convolution_is_not_folded():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.other = nn.Conv2d(1, 1, 3, padding=1), nn.Conv2d(1, 1, 3, padding=1)
            self.one, self.two, self.three = (nn.BatchNorm2d(1) for _ in range(3))

        def forward(self, x):
            return self.three(self.other(self.two(self.conv(self.one(self.conv(x)))))).flatten(1)

    model, images = Shared().eval(), torch.randn(4, 1, 4, 4)
    for norm in (model.one, model.two, model.three):
        norm.running_mean.normal_()
    graph, folded = rewritten(model, images)
    assert folded == 1
    assert torch.allclose(graph(images), model(images), atol=1e-5)


def test_channels_last_goes_by_the_width_of_the_convolutions(lenet, resnet):
    assert channels_last_wins(resnet) and not channels_last_wins(lenet) and not channels_last_wins(nn.Linear(64, 64))


def test_an_individual_is_stopped_when_the_floor_is_out_of_reach(lenet, digits, layout):
    group = population(lenet, layout)
    full = Evaluator(lenet, layout, digits.search, 32)
    stopping = Evaluator(lenet, layout, digits.search, 32, floor=0.8)
    for (accuracy, sparsity), (early, same) in zip(full.many(group), stopping.many(group)):
        assert same == sparsity
        assert early == accuracy if accuracy >= 0.8 else early < 0.8
    assert stopping.saved > 287
    exactly = full(group[4])[0]
    assert Evaluator(lenet, layout, digits.search, 32, floor=exactly)(group[4])[0] == exactly


def test_bf16_may_rank_but_what_is_written_is_fp32(lenet, digits, tmp_path):
    front = evoprune.prune(lenet, digits, out=str(tmp_path / "run"), population=16, generations=4, precision="bf16", threads=1)
    for point in front:
        assert evoprune.accuracy(point.model(), digits.search) == point.accuracy == point.accuracy_before
    assert front.record.settings["precision"] == "bf16"


def test_the_front_of_a_folded_model_is_exact(resnet, digits, tmp_path):
    data = evoprune.Data(None, type(digits.search)(digits.search.images[:100], digits.search.labels[:100]), digits.search)
    front = evoprune.prune(resnet, data, out=str(tmp_path / "run"), population=4, generations=1, layer="layer4", threads=1,
                           repair="none")
    for point in front:
        assert evoprune.accuracy(point.model(), data.search) == point.accuracy


def test_the_batch_size_is_recorded(lenet, digits, tmp_path):
    settings = {"population": 4, "generations": 1, "threads": 1}
    front = evoprune.prune(lenet, digits, batch_size="7", out=str(tmp_path / "a"), **settings)
    assert front.record.search_batch_size == 7 and front.record.batch_size == 256
    assert fastest_batch_size(lenet, digits.search, 64, ["fc1.weight"]) in (32, 64, 128)
    front = evoprune.prune(lenet, digits, batch_size="auto", out=str(tmp_path / "b"), **settings)
    assert front.record.search_batch_size in (128, 256)
    with pytest.raises(evoprune.EvopruneError, match="batch_size: found '0', expected a whole number of at least 1, or auto"):
        evoprune.prune(lenet, digits, batch_size="0")


def test_a_prepared_model_is_a_private_copy(resnet, digits):
    before = copy.deepcopy(resnet.state_dict())
    prepared = PreparedModel(resnet, digits.search, 64, ["conv1.weight"], "bf16", 10)
    for parameter in prepared.model.parameters():
        parameter.data.zero_()
    assert all(torch.equal(v, before[k]) for k, v in resnet.state_dict().items())


@pytest.mark.gpu
def test_running_out_of_memory_halves_the_batch(lenet, digits, layout, monkeypatch, caplog):
    evaluator = Evaluator(lenet, layout, digits.search.to(torch.device("cuda")), 256)
    expected = evaluator.many(population(lenet, layout, 4))
    plain, failed = evaluator.summed, []

    def once():
        if not failed:
            failed.append(True)
            raise torch.cuda.OutOfMemoryError
        return plain()

    monkeypatch.setattr(evaluator, "summed", once)
    assert evaluator.many(population(lenet, layout, 4)) == expected
    assert evaluator.batch_size == 128 and "going on with batches of 128" in caplog.text


@pytest.mark.gpu
def test_a_cuda_graph_counts_as_the_eager_way(lenet, digits, layout):
    split = digits.search.to(torch.device("cuda"))
    eager, graph = (Evaluator(lenet, layout, split, 128, plain=True) for _ in range(2))
    eager.graph_failed = True
    group = population(lenet, layout, 8)
    assert graph.many(group) == eager.many(group) and graph.graph is not None
