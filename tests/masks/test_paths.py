import copy

import numpy as np
import pytest
import torch
from nets import Block
from torch import nn

from evoprune.inputs.models import LeNet, LeNet5
from evoprune.masks.channels import find_channels
from evoprune.masks.genome import from_masks, get_bits, kept_genes, set_bits
from evoprune.masks.layers import find_layers
from evoprune.masks.paths import drop_dead
from evoprune.values.repair import Repairer


class Odd(nn.Module):
    """The first layer's channels are mixed by something unknown: only the second's readers can be told."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(64, 12), nn.Linear(12, 9), nn.Linear(9, 10)

    def forward(self, x):
        x = self.a(x.flatten(1))
        return self.c(self.b(x.cumsum(1)).relu())


def masked(model, layout, individual):
    model = copy.deepcopy(model).eval()
    for i, layer in enumerate(layout):
        model.get_parameter(layer.name).data *= torch.from_numpy(get_bits(individual, i, layout)).view(layer.shape)
    return model


def dead_by_hand(model, layout, individual, inputs):
    """The obvious slow way: a kept weight is dead if making it NaN leaves the output finite... of its whole row."""
    dead = []
    for i, layer in enumerate(layout):
        genes = get_bits(individual, i, layout).reshape(layer.shape[0], -1)
        for row in np.flatnonzero(genes.any(1)):
            net = masked(model, layout, individual)
            before = net(inputs)
            weight = net.get_parameter(layer.name).data
            weight[row] += torch.randn_like(weight[row])
            if torch.equal(net(inputs), before):
                dead.append((i, int(row)))
    return dead


@pytest.mark.parametrize(("make", "side"), [(LeNet5, 28), (LeNet, 8), (Block, 8), (Odd, 8)])
@pytest.mark.parametrize("density", [0.3, 0.02, 0.008])
def test_dropping_dead_paths_changes_no_output_bit(make, side, density):
    torch.manual_seed(0)
    rng = np.random.default_rng(1)
    model = make().eval()
    layout, inputs = find_layers(model), torch.randn(5, 1, side, side)
    channels = find_channels(model, layout, inputs[:2])
    assert len(channels) == {LeNet5: 4, LeNet: 3, Block: 2, Odd: 1}[make]
    dropped = 0
    for _ in range(10):
        individual = from_masks((rng.random(layer.shape) < density for layer in layout), "x")
        less = individual.clone()
        for i, genes in drop_dead(individual, layout, channels).items():
            assert not (genes & ~get_bits(individual, i, layout)).any()
            dropped += int((get_bits(individual, i, layout) & ~genes).sum())
            set_bits(less, i, genes)
        with torch.no_grad():
            assert torch.equal(masked(model, layout, individual)(inputs), masked(model, layout, less)(inputs))
        assert drop_dead(less, layout, channels) == {}
    assert dropped or density > 0.01 or make is Odd


def test_it_finds_what_the_obvious_slow_way_finds():
    torch.manual_seed(0)
    rng = np.random.default_rng(3)

    class Linear(nn.Module):  # no ReLU: what reads a channel always shows
        def __init__(self):
            super().__init__()
            self.conv, self.fc1, self.fc2 = nn.Conv2d(1, 6, 3), nn.Linear(6 * 4, 12), nn.Linear(12, 10)

        def forward(self, x):
            return self.fc2(self.fc1(nn.functional.avg_pool2d(self.conv(x), 3).flatten(1)).tanh())

    model, inputs = Linear().eval(), torch.randn(3, 1, 8, 8)
    layout = find_layers(model)
    channels = find_channels(model, layout, inputs)
    found = 0
    for _ in range(10):
        individual = from_masks((rng.random(layer.shape) < 0.06 for layer in layout), "x")
        changed = drop_dead(individual, layout, channels)
        rows = [(i, int(row)) for i, genes in changed.items() for row in np.flatnonzero(
            (get_bits(individual, i, layout) & ~genes).reshape(layout[i].shape[0], -1).any(1))]
        with torch.no_grad():
            assert sorted(rows) == dead_by_hand(model, layout, individual, inputs)
        found += len(rows)
    assert found > 20


class Tied(nn.Module):
    """An autoencoder whose decoder has the encoder's weights, by their values, and a layer of one vector."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(9, 8), nn.Linear(8, 4)
        self.vector, self.g = nn.Parameter(torch.randn(9)), nn.Linear(9, 4)

    def forward(self, x):
        z = self.b(self.a(x).relu()) + self.g(self.vector)
        return nn.functional.linear(nn.functional.linear(z, self.b.weight.t()).relu(), self.a.weight.t())


