import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from evoprune.inputs.models import LeNet5, resnet18
from evoprune.values import slim
from evoprune.values.slim import slimmed


def size(model):
    return sum(p.numel() for p in model.parameters())


def killed(model, rows, shift=0.0):
    """Some rows of the named layers without weights; batch norms with statistics of their own and so large a shift."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.uniform_(0.5, 2, generator=generator)
            module.weight.data.uniform_(0.5, 1.5, generator=generator)
            module.running_mean.normal_(0, shift + 1e-12, generator=generator)
            module.bias.data.normal_(0, shift + 1e-12, generator=generator)
    for name, which in rows.items():
        layer = model.get_submodule(name)
        layer.weight.data[which] = 0
    return model.eval()


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1, bias=False), nn.Conv2d(8, 8, 1)
        self.norm, self.head = nn.BatchNorm2d(8), nn.Linear(8, 4)

    def forward(self, x):
        x = self.a(x).relu()
        x = x + self.norm(self.b(x))
        return self.head((x + self.c(x)).mean((2, 3)))


class Grouped(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 12, 3, groups=4), nn.Linear(12, 4)

    def forward(self, x):
        return self.head(self.b(self.a(x).relu()).relu().mean((2, 3)))


class Depthwise(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 8, 1)
        self.norm, self.head = nn.BatchNorm2d(8), nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.c(self.norm(self.b(self.a(x).relu())).relu()).mean((2, 3)))


class Concatenated(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.norm = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(16)
        self.head = nn.Linear(16 * 36, 4)

    def forward(self, x):
        x = self.a(x).relu()
        return self.head(self.norm(torch.cat([x, self.b(x)], 1)).relu().view(-1, 16 * 36))


class PaddedShortcut(nn.Module):
    """The kind A of He et al. (2016)."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 16, 3, padding=1, stride=2), nn.Conv2d(16, 8, 3)
        self.norm, self.head = nn.BatchNorm2d(16), nn.Linear(8, 4)

    def forward(self, x):
        x = self.a(x).relu()
        x = F.relu(self.norm(self.b(x)) + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4)))
        return self.head(self.c(x).mean((2, 3)))


class Gated(nn.Module):
    """Squeeze and excitation."""

    def __init__(self):
        super().__init__()
        self.a, self.f, self.g, self.c = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1), nn.Conv2d(8, 8, 3)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = self.a(x).relu()
        x = x * torch.sigmoid(self.g(self.f(F.adaptive_avg_pool2d(x, 1)).relu()))
        return self.head(self.c(x).mean((2, 3)))


NETS = {
    Residual: ({"a": [1, 2, 3, 7], "b": [2, 3], "c": [1, 2, 3, 5]}, {"a": 2, "b": 2, "c": 2}),
    Grouped: ({"a": [2, 3, 5], "b": [3, 4, 5, 9]}, {"a": 2, "b": 3}),
    Depthwise: ({"a": [1, 4], "b": [4, 6], "c": [0]}, {"a": 3, "b": 3, "c": 1}),
    Concatenated: ({"b": [0, 5, 6]}, {"b": 3}),
    PaddedShortcut: ({"a": [0, 1], "b": [0, 4, 5, 6, 15], "c": [3]}, {"a": 2, "b": 4, "c": 1}),
    Gated: ({"a": [2, 3], "f": [1], "c": [0, 7]}, {"a": 2, "f": 1, "g": 2, "c": 2})}


@pytest.mark.parametrize("shift", [0.0, 1.0])
@pytest.mark.parametrize("kind", NETS)
def test_channels_of_every_kind_of_net_are_cut_out(kind, shift):
    rows, expected = NETS[kind]
    torch.manual_seed(0)
    net = killed(kind(), rows, shift)
    for name in rows:  # nothing behind them, so that they are zero whatever comes
        if shift == 0 and net.get_submodule(name).bias is not None:
            net.get_submodule(name).bias.data[rows[name]] = 0
    before, x = copy.deepcopy(net), torch.randn(6, 3, 8, 8)
    small, counts = slimmed(net, x)
    with torch.no_grad():
        assert torch.allclose(small(x), before(x), rtol=0, atol=1e-5 * float(before(x).abs().max()))
        assert torch.equal(net(x), before(x))
    assert size(small) < size(net)
    if kind in (PaddedShortcut, Gated) and shift:  # what is not zero cannot be folded behind padding, and varies with a gate
        expected = counts
    assert counts == expected


def test_a_lenet5_by_hand():
    torch.manual_seed(0)
    net, x = LeNet5().eval(), torch.randn(5, 1, 28, 28)
    for name, gone in (("feature.0", [1]), ("feature.3", [0, 3]), ("classifier.1", range(20)), ("classifier.3", [4])):
        net.get_submodule(name).weight.data[list(gone)] = 0
    small, counts = slimmed(net, x)
    assert counts == {"feature.0": 1, "feature.3": 2, "classifier.1": 20, "classifier.3": 1}
    shapes = [tuple(small.get_submodule(name).weight.shape) for name in counts]
    assert shapes == [(5, 1, 5, 5), (14, 5, 5, 5), (100, 350), (83, 100)]
    assert small.get_submodule("classifier.5").weight.shape == (10, 83)
    with torch.no_grad():
        assert torch.allclose(small(x), net(x), atol=1e-6)


