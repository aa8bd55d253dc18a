import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from evoprune.values import sparse
from evoprune.values.sparse import SparseConv2d, SparseLinear, sparsely_run

mkl = pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="torch has no MKL here")


def pruned(layer, density=0.1):
    generator = torch.Generator().manual_seed(0)
    layer.weight.data *= torch.rand(layer.weight.shape, generator=generator) < density
    return layer


@mkl
@pytest.mark.parametrize("layer", [
    nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, (3, 5), stride=(2, 1), padding=(1, 2), dilation=(1, 2), bias=False), nn.Conv2d(3, 8, 1),
    nn.Conv2d(3, 8, 1, stride=2), nn.Linear(12, 7), nn.Linear(12, 7, bias=False)], ids=str)
def test_a_sparse_layer_computes_what_the_dense_one_does(layer):
    pruned(layer, 0.3)
    torch.manual_seed(0)
    inputs = [torch.randn(4, 3, 12, 12), torch.randn(1, 3, 13, 12)] if isinstance(layer, nn.Conv2d) else [
        torch.randn(4, 12), torch.randn(2, 5, 12)]
    with torch.no_grad(), warnings.catch_warnings(action="error"):
        made = SparseConv2d(layer) if isinstance(layer, nn.Conv2d) else SparseLinear(layer)
        for x in inputs:
            assert torch.allclose(made(x), layer(x), atol=1e-5)


class Net(nn.Module):
    """Two layers that can run sparse, and some that cannot: too dense, grouped, called twice."""

    def __init__(self):
        super().__init__()
        self.conv, self.dense, self.grouped = pruned(nn.Conv2d(3, 8, 3)), nn.Conv2d(8, 8, 1), pruned(nn.Conv2d(8, 8, 3, groups=4))
        self.twice, self.head, self.drop = pruned(nn.Linear(8, 8)), pruned(nn.Linear(8, 4)), nn.Dropout()

    def forward(self, x):
        x = self.drop(self.grouped(self.dense(self.conv(x).relu())).mean((2, 3)))
        return self.head(self.twice(self.twice(x)))


def test_what_is_slow_is_timed_in_few_rounds(monkeypatch):
    clock, lasts = [0.0], [4.0, 1.0, 2.0, 9.0]
    seen: list[int] = []

    def measure(timer, min_run_time):
        function = timer._globals["function"]
        seen.append(function)
        clock[0] += lasts[function]
        return SimpleNamespace(median=lasts[function] + len(seen))
    monkeypatch.setattr("torch.utils.benchmark.Timer.blocked_autorange", measure)
    monkeypatch.setattr(sparse.time, "perf_counter", lambda: clock[0])
    assert sparse.timed(0, 1) == [4 + 6, 1 + 7] and seen == [0, 1] * 6  # 30 s are over after six rounds
    seen.clear()
    assert sparse.timed(1) == [1 + 4] and seen == [1] * 7
    seen.clear()
    assert sparse.timed(3, 2) == [9 + 3, 2 + 4] and seen == [3, 2] * 3


@mkl
@pytest.mark.parametrize(("seconds", "expected"), [
    ([3.0, 1.0], {"conv": 3.0, "head": 3.0}), ([1.0, 1.0], {}), ([1.0, 3.0], {})])
