import copy

import numpy as np
import pytest
import torch
from nets import Mixed
from torch import nn

from evoprune.evaluation.evaluator import Evaluator
from evoprune.inputs.splits import as_split, calibration
from evoprune.masks.genome import from_masks, get_bits
from evoprune.masks.layers import find_layers
from evoprune.masks.saliency import SALIENCIES
from evoprune.masks.tensors import masks
from evoprune.values.least_squares import Solved, conjugate_gradients, draw_positions, fitted, gram, grouped, solve_rows
from evoprune.values.repair import Repairer
from evoprune.values.sensitivity import batch_for


@pytest.fixture(scope="module")
def mixed():
    torch.manual_seed(0)
    model = passed_in_training_mode(Mixed(), torch.randn(90, 1, 8, 8))
    for norm in (model.norm1, model.norm2):  # those of other images, near
        norm.running_mean += 0.3 * norm.running_var.sqrt() * torch.randn(len(norm.running_mean))
        norm.running_var *= torch.empty_like(norm.running_var).uniform_(0.5, 2)
    return model


def passed_in_training_mode(model, images):
    for norm in (model.norm1, model.norm2):
        norm.momentum = None  # the mean over all passes, which is one
        norm.reset_running_stats()
    model.train()
    with torch.no_grad():
        model(images)
    return model.eval()


def masked(model, layout, density, seed=0):
    """A copy of `model` with random masks applied, and the masks by name."""
    generator = torch.Generator().manual_seed(seed)
    kept = {layer.name: torch.rand(layer.shape, generator=generator) < density for layer in layout}
    model = copy.deepcopy(model)
    for name, mask in kept.items():
        model.get_parameter(name).data.mul_(mask)
    return model, kept


def rows_by_unfold(module, inputs):
    if isinstance(module, nn.Linear):
        return inputs
    patches = nn.functional.unfold(inputs, module.kernel_size, module.dilation, module.padding, module.stride)
    return patches.transpose(1, 2).reshape(-1, patches.shape[1])


def repaired_obviously(dense, layout, kept, images, shares):
    """Layer by layer in float64: run the prefix, solve each row by lstsq, set it, take batch-norm statistics, go on. `shares`
    (rows, out) a layer by name: of each error in the weight of all; without, all weigh the same."""
    net, dense = copy.deepcopy(dense).double(), copy.deepcopy(dense).double()
    for name, mask in kept.items():
        net.get_parameter(name).data.mul_(mask)
    images = images.double()

    def seen(model, module, what):
        found = []
        hook = module.register_forward_hook(lambda m, args, output: found.append(args[0] if what == "input" else output))
        model(images)
        hook.remove()
        return found[0]

    for name, module in net.named_children():
        if name.startswith("norm"):
            x = seen(net, module, "input")
            before = seen(dense, was := dense.get_submodule(name), "input")
            grown = (x.var((0, 2, 3)) + module.eps) / (before.var((0, 2, 3)) + module.eps)
            module.running_var.copy_(((was.running_var + module.eps) * grown - module.eps).clamp_min(0))
            off = (was.running_mean - before.mean((0, 2, 3))) / (was.running_var + module.eps).sqrt()
            module.running_mean.copy_(x.mean((0, 2, 3)) + off * (module.running_var + module.eps).sqrt())
        elif name != "grouped":
            mask = kept[f"{name}.weight"].reshape(len(module.weight), -1)
            x = rows_by_unfold(module, seen(net, module, "input"))
            z = seen(dense, dense.get_submodule(name), "output")
            z = z.flatten(2).transpose(1, 2).reshape(-1, z.shape[1]) if z.dim() == 4 else z
            n = len(x)
            share = shares[name].double() if name in shares else torch.full_like(z, 1 / n)
            w0 = dense.get_submodule(name).weight.reshape(mask.shape)
            weights, bias = torch.zeros_like(w0), torch.zeros(len(w0), dtype=x.dtype)
            for row in range(len(mask)):
                s, weight = mask[row], share[:, row]
                if name == "conv1":  # a batch norm behind it takes the mean, whatever errors weigh
                    mx, mz = x.mean(0), z[:, row].mean()
                elif name == "fc1":
                    mx, mz = torch.zeros_like(x[0]), 0
                else:
                    mx, mz = weight @ x, weight @ z[:, row]
                damping = 0.01 * (weight @ (x - mx) ** 2).mean()
                if s.any():  # least squares with rows that pull towards the dense weights
                    a = torch.cat([(x - mx)[:, s] * weight.sqrt()[:, None],
                                   damping.sqrt() * torch.eye(int(s.sum()), dtype=x.dtype)])
                    b = torch.cat([(z[:, row] - mz) * weight.sqrt(), damping.sqrt() * w0[row, s]])
                    weights[row, s] = torch.linalg.lstsq(a, b[:, None]).solution[:, 0]
                bias[row] = mz - weights[row] @ mx
            module.weight.data.copy_(weights.view(module.weight.shape))
            if module.bias is not None:
                module.bias.data.copy_(bias)
    return net


