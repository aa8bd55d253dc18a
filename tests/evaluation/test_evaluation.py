import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import knowing
from torch import nn

from evoprune import accuracy
from evoprune.errors import EvopruneError
from evoprune.evaluation.accuracy import batch_size_for, probe
from evoprune.evaluation.evaluator import Evaluator
from evoprune.evolution.starts import first_population
from evoprune.inputs.models import logits_of
from evoprune.inputs.splits import as_split, example_sums
from evoprune.inputs.tasks import check_task, guessed
from evoprune.masks.genome import from_masks, get_bits, sparsity
from evoprune.masks.layers import find_layers
from evoprune.masks.tensors import masks, unpack


def population(model, layout, size=20):
    weights = [dict(model.named_parameters())[layer.name].detach().numpy() for layer in layout]
    return first_population(knowing(weights, layout), "random,magnitude,erk,lamp", size, np.random.default_rng(0))


def count_obviously(model, layout, individual, split, batch_size):
    """Copy the model, zero what is pruned, eval(), count."""
    model = copy.deepcopy(model).eval()
    for i, layer in enumerate(layout):
        weight = dict(model.named_parameters())[layer.name]
        for position, kept in enumerate(get_bits(individual, i, layout)):
            if not kept:
                weight.data.view(-1)[position] = 0
    right = 0
    for i in range(0, len(split), batch_size):
        images = (split.images[i:i + batch_size].float() / 255 - 0.3053) / 0.3762
        right += (model(images).argmax(1) == split.labels[i:i + batch_size]).sum().item()
    return right


def test_counts_equal_the_obvious_way(lenet, digits, layout):
    evaluator = Evaluator(lenet, layout, digits.search, 64)
    counts = set()
    for individual, (share, sparse) in zip(population(lenet, layout), evaluator.many(population(lenet, layout))):
        right = count_obviously(lenet, layout, individual, digits.search, 64)
        assert share == right / len(digits.search) and sparse == sparsity(individual, layout)
        counts.add(right)
    assert len(counts) > 8  # masks that tell classes apart


@pytest.mark.parametrize("include", ["0.bias", "1.weight", "1.weight,1.bias"])
def test_masked_biases_and_norms_are_not_folded_away(digits, include):
    model = nn.Sequential(nn.Conv2d(1, 4, 3), *with_batch_norm().eval()[1:])
    model[1].weight.data.uniform_(0.5, 2), model[1].bias.data.normal_()
    layout, rng = find_layers(model, include=include), np.random.default_rng(0)
    evaluator = Evaluator(model, layout, digits.search, 64)
    for _ in range(5):
        individual = from_masks([rng.random(layer.genes) < 0.6 for layer in layout], "x")
        right = count_obviously(model, layout, individual, digits.search, 64)
        assert evaluator(individual)[0] == right / len(digits.search)


def test_a_model_that_says_something_else_each_time_is_told(digits, caplog):
    for layer, said in ((nn.Identity(), 0), (nn.Dropout(0.0), 0), (Noise(), 1)):
        probe(nn.Sequential(nn.Flatten(), nn.Linear(64, 10), layer), digits.search)
        assert sum("returns other outputs for the same inputs each time" in each for each in caplog.messages) == said


class Noise(nn.Module):
    def forward(self, x):
        return x + torch.randn_like(x)


def with_batch_norm():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(),
                          nn.Linear(144, 10))
    model[1].running_mean.normal_()
    return model.train()


class Towers(nn.Module):
    """Layers of the same weights, each of which gets the inputs."""

    def __init__(self, called):
        super().__init__()
        self.a, self.b, self.head, self.called = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 4), called
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.head(sum(self.get_submodule(name)(x.roll(i, 1)).relu() for i, name in enumerate(self.called)))


@pytest.mark.parametrize("repair", ["none", "least-squares"])
@pytest.mark.parametrize("called", ["ab", "ba", "b"])
def test_tied_weights_are_masked_wherever_they_are_used(called, repair):
    torch.manual_seed(0)
    model, x = Towers(called).eval(), torch.randn(200, 6)
    split, layout = as_split((x, model(x).argmax(1)), "x"), find_layers(model)
    evaluator = Evaluator(model, layout, split, 50, cache_mb=64, repair=repair, calibration=split if repair != "none" else None)
    for seed in range(4):
        generator = np.random.default_rng(seed)
        individual = from_masks([generator.random(layer.shape) < 0.5 for layer in layout], "random")
        net = copy.deepcopy(model)
        for layer, mask in zip(layout, masks(individual, layout)):
            net.get_parameter(layer.name).data *= mask
        accuracy, parts = evaluator(individual)[0], evaluator.prepared.model
        if repair == "none":
            assert accuracy == int((net(x).argmax(1) == split.labels).sum()) / 200
        else:  # tied layers stay as they are, masked
            assert torch.equal(parts.get_submodule(called[0]).weight, net.a.weight)
            assert evaluator.repairer.first is parts.get_submodule(called[0])