def test_the_faster_of_dense_and_sparse_is_taken_and_told(seconds, expected, monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.setattr(sparse, "timed", lambda *functions: ([f() for f in functions], seconds)[1])
    net, x = Net(), torch.randn(5, 3, 8, 8)
    fast = sparsely_run(net, x)
    assert fast.sparse_layers == expected and net.training and not fast.training
    net.eval()
    assert {name for name, module in fast.named_modules() if isinstance(module, sparse.Sparse)} == set(expected)
    with torch.no_grad():
        assert torch.allclose(fast(x), net(x), atol=1e-6)
    assert caplog.messages == ["sparse: times as fast as dense, at batch 5 on 1 thread: conv 3.0, head 3.0" if expected
                               else "sparse: all layers stay dense, which is as fast here at batch 5 on 1 thread"]


@mkl
def test_batch_norms_become_part_of_the_convolution_that_they_alone_follow(monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.setattr(sparse, "timed", lambda *functions: ([f() for f in functions], [3.0, 1.0])[1])
    torch.manual_seed(0)
    net, x = nn.Sequential(pruned(nn.Conv2d(3, 8, 3, bias=False)), nn.BatchNorm2d(8), nn.ReLU(), nn.BatchNorm2d(8),
                           nn.Conv2d(8, 4, 1)), torch.randn(5, 3, 8, 8)
    net(x)
    fast = sparsely_run(net, x)
    assert caplog.messages[0] == "sparse: batch norms folded into the convolutions before them: 1"
    assert isinstance(net[1], nn.BatchNorm2d) and isinstance(fast[0], SparseConv2d) and fast.sparse_layers == {"0": 3.0}
    assert [type(fast[i]) for i in (1, 3)] == [nn.Identity, nn.BatchNorm2d]
    assert torch.equal(fast[0].weight.to_dense() != 0, net[0].weight.flatten(1) != 0)
    with torch.no_grad():
        assert torch.allclose(fast(x), net.eval()(x), atol=1e-5)


class Asks(nn.Module):
    """Cannot be traced: it asks its input; and uses its convolution's weights twice."""

    def __init__(self, asks):
        super().__init__()
        self.conv, self.norm, self.asks = pruned(nn.Conv2d(3, 8, 3)), nn.BatchNorm2d(8), asks

    def forward(self, x):
        if self.asks:
            return self.norm(self.conv(x)) if x.mean() < 9 else x
        return self.norm(self.conv(x)) + self.conv.weight.sum()


@mkl
@pytest.mark.parametrize("asks", [True, False])
def test_a_batch_norm_that_cannot_be_folded_stays(asks):
    torch.manual_seed(0)
    net, x = Asks(asks), torch.randn(5, 3, 8, 8)
    net(x)
    fast = sparsely_run(net.eval(), x)
    assert isinstance(fast.norm, nn.BatchNorm2d)
    with torch.no_grad():
        assert torch.allclose(fast(x), net(x), atol=1e-5)


def test_without_mkl_all_stays_dense(monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    net, x = Net().eval(), torch.randn(5, 3, 8, 8)
    fast = sparsely_run(net, x)
    assert fast.sparse_layers == {} and torch.equal(fast(x), net(x)) and caplog.messages == [
        "sparse: all layers stay dense, torch has no MKL here"]


@mkl
def test_a_wide_sparse_layer_is_faster():
    """Twenty times fewer products: it would have to be a very odd machine."""
    fast = sparsely_run(nn.Sequential(pruned(nn.Linear(2048, 2048), 0.01)), torch.randn(16, 2048))
    assert fast.sparse_layers["0"] > 1 and isinstance(fast[0], SparseLinear)


class Odd(nn.Module):
    """Asks its first layer for its size, hands the second its input by name, and has a third in half precision."""

    def __init__(self):
        super().__init__()
        self.bare, self.named, self.narrow = pruned(nn.Linear(8, 8)), pruned(nn.Linear(8, 8)), pruned(nn.Linear(8, 8)).bfloat16()

    def forward(self, x):
        x = self.named(input=self.bare(x).view(-1, self.bare.out_features))
        return self.narrow(x.bfloat16()).float()


@mkl
@pytest.mark.parametrize(("net", "left"), [
    (nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1), "layers.0.linear1, layers.0.linear2"),
    (Odd(), "bare")], ids=["encoder", "odd"])
def test_what_a_model_does_not_run_as_a_layer_stays_dense(net, left, monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.setattr(sparse, "timed", lambda *functions: ([f() for f in functions], [3.0, 1.0])[1])
    for module in net.modules():
        if isinstance(module, nn.Linear):
            pruned(module)
    net, x = net.eval(), torch.randn(2, 5, 8)
    fast = sparsely_run(net, x)
    assert fast.sparse_layers == {} and caplog.messages[0] == f"sparse: the model does not run {left} as layers, which stay dense"
    with torch.no_grad():
        assert torch.equal(fast(x), net(x))
