"""Which parameters are searched and which are not, of networks that torch's own modules do not make alone."""


import pytest
import torch
from torch import nn
from torch.nn.utils.prune import l1_unstructured

import evoprune
from evoprune.errors import EvopruneError
from evoprune.evaluation.usage import unused_parameters
from evoprune.inputs.models import private_copy
from evoprune.inputs.splits import Split, as_split
from evoprune.masks.layers import UNUSED, find_layers, left_out

IMAGES = Split(torch.randn(12, 6), torch.arange(12) % 3)


class Head(nn.Module):
    """A linear layer, an auxiliary head for training, one that nothing calls, and one whose weight alone is used."""

    def __init__(self, gradients=True):
        super().__init__()
        self.gradients = gradients
        self.body, self.head, self.auxiliary, self.forgotten, self.inner = (nn.Linear(6, n) for n in (6, 3, 3, 3, 6))

    def forward(self, x):
        with torch.set_grad_enabled(self.gradients and torch.is_grad_enabled()):
            x = self.body(x).relu()
            x = nn.functional.linear(x, self.inner.weight)
            return (self.head(x), self.auxiliary(x)) if self.training else self.head(x)


@pytest.mark.parametrize("gradients", [True, False])
def test_layers_that_the_forward_pass_does_not_use_are_neither_searched_nor_counted(gradients):
    model = Head(gradients)
    unused = unused_parameters(model, IMAGES, [layer.name for layer in find_layers(model)])
    assert unused == ("auxiliary.weight", "forgotten.weight")
    layout = find_layers(model, unused=unused)
    assert [layer.name for layer in layout] == ["body.weight", "head.weight", "inner.weight"]
    assert layout.total == layout.weights == 90
    assert left_out(model, layout, unused)[UNUSED] == [("auxiliary.weight", 18), ("forgotten.weight", 18)]


def test_a_run_of_a_model_with_an_unused_head_says_so_and_its_points_keep_it(tmp_path, caplog):
    caplog.set_level("INFO", "evoprune")
    model = Head()
    data = (torch.randn(60, 6), torch.arange(60) % 3)
    front = evoprune.prune(model, data, out=tmp_path / "run", population=8, generations=2, engine="processes", workers=1)
    said = [record.getMessage() for record in caplog.records if "not searched" in record.getMessage()]
    assert said == ["not searched: 38.78 % of 147 parameters: 21 in biases and norms; "
                    "36 that the forward pass does not use (auxiliary.weight, forgotten.weight)"], said
    assert all(torch.equal(point.model().auxiliary.weight, model.auxiliary.weight) for point in front)
    assert front.layout.total == 90


class Recurrent(nn.Module):
    def __init__(self, kind, **options):
        super().__init__()
        self.cells = kind(4, 5, **options)
        self.head = nn.Linear(options.get("proj_size", 5), 3)

    def forward(self, x):  # (batch, 6) -> (batch, 3)
        x = x.unfold(1, 4, 1)  # (batch, 3, 4)
        if isinstance(self.cells, nn.RNNBase):
            return self.head(self.cells(x)[0][:, -1, :5])
        found = self.cells(x[:, 0])
        return self.head(found[0] if isinstance(found, tuple) else found)


