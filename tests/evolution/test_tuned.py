import copy
import csv
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import knowing
from torch import nn

import evoprune
from evoprune import EvopruneError
from evoprune.config import Config, keywords
from evoprune.evolution import budget as budgets
from evoprune.evolution.budget import FIRST_SHARE, LINE_SHARE, Budget, budget_of, kept_at_targets
from evoprune.evolution.generations import State
from evoprune.evolution.starts import at_targets
from evoprune.evolution.toolbox import default_toolbox
from evoprune.evolution.tuned import FIRST_STRATEGY, HIGH, LOW, mutate_strategy, unite, usual_strategy, weakest_targets
from evoprune.inputs.models import LeNet
from evoprune.masks.genome import Result, dense_individual, from_masks, get_bits, kept_genes
from evoprune.masks.layers import find_layers
from evoprune.masks.saliency import gene_scores, keep_top
from evoprune.rules import target_sparsities
from evoprune.values.fast import fast_training
from evoprune.values.inherited import fit_values, packed, unpacked
from evoprune.values.training import Recipe, Shrink, grown, steps_an_epoch, tune

TUNED = {"total_epochs": 6.0, "population": 16, "generations": 4, "targets": "0.8,0.9,0.95", "threads": 1}


def tuned(model, data, out, **settings):
    return evoprune.prune(model, data, out=str(out), **{**TUNED, **settings})


def content(out):
    return [(out / name).read_bytes() for name in ("front.csv", "masks.npz")] + [
        path.read_bytes() for path in sorted((out / "models").iterdir())]


@pytest.fixture(scope="module", params=[True, False], ids=["a line", "separate"])
def line(request):
    """Whether the first children are one."""
    return request.param


@pytest.fixture
def few_steps(line, monkeypatch):
    """Runs of so few steps that the first children are a line, or of as few that count as many."""
    if not line:
        monkeypatch.setattr(budgets, "LINE_STEPS", 0)


@pytest.fixture(scope="module")
def tuned_run(line, lenet, digits, tmp_path_factory):
    """The folder of a finished tuned run and how many steps it trained; do not change it."""
    out, steps = tmp_path_factory.mktemp("tuned") / "run", []
    with pytest.MonkeyPatch.context() as patch:
        if not line:
            patch.setattr(budgets, "LINE_STEPS", 0)
        count_steps(patch, steps)
        tuned(lenet, digits, out)
    return out, sum(steps)


