"""nn.MultiheadAttention in plain steps, so that what enters and leaves its projections can be seen and they be solved as linear
layers, or some of its heads left out. Its own forward hands all weights to one kernel.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Plain:
    """The forward pass of one nn.MultiheadAttention, whose input projections are linear layers that share its parameters.

    `inputs` has them by the name of their weight: one for queries, keys and values where all three are one tensor's.
    """

    def __init__(self, module: nn.MultiheadAttention):
        self.module, bias = module, module.in_proj_bias
        if module._qkv_same_embed_dim:
            self.inputs = {"in_proj_weight": sharing(module.in_proj_weight, bias)}
        else:
            biases = [None] * 3 if bias is None else bias.chunk(3)
            self.inputs = {f"{name}_proj_weight": sharing(getattr(module, f"{name}_proj_weight"), part)
                           for name, part in zip("qkv", biases)}

    def possible(self, query: Tensor) -> bool:
        """Return whether `__call__` does what the module does."""
        module = self.module
        return query.dim() == 3 and module.bias_k is None and module.bias_v is None and not module.add_zero_attn and \
            not module.training

    def projected(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        """Return queries, keys and values, (batch, tokens, features)."""
        given = (query, key, value)
        if len(self.inputs) == 3:
            return [layer(x) for layer, x in zip(self.inputs.values(), given)]
        layer = self.inputs["in_proj_weight"]
        if query is key and key is value:
            return list(layer(query).chunk(3, -1))
        biases = [None] * 3 if layer.bias is None else layer.bias.chunk(3)  # several inputs, no one linear layer
        return [nn.functional.linear(x, weight, bias) for x, weight, bias in zip(given, layer.weight.chunk(3), biases)]

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None = None,
                 need_weights: bool = True, attn_mask: Tensor | None = None, average_attn_weights: bool = True,
                 is_causal: bool = False) -> tuple[Tensor, Tensor | None]:
        # 8 arguments: those of nn.MultiheadAttention.forward
        module = self.module
        if not self.possible(query):
            return type(module).forward(module, query, key, value, key_padding_mask, need_weights, attn_mask,
                                        average_attn_weights, is_causal)
        found = self.projected(query, key, value)
        if not module.batch_first:
            found = [x.transpose(0, 1) for x in found]
        q, k, v = (x.reshape(*x.shape[:2], module.num_heads, -1).transpose(1, 2) for x in found)  # (batch, heads, tokens, d)
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        if attn_mask is not None:  # (tokens, tokens) or (batch * heads, tokens, tokens)
            scores = scores + added(attn_mask if attn_mask.dim() == 2 else attn_mask.view_as(scores), scores)
        if key_padding_mask is not None:
            scores = scores + added(key_padding_mask, scores)[:, None, None]
        weights = scores.softmax(-1)
        outputs = (weights @ v).transpose(1, 2).flatten(2)
        outputs = module.out_proj(outputs if module.batch_first else outputs.transpose(0, 1))
        return outputs, (weights.mean(1) if average_attn_weights else weights) if need_weights else None


class FewerHeads(nn.Module):
    """What is left of an nn.MultiheadAttention without some of its heads, in eval mode; it returns no attention weights."""

    def __init__(self, module: nn.MultiheadAttention, kept: Tensor):
        super().__init__()
        rows, self.batch_first = kept.repeat_interleave(module.head_dim), module.batch_first
        self.heads, self.before = int(kept.sum()), len(kept)
        self.places: Tensor
        self.register_buffer("places", kept.nonzero()[:, 0])
        for name, (weight, bias) in zip("qkv", projections(module)):
            self.add_module(name, linear(weight[rows], None if bias is None else bias[rows]))
        self.out = linear(module.out_proj.weight[:, rows], module.out_proj.bias)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None = None,
                need_weights: bool = True, attn_mask: Tensor | None = None, average_attn_weights: bool = True,
                is_causal: bool = False) -> tuple[Tensor, None]:
        # 8 arguments: those of nn.MultiheadAttention.forward
        given = [x if self.batch_first else x.transpose(0, 1) for x in (query, key, value)]
        q, k, v = (getattr(self, name)(x).reshape(*x.shape[:2], self.heads, -1).transpose(1, 2) for name, x in zip("qkv", given))
        mask = None
        if attn_mask is not None:  # (tokens, tokens) or (batch * heads, tokens, tokens)
            if attn_mask.dim() == 3:
                attn_mask = attn_mask.view(-1, self.before, *attn_mask.shape[1:])[:, self.places]
            mask = added(attn_mask, q)
        if key_padding_mask is not None:
            hidden = added(key_padding_mask, q)[:, None, None]
            mask = hidden if mask is None else mask + hidden
        found = self.out(nn.functional.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2))
        return found if self.batch_first else found.transpose(0, 1), None


def projections(module: nn.MultiheadAttention) -> list[tuple[Tensor, Tensor | None]]:
    """Return weight and bias of the projections of queries, keys and values."""
    weights = module.in_proj_weight.chunk(3) if module._qkv_same_embed_dim else (
        module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
    biases = [None] * 3 if module.in_proj_bias is None else module.in_proj_bias.chunk(3)
    return list(zip(weights, biases))


def living_heads(module: nn.MultiheadAttention) -> Tensor:
    """Return which heads add anything to the output, (heads,) bool: some weight of the output projection, and some value. At
    least one stays."""
    weight, bias = projections(module)[2]
    values = weight.detach().any(1) if bias is None else weight.detach().any(1) | (bias.detach() != 0)
    lives = (values & module.out_proj.weight.detach().any(0)).view(module.num_heads, -1).any(1)
    return lives if lives.any() else torch.arange(module.num_heads) == 0


def linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """Return a linear layer with copies of these values."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    return layer


def sharing(weight: nn.Parameter, bias: Tensor | None) -> nn.Linear:
    """Return a linear layer that has this weight, and this bias as a view."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = weight
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return layer


def added(mask: Tensor, scores: Tensor) -> Tensor:
    """Return a mask as it is added to scores: where it is bool, True hides."""
    return torch.zeros_like(mask, dtype=scores.dtype).masked_fill(mask, -math.inf) if mask.dtype == torch.bool else mask


@contextmanager
def plain_attention(found: dict[nn.MultiheadAttention, Plain]) -> Iterator[None]:
    """Let attention take plain steps for a while, and torch's transformer encoders call it."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(not found and fast)
    for module, forward in found.items():
        module.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        for module in found:
            del module.forward
        torch.backends.mha.set_fastpath_enabled(fast)
