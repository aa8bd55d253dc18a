import csv
import itertools
from contextlib import suppress
from dataclasses import replace
from functools import reduce
from statistics import NormalDist
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import hashes

import evoprune
from evoprune.chance import paired_bootstrap, sign_test
from evoprune.config import Config
from evoprune.evolution import toolbox, tuned
from evoprune.evolution.budget import FIRST_SHARE, LINE_STEPS, SEED_STEPS, SEEDS, kept_at_targets, seeded_budget
from evoprune.evolution.generations import State, evolve
from evoprune.evolution.history import Log, Seen
from evoprune.evolution.tuned import GENTLE, seed_jobs
from evoprune.inputs.models import copied
from evoprune.inputs.tasks import CLASSIFICATION
from evoprune.masks.genome import dense_individual, from_masks, kept_weights
from evoprune.masks.layers import find_layers
from evoprune.masks.layout import Layer, Layout
from evoprune.objectives import USUAL, Objective, Objectives
from evoprune.results.written import DOMINATED, FRONT
from evoprune.run import refine
from evoprune.run.rebuild import RunBuilder, rebuild
from evoprune.run.refine import joined, rows_of

SEED_EPOCHS = 3 * SEEDS * SEED_STEPS / FIRST_SHARE / 18  # of three targets and 18 steps an epoch, so that each seed has its steps
SETTINGS = {"repair": "least-squares", "shots": 5, "population": 4, "generations": 1, "targets": "0.8,0.95", "threads": 1}


def test_the_sign_test_counts_every_way_that_coins_can_fall():
    for wins, losses in ((0, 0), (1, 0), (3, 1), (5, 5), (2, 7)):
        flips = [sum(coins) for coins in itertools.product((0, 1), repeat=wins + losses)]
        assert sign_test(wins, losses) == pytest.approx(np.mean([heads >= wins for heads in flips]))
    for wins, losses in ((10_150, 9_850), (9_900, 10_100)):  # of many, as fast
        assert sign_test(wins, losses) == pytest.approx(NormalDist(10_000, 5000 ** 0.5).cdf(20_000 - wins + 0.5), rel=0.01)


def test_the_bootstrap_tells_better_from_equal():
    rng = np.random.default_rng(0)
    a = np.stack([rng.random(300) < 0.9, np.ones(300)], 1).astype(float)
    worse = a * [[0.8, 1]]
    mean = CLASSIFICATION.score
    assert paired_bootstrap(a, worse, mean) == 0 and paired_bootstrap(worse, a, mean) == 1
    assert 0.2 < paired_bootstrap(a, a[::-1], mean) < 0.8


@pytest.mark.parametrize(("epochs", "first"), [(10.0, 3), (LINE_STEPS / 6 - 0.1, 3), (LINE_STEPS / 6, 3), (1000.0, 3),
                                               (SEED_EPOCHS - 0.1, 3), (SEED_EPOCHS, 3 * SEEDS)])
def test_the_budget_is_kept_and_later_children_are_made_only_where_they_have_their_steps(epochs, first):
    config = Config(total_epochs=epochs, population=16, targets="0.8,0.9,0.95")
    budget = seeded_budget(config, 1151, 64)
    shares = [budget.of(job) for job in range(budget.jobs)]
    assert sum(shares) == round(epochs * 18) and budget.first == first
    assert (budget.jobs > first) == (FIRST_SHARE * epochs * 18 / 3 / SEEDS >= SEED_STEPS) == (first == 3 * SEEDS)
    assert budget.jobs == first or min(shares[first:]) >= min(shares[:first]) - 1
    assert budget.line == (epochs < LINE_STEPS / 6) and (not budget.line or max(shares) <= min(shares) + 1)
    assert [budget.before(g) for g in range(3)] == ([0, 1, 2] if budget.line else [0, first, first + budget.children])
    spent = FIRST_SHARE if first > 3 else 1 / 3 if budget.line else 1
    assert budget.spent(state_at(0, budget.first)) == pytest.approx(epochs * spent, abs=0.1)


def state_at(generation, evaluations):
    return SimpleNamespace(generation=generation, evaluations=evaluations)


