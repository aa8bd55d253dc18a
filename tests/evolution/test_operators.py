import numpy as np
import pytest

from evoprune.evolution.operators import MOVES, flip, grow_genes, mate, mutate, pick, prune_genes, refine, swap, toggle
from evoprune.masks.genome import from_masks, get_bits, kept_genes
from evoprune.masks.layout import Layer, Layout

LAYOUT = Layout((Layer("a", (30,)), Layer("b", (7, 11)), Layer("c", (400, 300))), 30 + 77 + 120_000)


def individual(rng, density=0.3):
    return from_masks([rng.random(layer.shape) < density for layer in LAYOUT], "x")


def test_mutate_with_p_0_changes_nothing_and_with_p_1_every_layer(rng):
    for _ in range(20):
        a = individual(rng)
        (b,) = mutate(a.clone(), rng, LAYOUT, p=0)
        assert a == b
        (c,) = mutate(a.clone(), rng, LAYOUT, p=1)
        assert all(not np.array_equal(x, y) for x, y in zip(a, c))


def test_mutate_changes_at_least_one_layer_in_place(rng):
    for _ in range(50):
        a = individual(rng)
        before = a.clone()
        (b,) = mutate(a, rng, LAYOUT)
        assert b is a and a != before


def test_mate_with_p_0_changes_nothing_and_with_p_1_exchanges_all(rng):
    a, b = individual(rng), individual(rng)
    c, d = mate(a.clone(), b.clone(), rng, p=0)
    assert (c, d) == (a, b)
    c, d = mate(a.clone(), b.clone(), rng, p=1, uniform=0)
    assert (c, d) == (b, a)


def test_uniform_exchange_keeps_what_the_parents_share_and_loses_no_gene(rng):
    a, b = individual(rng), individual(rng)
    c, d = mate(a.clone(), b.clone(), rng, p=1, uniform=1)
    for i in range(3):
        w, x, y, z = (get_bits(v, i, LAYOUT) for v in (a, b, c, d))
        assert np.array_equal(y[w == x], w[w == x])
        assert np.array_equal(y.astype(int) + z, w.astype(int) + x)
    differ = get_bits(a, 2, LAYOUT) != get_bits(b, 2, LAYOUT)
    from_b = (get_bits(c, 2, LAYOUT) == get_bits(b, 2, LAYOUT))[differ].mean()
    assert 0.48 < from_b < 0.52


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_moves_change_what_they_say(layer, rng):
    genes = LAYOUT[layer].genes
    for _ in range(30):
        before = individual(rng)
        kept = kept_genes(before[layer])
        changed = {}
        for move in MOVES:
            after = before.clone()
            move(after[layer], genes, rng)
            old, new = (get_bits(v, layer, LAYOUT) for v in (before, after))
            changed[move] = (old & ~new).sum(), (new & ~old).sum()
            assert after[layer][-1] & (0xFF >> ((genes - 1) % 8 + 1)) == 0  # padding
        assert changed[swap][0] == changed[swap][1] > 0
        assert changed[prune_genes][0] > 0 == changed[prune_genes][1]
        assert changed[grow_genes][1] > 0 == changed[grow_genes][0]
        assert changed[flip][0] > 0 and changed[flip][1] > 0
        assert max(max(c) for c in changed.values()) <= max(2, 0.1 * kept)


@pytest.mark.parametrize("density", [0.0, 0.001, 0.3, 1.0])
def test_pick_returns_different_positions_of_the_right_value(density, rng):
    bits = np.packbits(rng.random(200_000) < density)
    values = np.unpackbits(bits)
    for value in (True, False):
        for count in (1, 50, 199_999):
            found = pick(bits, 200_000, value, count, rng)
            assert len(found) == len(np.unique(found)) == min(count, (values == value).sum())
            assert (values[found] == value).all()


def test_pick_is_uniform_over_a_large_layer(rng):
    bits = np.packbits(np.arange(100_000) % 4 == 0)
    found = np.concatenate([pick(bits, 100_000, True, 100, rng) for _ in range(300)])
    counts = np.histogram(found, 10, (0, 100_000))[0]
    assert counts.min() > 2700 and counts.max() < 3300


def test_toggle_flips_several_bits_of_one_byte():
    bits = np.zeros(2, np.uint8)
    toggle(bits, np.array([0, 3, 7, 8]))
    assert np.unpackbits(bits).nonzero()[0].tolist() == [0, 3, 7, 8]


def test_an_empty_layer_can_grow_and_a_full_one_be_pruned(rng):
    empty = from_masks([np.zeros(layer.shape, bool) for layer in LAYOUT], "x")
    full = from_masks([np.ones(layer.shape, bool) for layer in LAYOUT], "x")
    for _ in range(20):
        mutate(empty, rng, LAYOUT, p=1)
        mutate(full, rng, LAYOUT, p=1)
    assert all(kept_genes(bits) for bits in empty)
    assert all(kept_genes(bits) < layer.genes for bits, layer in zip(full, LAYOUT))


@pytest.mark.parametrize("inherited", [("a", "b", "c"), ("a", "c"), ()])
def test_refine_prunes_what_is_worth_least_and_grows_what_promises_most(inherited, rng):
    layout = Layout(LAYOUT[:2], 107)  # few genes, and scores so far apart that noise changes no order
    order = rng.permutation(107)
    growth = [1000.0 * order[:30], 1000.0 * order[30:]]
    moves = set()
    for _ in range(100):
        parent = from_masks([rng.random(layer.shape) < 0.4 for layer in layout], "x")
        kept = np.concatenate([get_bits(parent, i, layout) for i in range(2)])
        worth = rng.permutation(107) if len(inherited) == 3 else order
        parts = {"a": slice(0, 30), "b": slice(30, 107)}
        parent.saliency = {name: 1000.0 * worth[part][kept[part]] if len(inherited) == 3 else np.zeros(kept[part].sum())
                           for name, part in parts.items() if name in inherited}
        (child,) = refine(parent.clone(), rng, layout, growth)
        now = np.concatenate([get_bits(child, i, layout) for i in range(2)])
        gone, back = np.flatnonzero(kept & ~now), np.flatnonzero(now & ~kept)
        changed = sorted({int(i >= 30) for i in [*gone, *back]})
        assert {layout[i].name for i in changed}.isdisjoint(child.saliency) and len(gone) + len(back)
        for within in (np.arange(107), np.arange(30), np.arange(30, 107)):
            lowest, highest = within[kept[within]], within[~kept[within]]
            lowest, highest = lowest[np.argsort(worth[lowest])], highest[np.argsort(-order[highest])]
            if set(gone) == set(lowest[:len(gone)]) and set(back) == set(highest[:len(back)]):
                break
        else:
            assert inherited == ("a", "c") and changed == [0]  # that layer alone, whose own scores are all the same
        moves.add((len(gone) > 0, len(back) > 0))
    assert moves == {(True, False), (False, True), (True, True)}
