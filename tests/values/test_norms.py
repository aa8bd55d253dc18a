import copy
from dataclasses import replace

import pytest
import torch
from nets import Mixed
from torch import nn
from torch.nn import functional as F

from evoprune.inputs.splits import Split, calibration
from evoprune.inputs.tasks import CLASSIFICATION
from evoprune.masks.layers import find_layers
from evoprune.values import norms
from evoprune.values.norms import Fitting, distance, fit_norms, lost, norms_of, scales_and_shifts
from evoprune.values.repair import Repairer


@pytest.fixture
def pruned():
    """A model that has learned to tell something, a copy, its repairer on 2,000 images, and masks to set."""
    torch.manual_seed(0)
    dense, images = Mixed(), torch.randn(2000, 1, 8, 8)
    labels = (images[:, 0, :4].mean((1, 2)) > 0).long() + 2 * (images[:, 0, :, :4].mean((1, 2)) > 0).long()
    optimizer = torch.optim.Adam(dense.parameters(), 1e-2)
    for _ in range(30):
        optimizer.zero_grad()
        F.cross_entropy(dense(images), labels).backward()
        optimizer.step()
    dense.eval().requires_grad_(False)
    layout, net = find_layers(dense), copy.deepcopy(dense)
    repairer = Repairer("least-squares", net, layout, images)
    repairer.study(Fitting.drawn(Split(images, labels), 2000, seed=0))
    masks = {layer.name: torch.rand(layer.shape) < 0.2 for layer in layout}
    return dense, net, repairer, masks


def repair(net, dense, repairer, masks):
    for name, mask in masks.items():
        net.get_parameter(name).copy_(dense.get_parameter(name) * mask)
    repairer(masks)


def off(net, dense, images):
    return float(distance(net(images), dense(images), CLASSIFICATION) - distance(dense(images), dense(images), CLASSIFICATION))


def test_fitted_norms_bring_other_images_nearer_and_the_next_repair_begins_anew(pruned, monkeypatch):
    monkeypatch.setattr(norms, "RATE", 0.1)  # for a net that has so few steps
    dense, net, repairer, masks = pruned
    repair(net, dense, repairer, masks)
    repaired = copy.deepcopy(net)
    repairer.fit_norms()
    others = torch.randn(500, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    assert off(net, dense, others) < 0.97 * off(repaired, dense, others)
    changed = {name for name, value in net.state_dict().items() if not torch.equal(value, repaired.state_dict()[name])}
    assert changed == {f"{name}.{part}" for name in norms_of(net) for part in ("weight", "bias")}
    assert not any(p.requires_grad or p.grad is not None for p in net.parameters())
    repair(net, dense, repairer, masks)
    assert all(torch.equal(value, repaired.state_dict()[name]) for name, value in net.state_dict().items())


def test_layer_norms_are_fitted_and_the_next_repair_begins_anew(pruned):
    _, _, repairer, _ = pruned
    dense = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.LayerNorm(32), nn.ReLU(), nn.Linear(32, 32), nn.LayerNorm(32),
                          nn.ReLU(), nn.Linear(32, 4)).requires_grad_(False)
    dense[7].weight.mul_(10)  # which makes it sure of what it says
    net, layout = copy.deepcopy(dense), find_layers(dense)
    repairer = Repairer("least-squares", net, layout, repairer.inputs)
    repairer.study(Fitting(Split(repairer.inputs, torch.zeros(2000)), torch.arange(2000), 4))
    masks = {layer.name: torch.rand(layer.shape) < 0.3 for layer in layout}
    repair(net, dense, repairer, masks)
    repaired = copy.deepcopy(net)
    repairer.fit_norms()
    assert all(not torch.equal(value, old) for i in (2, 5) for value, old in zip(net[i].parameters(), repaired[i].parameters()))
    assert off(net, dense, repairer.inputs) < 0.99 * off(repaired, dense, repairer.inputs)
    repair(net, dense, repairer, masks)
    assert all(torch.equal(value, repaired.state_dict()[name]) for name, value in net.state_dict().items())


