import copy
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from evoprune.inputs.models import LeNet5, off_by, resnet18
from evoprune.masks.channels import Tracer
from evoprune.values import slim
from evoprune.values.fast import AveragePool2x2
from evoprune.values.slim import Gone, slimmed


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
    small, gone = slimmed(net, x)
    with torch.no_grad():
        assert torch.allclose(small(x), before(x), rtol=0, atol=1e-5 * float(before(x).abs().max()))
        assert torch.equal(net(x), before(x))
    assert size(small) < size(net)
    if kind in (PaddedShortcut, Gated) and shift:  # what is not zero cannot be folded behind padding, and varies with a gate
        expected = gone.channels
    assert gone.channels == expected


def test_a_lenet5_by_hand():
    torch.manual_seed(0)
    net, x = LeNet5().eval(), torch.randn(5, 1, 28, 28)
    for name, gone in (("feature.0", [1]), ("feature.3", [0, 3]), ("classifier.1", range(20)), ("classifier.3", [4])):
        net.get_submodule(name).weight.data[list(gone)] = 0
    small, gone = slimmed(net, x)
    assert gone.channels == {"feature.0": 1, "feature.3": 2, "classifier.1": 20, "classifier.3": 1}
    shapes = [tuple(small.get_submodule(name).weight.shape) for name in gone.channels]
    assert shapes == [(5, 1, 5, 5), (14, 5, 5, 5), (100, 350), (83, 100)]
    assert small.get_submodule("classifier.5").weight.shape == (10, 83)
    with torch.no_grad():
        assert torch.allclose(small(x), net(x), atol=1e-6)


def test_unread_positions_of_a_flatten_are_cut_out_by_one_select():
    torch.manual_seed(0)
    net, x = LeNet5().eval(), torch.randn(5, 1, 28, 28)
    net.classifier[1].weight.data[:, ::3] = 0
    small, gone = slimmed(net, x)
    assert gone == Gone(positions={"classifier.1": 134}) and small.get_submodule("classifier.1").in_features == 266
    with torch.no_grad():
        assert torch.allclose(small(x), net(x), atol=1e-6)


def macs(net, x):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(x[:1])
    return counter.get_total_flops() // 2


LENET5 = 28 * 28 * 3 * 25 + 10 * 10 * 8 * 3 * 25 + 200 * 60 + 60 * 42 + 42 * 10  # by hand, of half of the filters
STAGE = 32 * 64 * 9 + 3 * 64 * 64 * 9 + 32 * 64  # the second, a position: one convolution from the first, three, the shortcut
RESNET18 = 1024 * (32 * 3 * 9 + 4 * 32 * 32 * 9) + (256 + 4 * 64 + 16 * 16) * STAGE + 256 * 10


@pytest.mark.parametrize(("make", "shape", "dense", "half"), [
    (LeNet5, (1, 28, 28), 416_520, LENET5), (resnet18, (3, 32, 32), 555_422_720, RESNET18)])
def test_half_of_the_filters_leave_the_macs_that_there_are_by_hand(make, shape, dense, half):
    torch.manual_seed(0)
    net, x = make().eval(), torch.randn(2, *shape)
    *layers, last = [module for module in net.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    for layer in layers:
        layer.weight.data[::2] = 0
        if layer.bias is not None:
            layer.bias.data[::2] = 0
    small, gone = slimmed(net, x)
    assert sum(gone.channels.values()) == sum(len(layer.weight) for layer in layers) // 2
    assert (macs(net, x), macs(small, x)) == (dense, half)
    with torch.no_grad():
        assert torch.allclose(small(x), net(x), atol=1e-5)


def test_neurons_of_a_transformer_encoder():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    net = nn.Sequential(nn.Embedding(30, 16), nn.TransformerEncoder(layer, 2), nn.Flatten(), nn.Linear(160, 4)).eval()
    for i in (0, 1):
        net[1].layers[i].linear1.weight.data[:10] = 0
    x = torch.randint(30, (4, 10))
    small, gone = slimmed(net, x)
    assert gone.channels == {"1.layers.0.linear1": 10, "1.layers.1.linear1": 10}
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
    small, gone = slimmed(net, x)
    assert gone == Gone() and type(small) is kind and torch.equal(small(x), net(x)) and any(said in m for m in caplog.messages)


def test_a_neuron_that_only_seems_dead_stays():
    """Off for all examples, but not by its weights."""
    net, x = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)).eval(), torch.rand(50, 6)
    net[0].weight.data[2], net[0].bias.data[2] = -1, -0.1
    net[0].weight.data[3] = 0
    assert not net[:2](x)[:, 2].any()
    small, gone = slimmed(net, x)
    assert gone.channels == {"0": 1}
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
    small, gone = slimmed(net, x)
    assert gone.channels == {"2": 2} and "slim: other outputs without channels of 0, which stay" in caplog.messages
    with torch.no_grad():
        assert torch.allclose(small(x), net(x), atol=1e-6)


