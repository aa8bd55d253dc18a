"""Attention in plain steps gives what torch's gives, and its projections are solved as linear layers are."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

import evoprune
from evoprune.masks.layers import find_layers
from evoprune.values.attention import Plain, plain_attention
from evoprune.values.repair import Repairer


def close(a, b):
    return torch.allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ["self", "cross", "other sizes"])
def test_plain_steps_give_what_torch_gives(kind, bias, batch_first):
    torch.manual_seed(0)
    sizes = {"kdim": 6, "vdim": 10} if kind == "other sizes" else {}
    module = nn.MultiheadAttention(8, 2, bias=bias, batch_first=batch_first, **sizes).eval().requires_grad_(False)
    if bias:
        module.in_proj_bias.normal_()
    query, memory = torch.randn(3, 3, 8), [torch.randn(3, 3, size) for size in ((6, 10) if sizes else (8, 8))]
    given = (query, query, query) if kind == "self" else (query, *memory)
    hidden = torch.tensor([[False, False, True], [False, True, True], [False, False, False]])
    causal = torch.full((3, 3), -math.inf).triu(1)
    masks = [{}, {"key_padding_mask": hidden}, {"attn_mask": causal}, {"attn_mask": causal == -math.inf},
             {"attn_mask": torch.randn(6, 3, 3)}, {"key_padding_mask": hidden, "attn_mask": causal == -math.inf}]
    called = []
    plain = Plain(module)
    for layer in plain.inputs.values():
        layer.register_forward_hook(lambda layer, args, output: called.append(layer))
    for options in masks:
        for extra in ({}, {"need_weights": False}, {"average_attn_weights": False}):
            expected = module(*given, **options, **extra)
            with plain_attention({module: plain}):
                found = module(*given, **options, **extra)
            assert close(found[0], expected[0])
            assert found[1] is None if expected[1] is None else close(found[1], expected[1])
    assert len(called) == {"self": 1, "cross": 0, "other sizes": 3}[kind] * 18
    assert "forward" not in vars(module) and torch.backends.mha.get_fastpath_enabled()


def test_what_plain_steps_cannot_do_is_left_to_torch():
    for module in (nn.MultiheadAttention(8, 2, add_bias_kv=True), nn.MultiheadAttention(8, 2, add_zero_attn=True)):
        query = torch.randn(3, 3, 8)
        expected = module.eval()(query, query, query)[0]
        with plain_attention({module: Plain(module)}):
            assert torch.equal(module(query, query, query)[0], expected)


class Tokens(nn.Module):
    """A transformer encoder over eight tokens, and cross-attention from one learnt query."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True, dropout=0.0)
        self.embed, self.encoder = nn.Linear(8, 16), nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.query, self.pool = nn.Parameter(torch.randn(1, 16)), nn.MultiheadAttention(16, 2, batch_first=True)
        self.head = nn.Linear(16, 10)

    def forward(self, x):
        x = self.encoder(self.embed(x))
        return self.head(self.pool(self.query.expand(len(x), 1, -1), x, x)[0][:, 0])


def test_all_of_self_attention_is_solved_and_the_masked_model_comes_nearer():
    torch.manual_seed(0)
    model, inputs = Tokens().eval().requires_grad_(False), torch.randn(200, 8, 8)
    layout, more = find_layers(model), torch.randn(500, 8, 8)
    net = copy.deepcopy(model)
    repairer = Repairer("least-squares", net, layout, inputs)
    assert repairer.left() == ["pool.in_proj_weight"]  # of several inputs
    masks = {layer.name: torch.rand(layer.shape) < 0.5 for layer in layout}
    for name, mask in masks.items():
        net.get_parameter(name).mul_(mask)
    masked = copy.deepcopy(net)
    repairer(masks)
    assert all((net.get_parameter(name)[~mask] == 0).all() for name, mask in masks.items())
    changed = [name for name, _ in net.named_parameters() if not torch.equal(net.get_parameter(name), masked.get_parameter(name))]
    assert {*(f"encoder.layers.0.self_attn.{name}" for name in ("in_proj_weight", "in_proj_bias", "out_proj.weight")),
            "encoder.layers.0.linear1.weight", "pool.out_proj.weight"} <= set(changed)
    assert net.state_dict().keys() == model.state_dict().keys()
    before, after = ((each(more) - model(more)).square().mean() for each in (masked, net))
    assert after < 0.5 * before


def test_one_projection_is_solved_as_the_same_linear_layer_would_be():
    """Queries, keys and values are three linear layers of one input: solved together, they are what each alone would be."""
    torch.manual_seed(0)

    class Split(nn.Module):
        def __init__(self, attention):
            super().__init__()
            self.parts = nn.ModuleList([nn.Linear(8, 8) for _ in range(3)])
            self.out, self.head = nn.Linear(8, 8), nn.Linear(8, 4)
            for part, weight, bias in zip(self.parts, attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3)):
                part.weight, part.bias = nn.Parameter(weight.clone()), nn.Parameter(bias.clone())
            self.out.load_state_dict(attention.out_proj.state_dict())

        def forward(self, x):
            q, k, v = (part(x).reshape(*x.shape[:2], 2, 4).transpose(1, 2) for part in self.parts)
            x = ((q @ k.transpose(-1, -2) / 2).softmax(-1) @ v).transpose(1, 2).flatten(2)
            return self.head(self.out(x)[:, 0])

    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.head = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 4)

        def forward(self, x):
            return self.head(self.attention(x, x, x)[0][:, 0])

    whole = Whole().eval().requires_grad_(False)
    split = Split(whole.attention).eval().requires_grad_(False)
    split.head.load_state_dict(whole.head.state_dict())
    images = torch.randn(150, 5, 8)
    mask = torch.rand(24, 8) < 0.5
    for net in (whole, split):
        layout = find_layers(net)
        masks = {layer.name: torch.ones(layer.shape, dtype=torch.bool) for layer in layout}
        parts = {"attention.in_proj_weight": mask} if net is whole else {
            f"parts.{i}.weight": part for i, part in enumerate(mask.chunk(3))}
        repairer = Repairer("least-squares", net, layout, images)
        masks.update(parts)
        for name, part in parts.items():
            net.get_parameter(name).mul_(part)
        repairer(masks)
    assert torch.allclose(whole.attention.in_proj_weight, torch.cat([part.weight for part in split.parts]), atol=1e-4)
    assert torch.allclose(whole(images), split(images), atol=1e-3)


def test_a_run_says_what_least_squares_leaves_and_what_share_that_is(tmp_path, caplog):
    caplog.set_level("INFO", "evoprune")
    torch.manual_seed(0)
    model = Tokens()
    data = torch.randn(60, 8, 8), torch.arange(60) % 10
    front = evoprune.prune(model, data, out=tmp_path / "run", repair="least-squares", knowledge="weights", start="lamp",
                           population=4, generations=0)
    share = 100 * 3 * 16 * 16 / front.layout.weights
    assert f"least squares leaves {share:.2f} % of the weights as they are: pool.in_proj_weight" in caplog.messages
    point = front.points[-1]
    assert abs(evoprune.accuracy(point.model(), front_split(data, 1)) - point.test_accuracy) < 1e-9


def front_split(data, half):
    """The half of the data that a run with the default seed searches (0) or tests (1) on."""
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(data[0])))
    chosen = order[:30] if half == 0 else order[30:]
    return data[0][chosen], data[1][chosen]