def test_norms_are_fitted_as_torch_does(pruned):
    dense, net, repairer, masks = pruned
    repair(net, dense, repairer, masks)
    expected, images, said = copy.deepcopy(net), repairer.inputs.flip(0), dense(repairer.inputs.flip(0))
    free = [p for norm in norms_of(expected).values() for p in norm.parameters()]
    far = float(distance(expected(images[1750:]), said[1750:], CLASSIFICATION))
    rate = norms.RATE * lost(far, said[1750:], CLASSIFICATION) ** 0.5
    for p in free:
        p.requires_grad_()
    optimizer, drawn, batches = torch.optim.Adam(free), torch.Generator().manual_seed(0), []
    for _ in range(2):
        batches += torch.randperm(1750, generator=drawn).split(300)
    for step, rows in enumerate(batches):
        optimizer.param_groups[0]["lr"] = rate * norms.schedule(step, len(batches))
        optimizer.zero_grad()
        (said[rows].softmax(1) * (said[rows].log_softmax(1) - expected(images[rows]).log_softmax(1))).sum(1).mean().backward()
        optimizer.step()
    fitting = Fitting(Split(repairer.inputs, torch.zeros(2000)), torch.arange(1999, -1, -1), 2)
    fit_norms(net, [p for norm in norms_of(net).values() for p in norm.parameters()], fitting, fitting.said(dense, 300), 300)
    for name, value in expected.state_dict().items():
        assert torch.allclose(net.state_dict()[name], value, atol=1e-5), name


@pytest.mark.gpu
def test_the_gpu_fits_as_the_cpu_does(pruned):
    dense, net, repairer, masks = pruned
    on_gpu, images = copy.deepcopy(dense).cuda(), repairer.inputs.cuda()
    there = Repairer("least-squares", on_gpu, repairer.layout, images)
    there.study(Fitting(Split(images, torch.zeros(2000).cuda()), repairer.fitting[0].rows.cuda(), repairer.fitting[0].epochs))
    for model, of in ((net, repairer), (on_gpu, there)):
        repair(model, copy.deepcopy(dense).to(of.inputs.device), of, {name: m.to(of.inputs.device) for name, m in masks.items()})
        of.fit_norms()
    assert off(on_gpu.cpu(), dense, repairer.inputs) == pytest.approx(off(net, dense, repairer.inputs), rel=0.02)


def test_norms_that_come_no_nearer_on_images_kept_apart_stay(pruned, monkeypatch):
    monkeypatch.setattr(norms, "RATE", 30.0)
    dense, net, repairer, masks = pruned
    repair(net, dense, repairer, masks)
    repaired = copy.deepcopy(net)
    repairer.fit_norms()
    assert all(torch.equal(value, repaired.state_dict()[name]) for name, value in net.state_dict().items())


def test_norms_stay_where_little_of_what_the_dense_model_says_is_lost(pruned, monkeypatch):
    dense, net, repairer, masks = pruned
    repair(net, dense, repairer, masks)
    repaired, (fitting, said) = copy.deepcopy(net), repairer.fitting
    last = fitting.rows[1750:]
    share = lost(float(distance(net(repairer.inputs[last]), said[1750:], CLASSIFICATION)), said[1750:], CLASSIFICATION)
    for little, stays in ((share + 1e-3, True), (share - 1e-3, False)):
        monkeypatch.setattr(norms, "LITTLE", little)
        repairer.fit_norms()
        assert stays == all(torch.equal(value, repaired.state_dict()[name]) for name, value in net.state_dict().items())


def test_what_masks_change_or_no_gradient_reaches_is_not_fitted(pruned, monkeypatch):
    dense, net, repairer, masks = pruned
    fitted = []
    monkeypatch.setattr("evoprune.values.repair.fit_norms", lambda model, free, *others: fitted.append(free))
    fitting, repairer.fitting = repairer.fitting[0], None
    repairer.masked = [*repairer.masked, net.norm1.weight]
    repairer.study(fitting)
    repairer.fit_norms()
    assert [list(map(id, free)) for free in fitted] == [[id(net.norm1.bias), id(net.norm2.weight), id(net.norm2.bias)]]
    repairer.fitting, repairer.differentiable = None, False
    for other in (repairer, Repairer("bn", net, repairer.layout, repairer.inputs)):
        other.study(fitting)
        other.fit_norms()
    assert len(fitted) == 1


@pytest.mark.parametrize("kind", ["bn", "least-squares"])
def test_a_repair_leaves_what_masks_change_of_norms_alone(pruned, kind):
    dense, net, repairer, masks = pruned
    layout = find_layers(net, include="norm*")
    masks = {layer.name: torch.rand(layer.shape) < 0.4 for layer in layout}
    repairer = Repairer(kind, net, layout, repairer.inputs)
    repairer.study(Fitting(Split(repairer.inputs, torch.zeros(2000)), torch.arange(2000), 1))
    repair(net, dense, repairer, masks)
    repairer.fit_norms()
    assert {"norm1.weight", "norm2.bias"} <= set(masks) and not repairer.free
    assert not any(net.get_parameter(name)[~mask].any() for name, mask in masks.items())