class Conv1D(nn.Module):
    """Hugging Face's linear layer of GPT-2, whose weight is (in, out)."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf = nf
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf)), nn.Parameter(torch.zeros(nf))

    def forward(self, x):
        return x @ self.weight + self.bias


def computed(make):
    return lambda: nn.Sequential(make(nn.Linear(6, 6)), nn.ReLU(), nn.Linear(6, 3))


MODELS = {
    "lstm": (lambda: Recurrent(nn.LSTM, num_layers=2, bidirectional=True, batch_first=True),
             {"cells.weight_ih_l0": 80, "cells.weight_hh_l0": 100, "cells.weight_ih_l1_reverse": 200, "head.weight": 15}),
    "projected lstm": (lambda: Recurrent(nn.LSTM, proj_size=3, batch_first=True), {"cells.weight_hr_l0": 15}),
    "gru": (lambda: Recurrent(nn.GRU, batch_first=True), {"cells.weight_ih_l0": 60, "cells.weight_hh_l0": 75}),
    "cell": (lambda: Recurrent(nn.LSTMCell), {"cells.weight_ih": 80, "cells.weight_hh": 100}),
    "conv1d": (lambda: nn.Sequential(Conv1D(8, 6), nn.ReLU(), Conv1D(3, 8)), {"0.weight": 48, "2.weight": 24}),
    "spectral norm": (computed(nn.utils.parametrizations.spectral_norm), {"0.parametrizations.weight.original": 36}),
    "old spectral norm": (computed(nn.utils.spectral_norm), {"0.weight_orig": 36}),
    "pruned before": (computed(lambda layer: l1_unstructured(layer, "weight", 0.25)), {"0.weight_orig": 36}),
}


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("kind", MODELS)
def test_recurrent_turned_and_computed_weights_are_searched(kind, tmp_path):
    make, expected = MODELS[kind]
    torch.manual_seed(0)
    model = make()
    data = (torch.randn(60, 6), torch.arange(60) % 3)
    front = evoprune.prune(model, data, out=tmp_path / "run", population=8, generations=2, seed=1)
    sizes = {layer.name: layer.weights for layer in front.layout}
    assert expected.items() <= sizes.items() and front.layout.total == front.layout.weights
    point = front.points[-1]
    assert point.sparsity > 0.5
    pruned, parameters = point.model(), dict(model.named_parameters())
    for name, mask in point.masks().items():
        value = dict(pruned.named_parameters())[name]
        assert torch.equal(value, parameters[name] * mask)
    first = pruned[0] if isinstance(pruned, nn.Sequential) else None
    if isinstance(first, nn.Linear):
        with torch.no_grad():
            first(torch.zeros(1, 6))
        assert bool((first.weight[~next(iter(point.masks().values()))] == 0).all())
    assert evoprune.accuracy(pruned, (data[0], data[1])) >= 0


def test_a_filter_of_a_turned_layer_is_one_output():
    layout = find_layers(Conv1D(8, 6), units=[("*", "filter")])
    assert layout[0].gene_shape == (1, 8)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
@pytest.mark.parametrize(("make", "name"), [
    (nn.utils.parametrizations.orthogonal, "parametrizations.weight.original"),  # where that is zero, the weight is not
    (nn.utils.parametrizations.weight_norm, "parametrizations.weight.original1"),  # not a number, where a row is zero
    (nn.utils.weight_norm, "weight_v")])
def test_a_weight_whose_source_cannot_be_pruned_is_counted_and_named(make, name):
    model = nn.Sequential(make(nn.Linear(6, 6)), nn.Linear(6, 3))
    layout = find_layers(model)
    assert [layer.name for layer in layout] == ["1.weight"] and layout.total == 18 + 36
    assert left_out(model, layout, ())["in weights computed from others"] == [(f"0.{name}", 36)]
    with pytest.raises(EvopruneError, match="has no prunable weights, .*; bake them in first, with torch.nn.utils.remove_weight"):
        find_layers(model[:1])


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
def test_a_run_beside_weight_norm_goes_well(tmp_path):
    model = nn.Sequential(nn.utils.weight_norm(nn.Linear(6, 6)), nn.ReLU(), nn.Linear(6, 3))
    model(torch.ones(1, 6)).sum().backward()
    front = evoprune.prune(model, (torch.randn(60, 6), torch.arange(60) % 3), out=tmp_path / "run", population=8, generations=1)
    assert front.points[-1].sparsity <= 18 / 54 and front.points[-1].model()(torch.ones(2, 6)).shape == (2, 3)


def test_every_parameter_is_searched_or_left_out_once():
    class Many(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head, self.place = nn.Embedding(9, 6), nn.Linear(6, 9), nn.Parameter(torch.zeros(4, 6))
            self.head.weight = self.embed.weight
            self.other, self.norm, self.last = nn.Embedding(3, 6), nn.LayerNorm(6), nn.Linear(6, 6)
            self.attention = nn.MultiheadAttention(6, 2)

    model = Many()
    layout = find_layers(model, skip="last")
    apart = left_out(model, layout, ())
    names = [name for each in apart.values() for name, _ in each] + [layer.name for layer in layout]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    assert {reason: sum(size for _, size in each) for reason, each in apart.items()} == {
        "in weights tied to embeddings": 54, "in others": 24, "in embeddings": 18, "left out by --layer or --skip": 36,
        "in biases and norms": 9 + 6 + 6 + 6 + 18 + 6}
    assert layout.total == 54 + 36 + 4 * 36  # the tied matrix, which would otherwise be pruned unseen, is counted


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
def test_a_copy_of_computed_weights_follows_its_own_parameters():
    model = nn.utils.weight_norm(nn.Linear(3, 2))
    model(torch.ones(1, 3)).sum().backward()
    other = private_copy(model)
    with torch.no_grad():
        other.weight_g.mul_(2)
    x = torch.randn(4, 3)
    assert torch.allclose(other(x) - other.bias, 2 * (model(x) - model.bias))


class Versioned(nn.Linear):
    """As MNASNet does: refuses a state dict that does not say its version."""

    _version = 2

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args):
        if local_metadata.get("version") not in (1, 2):
            raise ValueError("version should be set to 1 or 2")
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)


def test_a_model_that_wants_versions_in_its_state_dict_is_loaded_again(tmp_path):
    from safetensors.torch import save_file

    model, data = nn.Sequential(Versioned(6, 3)), (torch.randn(30, 6), torch.arange(30) % 3)
    front = evoprune.prune(model, data, out=tmp_path / "run", population=8, generations=1)
    assert front.points[0].model().state_dict().keys() == model.state_dict().keys()
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    evoprune.prune(model, data, out=tmp_path / "again", weights=str(tmp_path / "w.safetensors"), population=8, generations=1)


def test_a_single_layer_that_torch_has_pruned_is_pruned_further(tmp_path):
    """Its hook is that of the whole model, which a graph of it would lose."""
    torch.manual_seed(0)
    layer = l1_unstructured(nn.Linear(16, 3), "weight", 0.5)
    images = torch.randn(60, 16)
    labels = layer(images).argmax(1).detach()
    front = evoprune.prune(layer, evoprune.Data(None, (images, labels), (images, labels)), out=tmp_path / "run", population=8,
                           generations=2, threads=1)
    for point in front:
        assert evoprune.accuracy(point.model(), as_split((images, labels), "test")) == point.test_accuracy
    assert front[0].accuracy == 1 and len(front) > 1
