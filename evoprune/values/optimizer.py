"""Adam, or SGD with Nesterov's momentum, by torch's own functions: `torch.optim`'s classes import a compiler first, 2.5 s of
every process that trains."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim.adam import adam
from torch.optim.sgd import sgd

from ..errors import EvopruneError

MOMENTUM, DECAY = 0.9, 0.999  # of the running means of gradients and of their squares
WEIGHT_DECAY = 5e-4  # SGD's


class Optimizer:
    """Steps of `kind`, "adam" or "sgd", bit for bit those of `torch.optim.Adam(fused=True)` and of `torch.optim.SGD`.

    `squares` are running means of squared gradients, of use only beside each other, since they start at zero: Adam's own, or the
    same kept beside SGD if asked for. Those of `frozen` parameters are kept too, which no step changes.

    Raises:
        EvopruneError: parameters are complex.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], kind: str, squares: bool = False, frozen: Sequence[Tensor] = ()):
        self.parameters: list[Tensor] = [p for p in parameters if p.requires_grad]
        if any(p.is_complex() for p in self.parameters):
            raise EvopruneError("model: found complex parameters, which cannot be trained; freeze them with "
                                "requires_grad_(False), or leave training out")
        self.frozen = frozen
        self.adam, self.squared = kind == "adam", squares or kind == "adam"
        self.means: dict[Tensor, Tensor] = {}  # of the gradients of those that have had one, as are the others
        self.squares: dict[Tensor, Tensor] = {}
        self.steps: dict[Tensor, Tensor] = {}

    def state(self) -> dict[str, Tensor]:
        """Return what steps have left, by name and place of the parameter."""
        return {f"{name}.{i}": found[p] for name, found in self.kinds().items()
                for i, p in enumerate([*self.parameters, *self.frozen]) if p in found}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Be as the one that had this state."""
        for name, found in self.kinds().items():
            for i, p in enumerate([*self.parameters, *self.frozen]):
                if (value := state.get(f"{name}.{i}")) is not None:
                    found[p] = torch.empty_like(p if value.dim() else value, device=p.device).copy_(value)

    def kinds(self) -> dict[str, dict[Tensor, Tensor]]:
        return {"mean": self.means, "square": self.squares, "steps": self.steps}

    def zero_grad(self) -> None:
        """Drop the gradients."""
        for p in (*self.parameters, *self.frozen):
            p.grad = None

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """Change the parameters by their gradients."""
        moved = [p for p in self.parameters if p.grad is not None]
        gradients = [p.grad for p in moved if p.grad is not None]
        for p in moved:
            if self.squared and p not in self.squares:
                self.squares[p] = torch.zeros_like(p)
            if self.adam and p not in self.means:
                self.means[p], self.steps[p] = torch.zeros_like(p), torch.zeros((), dtype=torch.float32, device=p.device)
        for p in self.frozen:
            if p.grad is not None:
                if p not in self.squares:
                    self.squares[p] = torch.zeros_like(p)
                self.squares[p].mul_(DECAY).addcmul_(p.grad, p.grad, value=1 - DECAY)
        if self.adam:
            adam(moved, gradients, [self.means[p] for p in moved], [self.squares[p] for p in moved], [],
                 [self.steps[p] for p in moved], fused=True, amsgrad=False, beta1=MOMENTUM, beta2=DECAY, lr=rate, weight_decay=0,
                 eps=1e-8, maximize=False)
            return
        for p, gradient in zip(moved, gradients):
            if self.squared:
                self.squares[p].mul_(DECAY).addcmul_(gradient, gradient, value=1 - DECAY)
        means = [self.means.get(p) for p in moved]
        sgd(moved, gradients, means, weight_decay=WEIGHT_DECAY, momentum=MOMENTUM, lr=rate, dampening=0, nesterov=True,
            maximize=False)
        self.means.update({p: mean for p, mean in zip(moved, means) if mean is not None})