def count_steps(patch, steps):
    import evoprune.run.jobs as jobs

    def counted(net, train, recipe, *rest):
        steps.append(round(recipe.epochs * steps_an_epoch(len(train), recipe.batch_size)))
        return tune(net, train, recipe, *rest)

    def counted_growth(net, train, masks, layout, more, images, seed):
        steps.append(images // 64)
        return grown(net, train, masks, layout, more, images, seed)

    patch.setattr(jobs, "tune", counted)
    patch.setattr(jobs, "grown", counted_growth)


def test_the_budget_is_kept_to_the_step(tuned_run, digits):
    out, steps = tuned_run
    assert steps == round(6 * steps_an_epoch(len(digits.train), 64))
    with open(out / "log.csv", newline="") as file:
        epochs = [float(row["epochs"]) for row in csv.DictReader(file)]
    assert epochs[0] == 0 and epochs == sorted(epochs) and epochs[-1] == 6
    assert json.loads((out / "done.json").read_text())["epochs"] == 6


@pytest.mark.parametrize("steps,jobs,first", [(100, 7, 3), (1000, 3, 3), (17, 17, 4)])
def test_jobs_share_the_steps(steps, jobs, first):
    budget = Budget(1.0, steps, jobs, first, 0.4)
    shares = [budget.of(job) for job in range(jobs)]
    assert sum(shares) == steps == budget.upto(jobs)
    assert max(shares[:first]) - min(shares[:first]) <= 1
    assert first == jobs or max(shares[first:]) - min(shares[first:]) <= 1


def test_points_stand_at_their_targets_with_zeros_where_they_are_pruned(tuned_run):
    front = evoprune.load_front(tuned_run[0], copy.deepcopy(LeNet()))
    points = [point for point in front if point.origin == "tune"]
    targets = kept_at_targets(Config(targets="0.8,0.9,0.95"), front.layout)
    assert points and all(any(0 <= target - point.kept <= 30 for target in targets) for point in points)  # dead ones are gone
    for point in points:
        parameters, kept = dict(point.model().named_parameters()), 0
        for name, mask in point.masks().items():
            assert not parameters[name][~mask].any()
            kept += int(mask.sum())
        assert kept == point.kept


def test_the_written_accuracy_is_that_of_the_written_model(tuned_run, digits):
    front = evoprune.load_front(tuned_run[0], copy.deepcopy(LeNet()))
    for point in front:
        assert evoprune.accuracy(point.model(), digits.search) == point.accuracy
        assert evoprune.accuracy(point.model(), digits.test) == point.test_accuracy


def test_a_resumed_run_ends_like_one_that_never_stopped(tuned_run, few_steps, lenet, digits, tmp_path):
    def stopping(evaluate, layout, config):
        toolbox = default_toolbox(evaluate, layout, config)
        survive, calls = toolbox.survive, []

        def twice(*given, **named):
            calls.append(given)
            if len(calls) == 3:
                raise KeyboardInterrupt
            return survive(*given, **named)

        toolbox.register("survive", twice)
        return toolbox

    with pytest.raises(KeyboardInterrupt):
        tuned(lenet, digits, tmp_path / "run", toolbox=stopping)
    assert not (tmp_path / "run" / "done.json").exists()
    steps = []
    with pytest.MonkeyPatch.context() as patch:
        count_steps(patch, steps)
        evoprune.prune(lenet, digits, resume=tmp_path / "run")
    assert content(tmp_path / "run") == content(tuned_run[0])
    assert 0 < sum(steps) < tuned_run[1]


def test_jobs_that_ended_are_not_repeated_when_the_generation_is_resumed(lenet, digits, tmp_path, tuned_run, line, few_steps):
    import evoprune.run.jobs as jobs

    calls = []

    def some(*given):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(given)
        return tune(*given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jobs, "tune", some)
        with pytest.raises(KeyboardInterrupt):
            tuned(lenet, digits, tmp_path / "run")
    steps = []
    with pytest.MonkeyPatch.context() as patch:
        count_steps(patch, steps)
        evoprune.prune(lenet, digits, resume=tmp_path / "run")
    budget = Budget(6.0, tuned_run[1], 3 + 1 if line else 3 + 3 * 2, 3, LINE_SHARE if line else FIRST_SHARE)
    assert sum(steps) == tuned_run[1] - budget.upto(2)
    assert content(tmp_path / "run") == content(tuned_run[0])


@pytest.mark.parametrize("settings", [{}, {"generations": 1}, {"method": "gradual:fisher"}])  # a line has more generations
def test_a_run_out_of_time_goes_on_where_it_stopped(settings, lenet, digits, tmp_path):
    whole = tuned(lenet, digits, tmp_path / "whole", **settings)
    starts = 1
    tuned(lenet, digits, tmp_path / "run", max_seconds=0.0, **settings)
    while not (tmp_path / "run" / "done.json").exists() and starts < 50:
        evoprune.prune(lenet, digits, resume=tmp_path / "run", max_seconds=0.05)
        starts += 1
    assert starts >= 2 and len(whole) > 1
    assert content(tmp_path / "run") == content(tmp_path / "whole")


def test_a_stopped_run_of_a_net_with_batch_norm_repairs_nothing(digits, tmp_path, monkeypatch):
    def stop(progress, row, *rest):
        if row["generation"]:
            raise KeyboardInterrupt

    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 10))
    monkeypatch.setattr("evoprune.run.progress.SearchProgress.generation", stop)
    with pytest.raises(KeyboardInterrupt):
        tuned(net, digits, tmp_path / "run")
    front = evoprune.load_front(tmp_path / "run", net)
    assert not front.finished and "tune" in {point.origin for point in front}
    assert {point.repair for point in front} == {"none"}


def test_worker_processes_give_the_same_bytes(tuned_run, few_steps, lenet, digits, tmp_path):
    tuned(lenet, digits, tmp_path / "run", engine="processes", workers=2)
    assert content(tmp_path / "run") == content(tuned_run[0])


@pytest.mark.parametrize("method", ["oneshot:random", "oneshot:narrow", "oneshot:lamp", "oneshot:fisher", "multishot:lamp",
                                    "gradual:fisher", "gradual:magnitude", "gradual:lamp"])