def test_a_layer_too_wide_is_left_as_it_is(monkeypatch):
    net = nn.Sequential(nn.Linear(30, 20), nn.ReLU(), nn.Linear(20, 4)).requires_grad_(False)
    layout, images = find_layers(net), torch.randn(60, 30)
    assert Repairer("least-squares", copy.deepcopy(net), layout, images).left() == []
    monkeypatch.setattr("evoprune.values.repair.MOST_WORK", 64 * 30 * 20 * 30 - 1)
    repairer = Repairer("least-squares", copy.deepcopy(net), layout, images)
    assert repairer.left() == ["0.weight"]
    repairer({layer.name: torch.ones(layer.shape, dtype=torch.bool) for layer in layout})
    assert torch.equal(repairer.model[0].weight, net[0].weight)


class PadsFirst(nn.Conv2d):
    """Pads in its own forward, as timm's Conv2dSame does."""

    def forward(self, x):
        return super().forward(nn.functional.pad(x, (0, 1, 0, 1)))


class Experts(nn.Module):
    """Two experts, to which a router sends images."""

    def __init__(self):
        super().__init__()
        self.router, self.one, self.two, self.head = nn.Linear(6, 2), nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        first, out = self.router(x).argmax(1) == 0, torch.zeros(len(x), 8)
        out[first], out[~first] = self.one(x[first]), self.two(x[~first])
        return self.head(out.relu())


@pytest.mark.parametrize(("make", "shape", "left"), [
    (lambda: nn.Sequential(PadsFirst(3, 4, 2), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5)), (3, 4, 4), ["0.weight"]),
    (Experts, (6,), ["one.weight", "two.weight"])])
def test_layers_that_compute_or_get_something_of_their_own_are_left_as_they_are(make, shape, left):
    torch.manual_seed(0)
    model, images = make().requires_grad_(False).eval(), torch.randn(51, *shape)
    layout, dense = find_layers(model), copy.deepcopy(model)
    repairer = Repairer("least-squares", model, layout, images)
    assert repairer.left() == left
    for seed in range(5):  # a router of other weights sends other images
        net, kept = masked(dense, layout, 0.3, seed)
        model.load_state_dict(net.state_dict())
        repairer(kept)
        assert all(torch.equal(model.get_parameter(name), net.get_parameter(name)) for name in left)
        assert all(value.isfinite().all() for value in model.state_dict().values())


def test_a_bias_that_is_pruned_stays_zero():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).requires_grad_(False)
    layout = find_layers(model, include="*.bias")
    repairer = Repairer("least-squares", model, layout, torch.randn(60, 6))
    kept = {layer.name: (torch.arange(int(np.prod(layer.shape))) % 2 == 0).reshape(layer.shape) for layer in layout}
    repairer(kept)
    for name, mask in kept.items():
        assert bool(mask.any()) and torch.equal(model.get_parameter(name) != 0, mask)
    assert repairer.absorbing() == set()


