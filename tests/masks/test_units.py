"""A gene that governs all weights of an output, through all that touches masks, against the obvious way."""

import copy

import numpy as np
import pytest
import torch
from conftest import knowing
from nets import Block, Mixed
from torch import nn

import evoprune
from evoprune.errors import EvopruneError
from evoprune.evaluation.evaluator import Evaluator
from evoprune.evolution.budget import kept_at_targets
from evoprune.evolution.operators import MOVES, mate, mutate, refine
from evoprune.evolution.starts import STARTS, at_targets, first_population
from evoprune.evolution.tuned import unite
from evoprune.inputs.splits import as_split, calibration
from evoprune.masks.channels import find_channels
from evoprune.masks.genome import dense_individual, from_masks, get_bits, kept_genes, pruned_weights, set_bits, sparsity
from evoprune.masks.layers import find_layers
from evoprune.masks.layout import Layer, Layout
from evoprune.masks.paths import drop_dead
from evoprune.masks.saliency import NEEDS_DATA, SALIENCIES, gene_scores, keep_top
from evoprune.masks.tensors import from_named, named_masks
from evoprune.rules import read_units
from evoprune.values.inherited import fit_values
from evoprune.values.least_squares import solve_weighed
from evoprune.values.training import Recipe, Shrink, grown, tune

FILTERS = read_units("filter")


@pytest.fixture
def block():
    torch.manual_seed(0)
    return Block().eval()