def test_every_rule_keeps_the_budget_and_the_targets(method, lenet, digits, tmp_path, monkeypatch):
    steps = []
    count_steps(monkeypatch, steps)
    front = tuned(lenet, digits, tmp_path / "run", method=method, total_epochs=3.0)
    assert sum(steps) == round(3 * steps_an_epoch(len(digits.train), 64))
    points = [point for point in front if point.origin != "dense"]
    assert points and all(point.origin.startswith(method) for point in points)
    for point in points:
        parameters = dict(point.model().named_parameters())
        assert all(not parameters[name][~mask].any() for name, mask in point.masks().items())
    with open(tmp_path / "run" / "front.csv") as a, open(tmp_path / "run" / "layers.csv") as b:
        made = {row["id"]: float(row["sparsity"]) for row in csv.DictReader(a)}
        assert len({row["id"] for row in csv.DictReader(b)}) >= len(made)
    least = sorted(target_sparsities(TUNED["targets"]))
    assert all(any(abs(p.sparsity - s) < 0.02 and p.sparsity >= s - 1e-9 for s in least) for p in points)


@pytest.mark.parametrize("method", ["oneshot:erk", "multishot:magnitude", "multishot:obs"])
def test_rules_without_training(method, lenet, digits, tmp_path):
    front = evoprune.prune(lenet, digits, out=str(tmp_path / "run"), shots=10, method=method, targets="0.5,0.8",
                           repair="least-squares")
    pruned = [point for point in front if point.origin != "dense"]
    assert {point.origin.partition("@")[0] for point in pruned} == {method}
    found = [point.sparsity for point in pruned]  # what is dead is gone too; the first may be worse by an image, and no point
    assert found == pytest.approx([0.51, 0.81][-len(found):], abs=0.011)
    assert json.loads((tmp_path / "run" / "done.json").read_text())["epochs"] == 0


@pytest.mark.parametrize("rule", ["magnitude", "lamp"])
def test_the_steps_of_multishot_go_by_the_rule_that_it_names(rule, lenet, layout):
    weights = [lenet.get_parameter(layer.name).detach() for layer in layout]
    found, = at_targets(knowing(weights, layout), f"multishot:{rule}", [5000], seed=0)
    expected = keep_top(gene_scores(rule, layout, weights), 5000, layout)  # unrepaired, all steps score the same values
    assert found == from_masks((mask.numpy() for mask in expected), "")


@pytest.mark.parametrize("settings,message", [
    ({"method": "gradual:fisher"}, "method: found 'gradual:fisher' without training; give --total-epochs"),
    ({"method": "slowly"}, "method: found 'slowly', expected evolve, oneshot:RULE, multishot:RULE or gradual:RULE"),
    ({"method": "oneshot:best"}, "method: found the rule 'best', expected one of random, narrow, magnitude, erk, lamp, fisher"),
    ({"method": "gradual:erk", "total_epochs": 1.0}, "method: found the rule 'erk', expected one of magnitude, lamp, fisher"),
    ({"method": "oneshot:lamp", "knowledge": "none"}, "method: found 'lamp', which needs --knowledge weights, with --knowledge "
                                                      "none; expected random, narrow"),
    ({"targets": "0.9,1"}, "targets: found '0.9,1', expected sparsities between 0 and 1 like 0.9,0.95,0.99, or how many"),
    ({"total_epochs": 1.0, "finetune_epochs": 1}, "finetune_epochs: found 1 with --total-epochs, whose points are trained "
                                                  "already; expected one of them"),
    ({"total_epochs": 1.0, "layerwise": True}, "layerwise: found with --total-epochs or --method, expected it alone"),
    ({"total_epochs": 0.1}, "total_epochs: found 0.1, which is 2 steps for 8 jobs, expected at least one each; raise it, or "
                            "lower population, generations or targets"),
    ({"total_epochs": 5.0, "targets": "0.9999"}, "targets: found 0.9999, expected at most 0.999643: so much do the searched "
                                                 "layers allow, with a weight left in each")])
def test_bad_input_is_told_in_one_line(settings, message, lenet, digits, tmp_path):
    with pytest.raises(EvopruneError) as error:
        evoprune.prune(lenet, digits, out=str(tmp_path / "run"), **settings)
    assert str(error.value) == keywords(message)


def test_training_needs_a_train_split(lenet, digits, tmp_path):
    with pytest.raises(EvopruneError, match="found no train split, which train_epochs, finetune_epochs and total_epochs need"):
        evoprune.prune(lenet, evoprune.Data(None, digits.search, digits.test), out=str(tmp_path / "run"), total_epochs=2.0)


# ------------------------------------------------------------------------------------------------------------ its parts


