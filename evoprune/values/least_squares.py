"""The values of one layer, given what enters it: damped least squares a row, and a last layer fitted to probabilities."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

DAMPING = 0.01  # of the mean variance of a layer's inputs
STEPS, USUAL_STEPS = 32, 14  # of conjugate gradients, at most and as a rule, until one gains less than `LITTLE` of all they have;
LITTLE, SLOWER = 2e-4, 8  # they go where they are cheaper than a system a row, whose operations take `SLOWER` as long
WIDE, PARTS = 1024, 4  # inputs from which a symmetric product is made in parts, those above the diagonal once
EVEN_SHARE = 0.05  # of an error's weight, the same for all images and places (tanh wants less, ReLU 0.1: results/LOG.md)
ROWS = 12_288  # of activations that moments are taken over at least, drawn from all images evenly, where there are more,
POSITIONS = 16  # and positions or tokens of an image
MOST_KEPT = 1 << 29  # numbers of all layers' outputs that are kept, 2 GiB, and as many that say how much they are felt
MOST_SYSTEMS = 1 << 25  # values of the systems of rows that are solved at once, of which there are some copies
LARGEST_PRODUCT = {"cpu": 1 << 20, "cuda": 1 << 26}  # values, where errors are weighed; a core's cache, or few kernels
FIT_STEPS = 15  # of L-BFGS, on the weights of the last layer
FIT_DAMPING = 2  # over the number of images, times the squared distance to what least squares gives
Errors = Callable[[Tensor], Tensor]  # from weights (out, p) the error that removing each of them leaves


@dataclass
class Solved:
    """A layer that least squares gives new values, with what the dense model knows of it."""

    name: str  # of its weight
    module: nn.Linear | nn.Conv2d
    dense: Tensor  # weights, (out, p)
    by_row: bool = False  # whether they are removed by whole rows
    least: float = 0.0  # damping
    centred: bool = False  # a bias or a batch norm behind it takes the mean
    normed: bool = False  # it is a batch norm, which takes the mean that all images and places make alike
    targets: Tensor = field(default_factory=lambda: torch.empty(0))  # the dense model's outputs, (rows, out)
    size: int = 0  # numbers that it makes of one image
    positions: Tensor | None = None  # (images, positions) drawn, of a convolution, or of a linear layer's
    places: int = 1  # where there are many an image
    shares: Tensor | None = None  # of each error in the weight of all, (rows, out); None: alike
    moments: tuple[Tensor, ...] | None = None  # of the first layer, which no mask changes
    errors: Tensor = field(default_factory=lambda: torch.zeros(()))  # (out, p) that removing each weight would leave, or its part

    @property
    def bias(self) -> str:
        """The name of its bias."""
        owner, dot, name = self.name.rpartition(".")
        return owner + dot + name.replace("weight", "bias")

    def keep(self, output: Tensor, images: int, most: int) -> None:
        """Keep what the dense model makes of so many images: of a convolution, or of very many tokens, rows that are drawn, at
        most so many, but one an image."""
        self.centred = self.module.bias is not None
        count = max(1, min(max(POSITIONS, -(-ROWS // images)), most // images))
        if isinstance(self.module, nn.Conv2d):
            self.positions = draw_positions(len(output), output.shape[2:].numel(), count, output.device)
        elif (rows := output.shape[:-1].numel()) > min(most, 2 * max(ROWS, POSITIONS * images)):  # drawing takes time too
            self.places = rows // images
            self.positions = draw_positions(images, self.places, count, output.device)
        self.targets, self.size = outputs_of(self.module, output, self.positions), output.numel() // images

    def takes(self, inputs: Tensor) -> bool:
        """Say whether as many rows enter as did in the dense model: where they are chosen on the way, masks may change which."""
        if self.positions is not None and isinstance(self.module, nn.Conv2d):
            return 0 < len(inputs) * self.positions.shape[1] == len(self.targets)
        among = len(self.targets) if self.positions is None else len(self.positions) * self.places
        return 0 < inputs.shape[:-1].numel() == among


def moments(rows: Tensor, targets: Tensor, centred: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return cov(X) (p, p), cov(X, Z) (p, out), mean(X) (p,), mean(Z) (out,) of rows X (rows, p) and targets Z (rows, out); about
    zero unless `centred`."""
    mean, target_mean = rows.mean(0), targets.mean(0)
    if centred:
        rows, targets = rows - mean, targets - target_mean
    return gram(rows) / len(rows), rows.T @ targets / len(rows), mean, target_mean