@pytest.mark.parametrize("weighed", [False, True])
@pytest.mark.parametrize("density", [0.9, 0.4, 0.1])
def test_least_squares_equals_the_obvious_slow_way(mixed, density, weighed, monkeypatch):
    monkeypatch.setattr("evoprune.values.least_squares.ROWS", 10**6)  # all positions
    monkeypatch.setattr("evoprune.values.repair.WEIGHING_LIMIT", float("inf") if weighed else -1)
    monkeypatch.setattr("evoprune.values.least_squares.LARGEST_PRODUCT", {"cpu": 50_000})  # several groups of rows
    monkeypatch.setattr("evoprune.values.least_squares.SLOWER", 0)  # no conjugate gradients
    monkeypatch.setattr("evoprune.values.least_squares.FIT_STEPS", 0)
    layout = find_layers(mixed)
    images = torch.randn(90, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    repairer = Repairer("least-squares", net := copy.deepcopy(mixed).requires_grad_(False), layout, images)
    assert repairer.left() == ["grouped.weight"]
    shares = {layer.name.removesuffix(".weight"): layer.shares for layer in repairer.layers.values()
              if weighed and layer.shares is not None}
    assert set(shares) == ({"conv1", "conv2", "fc1"} if weighed else set())
    for seed in (0, 1):  # the second time, the first layer's moments are remembered
        changed, kept = masked(mixed, layout, density, seed)
        net.load_state_dict(changed.state_dict())
        repairer(kept)
        with torch.no_grad():
            expected = repaired_obviously(mixed, layout, kept, images, shares)
            for name, value in expected.state_dict().items():
                scale = float(value.double().abs().max())
                assert torch.allclose(net.state_dict()[name].double(), value.double(), rtol=0, atol=2e-3 * scale), name
        assert all(bool((net.get_parameter(name)[~mask] == 0).all()) for name, mask in kept.items())


def test_an_error_weighs_what_the_logits_of_that_image_feel(mixed, monkeypatch):
    monkeypatch.setattr("evoprune.values.least_squares.ROWS", 10**6)
    monkeypatch.setattr("evoprune.values.sensitivity.batch_for", lambda layers: 12)
    images = torch.randn(30, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    repairer = Repairer("least-squares", copy.deepcopy(mixed).requires_grad_(False), find_layers(mixed), images)
    generator = torch.Generator().manual_seed(0)
    ways = torch.cat([torch.randn(4, len(batch), 10, generator=generator) for batch in images.split(12)], 1)
    net, outputs = copy.deepcopy(mixed), {}
    for name in ("conv1", "conv2", "fc1"):
        net.get_submodule(name).register_forward_hook(
            lambda module, args, output, name=name: (output.retain_grad(), outputs.update({name: output}))[0])
    squares = {}
    for i, image in enumerate(images):
        for way in ways[:, i]:
            (net(image[None])[0] * (way - way.mean())).sum().backward()
            for name, output in outputs.items():
                rows = output.grad.reshape(output.shape[1], -1).T.square()  # (positions, out)
                squares.setdefault(name, torch.zeros(len(images), *rows.shape))[i] += rows / 4
    for layer in repairer.layers.values():
        if layer.name != "fc2.weight":
            root = squares[layer.name.removesuffix(".weight")].flatten(0, 1).sqrt()
            felt = 0.05 + 0.95 * root / root.mean(0).clamp_min(1e-30)
            assert torch.allclose(layer.shares, felt / felt.sum(0), rtol=1e-3) and felt.std() > 0.1


def test_a_bias_before_a_batch_norm_changes_nothing(mixed, monkeypatch):
    monkeypatch.setattr("evoprune.values.repair.WEIGHING_LIMIT", float("inf"))
    biased = Mixed(bias=True).eval().requires_grad_(False)
    biased.load_state_dict({**mixed.state_dict(), "conv1.bias": torch.arange(6.0)})
    biased.norm1.running_mean += torch.arange(6.0)
    images = torch.randn(90, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    found = []
    for model in (copy.deepcopy(mixed).requires_grad_(False), biased):
        repairer = Repairer("least-squares", model, layout := find_layers(model), images)
        changed, kept = masked(model, layout, 0.15)
        model.load_state_dict(changed.state_dict())
        repairer(kept)
        found.append(model)
    assert torch.allclose(found[0].conv1.weight, found[1].conv1.weight, rtol=1e-3, atol=1e-4)
    assert torch.allclose(found[0](images), found[1](images), rtol=1e-2, atol=1e-2)


def test_a_layer_that_some_images_pass_by_is_repaired(mixed, monkeypatch):
    monkeypatch.setattr("evoprune.values.sensitivity.batch_for", lambda layers: 32)

    class Branch(Mixed):
        def forward(self, x):
            return super().forward(x) if (x.mean((1, 2, 3)) > 0).any() else self.fc2(x.new_zeros(len(x), 12))

    model = Branch().eval().requires_grad_(False)
    model.load_state_dict(mixed.state_dict())
    images = torch.randn(97, 1, 8, 8).abs()
    images[:40] *= -1
    repairer = Repairer("least-squares", model, find_layers(model), images)
    assert repairer.differentiable and all(layer.shares is None for layer in repairer.layers.values())


def test_a_layer_that_a_mask_does_not_reach_has_what_the_dense_model_has(mixed):
    class Gated(Mixed):
        open = True

        def forward(self, x):
            x = self.norm1(self.conv1(x)).tanh() if self.open else x.expand(-1, 6, -1, -1)
            return self.fc2(self.fc1(self.norm2(self.grouped(self.conv2(x).tanh())).flatten(1)).relu())

    model = Gated(bias=True).eval().requires_grad_(False)
    model.norm1.load_state_dict(mixed.norm1.state_dict())
    layout = find_layers(model)
    repairer = Repairer("least-squares", model, layout, torch.randn(90, 1, 8, 8))
    before = copy.deepcopy({**model.norm1.state_dict(), **model.conv1.state_dict()})
    for Gated.open in (True, False):
        changed, kept = masked(model, layout, 0.3)
        model.load_state_dict({**model.state_dict(), **{name: changed.get_parameter(name) for name in kept}})
        repairer(kept)
        found = {**model.norm1.state_dict(), **model.conv1.state_dict()}
        same = [torch.equal(found[name], before[name]) for name in ("bias", "running_mean", "running_var")]
        assert same == [not Gated.open] * 3


def test_layers_may_be_called_by_name(mixed):
    class ByName(Mixed):
        def forward(self, x):
            x = self.norm1(input=self.conv1(input=x)).tanh()
            return self.fc2(input=self.fc1(input=self.norm2(input=self.grouped(self.conv2(x).tanh())).flatten(1)).relu())

    class ByPlace(Mixed):
        def forward(self, x):
            x = self.norm1(self.conv1(x)).tanh()
            return self.fc2(self.fc1(self.norm2(self.grouped(self.conv2(x).tanh())).flatten(1)).relu())

    images, found = torch.randn(90, 1, 8, 8), []
    torch.manual_seed(0)
    first = ByPlace().state_dict()
    for kind in (ByName, ByPlace):
        model = kind().eval().requires_grad_(False)
        model.load_state_dict(first)
        repairer = Repairer("least-squares", model, layout := find_layers(model), images)
        assert repairer.differentiable and [each.rpartition(".")[0] for each in repairer.left()] == ["grouped"]
        changed, kept = masked(model, layout, 0.3)
        model.load_state_dict(changed.state_dict())
        repairer(kept)
        found.append(model.state_dict())
    assert all(torch.equal(found[0][name], found[1][name]) for name in first)


def test_what_the_machine_lacks_is_not_taken_for_the_models_fault(mixed, monkeypatch):
    def fails(*args, **kwargs):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(torch.autograd, "grad", fails)
    with pytest.raises(RuntimeError, match="allocate"):
        Repairer("least-squares", mixed, find_layers(mixed), torch.randn(20, 1, 8, 8))


def test_rows_are_solved_in_groups_of_a_size():
    mask = torch.arange(40)[None] < torch.arange(20, 40)[:, None]
    together, apart = list(grouped(mask, 1 << 20)), list(grouped(mask, 3 * 40 * 50, 50))
    assert len(together) < 5 and all(rows.numel() in (1, 2, 3, 4, 5) for rows, _, _ in apart) and len(apart) > 5
    for groups in (together, apart):
        assert sorted(torch.cat([rows for rows, _, _ in groups]).tolist()) == list(range(20))
    assert all(at.shape[0] * at.shape[1] * 50 <= 3 * 40 * 50 for _, at, _ in apart)


def test_errors_weigh_alike_where_images_do_not_come_first(monkeypatch):
    monkeypatch.setattr("evoprune.values.sensitivity.batch_for", lambda layers: 32)

    class Rowwise(nn.Module):
        """Takes the rows of images as a sequence, its batch second, as torch's transformers do unless told otherwise."""

        def __init__(self, images_first):
            super().__init__()
            self.images_first = images_first
            self.fc1, self.fc2, self.fc3 = nn.Linear(8, 6), nn.Linear(6, 6), nn.Linear(6, 10)

        def forward(self, x):
            x = self.fc1(x[:, 0] if self.images_first else x[:, 0].transpose(0, 1)).relu()
            return self.fc3(self.fc2(x).relu().mean(1 if self.images_first else 0))

    torch.manual_seed(0)
    images = torch.randn(90, 1, 8, 8)
    for images_first in (True, False):
        model = Rowwise(images_first).eval().requires_grad_(False)
        repairer = Repairer("least-squares", model, find_layers(model), images)
        assert repairer.differentiable
        assert [each.shares is not None for each in repairer.layers.values()] == [images_first, images_first, False]


def test_batch_norm_repair_equals_a_pass_in_training_mode(mixed):
    images = torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(2))
    mixed = passed_in_training_mode(copy.deepcopy(mixed), images)  # its own statistics are of these images
    layout = find_layers(mixed)
    repairer = Repairer("bn", net := copy.deepcopy(mixed).requires_grad_(False), layout, images)
    changed, kept = masked(mixed, layout, 0.3)
    net.load_state_dict(changed.state_dict())
    repairer(kept)
    for name, value in passed_in_training_mode(changed, images).state_dict().items():
        if "num_batches" not in name:
            assert torch.allclose(net.state_dict()[name], value, rtol=1e-3, atol=1e-5), name
    assert not torch.allclose(net.norm2.running_var, mixed.norm2.running_var, rtol=0.1)


@pytest.mark.parametrize("kind", ["bn", "least-squares"])
def test_repair_changes_nothing_where_nothing_is_pruned(kind, mixed):
    layout, images = find_layers(mixed), torch.randn(400, 1, 8, 8, generator=torch.Generator().manual_seed(2))
    repairer = Repairer(kind, net := copy.deepcopy(mixed).requires_grad_(False), layout, images)
    repairer({layer.name: torch.ones(layer.shape, dtype=torch.bool) for layer in layout})
    for name, value in mixed.state_dict().items():
        assert torch.allclose(net.state_dict()[name], value, rtol=1e-3, atol=1e-3), name


def test_a_channel_that_is_dead_gives_what_the_dense_model_gives_in_the_mean(mixed):
    layout, images = find_layers(mixed), torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(2))
    repairer = Repairer("bn", net := copy.deepcopy(mixed).requires_grad_(False), layout, images)
    kept = {layer.name: torch.full(layer.shape, layer.name != "conv1.weight") for layer in layout}
    net.conv1.weight.zero_()
    repairer(kept)
    means = [model.norm1(model.conv1(images)).mean((0, 2, 3)) for model in (net, mixed)]
    assert torch.allclose(*means, atol=1e-3)


@pytest.mark.parametrize("density", [0.03, 0.5, 1.0])
def test_rows_solved_together_equal_rows_solved_alone(density, monkeypatch):
    monkeypatch.setattr("evoprune.values.least_squares.SLOWER", 0)  # no conjugate gradients but the ones asked for
    torch.manual_seed(0)
    x = torch.randn(300, 40) @ (torch.eye(40) + 0.05 * torch.randn(40, 40))
    covariance, cross, dense = x.T @ x / 300, torch.randn(40, 25) * 10, torch.randn(25, 40)
    mask = torch.rand(25, 40) < density
    mask[3] = False
    weights, errors = solve_rows(covariance, cross, dense, mask)
    same, of_rows = solve_rows(covariance, cross, dense, mask, by_row=True)
    assert torch.allclose(weights, same, rtol=1e-4, atol=1e-4)
    damping = 0.01 * covariance.trace() / 40
    damped = covariance + damping * torch.eye(40)
    wanted = (cross.T + damping * dense) * mask
    other = conjugate_gradients(damped, wanted, dense * mask, mask)
    start, end, best = (float((w @ damped * w).sum() - 2 * (w * wanted).sum()) for w in (dense * mask, other, weights))
    assert end - best <= 2e-3 * (start - best)
    for row, kept in enumerate(mask):
        system = covariance[kept][:, kept].double() + damping * torch.eye(int(kept.sum()))
        expected = torch.linalg.solve(system, (cross[kept, row] + damping * dense[row, kept]).double())
        scale = float(expected.abs().max()) if len(expected) else 1
        assert torch.allclose(weights[row, kept].double(), expected, atol=2e-3 * scale)
        assert not weights[row, ~kept].any() and not other[row, ~kept].any()
        wanted = (cross.T + damping * dense)[row].double()
        for j in kept.nonzero()[:, 0].tolist()[:3]:  # what removing it costs, after all others are solved again
            others = kept.clone()
            others[j] = False
            error = least_error(damped.double(), wanted, others) - least_error(damped.double(), wanted, kept)
            assert torch.isclose(errors(weights)[row, j].double(), error, rtol=1e-2)
        whole = least_error(damped.double(), wanted, torch.zeros_like(kept)) - least_error(damped.double(), wanted, kept)
        assert torch.isclose(of_rows(weights)[row].sum().double(), whole, rtol=1e-3, atol=1e-6)


def test_a_product_in_parts_is_the_whole_one(monkeypatch):
    monkeypatch.setattr("evoprune.values.least_squares.WIDE", 7)
    rows = torch.randn(30, 11, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(gram(rows), rows.T @ rows, atol=1e-5) and torch.allclose(gram(rows), gram(rows).T, atol=1e-5)


def test_what_is_not_asked_for_is_not_computed(lenet, digits):
    """The values are the same; what weights are worth then is nothing."""
    layout = find_layers(lenet)
    found = []
    for asked in (True, False):
        net = copy.deepcopy(lenet)
        repairer = Repairer("least-squares", net, layout, digits.search.inputs(slice(0, 200)))
        repairer.asked = asked
        masks = {layer.name: torch.rand(layer.shape, generator=torch.Generator().manual_seed(0)) < 0.3 for layer in layout}
        with torch.no_grad():
            for name, mask in masks.items():
                net.get_parameter(name).mul_(mask)
        repairer(masks)
        found.append((net.state_dict(), [layer.errors.numel() for layer in repairer.layers.values()]))
    assert all(torch.equal(a, b) for a, b in zip(found[0][0].values(), found[1][0].values(), strict=True))
    assert found[0][1] == [layer.weights for layer in layout] and found[1][1] == [1] * len(layout)


@pytest.mark.parametrize(("sizes", "images"), [((6,), 256), ((4000, 96), 256), ((12_000, 5000), 32), ((1 << 21,), 32), ((), 256),
                                               ((10_000,), 64), ((1 << 23, 1 << 23), 4), ((1 << 30,), 1)])
def test_gradients_are_taken_of_as_many_images_as_a_cache_holds(sizes, images):
    layers = {nn.Identity(): Solved("a", nn.Linear(1, 1), torch.zeros(1, 1), size=size) for size in sizes}
    assert batch_for(layers) == images


class ByToken(nn.Module):
    """Linear layers of 20 tokens an image."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(12, 16), nn.Linear(16, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.last(self.second(self.first(x).relu()).relu().mean(1))


@pytest.fixture
def few_rows(monkeypatch):
    monkeypatch.setattr("evoprune.values.least_squares.ROWS", 300)
    monkeypatch.setattr("evoprune.values.least_squares.POSITIONS", 3)


def by_token(images):
    torch.manual_seed(0)
    net, x = ByToken().eval().requires_grad_(False), torch.randn(images, 20, 12)
    return net, x, Repairer("least-squares", net, find_layers(net), x)


@pytest.mark.parametrize(("images", "count"), [(60, 5), (150, 3), (15, None)])
def test_of_many_tokens_some_are_looked_at(images, count, few_rows):
    net, x, repairer = by_token(images)
    layer, last = repairer.layers[net.first], repairer.layers[net.last]
    assert last.positions is None and last.takes(torch.zeros(images, 8)) and not last.takes(torch.zeros(images - 1, 8))
    assert not layer.takes(torch.zeros(images, 19, 12)) and layer.takes(x)
    if count is None:
        assert layer.positions is None
        return
    assert layer.positions.shape == (images, count) and len(layer.shares) == images * count
    rows = torch.stack([x[i, place] for i, places in enumerate(layer.positions.tolist()) for place in places]).double()
    layer.shares = None  # all errors alike: the usual equation
    dense = copy.deepcopy(net).double()
    kept = {each.name: torch.rand(each.shape) < 0.5 for each in repairer.layout}
    for name, mask in kept.items():
        net.get_parameter(name).mul_(mask)
    repairer(kept)
    wanted = dense.first(rows)
    centred, off = rows - rows.mean(0), wanted - wanted.mean(0)
    covariance, cross = centred.T @ centred / len(rows), centred.T @ off / len(rows)
    damping = 0.01 * covariance.trace() / 12
    for row, mask in enumerate(kept["first.weight"]):
        at = mask.nonzero()[:, 0]
        found = torch.linalg.solve(covariance[at][:, at] + damping * torch.eye(len(at)),
                                   cross[at, row] + damping * dense.first.weight[row, at])
        assert torch.allclose(net.first.weight[row, at].double(), found, atol=1e-4)


def test_layers_that_make_much_are_looked_at_in_fewer_places(monkeypatch):
    monkeypatch.setattr("evoprune.values.repair.MOST_KEPT", 120 * (16 + 8 + 4))
    net, _, repairer = by_token(60)
    assert [len(layer.targets) for layer in repairer.layers.values()] == [120, 120, 60]


def test_errors_of_the_tokens_looked_at_weigh_what_they_do_among_all(few_rows, monkeypatch):
    monkeypatch.setattr("evoprune.values.sensitivity.shares_of", torch.clone)
    monkeypatch.setattr("evoprune.values.sensitivity.batch_for", lambda layers: 7)
    net, _, repairer = by_token(60)
    some = repairer.layers[net.first]
    monkeypatch.setattr("evoprune.values.least_squares.ROWS", 10_000)
    net, _, repairer = by_token(60)
    among = repairer.layers[net.first].shares.view(60, 20, 16)
    assert torch.allclose(some.shares.view(60, 5, 16), torch.stack([among[i, row] for i, row in enumerate(some.positions)]))


def test_an_images_size_counts_all_its_tokens():
    class Folded(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(8, 6), nn.Linear(48, 10)

        def forward(self, x):
            return self.fc2(self.fc1(x.reshape(-1, 8)).relu().reshape(len(x), -1))

    model = Folded().eval().requires_grad_(False)
    repairer = Repairer("least-squares", model, find_layers(model), torch.randn(30, 1, 8, 8))
    assert [layer.size for layer in repairer.layers.values()] == [48, 10]


def least_error(system, wanted, kept):
    """The smallest w A w - 2 b w over the kept weights."""
    b = wanted[kept]
    return -b @ torch.linalg.solve(system[kept][:, kept], b)


def test_a_last_layer_is_fitted_to_probabilities(rng):
    torch.manual_seed(0)
    x = torch.randn(200, 30)
    probabilities = (2 * x @ torch.randn(30, 4)).softmax(1)
    mask = torch.rand(4, 30) < 0.5
    start, bias = 0.01 * torch.randn(4, 30) * mask, torch.zeros(4)

    def loss(weights, bias):
        return torch.nn.functional.cross_entropy(x @ weights.T + bias, probabilities) + 2 / 200 * (weights - start).square().sum()

    weights, fitted_bias = fitted(x, probabilities, start, bias, mask)
    free = weights.clone().requires_grad_(), fitted_bias.clone().requires_grad_()
    gradient, other = torch.autograd.grad(loss(*free), free)
    assert not weights[~mask].any() and loss(weights, fitted_bias) < 0.6 * loss(start, bias)
    assert gradient[mask].abs().max() < 0.01 and other.abs().max() < 0.01
    without, none = fitted(x, probabilities, start, None, mask)
    assert none is None and loss(without, 0) < loss(start, 0) and not without[~mask].any()
    assert fitted(x / 0, probabilities, start, bias, mask) == (start, bias)
    empty, none = fitted(x, probabilities, start * 0, None, torch.zeros_like(mask))
    assert none is None and not empty.any()


def test_only_a_linear_layer_that_makes_the_logits_is_fitted(mixed):
    images = torch.randn(20, 1, 8, 8, generator=torch.Generator().manual_seed(1))

    class Scaled(Mixed):
        def forward(self, x):
            return 2 * super().forward(x)

    class Doubled(Mixed):
        def forward(self, x):
            return super().forward(x).mul_(2)

    assert Repairer("least-squares", mixed, find_layers(mixed), images).classifier.name == "fc2.weight"
    for model in (Scaled().eval().requires_grad_(False), Doubled().eval().requires_grad_(False)):
        assert Repairer("least-squares", model, find_layers(model), images).classifier is None


def test_a_model_that_runs_in_inference_mode_is_repaired(mixed, monkeypatch):
    monkeypatch.setattr("evoprune.values.repair.WEIGHING_LIMIT", -1)  # it has no gradients to weigh errors by
    class Inference(Mixed):
        @torch.inference_mode()
        def forward(self, x):
            return super().forward(x)

    images = torch.randn(50, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    found = []
    for kind in (Mixed, Inference):
        model = kind().eval().requires_grad_(False)
        model.load_state_dict(mixed.state_dict())
        repairer = Repairer("least-squares", model, layout := find_layers(model), images)
        assert repairer.differentiable == (kind is Mixed)
        changed, kept = masked(mixed, layout, 0.3)
        model.load_state_dict(changed.state_dict())
        repairer(kept)
        found.append(model.state_dict())
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_saliency_equals_errors_times_gradients_image_by_image(mixed, monkeypatch):
    monkeypatch.setattr("evoprune.values.sensitivity.batch_for", lambda layers: 12)
    layout = find_layers(mixed)
    images = torch.randn(30, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    repairer = Repairer("least-squares", net := copy.deepcopy(mixed).requires_grad_(False), layout, images)
    changed, kept = masked(mixed, layout, 0.3)
    net.load_state_dict(changed.state_dict())
    repairer(kept)
    found = repairer.saliency()
    assert set(found) == {layer.name for layer in layout} - {"grouped.weight"}
    generator = torch.Generator().manual_seed(0)
    labels = torch.cat([torch.multinomial(net(batch).softmax(1), 1, generator=generator)[:, 0] for batch in images.split(12)])
    net.requires_grad_(True)
    squares, outputs = {name: 0 for name in found}, {}
    for name in found:
        net.get_submodule(name.removesuffix(".weight")).register_forward_hook(
            lambda module, args, output, name=name: (output.retain_grad(), outputs.update({name: output}))[0])
    for image, label in zip(images, labels):
        torch.nn.functional.cross_entropy(net(image[None]), label[None]).backward()
        for name, output in outputs.items():
            squares[name] = squares[name] + output.grad.reshape(output.shape[1], -1).square().sum(1) / 30
    for layer in repairer.layers.values():
        expected = layer.errors * squares[layer.name].sqrt()[:, None]
        assert torch.allclose(found[layer.name], expected, rtol=1e-3, atol=1e-9)
        assert found[layer.name].any() and not found[layer.name][~kept[layer.name].view(found[layer.name].shape)].any()
    entered = []
    net.fc1.register_forward_pre_hook(lambda module, args: entered.append(args[0].detach().double()))
    net(images)
    layer, = (each for each in repairer.layers.values() if each.name == "fc1.weight")
    for row, at in enumerate(kept["fc1.weight"]):  # the obvious: an error's share, and the inverse of the row's own system
        share, x = layer.shares[:, row].double(), entered[0][:, at]
        damping = max(0.01 * float((share @ entered[0].square()).mean()), layer.least)
        inverse = torch.linalg.inv((x.T * share) @ x + damping * torch.eye(x.shape[1]))
        expected = net.fc1.weight[row, at].double().square() / inverse.diagonal()
        assert torch.allclose(layer.errors[row, at].double(), expected, rtol=1e-2)


def test_values_stay_small_behind_a_layer_that_is_dead(mixed):
    layout = find_layers(mixed)
    images = torch.randn(90, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    repairer = Repairer("least-squares", net := copy.deepcopy(mixed).requires_grad_(False), layout, images)
    kept = {layer.name: torch.full(layer.shape, layer.name != "conv1.weight") for layer in layout}
    net.conv1.weight.zero_()
    repairer(kept)
    assert all(bool(value.isfinite().all()) and value.abs().max() < 10 for value in net.state_dict().values())
    assert all(bool(score.isfinite().all()) and score.min() >= 0 for score in repairer.saliency().values())


def test_positions_are_different_places_of_the_output():
    places = draw_positions(600, 100, 21, torch.device("cpu"))
    assert places.shape == (600, 21) and all(len(set(row.tolist())) == 21 for row in places)
    assert places.min() == 0 and places.max() == 99
    assert draw_positions(10, 100, 1229, torch.device("cpu")).tolist() == [list(range(100))] * 10


@pytest.mark.parametrize(("images", "most", "count"), [(600, 10**6, 21), (1000, 10**6, 16), (10, 10**6, 100), (600, 6000, 10),
                                                       (600, 100, 1), (64, 6472, 100)])
@pytest.mark.parametrize("convolution", [True, False])
def test_so_many_rows_of_an_image_are_kept(images, most, count, convolution):
    module = nn.Conv2d(2, 3, 1) if convolution else nn.Linear(2, 3)
    layer = Solved("a.weight", module, torch.zeros(3, 2))
    layer.keep(torch.zeros((images, 3, 10, 10) if convolution else (images, 100, 3)), images, most)
    assert layer.targets.shape == (images * count, 3)


@pytest.mark.parametrize("worth", ["lamp", "obs"])
def test_a_repaired_mask_is_measured_and_its_saliency_told_whatever_came_before(worth, lenet, digits, layout, rng):
    images = calibration(digits.train, 200, 0)
    evaluator = Evaluator(lenet, layout, digits.search, 64, repair="least-squares", calibration=images, worth=worth)
    group = [from_masks([rng.random(layer.shape) < density for layer in layout], "x") for density in (0.3, 0.1, 0.05)]
    before = copy.deepcopy(lenet.state_dict())
    forward, backward = evaluator.many(group), evaluator.many(group[::-1])[::-1]
    raw = Evaluator(lenet, layout, digits.search, 64).many(group)
    for individual, a, b, (accuracy, sparse) in zip(group, forward, backward, raw):
        assert a.objectives == b.objectives and a.objectives[1] == sparse and a.objectives[0] > accuracy + 0.05
        for i, layer in enumerate(layout):
            assert np.array_equal(a.saliency[layer.name], b.saliency[layer.name])
            assert a.saliency[layer.name].shape == (get_bits(individual, i, layout).sum(),)
    evaluator.set_masks(group[0])
    scores = SALIENCIES["lamp"]([parameter for parameter, _ in evaluator.masked]) if worth == "lamp" else \
        [evaluator.repairer.saliency()[layer.name].view(layer.shape) for layer in layout]
    for (parameter, _), mask, layer, score in zip(evaluator.masked, masks(group[0], layout), layout, scores):
        assert not parameter[~mask].any()
        assert np.array_equal(score[mask].double().clamp_min(1e-30).log().half().numpy(), forward[0].saliency[layer.name])
    assert all(torch.equal(v, before[k]) for k, v in lenet.state_dict().items())


def test_saliency_is_lamp_where_least_squares_does_not_solve_every_layer(mixed):
    layout = find_layers(mixed)
    images = calibration(as_split((torch.randn(60, 1, 8, 8), torch.zeros(60, dtype=torch.int64)), "data"), 60, 0)
    evaluator = Evaluator(mixed, layout, images, 60, repair="least-squares", calibration=images, worth="obs")
    evaluator.set_masks(from_masks([np.arange(layer.weights).reshape(layer.shape) % 2 == 0 for layer in layout], "x"))
    expected = SALIENCIES["lamp"]([parameter for parameter, _ in evaluator.masked])
    assert all(torch.equal(a, b) for a, b in zip(evaluator.saliency(), expected))


class WithoutGradients(nn.Module):
    """Its outputs have no gradients."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(64, 10)

    def forward(self, x):
        return self.fc(x.flatten(1)).detach()


def test_saliency_is_lamp_where_gradients_do_not_go_through(digits, caplog):
    model = WithoutGradients().eval()
    layout, images = find_layers(model), calibration(digits.train, 60, 0)
    with caplog.at_level("INFO", "evoprune"):
        evaluator = Evaluator(model, layout, digits.search, 64, repair="least-squares", calibration=images, worth="obs")
    evaluator.set_masks(from_masks([np.random.default_rng(0).random((10, 64)) < 0.2], "x"))
    assert torch.equal(evaluator.saliency()[0], SALIENCIES["lamp"]([evaluator.masked[0][0]])[0])
    assert [r.message.partition(" (")[0] for r in caplog.records if "LAMP" in r.message] == [
        "least squares weighs all errors alike, and weights are worth their LAMP score: no gradients go through the model"]


def test_calibration_images_are_a_fixed_draw(digits):
    a, b, c = (calibration(digits.train, 100, seed) for seed in (0, 0, 1))
    assert torch.equal(a.images, b.images) and not torch.equal(a.images, c.images) and len(a) == 100
    assert len(calibration(digits.train, 10**6, 0)) == len(digits.train)