def test_what_only_rounding_makes_another_number_goes_and_the_log_says_by_how_much(caplog):
    """Constants of 1e5 that cancel in the next layer, but not once they are folded."""
    caplog.set_level("INFO")
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)).eval(), torch.randn(9, 6)
    net[0].weight.data[:4], net[0].bias.data[:4] = 0, 1e5
    net[2].bias.data -= 1e5 * net[2].weight.data[:, :4].sum(1)
    small, gone = slimmed(net, x)
    assert gone == Gone(channels={"0": 4}) and caplog.messages[-1].startswith("slim: by rounding alone outputs differ by ")
    with torch.no_grad():
        rounded, found, exact = net(x), small(x), net.double()(x.double())
    assert float((found - exact).abs().max()) < 1e-6 and float((rounded - exact).abs().max()) > 1e-4


def test_no_number_is_no_equal_output():
    none, one, other = (nn.Linear(2, 2).requires_grad_(False) for _ in range(3))
    none.weight.fill_(torch.nan)
    assert slim.difference(none, one, torch.ones(3, 2)) == slim.difference(one, none, torch.ones(3, 2)) == torch.inf
    assert slim.difference(one, one, torch.ones(3, 2)) == 0 < slim.difference(one, other, torch.ones(3, 2)) < torch.inf


def test_what_is_no_number_in_both_agrees_where_there_are_others():
    some, one, none = torch.tensor([torch.nan, 2.0]), torch.tensor([1.0, 2.0]), torch.full((2,), torch.nan)
    assert off_by(some, some) == 0 and off_by(some, some + 0.5) == 0.25
    assert np.isnan(off_by(some, one)) and np.isnan(off_by(one, some))
    assert off_by(none, none) == off_by(one, one[:1]) == torch.inf


