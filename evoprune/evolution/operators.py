"""Mutation and crossover, layer by layer, on packed bits; only the individuals handed in are changed.

How many genes change is drawn per layer, log-uniformly up to a share of the layer's kept genes, so that a layer of ten
weights and one of ten million both see single flips and large moves. Only `refine` goes by what weights are worth.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from ..masks.genome import Bits, Individual, get_bits, kept_genes, set_bits
from ..masks.layout import Layout

LARGEST_MOVE = 0.1  # share of a layer's kept genes that one move changes at most
Floats = npt.NDArray[np.float64]
LARGEST_REFINEMENT = 0.3  # the same of a move that knows what matters
Move = Callable[[Bits, int, np.random.Generator], None]


def mutate(individual: Individual, rng: np.random.Generator, layout: Layout, p: float | None = None) -> tuple[Individual]:
    """Change each layer with probability `p` (one layer in the mean, and at least one, where it is None) by one move
    of `MOVES`, drawn at random. DEAP's convention: changes the individual in place and returns it in a tuple."""
    if p is None:
        chosen = rng.random(len(layout)) < 1 / len(layout)
        chosen[rng.integers(len(layout))] = True
    else:
        chosen = rng.random(len(layout)) < p
    for i in np.flatnonzero(chosen):
        MOVES[rng.integers(len(MOVES))](individual[i], layout[i].genes, rng)
        individual.saliency.pop(layout[i].name, None)  # it stood for the bits as they were
    return (individual,)


def flip(bits: Bits, genes: int, rng: np.random.Generator) -> None:
    """Prune some kept genes and keep some pruned ones, as many as two independent draws say."""
    kept = kept_genes(bits)
    gone, back = pick(bits, genes, True, size(kept, rng), rng), pick(bits, genes, False, size(kept, rng), rng)
    toggle(bits, gone)
    toggle(bits, back)


def swap(bits: Bits, genes: int, rng: np.random.Generator) -> None:
    """Prune and keep equally many genes: the sparsity stays."""
    kept = kept_genes(bits)
    count = min(size(kept, rng), kept, genes - kept)
    gone, back = pick(bits, genes, True, count, rng), pick(bits, genes, False, count, rng)
    toggle(bits, gone)
    toggle(bits, back)


def prune_genes(bits: Bits, genes: int, rng: np.random.Generator) -> None:
    """Prune some kept genes."""
    toggle(bits, pick(bits, genes, True, size(kept_genes(bits), rng), rng))


def grow_genes(bits: Bits, genes: int, rng: np.random.Generator) -> None:
    """Keep some pruned genes."""
    toggle(bits, pick(bits, genes, False, size(kept_genes(bits), rng), rng))


MOVES: tuple[Move, ...] = (flip, swap, prune_genes, grow_genes)


def refine(individual: Individual, rng: np.random.Generator, layout: Layout, growth: Sequence[Floats]) -> tuple[Individual]:
    """Prune the kept genes of low saliency, keep pruned ones of high saliency, or both, over all layers or in one.

    What is pruned goes by what the weights are worth in the parent, which the individual carries, what is kept by `growth`,
    (genes,) a layer: both logarithms, with Gumbel noise, from none to half. The size is log-uniform.
    """
    chosen = list(range(len(layout))) if rng.random() < 0.7 else [int(rng.integers(len(layout)))]
    genes = [get_bits(individual, i, layout) for i in range(len(layout))]
    kept = np.concatenate([genes[i] for i in chosen])
    move, noise = rng.choice(3, p=(0.45, 0.3, 0.25)), rng.uniform(0, 0.5)  # prune, grow, swap
    count = size(int(kept.sum()), rng, LARGEST_REFINEMENT)
    flips = np.zeros(len(kept), bool)
    if move != 1:
        now = np.zeros(len(kept))
        known = all(layout[i].name in individual.saliency for i in chosen)  # not after another move: then `growth`, on one scale
        now[kept] = np.concatenate([individual.saliency[layout[i].name] if known else growth[i][genes[i]] for i in chosen])
        flips[best(-noisy(now, noise, rng), kept, count)] = True
    if move != 0:
        flips[best(noisy(np.concatenate([growth[i] for i in chosen]), noise, rng), ~kept, count)] = True
    for i, part in zip(chosen, np.split(flips, np.cumsum([len(genes[i]) for i in chosen])[:-1])):
        if part.any():
            set_bits(individual, i, genes[i] ^ part)
            individual.saliency.pop(layout[i].name, None)
    return (individual,)


def noisy(scores: Floats, noise: float, rng: np.random.Generator) -> Floats:
    """Return logarithms of scores with Gumbel noise: the best k are a sample without replacement."""
    return scores + noise * rng.gumbel(size=len(scores)) if noise else scores


def best(scores: npt.NDArray[np.float64], among: npt.NDArray[np.bool_], count: int) -> npt.NDArray[np.int64]:
    """Return the positions of the `count` highest scores of those in `among`, or all of them if there are fewer."""
    places = np.flatnonzero(among)
    if count >= len(places):
        return places
    return places[np.argpartition(-scores[places], count)[:count]]


def mate(a: Individual, b: Individual, rng: np.random.Generator, p: float = 0.5, uniform: float = 0.25,
         layout: Layout | None = None) -> tuple[Individual, Individual]:
    """Exchange layers between two individuals: each with probability `p`, whole, or (probability `uniform`) gene by
    gene at random. Changes both in place and returns them; with `layout`, the saliency of a whole layer goes with it."""
    # 6 arguments: DEAP's two individuals, and what is registered with it
    for i in np.flatnonzero(rng.random(len(a)) < p):
        mixed = rng.random() < uniform
        if layout is not None:
            name = layout[i].name
            x, y = a.saliency.pop(name, None), b.saliency.pop(name, None)
            a.saliency.update({name: y} if y is not None and not mixed else {})
            b.saliency.update({name: x} if x is not None and not mixed else {})
        if mixed:
            exchange = (a[i] ^ b[i]) & np.frombuffer(rng.bytes(len(a[i])), np.uint8)
            a[i] ^= exchange
            b[i] ^= exchange
        else:
            a[i], b[i] = b[i], a[i]
    return a, b


def size(kept: int, rng: np.random.Generator, largest: float = LARGEST_MOVE) -> int:
    """Draw how many genes a move changes: log-uniform from 1 to a share of those kept."""
    return int(np.exp(rng.uniform(0, np.log(max(2, largest * kept)))))


def pick(bits: Bits, genes: int, value: bool, count: int, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    """Return `count` different positions whose bit is `value`, or all of them if there are fewer."""
    kept = kept_genes(bits)
    there = kept if value else genes - kept
    if genes > 1 << 16 and 8 * count < there and 64 * there > genes:  # draw until enough fit; unpacks nothing
        found = np.empty(0, np.int64)
        while len(found) < count:
            drawn = rng.integers(genes, size=2 * count * genes // there + 8)
            found = np.unique(np.concatenate([found, drawn[((bits[drawn >> 3] >> (7 - (drawn & 7))) & 1) == value]]))
        return rng.choice(found, count, replace=False)
    positions = np.flatnonzero(np.unpackbits(bits, count=genes) == value)
    return rng.choice(positions, min(count, there), replace=False)


def toggle(bits: Bits, positions: npt.NDArray[np.int64]) -> None:
    """Flip the bits at `positions`, all different."""
    np.bitwise_xor.at(bits, positions >> 3, (128 >> (positions & 7)).astype(np.uint8))