def test_a_mask_shrinks_to_what_was_asked_and_keeps_the_most_salient(lenet, digits, layout):
    net = copy.deepcopy(lenet)
    masks = {name: torch.ones(p.shape, dtype=torch.bool) for name, p in net.named_parameters() if p.dim() > 1}
    kept = tune(net, digits.train, Recipe(2, "adam", 0.005, 64, 0, True), masks, shrink=Shrink(layout, 500, "fisher"))
    assert sum(int(mask.sum()) for mask in kept.values()) == 500
    assert all(not p[~kept[name]].any() for name, p in net.named_parameters() if name in kept)
    recipe = Recipe(0, "adam", 0.005, 64, 0, True)
    still = tune(copy.deepcopy(lenet), digits.train, recipe, masks, shrink=Shrink(layout, 500, "magnitude"))
    assert all(torch.equal(still[name], masks[name]) for name in masks)  # no step, no pruning


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_a_frozen_layer_loses_what_gradients_say_and_stays_as_it_is(optimizer, lenet, digits, layout):
    net = copy.deepcopy(lenet)
    net.conv2.requires_grad_(False)
    masks = {name: torch.ones(p.shape, dtype=torch.bool) for name, p in net.named_parameters() if p.dim() > 1}
    kept = tune(net, digits.train, Recipe(2, optimizer, 0.005, 64, 0, True), masks, shrink=Shrink(layout, 2000, "fisher"))
    assert 50 < int(kept["conv2.weight"].sum()) < 2000 and not net.conv2.weight.requires_grad
    assert torch.equal(net.conv2.weight, lenet.conv2.weight * kept["conv2.weight"])


@pytest.mark.parametrize(("kept", "spared"), [(500, True), (40, True), (39, False)])
def test_each_class_keeps_a_weight_unless_that_takes_too_many(kept, spared, lenet, digits, layout):
    net = copy.deepcopy(lenet)
    net.fc2.weight.data[[0, 7]] *= 1e-6  # worth less than all others
    masks = {name: torch.ones(p.shape, dtype=torch.bool) for name, p in net.named_parameters() if p.dim() > 1}
    masks["fc2.weight"][3] = False  # gone before
    recipe = Recipe(1 / 18, "adam", 1e-9, 64, 0, True)
    found = tune(net, digits.train, recipe, masks, shrink=Shrink(layout, kept, "magnitude"))
    rows = found["fc2.weight"].sum(1).tolist()
    assert sum(int(mask.sum()) for mask in found.values()) == kept and rows[3] == 0
    assert (rows[0], rows[7]) == ((1, 1) if spared else (0, 0))
    if spared:
        assert int(found["fc2.weight"][0].nonzero()) == int(lenet.fc2.weight[0].abs().argmax())


def test_the_shrinking_is_cubic_and_ends_where_it_should(layout):
    shrink = Shrink(layout, 100, "magnitude", until=0.5, first=0.2)
    kept = [shrink.kept_at(step, 1000, 10_000, 10_000) for step in range(1001)]
    assert kept[0] == 2000 and kept[250] == 100 + round(1900 / 8) and kept[500] == kept[1000] == 100
    assert kept == sorted(kept, reverse=True)
    assert Shrink(layout, 100, "magnitude").kept_at(0, 10, 300, 10_000) == 300
    assert Shrink(layout, 500, "magnitude").kept_at(0, 10, 300, 1000) == 500


def test_with_a_pace_the_logarithm_of_the_density_falls_by_a_power_of_the_time_left(layout):
    shrink = Shrink(layout, 100, "magnitude", until=0.5, first=0.2, pace=2.0)
    kept = [shrink.kept_at(step, 1000, 10_000, 10_000) for step in range(1001)]
    assert kept[0] == 2000 and kept[250] == round(100 * 20 ** 0.25) and kept[500] == kept[1000] == 100
    assert kept == sorted(kept, reverse=True)


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_fisher_prunes_by_the_running_squares_of_the_gradients(optimizer, digits):
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    images = torch.randint(1, 256, digits.train.images.shape, generator=torch.Generator().manual_seed(0)).byte()
    images[..., 0, 0] = 0  # no gradient
    train = type(digits.train)(images, digits.train.labels)
    kept = tune(net, train, Recipe(1, optimizer, 0.01, 64, 0, True), {"1.weight": torch.ones(10, 64, dtype=torch.bool)},
                shrink=Shrink(find_layers(net), 630, "fisher", until=1.0, first=1.0))
    assert not kept["1.weight"][:, 0].any() and int(kept["1.weight"].sum()) == 630


