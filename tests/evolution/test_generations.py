from dataclasses import replace

import moocore
import numpy as np
import pytest
from conftest import group_of, knowing
from deap import tools

from evoprune.config import Config
from evoprune.evolution.generations import begin, evolve, measure
from evoprune.evolution.selection import non_dominated, nsga2, rank_and_crowding, tournament, values_of
from evoprune.evolution.starts import first_population
from evoprune.evolution.toolbox import default_toolbox
from evoprune.masks.genome import Fitness, Result, from_masks, sparsity
from evoprune.masks.layout import Layer, Layout
from evoprune.objectives import USUAL

LAYOUT = Layout((Layer("a", (10, 30)), Layer("b", (30, 10))), 600)
RULES = "random,magnitude,erk,lamp"
CONFIG = Config(population=20, generations=12)


class Counting:
    """A made-up objective: how many of the first 300 genes are kept; counts its calls."""

    def __init__(self):
        self.calls = []

    def __call__(self, individual):
        self.calls.append(individual.key())
        return np.bitwise_count(individual[0]).sum() / 300, sparsity(individual, LAYOUT)

    def many(self, individuals, progress):
        return list(map(self, individuals))

    def simplify(self, individual):
        pass


class Sparser(Counting):
    """Both objectives are the sparsity."""

    def __call__(self, individual):
        return sparsity(individual, LAYOUT), sparsity(individual, LAYOUT)


def start(evaluate, config=CONFIG):
    toolbox = default_toolbox(evaluate, LAYOUT, config)
    weights = [np.random.default_rng(0).standard_normal(layer.shape).astype(np.float32) for layer in LAYOUT]
    population = first_population(knowing(weights, LAYOUT), RULES, config.population, np.random.default_rng(config.seed))
    return toolbox, begin(population, toolbox, config)


def digest(state):
    return [(i.key(), i.fitness.values, i.origin, i.generation) for i in state.population + state.archive], \
        [{k: v for k, v in row.items() if k != "seconds"} for row in state.log], state.seen