class Logarithms(nn.Module):
    """Takes positive inputs alone; of the others outputs are no numbers."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.b(self.a(x.log()).relu())


def test_a_net_that_takes_positive_inputs_alone_is_cut():
    torch.manual_seed(0)
    net = Logarithms().eval()
    net.a.weight.data[:5], net.a.bias.data[:5] = 0, -1
    assert slimmed(net, torch.rand(9, 6) + 0.1)[1] == Gone(channels={"a": 5})


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
    small, gone = slimmed(net, x)
    assert gone.channels == {"a": 1, "b": 1} and not any("other outputs" in message for message in caplog.messages)
    with torch.no_grad():
        assert torch.allclose(small(-x), net(-x), atol=1e-6)


def test_a_constant_is_not_folded_behind_padding(caplog):
    caplog.set_level("INFO")
    net, x = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 2, 3, padding=1), nn.Flatten()).eval(), torch.randn(5, 1, 8, 8)
    net[0].weight.data[:2] = 0
    net[0].bias.data[1] = 0  # this one is zero at the border too
    assert slimmed(net, x)[1].channels == {"0": 1} and not any("other outputs" in message for message in caplog.messages)
    net[1].padding_mode = "replicate"
    net[1]._reversed_padding_repeated_twice = [1] * 4
    small, gone = slimmed(net, x)
    assert gone.channels == {"0": 2} and torch.allclose(small(x), net(x), atol=1e-6)


class Attending(nn.Module):
    """Two attentions, the second across inputs of other widths, with masks."""

    def __init__(self, batch_first, bias=True):
        super().__init__()
        self.a = nn.MultiheadAttention(16, 4, batch_first=batch_first, bias=bias)
        self.b = nn.MultiheadAttention(16, 2, kdim=6, vdim=5, batch_first=batch_first, bias=bias)
        self.batch_first = batch_first

    def forward(self, x, keys, values):
        x, keys, values = (each if self.batch_first else each.transpose(0, 1) for each in (x, keys, values))
        later = torch.ones(7, 7, dtype=torch.bool).triu(1)
        padded = (torch.arange(7) > 4).expand(3, 7)
        per_head = 3 * torch.arange(3.0 * 2 * 7 * 5).sin().view(6, 7, 5)
        x = x + self.a(x, x, x, attn_mask=later, key_padding_mask=padded)[0]
        x = x + self.b(x, keys, values, attn_mask=per_head)[0]
        return x if self.batch_first else x.transpose(0, 1)


def with_dead_heads(net):
    """Of four heads one is not read and one has no values, but one of its rows a bias; of two heads one has neither."""
    torch.manual_seed(0)
    for attention in (net.a, net.b):
        if attention.in_proj_bias is not None:
            nn.init.normal_(attention.in_proj_bias)
    net.a.out_proj.weight.data[:, 4:8] = 0
    net.a.in_proj_weight.data[32 + 8:32 + 12] = 0
    if net.a.in_proj_bias is not None:
        net.a.in_proj_bias.data[32 + 9:32 + 12] = 0
    net.b.v_proj_weight.data[:8] = 0
    if net.b.in_proj_bias is not None:
        net.b.in_proj_bias.data[32:40] = 0
    return net.eval()


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_dead_heads_are_cut_out(batch_first, bias, caplog):
    caplog.set_level("INFO")
    net, x = with_dead_heads(Attending(batch_first, bias)), (torch.randn(3, 7, 16), torch.randn(3, 5, 6), torch.randn(3, 5, 5))
    small, gone = slimmed(net, x)
    assert gone == Gone(heads={"a": 1 if bias else 2, "b": 1})
    assert caplog.messages == [f"slim: {gone.heads['a']} of 4 heads cut out of a", "slim: 1 of 2 heads cut out of b"]
    assert small.a.q.weight.shape == (12 if bias else 8, 16) and small.b.v.weight.shape == (8, 5)
    with torch.no_grad():
        assert torch.allclose(small(*x), net(*x), atol=1e-6) and not small.a.out.weight.requires_grad
    torch.export.export(small, x)


def test_heads_of_a_transformer_encoder_of_which_one_stays():
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), 2)
    net, x = nn.Sequential(encoder, nn.Flatten()).eval(), torch.randn(3, 7, 16)
    encoder.layers[0].self_attn.out_proj.weight.data.zero_()
    encoder.layers[1].self_attn.out_proj.weight.data[:, 4:8] = 0
    small, gone = slimmed(net, x)
    assert gone == Gone(heads={"0.layers.0.self_attn": 3, "0.layers.1.self_attn": 1})
    with torch.no_grad():
        assert torch.allclose(small(x), net(x), atol=1e-5)


class Telling(nn.Module):
    """Returns how it attends too; or lets torch compute attention between linear layers."""

    def __init__(self, tells):
        super().__init__()
        self.tells, self.a, self.q = tells, nn.MultiheadAttention(16, 4, batch_first=True), nn.Linear(16, 16)

    def forward(self, x):
        found, weights = self.a(x, x, x)
        x = self.q(x)[:, None]
        return found + (weights.sum() if self.tells else F.scaled_dot_product_attention(x, x, x)[:, 0])


@pytest.mark.parametrize("tells", [True, False])
def test_heads_that_have_to_stay_are_named(tells, caplog):
    caplog.set_level("INFO")
    net, x = Telling(tells).eval(), torch.randn(3, 7, 16)
    net.a.out_proj.weight.data[:, :4] = 0
    small, gone = slimmed(net, x)
    assert gone.heads == ({} if tells else {"a": 1})
    assert caplog.messages[0] == "slim: " + (
        "dead heads of a stay, its attention weights are used or it adds keys" if tells else
        "heads of scaled_dot_product_attention stay, how many there are is in the model's own code")
    assert torch.allclose(small(x), net(x), atol=1e-6)


def test_heads_that_would_change_the_outputs_stay_and_the_log_says_so(monkeypatch, caplog):
    caplog.set_level("INFO")
    net, x = with_dead_heads(Attending(True)), (torch.randn(3, 7, 16), torch.randn(3, 5, 6), torch.randn(3, 5, 5))
    monkeypatch.setattr(slim, "living_heads", lambda module: torch.tensor([True, False] * (module.num_heads // 2)))
    small, gone = slimmed(net, x)  # of the second the first is dead
    assert gone == Gone() and "slim: other outputs without heads of a, heads of b, which stay" in caplog.messages


def test_average_pools_run_faster_with_the_same_bits_and_are_exported_as_what_they_were():
    torch.manual_seed(0)
    net, x = killed(LeNet5(), {"feature.0": slice(3)}), torch.randn(32, 1, 28, 28)
    small, gone = slimmed(net, x)
    assert sum("average_2x2" in node.name for node in Tracer().trace(small).nodes) == 2  # one step each
    pools = [module for module in small.modules() if isinstance(module, nn.AvgPool2d)]
    assert gone.channels == {"feature.0": 3} and [type(pool) for pool in pools] == [AveragePool2x2] * 2
    with torch.no_grad():
        found = small(x)
        exported = torch.export.export(small, (x,))
        for pool in pools:
            pool.forward = partial(nn.AvgPool2d.forward, pool)
        assert torch.equal(small(x), found)
    assert str(exported.graph).count("avg_pool2d.default") == 2 and "slice" not in str(exported.graph)
