import pytest
import torch
from torch import nn

from evoprune.errors import EvopruneError
from evoprune.inputs.models import LeNet5, resnet18
from evoprune.masks.layers import find_layers


def names(layout):
    return [layer.name for layer in layout]


def test_lenet5_has_the_layers_of_the_literature():
    layout = find_layers(LeNet5())
    assert names(layout) == [f"{n}.weight" for n in ("feature.0", "feature.3", "classifier.1", "classifier.3", "classifier.5")]
    assert layout.total == layout.weights == 61_470


def test_resnet18_has_21_layers_and_no_norm_among_them():
    model = resnet18()
    layout = find_layers(model)
    assert sum(p.numel() for p in model.parameters()) == 11_173_962
    assert len(layout) == 21 and layout.total == 11_164_352


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.position = nn.Parameter(torch.zeros(4, 8))
        self.attention = nn.MultiheadAttention(8, 2)
        self.norm = nn.LayerNorm(8)
        self.up, self.down = nn.Linear(8, 16), nn.ConvTranspose1d(16, 8, 1)
        self.again = self.up
        self.head = nn.Linear(8, 20)
        self.head.weight = self.embed.weight


def test_attention_counts_tied_weights_count_once_and_embeddings_are_left_alone():
    layout = find_layers(Transformer())
    assert names(layout) == ["attention.in_proj_weight", "attention.out_proj.weight", "up.weight", "down.weight"]
    assert names(find_layers(Transformer(), include="position")) == ["position", *names(layout)]
    assert "embed.weight" in names(find_layers(Transformer(), include="embed"))


def test_layer_and_skip_choose_by_module_or_parameter():
    model = LeNet5()
    assert names(find_layers(model, layer="classifier.1")) == ["classifier.1.weight"]
    assert names(find_layers(model, layer="feature.0.weight")) == ["feature.0.weight"]
    assert names(find_layers(model, layer="feature")) == ["feature.0.weight", "feature.3.weight"]
    assert names(find_layers(model, layer="classifier", skip="classifier.5")) == ["classifier.1.weight", "classifier.3.weight"]
    assert names(find_layers(model, skip="*.3,feature.*")) == ["classifier.1.weight", "classifier.5.weight"]
    assert find_layers(model, layer="feature.0").total == 61_470


@pytest.mark.parametrize(("options", "said"), [
    ({"layer": "conv9"}, "layer: nothing is called 'conv9'; there are 0.weight, 1.weight"),
    ({"skip": "conv*"}, "skip: nothing is called 'conv*'; there are 0.weight, 1.weight"),
    ({"skip": "*"}, "layer, skip: nothing is left to search; the model has 0.weight, 1.weight"),
])
def test_a_name_that_fits_nothing_says_what_exists(options, said):
    with pytest.raises(EvopruneError) as error:
        find_layers(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), **options)
    assert str(error.value) == said


def test_a_model_that_cannot_be_pruned_is_refused():
    with pytest.raises(EvopruneError, match="BatchNorm2d has no prunable weights"):
        find_layers(nn.BatchNorm2d(3))
    broken = nn.Linear(2, 2)
    broken.weight.data[0, 0] = float("nan")
    with pytest.raises(EvopruneError, match=r"weight holds NaN or infinity"):
        find_layers(broken)