def test_batch_norm_and_dropout_are_in_eval_mode_and_the_model_is_untouched(digits):
    model = with_batch_norm()
    before = copy.deepcopy(model.state_dict())
    layout = find_layers(model)
    evaluator = Evaluator(model, layout, digits.search, 32)
    for individual in population(model, layout, 8):
        assert int(evaluator.sums(individual)[0]) == count_obviously(model, layout, individual, digits.search, 32)
    assert model.training and model[3].training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())


def test_order_and_company_do_not_matter(lenet, digits, layout):
    evaluator = Evaluator(lenet, layout, digits.search, 128)
    group = population(lenet, layout, 8)
    one_by_one = [evaluator(individual) for individual in group]
    assert evaluator.many(group) == one_by_one
    assert evaluator.many(group[::-1]) == one_by_one[::-1]
    assert evaluator.many([]) == []


def test_a_non_finite_logit_is_a_wrong_answer():
    class Odd(nn.Module):
        def forward(self, x):
            return x

    logits = torch.tensor([[3.0, 1.0], [float("inf"), 1.0], [float("nan"), 1.0], [2.0, float("-inf")], [1.0, 2.0]])
    split = as_split((logits.nan_to_num(0), torch.tensor([0, 0, 0, 0, 0])), "x")
    split = type(split)(logits, split.labels)
    assert int(example_sums(Odd(), split, 2)[:, 0].sum()) == 1


@pytest.mark.parametrize("wrap", [
    lambda x: x, lambda x: (x, None), lambda x: [x], lambda x: {"logits": x, "loss": 1}, lambda x: {"out": x},
    lambda x: SimpleNamespace(logits=x), lambda x: ({"logits": x},)])
def test_logits_are_found_in_what_models_return(wrap):
    logits = torch.randn(2, 3)
    assert logits_of(wrap(logits)) is logits


def test_other_outputs_are_refused():
    with pytest.raises(EvopruneError, match="model: returned str, expected logits"):
        logits_of("cat")


def test_accuracy_puts_the_training_flags_back(digits):
    model = with_batch_norm()
    model[1].eval()
    share = accuracy(model, digits.search, 32)
    whole = from_masks([np.ones(layer.shape, bool) for layer in find_layers(model)], "x")
    assert share == count_obviously(model, find_layers(model), whole, digits.search, 32) / len(digits.search)
    assert model.training and not model[1].training and model[3].training


@pytest.mark.parametrize(("model", "said"), [
    (nn.Sequential(nn.Flatten(), nn.Linear(9, 10)), "data: images of shape (1, 8, 8) do not go through the model: "),
    (nn.Sequential(nn.Flatten(), nn.Linear(64, 4)), "data: found label 9, expected 0 to 3: the model has 4 outputs"),
    (nn.Linear(8, 10), "model: returned logits of shape (2, 1, 8, 10) for 2 images, expected (2, classes)"),
])
def test_a_model_that_does_not_fit_the_images_is_refused(model, said, digits):
    with pytest.raises(EvopruneError) as error:
        outputs, _ = probe(model, digits.search)
        check_task(guessed(outputs, digits.search.labels), outputs, digits.search.labels, "data")
    assert str(error.value).startswith(said)  # torch's own words may follow


def test_the_batch_size_depends_on_activation_bytes_alone(lenet, digits):
    outputs, largest = probe(lenet, digits.search)
    assert (tuple(outputs.shape), largest) == ((2, 10), 8 * 8 * 8 * 4)
    cpu = torch.device("cpu")
    assert [batch_size_for(b, cpu) for b in (1, 18_816, 73_728, 262_144, 1 << 30)] == [256, 256, 256, 64, 1]


def test_masks_have_the_shapes_of_the_parameters(lenet, layout):
    individual = population(lenet, layout, 4)[2]
    for i, (mask, layer) in enumerate(zip(masks(individual, layout), layout)):
        assert mask.shape == layer.shape and np.array_equal(mask.numpy().ravel(), get_bits(individual, i, layout))


@pytest.mark.gpu
def test_bits_are_unpacked_the_same_way_on_the_gpu(rng):
    bits = np.packbits(rng.random(1003) < 0.5)
    assert torch.equal(unpack(bits, 1003, "cuda").cpu(), unpack(bits, 1003, "cpu"))


@pytest.mark.gpu
def test_the_gpu_counts_as_the_cpu_does(lenet, digits, layout):
    group = population(lenet, layout, 8)
    gpu = Evaluator(lenet, layout, digits.search.to(torch.device("cuda")), 256)
    cpu = Evaluator(lenet, layout, digits.search, 256)
    assert np.abs(np.array(gpu.many(group)) - cpu.many(group)).max() <= 2 / len(digits.search)
    assert gpu.channels == cpu.channels and len(cpu.channels) == 3