def test_seeds_are_what_was_found_at_each_target_and_a_child_of_the_dense_model(lenet):
    layout, config = find_layers(lenet), Config(total_epochs=SEED_EPOCHS, targets="0.5,0.8,0.9")
    rng, found = np.random.default_rng(0), []
    for density, score in ((0.45, 0.9), (0.48, 0.8), (0.18, 0.7), (0.09, 0.4)):
        found.append(from_masks((rng.random(layer.genes) < density for layer in layout), f"at {density}"))
        found[-1].fitness.values = (score, 1 - density)
    jobs = seed_jobs([dense_individual(layout), *found], seeded_budget(config, 1151, 64), config, layout)
    assert [job.individual.origin for job in jobs] == [
        "at 0.45+repair+tune", "at 0.45+tune", "tune", "at 0.18+repair+tune", "at 0.18+tune", "tune", "at 0.09+repair+tune",
        "at 0.09+tune", "tune"]
    targets = kept_at_targets(config, layout)
    for i, job in enumerate(jobs):
        assert job.kept == (targets[i // 3] if i % 3 == 2 else kept_weights(job.individual, layout)) and job.seed == i
        assert job.repaired == (i % 3 == 0) and (job.learning_rate == GENTLE) == job.repaired if i % 3 < 2 else True
    plain = seed_jobs(found[2:3], seeded_budget(config, 1151, 64), replace(config, repair="none"), layout)  # two have no mask
    assert [job.individual.origin for job in plain] == [*["tune"] * 3, *["at 0.18+tune"] * 2, *["tune"] * 4]
    assert sum(job.steps for job in plain) == round(FIRST_SHARE * 18 * SEED_EPOCHS) and not any(job.repaired for job in plain)
    line, dense, least = LINE_STEPS, tuned.DENSE_STEPS, "0.9,0.95,0.97"
    for steps, aims, count, tuned_dense in ((line, "0.5,0.8,0.9", 3, [2]), (line - 1, "0.5,0.8,0.9", 1, []),  # one a target, or
                                            (dense, least, 1, [0]), (dense - 1, least, 1, [])):  # the first of a line
        few_targets = Config(total_epochs=3 * steps / 18, targets=aims)
        few = seed_jobs(found, seeded_budget(few_targets, 1151, 64), few_targets, layout)
        assert [job.steps for job in few] == [steps] * count
        assert [i for i, job in enumerate(few) if not job.repaired] == tuned_dense == [
            i for i, job in enumerate(few) if job.individual.origin == "tune"]


def points(*given):
    """Points of (density, score, right answers of 20 images)."""
    return [SimpleNamespace(density=density, measured=SimpleNamespace(score=score, ranked=(score, 1 - density)),
                            right=np.array(right, float))
            for density, score, right in given]


def right(count, offset=0):
    """As many right answers of 40."""
    return np.roll(np.arange(40) < count, offset)


@pytest.fixture
def run(monkeypatch):
    monkeypatch.setattr(refine, "sums_of", lambda run, point: np.stack([point.right, np.ones(40)], 1))
    labels = torch.zeros(40, dtype=torch.long)
    search = SimpleNamespace(task=CLASSIFICATION, labels=labels)
    return SimpleNamespace(choice=None, data=SimpleNamespace(search=search), objectives=USUAL)


def test_what_is_best_in_a_further_objective_stays(run):
    run.objectives = Objectives((*USUAL, Objective("cost", -1.0, 100.0, 0.0)))
    dear, cheap, dominated = points((0.1, 0.8, right(32)), (0.2, 0.5, right(20)), (0.2, 0.5, right(20)))
    for point, cost in ((dear, 9.0), (cheap, 1.0), (dominated, 10.0)):
        point.measured.values = (point.measured.score, 1 - point.density, cost)
    assert joined(run, [[dear], [cheap, dominated]]) == [cheap, dear]


def test_what_is_better_by_chance_alone_is_left_out(run):
    simple = points((0.5, 0.9, right(36)), (0.1, 0.5, right(20)))
    lucky, better, sparse = points((0.2, 0.525, right(21)), (0.12, 0.75, right(30)), (0.05, 0.3, right(12)))
    assert joined(run, [simple, [lucky]]) == simple  # one more right answer of 40
    assert joined(run, [simple, [better, sparse]]) == [simple[0], better, simple[1], sparse]  # nothing simpler is so sparse
    worse, = points((0.12, 0.5, right(20, 20)))
    assert joined(run, [simple, [better, worse]]) == [simple[0], better, simple[1]]


def test_what_more_images_say_counts_where_there_are_some(run):
    simple = points((0.5, 0.9, right(36)), (0.1, 0.5, right(20)))
    better, worse = points((0.3, 0.4, right(30)), (0.2, 0.9, right(10)))
    for point, all_of_them in ((better, 0.75), (worse, 0.25)):
        point.measured.ranked = (all_of_them, 1 - point.density)
    assert joined(run, [simple, [better, worse]]) == [simple[0], better, simple[1]]


def test_a_phase_that_helps_by_more_than_chance_as_a_whole_is_judged_together(run):
    simple = points((0.5, 0.9, right(36)), (0.3, 0.8, right(32)), (0.1, 0.5, right(20)))
    two_more = points((0.4, 0.85, right(34)), (0.2, 0.55, right(22)))
    assert joined(run, [simple, two_more[:1]]) == simple
    assert joined(run, [simple, two_more]) == sorted([*simple, *two_more], key=lambda point: -point.density)


def test_the_log_of_training_goes_on_where_that_of_the_search_ends():
    def state(*rows):
        return State(0, [], [], Seen(), reduce(Log.and_then, rows, Log()))

    row = {"generation": 0, "evaluations": 8, "epochs": 0, "seconds": 2.0, "hvlog": 0.5}
    search = state(row, {**row, "generation": 1, "evaluations": 16, "seconds": 4.0})
    found = rows_of(search, state({**row, "epochs": 3.0}))
    assert rows_of(search, None) == list(search.log)
    assert found[-1] == {"generation": 2, "evaluations": 24, "epochs": 3.0, "seconds": 6.0, "hvlog": 0.5}


@pytest.fixture(scope="module")
def refined(lenet, digits, tmp_path_factory):
    out = tmp_path_factory.mktemp("refined") / "run"
    evoprune.prune(lenet, digits, out=out, refine_epochs=30.0, **SETTINGS)
    return out


def test_points_of_all_phases_are_what_they_say(refined, lenet, digits):
    front = evoprune.load_front(refined, lenet)
    origins = {point.origin.rpartition("+")[2] for point in front}
    assert "tune" in origins and any("multishot" in point.origin and not point.origin.endswith("tune") for point in front)
    for point in front:
        model = point.model()
        assert evoprune.accuracy(model, digits.search) == point.accuracy
        assert evoprune.accuracy(model, digits.test) == point.test_accuracy
        trained = point.origin.endswith("tune")
        assert point.trained == trained and point.repair == ("none" if trained or point.origin == "dense" else "least-squares")
        assert trained or point.accuracy_before == point.accuracy
        for name, mask in point.masks().items():
            assert not model.get_parameter(name)[~mask].any()
    with (refined / "log.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["generation"]) for row in rows] == list(range(len(rows))) and float(rows[-1]["epochs"]) == 30


def test_generations_of_what_is_trained_count_on_as_in_the_log(refined, lenet):
    front = evoprune.load_front(refined, lenet)
    points = {point.id: point for name in (DOMINATED, FRONT) if front.written.has(name) for point in front.read(name)}
    with (refined / "log.csv").open(newline="") as file:
        log = {int(row["generation"]): float(row["epochs"]) for row in csv.DictReader(file)}
    trained = {point.generation for point in points.values() if "tune" in point.origin}
    assert trained and trained <= {generation for generation, epochs in log.items() if epochs}
    assert all(log[point.generation] == 0 for point in points.values() if "tune" not in point.origin)


@pytest.mark.parametrize("extra", [{"accuracy_floor": 0.8}, {"precision": "bf16"}])
def test_what_points_scored_before_training_is_of_all_images_in_fp32(extra, lenet, digits, tmp_path):
    settings = {**SETTINGS, "repair": "none", "total_epochs": 40.0, "batch_size": "32", **extra}
    front = evoprune.prune(lenet, digits, out=tmp_path / "run", **settings)
    points = [point for point in front if point.kept < point.weights]
    assert points
    for point in points:
        masked = copied(lenet)
        for name, mask in point.masks().items():
            masked.get_parameter(name).data *= mask
        assert point.accuracy_before == pytest.approx(evoprune.accuracy(masked.eval(), digits.search), abs=1e-9)


def test_where_steps_are_few_each_target_inherits_from_the_next_denser_one(lenet, digits, tmp_path, monkeypatch):
    made, usual = [], toolbox.measure_jobs

    def measured(jobs, *given, **more):
        born = usual(jobs, *given, **more)
        made.extend(zip(jobs, born))
        return born

    monkeypatch.setattr(toolbox, "measure_jobs", measured)
    layout, targets = find_layers(lenet), "0.5,0.8,0.9,0.95"
    evoprune.prune(lenet, digits, out=tmp_path / "run", refine_epochs=12.0, **{**SETTINGS, "targets": targets})
    kept = kept_at_targets(Config(targets=targets), layout)
    assert [job.kept for job, _ in made] == [kept_weights(made[0][0].individual, layout), *kept[1:]]
    assert [job.steps for job, _ in made] == [54] * 4 and made[0][0].repaired and not made[0][0].individual.values
    for i, ((_, parent), (job, _)) in enumerate(itertools.pairwise(made), 1):
        assert job.growth == 0 and job.learning_rate == tuned.usual_strategy(i, 4)[0]
        assert job.individual.values.keys() == parent.values.keys()
        for name, value in job.individual.values.items():  # as the denser target's training left it
            assert np.isin(value[value != 0], parent.values[name]).all()


def test_an_heir_is_that_of_the_sparsest_with_weights_enough_and_of_the_newest(lenet):
    layout, rng = find_layers(lenet), np.random.default_rng(0)
    targets = kept_at_targets(Config(targets="0.5,0.8,0.9"), layout)

    def born(density, generation):
        individual = from_masks((rng.random(layer.genes) < density for layer in layout), "tune")
        individual.generation = generation
        return individual

    older, newer, collapsed, dense = born(0.45, 0), born(0.3, 1), born(0.05, 2), dense_individual(layout)
    population = [older, collapsed, newer, dense]
    job = tuned.heir(2, targets, State(2, population, [dense], Seen(), Log()), layout, rng, 7)
    assert job.individual.key() == newer.key() and (job.kept, job.steps, job.growth) == (targets[2], 7, 0)
    assert job.individual is not newer and job.individual.generation == 3 and newer.generation == 1
    twin = older.clone()
    twin.generation, twin.values = 1, {"bias": np.ones(1)}
    for same in ([older, twin], [twin, older]):
        assert tuned.heir(1, targets, State(1, same, [dense], Seen(), Log()), layout, rng, 7).individual.values == twin.values
    alone = tuned.heir(1, targets, State(1, [collapsed], [dense], Seen(), Log()), layout, rng, 7)
    assert alone.individual.key() == dense.key()


@pytest.mark.parametrize("line", [True, False])
def test_children_of_a_line_stay_where_more_images_choose(line):
    def born(score, generation):
        individual = from_masks([np.arange(8) < 4], "tune")
        individual.generation = generation
        individual.fitness.values = (score, 0.5)
        return individual

    config = Config(total_epochs=1.0, generations=1, choice_images=9)
    dense, better, worse = dense_individual(Layout([Layer("weight", (8,))], 8)), born(0.9, 0), born(0.8, 1)
    dense.fitness.values = (1.0, 0.0)
    made = SimpleNamespace(inherits=lambda generation: line, breed=lambda state, rng: [], measure=lambda jobs, seen: [worse],
                           survive=lambda found, size, rng: found, epochs=lambda state: 0)
    last, = evolve(State(0, [dense, better], [dense, better], Seen(), Log().and_then({"seconds": 0.0})), made, config)
    assert [[each is one for one in last.archive].count(True) for each in (dense, better, worse)] == [1, 1, line]


def test_a_line_that_is_stopped_goes_on_and_engines_agree(lenet, digits, tmp_path):
    settings = {**SETTINGS, "refine_epochs": 3.0, "targets": "0.5,0.8,0.9"}
    rows = []

    def stop(row):
        rows.append(row)
        if row["epochs"] == 2:  # of the three: the second child is there
            raise KeyboardInterrupt

    evoprune.prune(lenet, digits, out=tmp_path / "local", **settings)
    with suppress(KeyboardInterrupt):
        evoprune.prune(lenet, digits, out=tmp_path / "stopped", on_generation=stop, **settings)
    assert rows[-1]["epochs"] == 2 and evoprune.prune(lenet, digits, resume=tmp_path / "stopped").finished
    evoprune.prune(lenet, digits, out=tmp_path / "processes", engine="processes", workers=2, **settings)
    mine = hashes(tmp_path / "local")
    names = {name for name in mine if name in ("front.csv", "layers.csv", "masks.npz") or name.startswith("models/")}
    for other in ("stopped", "processes"):
        theirs = hashes(tmp_path / other)
        assert len(names) > 4 and all(mine[name] == theirs[name] for name in names)


def test_a_line_goes_on_with_no_state_of_another_kind_of_training(refined, lenet, digits, monkeypatch):
    monkeypatch.setattr("evoprune.run.rebuild.identity_of", lambda *given: "")
    run = rebuild(RunBuilder(str(refined), ".", "", lenet, digits))
    few, as_few, many, other = (refine.trained(replace(run, config=replace(run.config, refine_epochs=epochs), identity=identity))
                                for epochs, identity in ((9.0, "a"), (10.0, "a"), (1000.0, "a"), (9.0, "b")))
    assert few.identity == as_few.identity and len({few.identity, many.identity, other.identity, "a"}) == 4


def test_training_never_costs_the_front_a_point(refined, lenet, digits, tmp_path):
    evoprune.prune(lenet, digits, out=tmp_path / "plain", **SETTINGS)
    plain, front = evoprune.load_front(tmp_path / "plain", lenet), evoprune.load_front(refined, lenet)
    simple = [point for point in plain if point.generation == 0]
    assert simple
    for point in simple:
        assert max(p.accuracy for p in front if p.sparsity >= point.sparsity) >= point.accuracy