def test_weights_that_are_read_by_their_values_too_are_kept():
    model = Tied().eval()
    assert find_channels(model, find_layers(model), torch.randn(2, 9)) == []


def test_a_model_that_cannot_be_traced_keeps_everything():
    class Branching(LeNet):
        def forward(self, x):
            return super().forward(x if x.sum() > 0 else -x)

    model = Branching()
    assert find_channels(model, find_layers(model), torch.randn(2, 1, 8, 8)) == []


def test_weights_that_read_a_constant_are_dead_where_least_squares_makes_up_for_it():
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    model = LeNet5().eval()
    layout, images = find_layers(model), torch.randn(64, 1, 28, 28)
    channels = find_channels(model, layout, images[:2])
    repairer = Repairer("least-squares", net := copy.deepcopy(model).requires_grad_(False), layout, images)
    absorbing = {i for i, layer in enumerate(layout) if layer.name in repairer.absorbing()}
    assert absorbing == {1, 2, 3, 4}  # the first convolution is padded
    individual = from_masks((rng.random(layer.shape) < d for layer, d in zip(layout, (0.04, 0.02, 0.01, 0.02, 0.3))), "x")
    less = individual.clone()
    for places, group in (((), individual), (absorbing, less)):
        for i, genes in drop_dead(group, layout, channels, places).items():
            set_bits(group, i, genes)
    assert sum(map(kept_genes, less)) < sum(map(kept_genes, individual))
    logits = []
    for each in (individual, less):
        net.load_state_dict(masked(model, layout, each).state_dict())
        repairer({layer.name: torch.from_numpy(get_bits(each, i, layout)).view(layer.shape) for i, layer in enumerate(layout)})
        with torch.no_grad():
            logits.append(net(torch.randn(50, 1, 28, 28, generator=torch.Generator().manual_seed(1))))
    assert torch.allclose(*logits, atol=1e-3 * float(logits[0].abs().max())) and logits[0].std(0).max() > 0.01


class Tokens(nn.Module):
    """Two layers of a transformer encoder over eight tokens of eight features."""

    def __init__(self, **options):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, dim_feedforward=24, batch_first=True, **options)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.up, self.down = nn.Linear(8, 20), nn.Linear(20, 10)

    def forward(self, x):
        x = self.encoder(x.flatten(1, 2))
        return self.down(torch.nn.functional.gelu(self.up(x))).mean(1)


@pytest.mark.parametrize("options", [{}, {"norm_first": True}, {"activation": "gelu"}])
def test_neurons_between_the_layers_of_tokens_can_die(options):
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    model, inputs = Tokens(**options).eval(), torch.randn(3, 1, 8, 8)
    layout = find_layers(model)
    channels = find_channels(model, layout, inputs[:2])
    names = [sorted(layout[i].name for i in (*each.makers, *each.readers)) for each in channels]
    assert names == [["down.weight", "up.weight"], *([f"encoder.layers.{i}.linear{k}.weight" for k in (1, 2)] for i in (1, 0))]
    for density in (0.5, 0.05):
        individual = from_masks((rng.random(layer.shape) < density for layer in layout), "x")
        less = individual.clone()
        for i, genes in drop_dead(individual, layout, channels).items():
            set_bits(less, i, genes)
        assert sum(map(kept_genes, less)) < sum(map(kept_genes, individual)) or density == 0.5
        with torch.no_grad():
            outputs = [masked(model, layout, each)(inputs) for each in (individual, less)]
        assert torch.equal(*outputs)
    assert "forward" not in vars(model.encoder) and "forward" not in vars(model.encoder.layers[0])


def test_tokens_that_are_mixed_keep_their_channels():
    class Mixing(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.across, self.down = nn.Linear(8, 20), nn.Linear(8, 8), nn.Linear(20, 10)

        def forward(self, x):
            x = self.up(x[:, 0])  # (batch, 8, 20)
            return self.down(self.across(x.transpose(1, 2)).transpose(1, 2)).mean(1)

    model = Mixing().eval()
    assert find_channels(model, find_layers(model), torch.randn(2, 1, 8, 8)) == []


def test_a_channel_that_is_summed_with_something_else_is_no_constant():
    """Nothing is known of the images beside a dead row: what reads the sum is not dead."""
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x):
            return self.head(self.table(x) + x)

    model, inputs = Sum().eval(), torch.randn(4, 6)
    layout = find_layers(model)
    individual = from_masks([np.zeros((6, 6), bool), np.ones((3, 6), bool)], "x")
    assert drop_dead(individual, layout, find_channels(model, layout, inputs), absorbing={1}) == {}
