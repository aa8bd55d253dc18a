"""The values of one layer, given what enters it: damped least squares a row, and a last layer fitted to probabilities."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

DAMPING = 0.01  # of the mean variance of a layer's inputs
STEPS = 32  # of conjugate gradients, where they are cheaper than a system a row, whose operations take `SLOWER` as long
SLOWER = 8
FIT_STEPS = 15  # of L-BFGS, on the weights of the last layer
FIT_DAMPING = 2  # over the number of images, times the squared distance to what least squares gives


def solve_rows(covariance: Tensor, cross: Tensor, dense: Tensor, mask: Tensor, least: float = 1e-10) -> tuple[Tensor, Tensor]:
    """Return the weights (out, p) that damped least squares gives each row on its kept inputs, zeros elsewhere; and the diagonal
    of the inverse of each row's own system, (out, p), ones elsewhere (of the whole system where conjugate gradients solve it).
    """
    p = len(covariance)
    damping = (DAMPING * covariance.trace() / p).clamp_min(max(least, 1e-10))
    damped = covariance + damping * torch.eye(p, device=covariance.device)
    wanted = (cross.T + damping * dense) * mask  # (out, p)
    kept = mask.sum(1)
    if SLOWER * float((kept.double() ** 3).sum()) / 3 > STEPS * 2 * len(dense) * p * p:
        inverse = torch.cholesky_inverse(torch.linalg.cholesky_ex(damped).L).diagonal()
        return conjugate_gradients(damped, wanted, dense * mask, mask), inverse.expand_as(dense)
    weights, inverse = torch.zeros_like(dense), torch.ones_like(dense)
    order = torch.argsort(kept, stable=True)
    sizes = kept[order].tolist()
    start = sum(size == 0 for size in sizes)
    places = torch.argsort(mask[order].to(torch.uint8), dim=1, descending=True, stable=True)  # kept inputs first, in order
    while start < len(order):
        end = start + 1
        while end < len(order) and sizes[end] <= 1.25 * sizes[start] + 4:  # nearly equal ones are solved together
            end += 1
        size = sizes[end - 1]
        rows, at = order[start:end], places[start:end, :size]  # (r,), (r, size)
        there = mask[rows[:, None], at]  # False where a row keeps fewer
        systems = damped[at[:, :, None], at[:, None, :]] * (there[:, :, None] & there[:, None, :])
        systems.diagonal(dim1=1, dim2=2).add_((~there).to(systems.dtype))
        factors = torch.linalg.cholesky_ex(systems).L
        found = torch.cholesky_solve(wanted[rows[:, None], at][:, :, None], factors)[:, :, 0]
        weights[rows[:, None], at] = found
        inverse[rows[:, None], at] = torch.cholesky_inverse(factors).diagonal(dim1=1, dim2=2)  # 1 where there is no weight
        start = end
    return weights, inverse


def fitted(inputs: Tensor, probabilities: Tensor, weights: Tensor, bias: Tensor | None,
           mask: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return the kept weights (classes, p) and the bias of a last layer nearest to the dense model's probabilities (images,
    classes), by cross-entropy, from those of least squares, which damping draws them to."""
    kept = mask.nonzero(as_tuple=True)
    start = [weights[kept], *([] if bias is None else [bias])]
    if not sum(value.numel() for value in start):
        return weights, bias
    free = [value.clone().requires_grad_() for value in start]
    optimizer = torch.optim.LBFGS(free, max_iter=FIT_STEPS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        logits = F.linear(inputs, torch.zeros_like(weights).index_put(kept, free[0]), *free[1:])
        value = F.cross_entropy(logits, probabilities) + FIT_DAMPING / len(inputs) * (free[0] - start[0]).square().sum()
        value.backward()  # type: ignore[no-untyped-call]  # torch has not typed it
        return value

    with torch.enable_grad():
        optimizer.step(loss)  # type: ignore[no-untyped-call]
    if not all(bool(value.isfinite().all()) for value in free):
        return weights, bias
    return torch.zeros_like(weights).index_put(kept, free[0].detach()), free[1].detach() if bias is not None else None


def conjugate_gradients(damped: Tensor, wanted: Tensor, start: Tensor, mask: Tensor) -> Tensor:
    """Solve all rows together, (out, p), by `STEPS` steps from `start`, each preconditioned by the diagonal."""
    diagonal = damped.diagonal()
    x = start
    residual = (wanted - x @ damped) * mask
    z = residual / diagonal
    direction, rz = z, (residual * z).sum(1, keepdim=True)
    for _ in range(STEPS):
        forward = (direction @ damped) * mask
        step = rz / (direction * forward).sum(1, keepdim=True).clamp_min(1e-30)
        x, residual = x + step * direction, residual - step * forward
        z = residual / diagonal
        previous, rz = rz, (residual * z).sum(1, keepdim=True)
        direction = z + rz / previous.clamp_min(1e-30) * direction
    return x
