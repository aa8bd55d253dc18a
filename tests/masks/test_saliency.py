import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from evoprune.inputs.models import differentiable
from evoprune.masks.layers import find_layers
from evoprune.masks.layout import Layer
from evoprune.masks.saliency import NEEDS_DATA, SALIENCIES, gradient_squares, keep_top
from evoprune.values.training import grown

LAYOUT = (Layer("a", (6, 5)), Layer("b", (4, 3, 2, 2)))


@pytest.fixture
def weights():
    torch.manual_seed(0)
    return [torch.randn(6, 5), torch.randn(4, 3, 2, 2)]


@pytest.mark.parametrize("name", SALIENCIES)
def test_scores_are_shaped_like_the_weights_and_lowest_at_zero(name, weights):
    weights[0][2:4] = 0
    scores = SALIENCIES[name](weights, [torch.rand_like(w) + 0.1 for w in weights] if name in NEEDS_DATA else None)
    assert [s.shape for s in scores] == [w.shape for w in weights]
    assert all(bool(((s > 0) == (w != 0)).all()) and bool((s >= 0).all()) for s, w in zip(scores, weights))


def test_lamp_equals_its_definition(weights):
    for w, scores in zip(weights, SALIENCIES["lamp"](weights, None)):
        square = w.double().numpy().ravel() ** 2
        expected = [v / square[square >= v].sum() for v in square]
        assert np.allclose(scores.numpy().ravel(), expected, rtol=1e-12)


def test_the_highest_are_kept_and_of_equal_ones_the_first(weights):
    rounded = [torch.round(w * 2) for w in weights]  # many ties
    for scores in (weights, rounded):
        flat = torch.cat([s.reshape(-1) for s in scores]).numpy()
        order = np.argsort(-flat, kind="stable")
        for count in (0, 1, 7, 30, 77, 78):
            expected = np.zeros(78, bool)
            expected[order[:count]] = True
            kept = keep_top(scores, count, LAYOUT)
            assert [k.shape for k in kept] == [s.shape for s in scores]
            assert np.array_equal(torch.cat([k.reshape(-1) for k in kept]).numpy(), expected)


@pytest.mark.gpu
def test_the_gpu_keeps_the_same(weights):
    for scores in (weights, [torch.round(w * 2) for w in weights]):
        for count in (1, 7, 30, 77):
            on_gpu = keep_top([s.cuda() for s in scores], count, LAYOUT)
            assert all(torch.equal(a.cpu(), b) for a, b in zip(on_gpu, keep_top(scores, count, LAYOUT)))


class TwoHeads(nn.Module):
    """Returns logits and what no loss reaches."""

    def __init__(self):
        super().__init__()
        self.body, self.head, self.other = nn.Linear(64, 8), nn.Linear(8, 10), nn.Linear(8, 3)

    def forward(self, x):
        x = self.body(x.flatten(1)).relu()
        return self.head(x), self.other(x)


@pytest.mark.parametrize("model", [nn.Sequential(nn.LSTM(3, 4)), nn.Sequential(nn.Linear(3, 4))])
def test_recurrent_layers_pass_gradients_back_in_eval_mode_without_cudnn(model):
    before = torch.backends.cudnn.enabled
    with pytest.raises(ZeroDivisionError), differentiable(model):
        assert torch.backends.cudnn.enabled == (before and isinstance(model[0], nn.Linear))
        1 / 0  # noqa: B018
    assert torch.backends.cudnn.enabled == before


def test_what_the_loss_does_not_reach_or_is_frozen_has_gradients(digits):
    net, names = TwoHeads(), ["body.weight", "head.weight", "other.weight"]
    net.body.requires_grad_(False)
    body, head, other = gradient_squares(net, names, digits.train, 32, 64)
    assert body.any() and head.any() and not other.any()
    layout = find_layers(net)
    none = {name: torch.zeros_like(net.get_parameter(name), dtype=torch.bool) for name in names}
    kept = grown(net, digits.train, none, layout, 20, 64, seed=0)
    assert sum(int(mask.sum()) for mask in kept.values()) == 20 and not kept["other.weight"].any()
    assert not net.body.weight.requires_grad and net.body.weight.grad is None


def test_gradient_squares_are_those_of_backward_and_leave_the_model_alone(lenet, digits, layout):
    names = [layer.name for layer in layout]
    before = copy.deepcopy(lenet.state_dict())
    squares = gradient_squares(lenet, names, digits.search, 16, 40)
    net = copy.deepcopy(lenet).eval()
    expected = [torch.zeros(layer.shape) for layer in layout]
    for i in (slice(0, 16), slice(16, 32), slice(32, 40)):
        net.zero_grad()
        F.cross_entropy(net(digits.search.inputs(i)), digits.search.labels[i]).backward()
        for name, total in zip(names, expected):
            total += dict(net.named_parameters())[name].grad ** 2 / 3
    assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-9) for a, b in zip(squares, expected))
    assert all(torch.equal(v, before[k]) for k, v in lenet.state_dict().items())