@pytest.fixture
def images():
    return as_split((torch.randn(60, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(60) % 10), "data")


def rows_kept(layout, individual):
    """Which outputs of each layer are kept, if no filter is cut."""
    found = []
    for layer, mask in zip(layout, named_masks(individual, layout).values()):
        rows = mask.movedim(layer.output, 0).flatten(1)
        assert torch.equal(rows.any(1), rows.all(1))
        found.append(rows.any(1).numpy())
    return found


def by_weights(model, layout, individual):
    """The same mask, a gene a weight."""
    fine = find_layers(model)
    return fine, from_masks([mask.numpy() for mask in named_masks(individual, layout).values()], "fine")


# ------------------------------------------------------------------------------------------------------ layers and layout


class Kinds(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.deep = nn.Sequential(nn.ConvTranspose2d(4, 5, 2), nn.Linear(6, 7))
        self.attention = nn.MultiheadAttention(8, 2)


def test_a_filter_is_all_that_makes_an_output():
    shapes = {layer.name: layer.gene_shape for layer in find_layers(Kinds(), units=FILTERS)}
    assert shapes == {"conv.weight": (4, 1, 1, 1), "deep.0.weight": (1, 5, 1, 1), "deep.1.weight": (7, 1),
                      "attention.in_proj_weight": (24, 1), "attention.out_proj.weight": (8, 1)}


def test_units_go_by_name_and_the_first_that_fits_counts():
    layout = find_layers(Kinds(), units=read_units("deep.1=weight, deep=filter,attention.in*=filter"))
    assert [layer.unit for layer in layout] == ["weight", "filter", "weight", "filter", "weight"]
    assert layout.least == 1 + 4 * 2 * 2 + 1 + 8 + 1


@pytest.mark.parametrize(("text", "said"), [
    (text, f"unit: found {text!r}, expected weight or filter, or PATTERN=UNIT with commas between, like "
     "'conv*=filter,fc*=weight'")
    for text in ("channel", "conv*", "conv*=rows", "=filter", ",")])
def test_a_unit_that_does_not_exist_is_one_line(text, said):
    with pytest.raises(EvopruneError) as error:
        evoprune.Config(unit=text)
    assert str(error.value) == said


def test_a_pattern_that_fits_no_searched_layer_says_what_there_is():
    with pytest.raises(EvopruneError) as error:
        find_layers(Kinds(), skip="attention", units=read_units("attention=filter"))
    assert str(error.value) == "unit: nothing is called 'attention'; there are conv.weight, deep.0.weight, deep.1.weight"


def test_a_layer_sums_and_spreads_what_its_genes_govern(rng):
    layer, scores = Layer("a", (3, 5, 2), "filter", 1), rng.random((3, 5, 2))
    genes = rng.random(5) < 0.5
    assert np.allclose(layer.summed(scores).ravel(), [scores[:, i].sum() for i in range(5)])
    assert np.allclose(layer.summed(torch.from_numpy(scores)), layer.summed(scores))
    assert np.array_equal(layer.expanded(genes), np.broadcast_to(genes[None, :, None], (3, 5, 2)))
    assert np.array_equal(layer.any(layer.expanded(genes)).ravel(), genes)
    some = [bool((scores[:, i] > 0.8).any()) for i in range(5)]
    assert layer.any(scores > 0.8).ravel().tolist() == layer.any(torch.from_numpy(scores > 0.8)).flatten().tolist() == some
    assert layer.weights_a_gene == 6 and not (scores > 0.8).all((0, 2)).any() and any(some)


# --------------------------------------------------------------------------------------------------------- starts, operators


@pytest.mark.parametrize("name", STARTS)
@pytest.mark.parametrize("density", [0.9, 0.5, 0.3])
def test_a_rule_keeps_whole_filters_and_the_share_it_is_asked_for(name, density, rng, block):
    layout = find_layers(block, units=FILTERS)
    masks = STARTS[name](knowing([block.get_parameter(layer.name) for layer in layout], layout))(density, rng)
    assert [mask.shape for mask in masks] == [layer.gene_shape for layer in layout]
    individual = from_masks(masks, name)
    rows_kept(layout, individual)
    assert abs(1 - sparsity(individual, layout) - density) < 0.1
    kept = sum(int(mask.sum()) for mask in named_masks(individual, layout).values())
    assert kept == layout.weights - pruned_weights(individual, layout)


@pytest.mark.parametrize("name", ["magnitude", "lamp", "fisher"])
def test_rules_by_saliency_keep_the_filters_of_the_largest_sums(name, block):
    layout = find_layers(block, units=FILTERS)
    weights = [block.get_parameter(layer.name).detach() for layer in layout]
    masks = STARTS[name](knowing(weights, layout))(0.4, np.random.default_rng(0))
    scores = SALIENCIES[name](weights, [torch.ones_like(w) for w in weights])
    ranked = sorted(((float(row.sum()), -i, -j) for i, score in enumerate(scores) for j, row in enumerate(score)), reverse=True)
    left, expected = round(0.4 * layout.weights), set()
    for _, i, j in ranked:
        left -= weights[-i][-j].numel()
        if left < 0:
            break
        expected.add((-i, -j))
    assert {(i, int(j)) for i, mask in enumerate(masks) for j in np.flatnonzero(mask)} == expected


def test_narrow_leaves_readers_whole_and_makers_the_channels_of_one_draw(block, rng):
    layout = find_layers(block, units=FILTERS)
    channels = find_channels(block, layout, torch.zeros(2, 1, 8, 8))
    known = knowing([block.get_parameter(layer.name) for layer in layout], layout)
    object.__setattr__(known, "channels", lambda: channels)
    fewer = 0
    for _ in range(20):
        rows = rows_kept(layout, from_masks(STARTS["narrow"](known)(0.2, rng), "narrow"))
        fewer += rows[1].sum() < len(rows[1])
        assert all(part.any() for part in rows)
    assert fewer


def test_the_first_population_and_targets_hold_with_filters(block, rng):
    layout = find_layers(block, units=FILTERS)
    known = knowing([block.get_parameter(layer.name) for layer in layout], layout)
    for individual in first_population(known, ",".join(STARTS), 30, rng):
        rows_kept(layout, individual)
    targets = kept_at_targets(evoprune.Config(targets="0.2,0.25,0.3,0.35,0.4,0.45,0.5,0.55,0.6"), layout)
    for method in ("oneshot:random", "oneshot:erk", "oneshot:magnitude", "multishot:lamp"):
        kept = [layout.weights - pruned_weights(each, layout) for each in at_targets(known, method, targets, 0)]
        assert all(0.7 * target < k <= target for k, target in zip(kept, targets)), method
    with pytest.raises(EvopruneError) as error:
        kept_at_targets(evoprune.Config(targets="0.95"), layout)
    most = 1 - layout.least / layout.total
    assert str(error.value) == (f"targets: found 0.95, expected at most {most:.6g}: so much do the searched layers allow, with a "
                                f"gene (see --unit) left in each")


def test_operators_change_whole_filters_only(block, rng):
    layout = find_layers(block, units=FILTERS)
    parents = first_population(knowing([block.get_parameter(layer.name) for layer in layout], layout), "random,erk", 12, rng)
    for move in MOVES:
        bits = parents[3][1].copy()
        move(bits, layout[1].genes, rng)
        assert len(bits) == len(parents[3][1]) and not np.unpackbits(bits)[layout[1].genes:].any()
    changed = 0
    for _ in range(30):
        a, b = (parents[i].clone() for i in rng.choice(12, 2, replace=False))
        before = [set(map(bytes, (a[i], b[i]))) for i in range(len(layout))]
        mate(a, b, rng, uniform=0.0)
        assert [set(map(bytes, (a[i], b[i]))) for i in range(len(layout))] == before
        mutate(a, rng, layout)
        unite(a, b, rng)
        changed += a != b
        rows_kept(layout, a)
    assert changed


def test_refine_takes_the_filters_that_are_worth_least(block):
    layout = find_layers(block, units=FILTERS)
    parent = dense_individual(layout)
    parent.saliency = {layer.name: np.arange(layer.genes, dtype=np.float16) + 100 * i for i, layer in enumerate(layout)}
    growth = [np.zeros(layer.genes) for layer in layout]
    pruned = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        child, = refine(parent.clone(), rng, layout, growth)
        rows = rows_kept(layout, child)
        gone = [int((~row).sum()) for row in rows]
        for row, count in zip(rows, gone):
            if count:
                pruned += 1
                assert np.flatnonzero(~row).mean() <= (count - 1) / 2 + 1.5  # the lowest, but for the noise
    assert pruned > 10


# ----------------------------------------------------------------------------------------------------- saliency, paths, values


@pytest.mark.parametrize("name", SALIENCIES)
def test_a_gene_is_worth_the_sum_of_its_weights(name, rng):
    layout = Layout((Layer("a", (3, 4, 2, 2), "filter"), Layer("b", (5, 3)), Layer("c", (4, 2), "filter", 1)), 71)
    weights = [torch.randn(layer.shape) for layer in layout]
    squares = [torch.rand(layer.shape) for layer in layout] if name in NEEDS_DATA else None
    scores, found = SALIENCIES[name](weights, squares), gene_scores(name, layout, weights, squares)
    assert torch.allclose(found[0].flatten(), torch.stack([row.sum() for row in scores[0]]))
    assert torch.equal(found[1], scores[1]) and torch.allclose(found[2].flatten(), scores[2].sum(0))


@pytest.mark.parametrize("count", [0, 1, 3, 10, 30, 70, 71])
def test_keep_top_fills_with_whole_genes_from_the_best_on(count):
    layout = Layout((Layer("a", (3, 4, 2, 2), "filter"), Layer("b", (5, 3)), Layer("c", (4, 2), "filter", 1)), 71)
    scores = [torch.randn(layer.gene_shape, generator=torch.Generator().manual_seed(2)).round(decimals=1) for layer in layout]
    flat = [(float(s), layer.weights_a_gene) for layer, score in zip(layout, scores) for s in score.flatten()]
    kept, left = [False] * len(flat), count
    for place in sorted(range(len(flat)), key=lambda i: -flat[i][0]):
        left -= flat[place][1]
        if left < 0 and (not count or any(kept)):
            break
        kept[place] = True
    assert torch.cat([mask.flatten() for mask in keep_top(scores, count, layout)]).tolist() == kept


@pytest.mark.parametrize("make", [Block, Mixed])
def test_a_filter_is_dead_where_all_its_weights_are(make, rng):
    torch.manual_seed(0)
    model, inputs = make().eval(), torch.randn(4, 1, 8, 8)
    layout = find_layers(model, units=FILTERS)
    channels, dropped = find_channels(model, layout, inputs), 0
    for _ in range(40):
        individual = from_masks((rng.random(layer.gene_shape) < 0.4 for layer in layout), "x")
        for i in range(len(layout)):
            if rng.random() < 0.15:
                set_bits(individual, i, np.zeros(layout[i].genes, bool))
        fine, same = by_weights(model, layout, individual)
        expected = drop_dead(same, fine, channels)
        found = drop_dead(individual, layout, channels)
        assert {i: layout[i].expanded(genes).tolist() for i, genes in found.items()} == {
            i: genes.reshape(fine[i].shape).tolist() for i, genes in expected.items()}
        dropped += len(found)
        finest = drop_dead(same, fine, channels, absorbing=range(len(layout)))
        for i, genes in drop_dead(individual, layout, channels, absorbing=range(len(layout))).items():
            gone = layout[i].expanded(get_bits(individual, i, layout) & ~genes)
            assert not (gone.reshape(-1) & finest[i]).any()  # a filter that still reads a channel that varies stays whole
            assert not (genes & ~get_bits(individual, i, layout)).any()
            set_bits(individual, i, genes)
        assert drop_dead(individual, layout, channels, absorbing=range(len(layout))) == {}
    assert dropped


@pytest.mark.parametrize("repair", ["none", "bn", "least-squares"])
def test_filters_measure_and_repair_like_the_weights_they_stand_for(repair, images, rng):
    torch.manual_seed(1)
    model = Mixed().eval()
    layout = find_layers(model, units=FILTERS)
    individual = from_masks((rng.random(layer.gene_shape) < 0.6 for layer in layout), "x")
    fine, same = by_weights(model, layout, individual)
    kinds = dict(repair=repair, calibration=None if repair == "none" else calibration(images, 60, 0))
    coarse, plain = (Evaluator(model, each, images, 30, plain=True, **kinds) for each in (layout, fine))
    (accuracy, sparse), (other, weights) = coarse(individual), plain(same)
    assert sparse == weights and abs(accuracy - other) <= (2 / 60 if repair == "least-squares" else 0)
    for (a, _), (b, _) in zip(coarse.masked, plain.masked):
        assert torch.allclose(a, b, rtol=1e-2, atol=1e-3 * float(b.abs().max()) + 1e-6)


@pytest.mark.parametrize("worth", ["lamp", "obs"])
def test_what_a_result_says_filters_are_worth(worth, images, rng):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(1, 5, 3), nn.Tanh(), nn.Flatten(), nn.Linear(180, 10)).eval()
    layout = find_layers(model, units=FILTERS)
    evaluator = Evaluator(model, layout, images, 30, repair="least-squares", calibration=calibration(images, 60, 0), worth=worth)
    individual = from_masks([np.array([1, 1, 0, 1, 0], bool), rng.random(10) < 0.8], "x")
    result = evaluator(individual)
    parts = evaluator.repairer.saliency() if worth == "obs" else dict(zip(
        [layer.name for layer in layout], SALIENCIES["lamp"]([p for p, _ in evaluator.masked])))
    for i, layer in enumerate(layout):
        kept = get_bits(individual, i, layout)
        expected = torch.stack([row.sum() for row in parts[layer.name].reshape(layer.shape[0], -1)])[torch.from_numpy(kept)]
        assert expected.min() > 0 and np.allclose(result.saliency[layer.name], expected.log(), rtol=2e-3, atol=2e-3)


def test_removing_a_row_costs_what_it_costs_where_errors_are_weighed():
    torch.manual_seed(0)
    x, shares = torch.randn(200, 12) @ torch.randn(12, 12), torch.rand(200, 4)
    shares = shares / shares.sum(0)
    x, targets, dense = x - x.mean(0), torch.randn(200, 4), torch.randn(4, 12)
    mask = torch.ones(4, 12, dtype=torch.bool)
    mask[2] = False
    for shifts in (False, True):
        weights, errors, _ = solve_weighed(x, targets, shares, dense, mask, 1e-10, shifts, by_row=True)
        for row in range(4):
            mean = shares[:, row] @ x * shifts
            system = (x * shares[:, row, None]).T @ x - mean[:, None] * mean
            system += 0.01 * float(system.trace()) / 12 * torch.eye(12)
            expected = weights[row] @ torch.linalg.inv(torch.linalg.inv(system.double())).float() @ weights[row]
            assert torch.isclose(errors(weights)[row].sum(), expected, rtol=1e-3, atol=1e-6)


# ------------------------------------------------------------------------------------------------------------------- training


def test_training_prunes_and_grows_whole_filters(lenet, digits):
    layout = find_layers(lenet, units=FILTERS)
    net = copy.deepcopy(lenet)
    masks = named_masks(dense_individual(layout), layout)
    kept = tune(net, digits.train, Recipe(1, "adam", 0.005, 64, 0, True), masks, shrink=Shrink(layout, 400, "fisher"))
    individual = from_named(kept, layout, "x")
    rows = rows_kept(layout, individual)
    assert 400 - max(layer.weights_a_gene for layer in layout) < sum(int(m.sum()) for m in kept.values()) <= 400
    net, drawn = copy.deepcopy(lenet), np.random.default_rng(0)
    individual = from_masks((drawn.random(layer.gene_shape) < 0.4 for layer in layout), "x")
    kept, rows = named_masks(individual, layout), rows_kept(layout, individual)
    more = grown(net, digits.train, kept, layout, 3000, 1000, seed=0)
    grown_rows = rows_kept(layout, from_named(more, layout, "y"))
    order = torch.randperm(len(digits.train), generator=torch.Generator().manual_seed(0))[:1000]
    loss = nn.functional.cross_entropy(net(digits.train.inputs(order)), digits.train.labels[order])
    gradients = torch.autograd.grad(loss, [net.get_parameter(layer.name) for layer in layout])
    worth = [gradient.abs().flatten(1).sum(1).numpy() for gradient in gradients]
    new = [after & ~before for before, after in zip(rows, grown_rows)]
    assert any(part.any() for part in new) and all((after | ~before).all() for before, after in zip(rows, grown_rows))
    least = min(score[part].min() for score, part in zip(worth, new) if part.any())
    assert all((score[~after] <= least).all() for score, after in zip(worth, grown_rows))


def test_inherited_values_make_room_for_filters_that_grow(layout, lenet):
    layout = find_layers(lenet, units=FILTERS)
    parent, child = dense_individual(layout), dense_individual(layout)
    for each, at in ((parent, 3), (child, 1)):
        genes = np.ones(layout[1].genes, bool)
        genes[at] = False
        set_bits(each, 1, genes)
    weights = lenet.get_parameter(layout[1].name).detach()
    child.values = {layout[1].name: weights[named_masks(parent, layout)[layout[1].name]].numpy()}
    fit_values(child, parent, layout)
    whole = torch.zeros_like(weights)
    whole[named_masks(child, layout)[layout[1].name]] = torch.from_numpy(child.values[layout[1].name])
    expected = weights.clone()
    expected[[1, 3]] = 0
    assert torch.equal(whole, expected) and kept_genes(child[1]) == layout[1].genes - 1


@pytest.mark.parametrize("settings", [
    {"population": 8, "generations": 1, "repair": "least-squares"}, {"total_epochs": 6, "targets": "0.3,0.6", "generations": 3},
    {"total_epochs": 4, "targets": "0.3,0.6", "method": "gradual:fisher"}, {"method": "multishot:obs", "targets": "0.3",
                                                                          "repair": "least-squares"},
    {"population": 8, "generations": 2, "layerwise": True, "rounds": 2, "caps": "0.5,0.8", "finetune_epochs": 1},
    {"population": 8, "generations": 3, "finetune_epochs": 1, "front": 3, "unit": "conv*=filter"}],
    ids=lambda s: "-".join(s))
def test_a_run_by_filters_gives_models_whose_zeros_are_whole_filters(settings, lenet, digits, tmp_path):
    front = evoprune.prune(lenet, digits, out=str(tmp_path / "run"), threads=1, **{"unit": "filter", **settings})
    assert max(point.sparsity for point in front) > 0.2
    for point in front:
        net, zeros = point.model(), 0
        for layer, mask in zip(front.layout, point.masks().values()):
            weight = net.get_parameter(layer.name)
            rows = mask.flatten(1)
            assert layer.unit == "weight" or torch.equal(rows.any(1), rows.all(1))
            assert not weight[~mask].any()
            zeros += int((~mask).sum())
        assert point.sparsity == zeros / front.layout.total and point.kept == front.layout.total - zeros