@pytest.mark.parametrize("steps", [8, 1000])
def test_selection_is_deaps_nsga2(steps, rng):
    """Few steps make ties and equal objectives; the crowding sums then decide, so the chosen objectives are compared."""
    for _ in range(20):
        group = group_of(np.unique(rng.integers(0, steps, (60, 2)), axis=0) / steps)
        ours = nsga2(group, len(group) // 2)
        deaps = tools.selNSGA2(group, len(group) // 2)
        ranks, crowding = rank_and_crowding(values_of(group, USUAL), np.ones(len(group), bool), 0)
        fronts = tools.sortNondominated(group, len(group))
        for rank, front in enumerate(fronts):
            tools.emo.assignCrowdingDist(front)
            for individual in front:
                i = next(k for k, other in enumerate(group) if other is individual)
                assert ranks[i] == rank
                if len({i.fitness.values[0] for i in front}) == len(front):
                    assert np.isclose(crowding[i] / 2, individual.fitness.crowding_dist)
        if steps == 1000:
            assert {i.key() for i in ours} == {i.key() for i in deaps}


def test_hand_computed_ranks_and_crowding():
    values = np.array([[0.9, 0.1], [0.8, 0.5], [0.5, 0.9], [0.7, 0.4], [0.1, 0.2]])
    ranks, crowding = rank_and_crowding(values, np.ones(len(values), bool), 0)
    assert ranks.tolist() == [0, 0, 0, 1, 2]
    assert crowding.tolist() == [np.inf, 2.0, np.inf, np.inf, np.inf]


def test_points_below_the_floor_come_last_by_accuracy():
    values = np.array([[0.3, 0.9], [0.9, 0.1], [0.5, 0.2], [0.95, 0.05], [0.4, 0.99]])
    ranks, _ = rank_and_crowding(values, values[:, 0] >= 0.8, 0)
    assert ranks.tolist() == [3, 0, 1, 0, 2]
    assert rank_and_crowding(values, values[:, 0] >= 0.99, 0)[0].tolist() == [4, 1, 2, 0, 3]
    assert [i.fitness.values for i in non_dominated(group_of(values), 0.8)] == [(0.95, 0.05), (0.9, 0.1)]


def test_copies_survive_only_where_there_is_nothing_else():
    group = group_of([[0.9, 0.1], [0.5, 0.5]])
    twins = [group[0].clone() for _ in range(4)]
    assert {i.key() for i in nsga2(twins + group, 2)} == {i.key() for i in group}
    assert len(nsga2(twins + group, 5)) == 5


def test_tournaments_prefer_better_ranks(rng):
    group = group_of([[0.9, 0.9], [0.1, 0.1], [0.2, 0.2]])
    winners = tournament(group, 600, rng)
    share = sum(w is group[0] for w in winners) / 600
    assert 0.5 < share < 0.62  # 1 - (2/3)^2 = 0.556
    assert sum(w is group[1] for w in winners) / 600 < 0.15


def test_the_archive_is_the_non_dominated_set(rng):
    for _ in range(20):
        values = rng.integers(0, 15, (50, 2)) / 15
        found = values_of(non_dominated(group_of(values)), USUAL)
        expected = np.unique(values[moocore.is_nondominated(values, maximise=True)], axis=0)
        assert np.array_equal(np.unique(found, axis=0), expected) and len(found) == len(expected)
        assert np.all(np.diff(found[:, 1]) > 0)


def test_hvlog_by_hand():
    hvlog = USUAL.hvlog
    assert hvlog(np.array([[1.0, 0.995]])) == pytest.approx(1)
    assert hvlog(np.array([[0.8, 0.95]])) == pytest.approx(0.8 * np.log(0.5 / 0.05) / np.log(100))
    assert hvlog(np.array([[0.9, 0.5], [0.8, 0.95]])) == pytest.approx(hvlog(np.array([[0.8, 0.95]])))
    assert hvlog(np.array([[0.9, 0.9], [0.4, 0.999]])) == pytest.approx((0.9 * np.log(5) + 0.4 * np.log(20)) / np.log(100))
    assert hvlog(np.array([[0.5, 0.95], [0.9, 0.96]])) == pytest.approx(0.9 * np.log(12.5) / np.log(100))
    assert hvlog(np.empty((0, 2))) == 0


def test_no_mask_is_measured_twice():
    evaluate = Counting()
    toolbox, state = start(evaluate)
    *_, state = evolve(state, toolbox, CONFIG)
    assert len(evaluate.calls) == len(set(evaluate.calls)) == state.evaluations
    copy = state.population[0].clone()
    del copy.fitness.values
    measure([copy, copy.clone()], state.seen, toolbox, USUAL)
    assert len(evaluate.calls) == state.evaluations and copy.fitness.values == state.population[0].fitness.values


def test_an_evaluation_may_change_the_mask_and_leave_something_to_inherit():
    def evaluate(individual):
        bits = [individual[0], np.zeros_like(individual[1])]
        return Result((0.5, 0.75), bits, {"x": individual[0]}, {"y": individual[1]})

    toolbox, state = start(Counting())
    toolbox.register("evaluate", evaluate)
    children = [state.population[3].clone(), state.population[3].clone()]
    before = children[0].clone()
    seen = {}
    measure(children, seen, toolbox, USUAL)
    for child in children:
        assert np.array_equal(child[0], before[0]) and not child[1].any() and child.fitness.values == (0.5, 0.75)
        assert np.array_equal(child.saliency["x"], before[0]) and np.array_equal(child.values["y"], before[1])
    assert children[0][1] is not children[1][1] and seen == {children[0].key(): (0.5, 0.75)}


def test_continuing_from_any_state_is_never_having_stopped():
    toolbox, state = start(Counting())
    states = [state, *evolve(state, toolbox, CONFIG)]
    for i in (0, 5, 11):
        *_, last = evolve(states[i], start(Counting())[0], CONFIG)
        assert digest(last) == digest(states[-1])
    assert [s.generation for s in states] == list(range(13))


def test_another_seed_gives_another_search():
    ends = []
    for seed in (0, 1):
        config = Config(population=20, generations=3, seed=seed)
        toolbox, state = start(Counting(), config)
        *_, state = evolve(state, toolbox, config)
        ends.append(digest(state))
    assert ends[0] != ends[1]


def test_a_known_optimum_is_approached():
    """Only the first 300 weights count, so sparsity 0.5 is free: the ideal front is accuracy 1 up to 0.5, then a line."""
    config = Config(population=40, generations=60)
    toolbox, state = start(Counting(), config)
    reference = {"ref": (0, 0), "maximise": True}
    before = moocore.hypervolume(values_of(state.archive, USUAL), **reference)
    *_, state = evolve(state, toolbox, config)
    after = moocore.hypervolume(values_of(state.archive, USUAL), **reference)
    assert before < 0.6 < 0.68 < after <= 0.75


def test_the_unpruned_model_is_always_in_the_archive():
    toolbox, state = start(Sparser())
    *_, state = evolve(state, toolbox, CONFIG)
    assert state.archive[0].origin == "dense" and sparsity(state.archive[0], LAYOUT) == 0
    assert len(non_dominated(state.archive)) == 1


def test_first_masks_that_were_given_up_do_not_stay():
    toolbox, state = start(Sparser())
    population, given_up = state.population, state.population[2]
    given_up.fitness = Fitness(USUAL.worst)
    toolbox.register("measure", lambda offspring, seen: offspring)
    kept = begin(population, toolbox, replace(CONFIG, choice_images=10)).archive
    assert [id(each) for each in kept] == [id(each) for each in population if each is not given_up]


def test_origins_and_generations_are_recorded():
    toolbox, state = start(Counting())
    *_, state = evolve(state, toolbox, CONFIG)
    origins = {i.origin for i in state.archive}
    assert origins & {"mate", "mutate", "mate+mutate"} and max(i.generation for i in state.archive) > 5


def test_a_users_operator_is_plugged_into_the_toolbox():
    def all_of_the_first_layer(individual, rng):
        individual[0][:] = from_masks([np.ones(300, bool)], "x")[0]
        return (individual,)

    toolbox, state = start(Counting())
    toolbox.register("mutate", all_of_the_first_layer)
    *_, state = evolve(state, toolbox, CONFIG)
    assert any(i.generation and np.bitwise_count(i[0]).sum() == 300 for i in state.population)