def test_scales_and_shifts_are_those_of_norms_of_any_kind():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.gamma, self.token = nn.Parameter(torch.ones(4)), nn.Linear(4, 4)

    class Placed(nn.Module):
        def __init__(self):
            super().__init__()
            self.gamma, self.places = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(1, 4))

    own = [nn.BatchNorm2d(4), nn.LayerNorm(4), nn.GroupNorm(2, 4), nn.RMSNorm(4), Scaled()]
    others = [nn.Conv2d(4, 4, 3), nn.Embedding(3, 4), Placed(), nn.MultiheadAttention(4, 1), nn.LayerNorm((4, 4))]
    net = nn.Sequential(*own, *others, own[1])
    found = {id(p): name for name, p in net.named_parameters()}
    assert [found[id(p)] for p in scales_and_shifts(net)] == [
        "0.weight", "0.bias", "1.weight", "1.bias", "2.weight", "2.bias", "3.weight", "4.gamma"]


@pytest.mark.parametrize("link", ["softmax", "sigmoid", "identity"])
def test_everything_is_lost_where_all_get_one_answer_and_nothing_by_the_dense_model(link):
    task, dense = replace(CLASSIFICATION, link=link), 3 * torch.randn(500, 4)
    one = {"softmax": dense.softmax(1).mean(0).log(), "sigmoid": dense.sigmoid().mean(0).logit(), "identity": dense.mean(0)}[link]
    between = torch.linspace(0, 1, 9)
    shares = [lost(float(distance(torch.lerp(dense, one.expand_as(dense), x), dense, task)), dense, task) for x in between]
    assert shares[0] == 0 and shares[-1] == pytest.approx(1, abs=1e-4) and shares == sorted(shares)
    assert lost(1e9, dense, task) == 1 and lost(0.0, dense, task) == 0 and lost(1.0, dense[:1], task) == 0


@pytest.mark.parametrize(("there", "count", "images", "epochs", "again"), [
    (1000, 100, 400, 1, 0), (450, 100, 400, 1, 50), (400, 100, 400, 1, 100), (150, 100, 150, 2, 100), (60, 100, 60, 4, 60)])
def test_norms_are_fitted_on_images_that_masks_are_not_repaired_on_where_there_are_enough(there, count, images, epochs, again):
    split = Split(torch.arange(there), torch.zeros(there))
    fitting, repaired_on = Fitting.drawn(split, count, seed=3), calibration(split, count, seed=3)
    assert len(set(fitting.rows.tolist())) == len(fitting.rows) == images and fitting.epochs == epochs
    assert len(set(fitting.rows.tolist()) & set(repaired_on.images.tolist())) == again


def test_fitting_norms_takes_so_many_operations_at_most(pruned, monkeypatch):
    _, _, repairer, _ = pruned
    fitting = Fitting(repairer.fitting[0].split, torch.arange(1000), 4)
    a_look = 6 * sum(layer.size * layer.dense[0].numel() for layer in repairer.layers.values())
    for looks, images, epochs in ((1e9, 1000, 4), (4000, 1000, 4), (3999, 1000, 3), (1000, 1000, 1), (999, 999, 1), (0, 1, 1)):
        monkeypatch.setattr("evoprune.values.repair.MOST_FITTED", looks * a_look)
        repairer.study(fitting)
        found, said = repairer.fitting
        assert (len(found.rows), found.epochs, len(said)) == (images, epochs, images)


def test_logits_are_kept_of_as_many_images_as_there_is_room_for(pruned, monkeypatch):
    dense, _, repairer, _ = pruned
    fitting, said = repairer.fitting
    for room, rows in ((20 * said[:300].nbytes, 2000), (3 * said[:300].nbytes, 900), (1, 300)):
        monkeypatch.setattr(norms, "MOST_SAID", room)
        found, expected = fitting.said(dense, 300), dense(repairer.inputs[fitting.rows[:rows]])
        assert len(found) == rows and torch.allclose(found, expected, atol=1e-5)
    assert not len(fitting.said(lambda images: dense(images).T, 300))


def test_distance_is_that_of_the_link():
    logits, dense = torch.randn(2, 6, 3, 4)
    softmax, sigmoid, identity = (replace(CLASSIFICATION, link=link) for link in ("softmax", "sigmoid", "identity"))
    assert torch.allclose(distance(logits, dense, softmax), F.cross_entropy(logits, dense.softmax(1)))
    yes, said = dense.sigmoid(), logits.sigmoid()
    assert torch.allclose(distance(logits, dense, sigmoid), -(yes * said.log() + (1 - yes) * (1 - said).log()).mean())
    assert torch.allclose(distance(logits, dense, identity), (logits - dense).square().mean())