def gram(rows: Tensor) -> Tensor:
    """Return X'X (p, p) of rows X (rows, p)."""
    p = rows.shape[1]
    if p < WIDE or rows.device.type != "cpu":
        return rows.T @ rows
    product = rows.new_empty(p, p)
    cuts = [p * i // PARTS for i in range(PARTS + 1)]
    for a, b in itertools.pairwise(cuts):
        product[a:b, a:] = rows[:, a:b].T @ rows[:, a:]
        product[b:, a:b] = product[a:b, b:].T
    return product


def lone_errors(inverse: Tensor) -> Errors:
    """Return the error of removing one weight of a row: its square over its place in the diagonal of the inverse of the row's
    system (Hassibi and Stork, 1993), `inverse` (out, p)."""
    return lambda weights: weights.square() / inverse.clamp_min(1e-30)


def row_errors(applied: Callable[[Tensor], Tensor]) -> Errors:
    """Return each weight's part of the error of removing its row: that of a group G is w_G' [(H^-1)_GG]^-1 w_G (optimal brain
    surgeon for groups; Kurtic et al., 2022, arXiv:2203.07259), so that of a whole row w' H w; `applied` gives H w."""
    return lambda weights: weights * applied(weights)


def solve_rows(covariance: Tensor, cross: Tensor, dense: Tensor, mask: Tensor, least: float = 1e-10,
               by_row: bool = False, asked: bool = True) -> tuple[Tensor, Errors | None]:
    """Return the weights (out, p) that damped least squares gives each row on its kept inputs, zeros elsewhere; and, if `asked`,
    the error of removing each, or its row (by the whole system's inverse where conjugate gradients solve it).
    """
    # 7 arguments: the terms of the equation, and what is removed together
    p = len(covariance)
    damping = (DAMPING * covariance.trace() / p).clamp_min(max(least, 1e-10))
    damped = covariance + damping * torch.eye(p, device=covariance.device)
    wanted = (cross.T + damping * dense) * mask  # (out, p)
    kept = mask.sum(1)
    if by_row and bool((mask == mask[:, :1]).all()):  # one system for all rows
        return torch.cholesky_solve(wanted.T, torch.linalg.cholesky_ex(damped).L).T * mask, row_errors(lambda w: w @ damped)
    if SLOWER * float((kept.double() ** 3).sum()) / 3 > USUAL_STEPS * 2 * len(dense) * p * p:
        weights = conjugate_gradients(damped, wanted, dense * mask, mask)
        inverse = diagonal_of_inverse(torch.linalg.cholesky_ex(damped).L[None])[0] if asked and not by_row else damped
    else:
        weights, inverse = torch.zeros_like(dense), torch.ones_like(dense)
        for rows, at, there in grouped(mask, MOST_SYSTEMS):
            systems = damped[at[:, :, None], at[:, None, :]]
            weights[rows[:, None], at], factors = solved(systems, wanted[rows[:, None], at], there)
            if asked and not by_row:
                inverse[rows[:, None], at] = diagonal_of_inverse(factors)
    if not asked:
        return weights, None
    return weights, row_errors(lambda w: w @ damped) if by_row else lone_errors(inverse)


def solve_weighed(inputs: Tensor, targets: Tensor, shares: Tensor, dense: Tensor, mask: Tensor, least: float,
                  shifts: bool, by_row: bool = False, asked: bool = True) -> tuple[Tensor, Errors | None, Tensor]:
    """Return what `solve_rows` does where each row weighs its errors in its own way, and what its outputs then want added.

    `inputs` (rows, p) and `targets` (rows, out) are about their means, `shares` (rows, out) of the weight of all errors sum to 1
    a column. With `shifts`, a bias takes what the weighed means are off, (out,), which is zero otherwise.
    """
    # 9 arguments: the terms of the equation, and what is removed together
    columns = inputs.T.contiguous()
    weighed = (shares * targets).T
    wanted, mean, target_mean = weighed @ inputs, shares.T @ inputs, weighed.sum(1)  # (out, p), (out, p), (out,)
    if not shifts:
        mean, target_mean = torch.zeros_like(mean), torch.zeros_like(target_mean)
    variance = (shares.T @ inputs.square() - mean.square()).mean(1, keepdim=True)  # (out, 1)
    damping = (DAMPING * variance).clamp_min(max(least, 1e-10))
    wanted = (wanted - mean * target_mean[:, None] + damping * dense) * mask
    weights, inverse = torch.zeros_like(dense), torch.ones_like(dense)
    for rows, at, there in grouped(mask, LARGEST_PRODUCT[inputs.device.type], len(inputs)):
        x, m = columns[at], mean[rows[:, None], at]  # (r, size, rows), (r, size)
        systems = (x * shares.T[rows][:, None]) @ x.transpose(1, 2) - m[:, :, None] * m[:, None, :]
        systems.diagonal(dim1=1, dim2=2).add_(damping[rows])
        weights[rows[:, None], at], factors = solved(systems, wanted[rows[:, None], at], there)
        if asked and not by_row:
            inverse[rows[:, None], at] = diagonal_of_inverse(factors)

    def applied(w: Tensor) -> Tensor:
        return (shares * (inputs @ w.T)).T @ inputs - mean * (mean * w).sum(1, keepdim=True) + damping * w

    errors = (row_errors(applied) if by_row else lone_errors(inverse)) if asked else None
    return weights, errors, target_mean - (weights * mean).sum(1)


def shares_of(squares: Tensor) -> Tensor:
    """Return the share of each error in the weight of all of its output, from the squared gradients by it, both (rows, out):
    their root over its mean, and `EVEN_SHARE` for all."""
    root = squares.nan_to_num_(posinf=0).sqrt_()
    mean = root.mean(0).clamp_min(1e-30)
    shares = root.mul_(1 - EVEN_SHARE).div_(mean).add_(EVEN_SHARE)
    return shares.div_(shares.sum(0))


def grouped(mask: Tensor, most: int, among: int = 0) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield rows that keep nearly equally many inputs, (r,), where those are, (r, size), and whether they are kept: False where
    a row keeps fewer. Rows that keep none are passed over; r * size * (size or `among`) is at most `most`, or r is 1."""
    kept = mask.sum(1)
    order = torch.argsort(kept, stable=True)
    sizes = kept[order].tolist()
    start = sum(size == 0 for size in sizes)
    places = torch.argsort(mask[order].to(torch.uint8), dim=1, descending=True, stable=True)  # kept inputs first, in order
    while start < len(order):
        end = start + 1
        while end < len(order) and sizes[end] <= 1.25 * sizes[start] + 4 and (
                end + 1 - start) * sizes[end] * max(sizes[end], among) <= most:
            end += 1
        rows, at = order[start:end], places[start:end, :sizes[end - 1]]
        yield rows, at, mask[rows[:, None], at]
        start = end


def solved(systems: Tensor, wanted: Tensor, there: Tensor) -> tuple[Tensor, Tensor]:
    """Return the solution of each system, (r, size), 0 where there is no weight, and its Cholesky factor."""
    systems = systems * (there[:, :, None] & there[:, None, :])
    systems.diagonal(dim1=1, dim2=2).add_((~there).to(systems.dtype))
    factors = torch.linalg.cholesky_ex(systems).L
    return torch.cholesky_solve(wanted[:, :, None], factors)[:, :, 0], factors


def diagonal_of_inverse(factors: Tensor) -> Tensor:
    """Return the diagonal of the inverse of each system, (r, size), from its Cholesky factor; 1 where there is no weight."""
    return torch.cholesky_inverse(factors).diagonal(dim1=1, dim2=2)


def fitted(inputs: Tensor, probabilities: Tensor, weights: Tensor, bias: Tensor | None,
           mask: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return the kept weights (classes, p) and the bias of a last layer nearest to the dense model's probabilities (images,
    classes), by cross-entropy, from those of least squares, which damping draws them to."""
    kept = mask.nonzero(as_tuple=True)
    start = [weights[kept], *([] if bias is None else [bias])]
    if not sum(value.numel() for value in start):
        return weights, bias
    free = [value.clone() for value in start]
    optimizer = torch.optim.LBFGS(free, max_iter=FIT_STEPS, line_search_fn="strong_wolfe")

    damping = FIT_DAMPING / len(inputs)

    def loss() -> Tensor:
        found = F.linear(inputs, torch.zeros_like(weights).index_put(kept, free[0]), *free[1:]).log_softmax(1)
        off = (found.exp() - probabilities) / len(inputs)  # the gradient by the logits, here without autograd
        free[0].grad = (off.T @ inputs)[kept] + 2 * damping * (free[0] - start[0])
        if bias is not None:
            free[1].grad = off.sum(0)
        return damping * (free[0] - start[0]).square().sum() - (probabilities * found).sum() / len(inputs)

    optimizer.step(loss)  # type: ignore[no-untyped-call]  # torch has not typed it
    if not all(bool(value.isfinite().all()) for value in free):
        return weights, bias
    return torch.zeros_like(weights).index_put(kept, free[0]), free[1] if bias is not None else None


def conjugate_gradients(damped: Tensor, wanted: Tensor, start: Tensor, mask: Tensor) -> Tensor:
    """Solve all rows together, (out, p), by steps from `start`, each preconditioned by the diagonal."""
    diagonal = damped.diagonal()
    x, gained = start, 0.0
    residual = (wanted - x @ damped) * mask
    z = residual / diagonal
    direction, rz = z, (residual * z).sum(1, keepdim=True)
    for _ in range(STEPS):
        forward = (direction @ damped) * mask
        step = rz / (direction * forward).sum(1, keepdim=True).clamp_min(1e-30)
        x, residual = x + step * direction, residual - step * forward
        gain = float((step * rz).sum())  # twice what the quadratic has fallen by
        gained += gain
        if not gain > LITTLE * gained:
            break
        z = residual / diagonal
        previous, rz = rz, (residual * z).sum(1, keepdim=True)
        direction = z + rz / previous.clamp_min(1e-30) * direction
    return x


def draw_positions(images: int, places: int, count: int, device: torch.device) -> Tensor:
    """Return which places of its output a layer is looked at, (images, count), or all of them."""
    scores = torch.rand(images, places, generator=torch.Generator().manual_seed(0))
    return scores.topk(min(count, places), 1).indices.sort(1).values.to(device)


def rows_of(module: nn.Linear | nn.Conv2d, inputs: Tensor, positions: Tensor | None) -> Tensor:
    """Return what enters a layer as rows that its weights multiply, (rows, p)."""
    if isinstance(module, nn.Linear):
        return drawn_rows(inputs, positions)
    assert positions is not None
    (kh, kw), (sh, sw), (dh, dw) = module.kernel_size, module.stride, module.dilation
    ph, pw = (int(p) for p in module.padding)
    padded = F.pad(inputs, (pw, pw, ph, ph))  # (images, c, h, w)
    width = padded.shape[3]
    columns = (width - dw * (kw - 1) - 1) // sw + 1  # of the output
    corner = positions // columns * sh * width + positions % columns * sw  # (images, count)
    offsets = (torch.arange(kh, device=inputs.device)[:, None] * dh * width
               + torch.arange(kw, device=inputs.device) * dw).reshape(-1)  # (kh * kw,)
    index = (corner[:, :, None] + offsets).flatten(1)[:, None].expand(-1, padded.shape[1], -1)
    patches = padded.flatten(2).gather(2, index)  # (images, c, count * kh * kw)
    n, c, count = len(inputs), padded.shape[1], corner.shape[1]
    return patches.view(n, c, count, kh * kw).transpose(1, 2).reshape(n * count, c * kh * kw)


def drawn_rows(values: Tensor, positions: Tensor | None) -> Tensor:
    """Return the rows (..., features) that are drawn, or all, (rows, features)."""
    if positions is None:
        return values.reshape(-1, values.shape[-1])
    among = values.reshape(len(positions), -1, values.shape[-1])  # (images, places, features)
    return among.gather(1, positions[:, :, None].expand(-1, -1, among.shape[2])).flatten(0, 1)


def outputs_of(module: nn.Module, outputs: Tensor, positions: Tensor | None) -> Tensor:
    """Return what a layer makes of those rows, (rows, out), float32, no view of it."""
    if positions is None or isinstance(module, nn.Linear):
        return drawn_rows(outputs, positions).float().clone()
    index = positions[:, None].expand(-1, outputs.shape[1], -1)
    return outputs.flatten(2).gather(2, index).transpose(1, 2).reshape(-1, outputs.shape[1]).float()
