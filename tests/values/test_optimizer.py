import copy

import pytest
import torch
from torch import nn

from evoprune.errors import EvopruneError
from evoprune.values.optimizer import Optimizer


def test_complex_parameters_are_refused_unless_they_are_frozen():
    values = nn.Parameter(torch.ones(3, dtype=torch.complex64))
    with pytest.raises(EvopruneError, match="model: found complex parameters, which cannot be trained; freeze them"):
        Optimizer([values], "adam")
    assert not Optimizer([values.requires_grad_(False)], "adam").parameters


@pytest.mark.parametrize("kind", ["adam", "sgd"])
def test_its_steps_are_those_of_torch(kind):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 30), nn.BatchNorm1d(30), nn.ReLU(), nn.Linear(30, 5), nn.Linear(5, 5))
    model[0].bias.requires_grad_(False)
    other = copy.deepcopy(model)
    ours = Optimizer(model.parameters(), kind, squares=True)
    free = [p for p in other.parameters() if p.requires_grad]
    theirs = torch.optim.Adam(free, 0.01, fused=True) if kind == "adam" else torch.optim.SGD(
        free, 0.01, momentum=0.9, weight_decay=5e-4, nesterov=True)
    squares = {p: torch.zeros_like(p) for p in free}
    for step in range(20):
        inputs, rate = torch.randn(16, 20), 0.01 / (1 + step)
        for net, optimizer in ((model, ours), (other, theirs)):
            optimizer.zero_grad()
            net[:4 if step < 5 else 5](inputs).square().mean().backward()  # the last layer has no gradient at first
            if optimizer is theirs:
                theirs.param_groups[0]["lr"] = rate
                for p in free:
                    if p.grad is not None:
                        squares[p] = 0.999 * squares[p] + 0.001 * p.grad.square()
        ours.step(rate)
        theirs.step()
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values()))
    for p, q in zip(ours.parameters, free, strict=True):
        torch.testing.assert_close(ours.squares[p], squares[q])