def test_unread_positions_of_a_flatten_are_cut_out_by_one_select():
    torch.manual_seed(0)
    net, x = LeNet5().eval(), torch.randn(5, 1, 28, 28)
    net.classifier[1].weight.data[:, ::3] = 0
    small, counts = slimmed(net, x)
    assert counts == {"what classifier.1 reads": 134} and small.get_submodule("classifier.1").in_features == 266
    with torch.no_grad():
        assert torch.allclose(small(x), net(x), atol=1e-6)


def test_half_of_the_filters_of_a_resnet18_halve_every_layer():
    torch.manual_seed(0)
    net, x = resnet18().eval(), torch.randn(2, 3, 32, 32)
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.data[::2] = 0
    small, _ = slimmed(net, x)
    for name, module in net.named_modules():
        if isinstance(module, nn.Conv2d):
            there = small.get_submodule(name)
            assert there.out_channels * 2 == module.out_channels, name
            assert there.in_channels * (1 if name == "conv1" else 2) == module.in_channels, name
    with torch.no_grad():
        assert torch.allclose(small(x), net(x), atol=1e-5)


def test_neurons_of_a_transformer_encoder():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    net = nn.Sequential(nn.Embedding(30, 16), nn.TransformerEncoder(layer, 2), nn.Flatten(), nn.Linear(160, 4)).eval()
    for i in (0, 1):
        net[1].layers[i].linear1.weight.data[:10] = 0
    x = torch.randint(30, (4, 10))
    small, counts = slimmed(net, x)
    assert counts == {"1.layers.0.linear1": 10, "1.layers.1.linear1": 10}
    with torch.no_grad():
        assert torch.allclose(small(x), net(x), atol=1e-5)


class Knowing(nn.Module):
    """Knows how many channels it has."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.b(self.a(x).relu().mul(8.0).view(x.shape[0], 2, 4).flip(1).reshape(x.shape[0], 8))


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.b(self.a(x)) if x.sum() > 0 else self.b(self.a(-x))


@pytest.mark.parametrize(("kind", "said"), [(Knowing, "slim: no channel can be cut out"),
                                            (Branching, "slim: nothing is cut out, torch.fx cannot trace the model")])
def test_what_cannot_be_told_stays(kind, said, caplog):
    caplog.set_level("INFO")
    net, x = kind().eval(), torch.rand(5, 6)
    net.a.weight.data[:3] = 0
    small, counts = slimmed(net, x)
    assert counts == {} and type(small) is kind and torch.equal(small(x), net(x)) and any(said in m for m in caplog.messages)


def test_a_neuron_that_only_seems_dead_stays():
    """Off for all examples, but not by its weights."""
    net, x = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)).eval(), torch.rand(50, 6)
    net[0].weight.data[2], net[0].bias.data[2] = -1, -0.1
    net[0].weight.data[3] = 0
    assert not net[:2](x)[:, 2].any()
    small, counts = slimmed(net, x)
    assert counts == {"0": 1}
    with torch.no_grad():
        assert torch.allclose(small(-x), net(-x), atol=1e-6)


def test_a_layer_that_would_change_the_outputs_stays_and_the_log_says_so(monkeypatch, caplog):
    caplog.set_level("INFO")
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).eval(), torch.randn(9, 6)
    net[0].weight.data[:3], net[2].weight.data[:2] = 0, 0
    smaller = slim.smaller

    def broken(module, rows, reader, kept):
        made = smaller(module, rows, reader, kept)
        if reader is not None and reader.name == "2" and not kept(reader.ids).all():
            made._parameters["weight"].data.add_(1)
        return made

    monkeypatch.setattr(slim, "smaller", broken)
    small, counts = slimmed(net, x)
    assert counts == {"2": 2} and "slim: other outputs without channels of 0, which stay" in caplog.messages
    with torch.no_grad():
        assert torch.allclose(small(x), net(x), atol=1e-6)


class Sum(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.c(self.a(x) + self.b(x).relu())


def test_a_sum_with_what_only_seems_dead_stays(caplog):
    caplog.set_level("INFO")
    net, x = Sum().eval(), torch.rand(50, 6)
    net.a.weight.data[:2] = 0
    net.b.weight.data[0] = 0
    net.b.weight.data[1], net.b.bias.data[1] = -1, -0.1  # off for all examples
    small, counts = slimmed(net, x)
    assert counts == {"a": 1, "b": 1} and not any("other outputs" in message for message in caplog.messages)
    with torch.no_grad():
        assert torch.allclose(small(-x), net(-x), atol=1e-6)


def test_a_constant_is_not_folded_behind_padding(caplog):
    caplog.set_level("INFO")
    net, x = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 2, 3, padding=1), nn.Flatten()).eval(), torch.randn(5, 1, 8, 8)
    net[0].weight.data[:2] = 0
    net[0].bias.data[1] = 0  # this one is zero at the border too
    assert slimmed(net, x)[1] == {"0": 1} and not any("other outputs" in message for message in caplog.messages)
    net[1].padding_mode = "replicate"
    net[1]._reversed_padding_repeated_twice = [1] * 4
    small, counts = slimmed(net, x)
    assert counts == {"0": 2} and torch.allclose(small(x), net(x), atol=1e-6)