def test_growth_takes_the_largest_gradients(lenet, digits, layout):
    torch.manual_seed(0)
    masks = {name: torch.rand(p.shape) < 0.05 for name, p in lenet.named_parameters() if p.dim() > 1}
    net = copy.deepcopy(lenet)
    more = grown(net, digits.train, masks, layout, 50, 10_000, seed=0)
    order = torch.randperm(len(digits.train), generator=torch.Generator().manual_seed(0))
    loss = nn.functional.cross_entropy(net(digits.train.inputs(order)), digits.train.labels[order])
    gradients = dict(zip(masks, torch.autograd.grad(loss, [dict(net.named_parameters())[name] for name in masks])))
    new = {name: more[name] & ~masks[name] for name in masks}
    assert sum(int(mask.sum()) for mask in new.values()) == 50 and all((more[name] | ~masks[name]).all() for name in masks)
    least = min(float(gradients[name].abs()[new[name]].min()) for name in masks if new[name].any())
    assert all(float(gradients[name].abs()[~more[name]].max()) <= least for name in masks)


def test_inherited_values_make_room_for_weights_that_grow(layout, rng):
    parent = from_masks([rng.random(layer.shape) < 0.1 for layer in layout], "p")
    values = [rng.normal(size=kept_genes(bits)).astype(np.float32) for bits in parent]
    parent.values = {layer.name: value for layer, value in zip(layout, values)}
    child, mate = parent.clone(), from_masks([rng.random(layer.shape) < 0.1 for layer in layout], "m")
    unite(child, mate, rng=rng, p=1.0)
    fit_values(child, parent, layout)
    for i, layer in enumerate(layout):
        whole = np.zeros(layer.genes, np.float32)
        whole[get_bits(child, i, layout)] = child.values[layer.name]
        before = get_bits(parent, i, layout)
        assert np.array_equal(whole[before], values[i]) and not whole[~before].any()
        assert np.array_equal(get_bits(child, i, layout), before | get_bits(mate, i, layout))
    assert all(value is parent.values[layer.name] for layer, value in zip(layout, values))  # the parent's are untouched


def test_a_strategy_mutates_within_its_limits(rng):
    strategy = FIRST_STRATEGY
    drawn = []
    for _ in range(300):
        strategy, = mutate_strategy(strategy, rng=rng)
        drawn.append(strategy)
    assert (np.array(drawn) >= LOW).all() and (np.array(drawn) <= HIGH).all() and np.array(drawn).std(0).min() > 0.01


def test_children_go_where_the_front_is_weak(layout):
    def at(accuracy, kept):
        individual = dense_individual(layout)
        for i, layer in enumerate(layout):
            individual[i] = np.packbits(np.arange(layer.genes) < kept * layer.genes)
        individual.fitness.values = accuracy, 0.0
        return individual

    dense = at(1.0, 1.0)
    targets = [int(layout.weights * share) + 10 for share in (0.2, 0.1, 0.05)]
    archive = [dense, at(0.98, 0.2), at(0.95, 0.1), at(0.8, 0.05)]
    drawn = [aim for i in range(30) for aim in weakest_targets(State(i, [dense], archive, {}, ()), targets, 2, layout)]
    assert np.bincount(drawn, minlength=3) / 60 == pytest.approx(np.array([0.02, 0.05, 0.2]) / 0.27, abs=0.03)


def test_a_result_survives_packing():
    bits = [np.packbits(np.arange(20) % 3 == 0), np.packbits(np.arange(7) % 2 == 0)]
    values = {"a": np.arange(3, dtype=np.float32), "n": np.int64(4) * np.ones((), np.int64)}
    found = unpacked(packed(Result((0.1, 0.9), bits, values=values)))
    assert found.objectives == (0.1, 0.9) and all(np.array_equal(a, b) for a, b in zip(found.bits, bits))
    assert {name: value.tolist() for name, value in found.values.items()} == {"a": [0, 1, 2], "n": 4} and found.saliency is None
    measured = Result((1 / 3,), saliency={"a": np.array([0.1, -2], np.float16)})
    again = unpacked(packed(measured))
    assert again.objectives == (1 / 3,) and again.bits is again.values is None
    assert again.saliency["a"].dtype == np.float16 and np.array_equal(again.saliency["a"], measured.saliency["a"])


@pytest.mark.parametrize("size", [(2, 3, 8, 8), (2, 3, 9, 7)])
def test_fast_training_gives_the_gradients_of_the_plain_modules(size):
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten(), nn.LazyLinear(5), nn.Tanh())
    x = torch.randn(size, requires_grad=True)
    expected = torch.autograd.grad(plain(x).square().sum(), [x, *plain.parameters()])
    torch.use_deterministic_algorithms(True)  # memory that nothing is written to is then NaN
    try:
        with fast_training(plain):
            assert "forward" in vars(plain[1]) and "forward" in vars(plain[2])
            found = torch.autograd.grad(plain(x).square().sum(), [x, *plain.parameters()])
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(expected, found))
    assert "forward" not in vars(plain[1])


@pytest.mark.parametrize(("epochs", "method", "line"), [(10.0, "evolve", True), (59.9, "evolve", True), (60.0, "evolve", False),
                                                        (10.0, "gradual:lamp", False)])
def test_budget_of_counts_a_job_a_target_and_the_children(epochs, method, line):
    config = Config(total_epochs=epochs, method=method, population=16, generations=6, targets="0.9,0.95")
    budget = budget_of(config, 6400, 64)
    assert (budget.steps, budget.jobs, budget.first, budget.line) == (100 * epochs, 2 + (1 if line else 5 * 2), 2, line)
    assert [budget.before(g) for g in range(5)] == ([0, 0, 1, 2, 3] if line else [0, 0, 2, 4, 6])
    assert [budget.inherits(g) for g in range(1, 5)] == [line, line, False, False]
    assert budget.generations == (3 if line else 6) and budget.before(budget.generations + 1) == budget.jobs
    assert budget.upto(2) == round((LINE_SHARE if line else FIRST_SHARE) * budget.steps)


@pytest.mark.parametrize(("generations", "population", "targets", "later", "children"), [
    (1, 16, 8, 0, 2), (2, 16, 8, 1, 2), (3, 16, 8, 2, 2), (20, 16, 8, 2, 2), (20, 16, 7, 1, 2), (20, 16, 2, 1, 1),
    (20, 64, 8, 1, 4)])
def test_children_after_a_line_have_half_of_its_steps_each_at_least(generations, population, targets, later, children):
    config = Config(total_epochs=10.0, population=population, generations=generations, targets=str(targets))
    budget = budget_of(config, 6400, 64)
    assert budget.line and budget.jobs == targets + children * later and budget.generations == targets + later
    assert all(budget.of(job) >= budget.of(0) // 2 for job in range(budget.jobs))
    assert not budget_of(replace(config, targets="0.9"), 6400, 64).line


def test_a_line_only_loses_weights_and_children_after_it_grow_as_usual(lenet, digits, tmp_path):
    def make(evaluate, layout, config):
        toolbox = default_toolbox(evaluate, layout, config)
        breed = toolbox.breed
        toolbox.register("mutate", lambda strategy, rng: (strategy,))
        toolbox.register("breed", lambda state, rng: born.extend(jobs := breed(state, rng=rng)) or jobs)
        return toolbox

    born = []
    tuned(lenet, digits, tmp_path / "run", toolbox=make)
    assert [job.growth for job in born[:3]] == [0, 0, 0] and [job.kept for job in born[:3]] == sorted(
        {job.kept for job in born}, reverse=True)
    usual = {job.kept: usual_strategy(aim, 3).tolist() for aim, job in enumerate(born[:3])}
    assert [job.strategy.tolist() for job in born[3:]] == [usual[job.kept] for job in born[3:]] and len(born) == 4


def test_a_script_registers_aim_and_jobs(lenet, digits, tmp_path):
    """The seams that experiments need, so that none reaches into a module."""
    def make(evaluate, layout, config):
        toolbox = default_toolbox(evaluate, layout, config)
        usual = toolbox.jobs
        toolbox.register("aim", lambda state, targets, children, layout: asked.append(state.generation) or [0] * children)
        toolbox.register("jobs", lambda masks, budget: [replace(job, what="mine") for job in usual(masks, budget=budget)])
        made.append(toolbox)
        return toolbox

    asked, made = [], []
    tuned(lenet, digits, tmp_path / "aim", toolbox=make, generations=3)
    assert asked == [3]  # after a line of three targets
    tuned(lenet, digits, tmp_path / "jobs", toolbox=make, total_epochs=1.0, method="gradual:lamp")
    assert {job.what for job in made[-1].first()[1]} == {"mine"}
