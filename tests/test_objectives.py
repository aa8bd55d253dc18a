"""What is optimised, and a third objective, the number of layers that keep anything, through a run."""

import csv
import itertools
import os

import numpy as np
import pytest
from deap import tools

import evoprune
from evoprune.config import Config
from evoprune.errors import EvopruneError
from evoprune.evolution.selection import in_order, non_dominated, nsga2, rank_and_crowding, values_of
from evoprune.inputs.named import load_objectives
from evoprune.main import main
from evoprune.masks.genome import Fitness, Individual
from evoprune.objectives import USUAL, Objective, Objectives, objectives_of
from evoprune.results.points import beyond_chance
from evoprune.run.prepare import check_objectives

KEPT = '''
from evoprune.objectives import Objective, measures


@measures(Objective("kept_layers", weight=-1.0, worst=4.0, best=0.0))
def kept_layers(individual, layout):
    return sum(bits.any() for bits in individual)
'''
THREE = Objectives((*USUAL, Objective("kept_layers", -1.0, 4.0, 0.0)))
SETTINGS = {"population": 12, "generations": 8, "train_epochs": 2, "train_images": 300, "search_images": 100, "threads": 1,
            "out": "whole"}


def group_of(values, objectives=THREE):
    group = []
    for i, value in enumerate(values):
        group.append(Individual([np.frombuffer(i.to_bytes(4, "big"), np.uint8).copy()]))
        group[-1].fitness = Fitness(tuple(map(float, value)), objectives)
    return group


@pytest.fixture
def three(rng):
    values = [(round(a, 1), round(s, 1), k) for a, s, k in zip(rng.random(30), rng.random(30), rng.integers(5, size=30))]
    return values + values


def better(a, b):
    signs = np.array(THREE.weights)
    a, b = signs * a, signs * b
    return bool((a >= b).all() and (a > b).any())


# ---------------------------------------------------------------------------------------------- selection, against slow code


def test_the_front_is_what_nothing_dominates_of_equal_ones_the_last_along_the_axis(three):
    group = group_of(three)
    obvious = {value for value in three if not any(better(other, value) for other in three)}
    found = non_dominated(group)
    assert [i.fitness.values for i in found] == sorted(obvious, key=lambda value: (value[1], value[0])) and len(found) > 4
    assert all(individual is [g for g in group if g.fitness == individual.fitness][-1] for individual in found)
    some = non_dominated(group, 0.7, always=group[3])
    assert some[0] is group[3] and [i for i in some[1:]] == [i for i in found if i.fitness.score >= 0.7 and i is not group[3]]
    assert non_dominated([]) == []


def test_ranks_are_those_of_deap_with_one_objective_minimised(three):
    group = group_of(three)
    values = values_of(group, THREE)
    assert np.array_equal(values, np.array(three))
    ranks, _ = rank_and_crowding(values * THREE.weights, np.ones(60, bool), THREE.score)
    for rank, front in enumerate(tools.sortNondominated(group, 60)):
        assert all(ranks[group.index(each)] == rank for each in front)
    survivors = nsga2(group, 20)
    assert max(ranks[group.index(i)] for i in survivors) <= min(
        ranks[i] for i in range(60) if group[i] not in survivors)
    order = in_order(group, values, 0.5, niches=False)
    fits = [three[i][0] >= 0.5 for i in order]
    assert fits == sorted(fits, reverse=True) and False in fits  # constraint domination
    below = [three[i][0] for i, fit in zip(order, fits) if not fit]
    assert below == sorted(below, reverse=True)


def test_hvlog_of_three_is_the_volume_that_is_dominated(rng):
    points = np.column_stack([rng.random(6), 1 - np.exp(rng.uniform(np.log(0.004), np.log(0.7), 6)), rng.integers(5, size=6)])
    sparse = np.clip(np.log((1 - points[:, 1]) / 0.5) / np.log(0.01), 0, 1)
    shares = np.column_stack([points[:, 0], sparse, (4 - points[:, 2]) / 4])
    inside = 0.0  # inclusion and exclusion
    for count in range(1, 7):
        for some in itertools.combinations(range(6), count):
            inside -= (-1) ** count * float(shares[list(some)].min(0).prod())
    assert THREE.hvlog(points) == pytest.approx(inside)
    assert THREE.hvlog(np.empty((0, 3))) == 0


def test_hvlog_of_two_is_the_mean_over_log_density(rng):
    grid = np.geomspace(0.5, 0.005, 40_001)
    for _ in range(20):
        values = np.column_stack([rng.random(30), 1 - np.exp(rng.uniform(np.log(0.003), 0, 30))])
        mean = np.mean([max((a for a, s in values if 1 - s <= density), default=0) for density in grid[::40]])
        assert USUAL.hvlog(values) == pytest.approx(mean, abs=2e-3)


def test_a_fitness_knows_its_objectives_wherever_it_goes():
    child = group_of([(0.5, 0.25, 3)])[0].clone()
    assert (child.fitness.score, child.fitness.axis, child.fitness.wvalues) == (0.5, 0.25, (0.5, 0.25, -3.0))
    del child.fitness.values
    child.fitness.values = 0.1, 0.2, 1.0
    assert child.fitness.objectives is THREE and not Individual([]).clone().fitness.valid


# ------------------------------------------------------------------------------------------------------ a third, through a run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the file of a third objective, and a whole run with it; do not change it."""
    folder = tmp_path_factory.mktemp("third")
    before = os.getcwd()
    os.chdir(folder)
    try:
        (folder / "kept.py").write_text(KEPT)
        evoprune.prune("lenet", objectives="accuracy,sparsity,kept.py:kept_layers", **SETTINGS)
    finally:
        os.chdir(before)
    return folder


def test_a_third_objective_gets_its_columns_row_and_point(folder):
    front = evoprune.load_front(folder / "whole")
    with open(folder / "whole" / "front.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["id", "accuracy", "sparsity", "kept_layers", "kept", "weights", "test_accuracy", "test_low",
                             "test_high", "accuracy_before", "generation", "origin", "repair"]
    for point, row in zip(front, rows):
        alive = sum(bool(mask.any()) for mask in point.masks().values())
        assert point.kept_layers == float(row["kept_layers"]) == alive
        assert not any(better(other.values, point.values) for other in front)
    assert front.record.measured.kept_layers == 4 and str(front).splitlines()[0].split()[:4] == [
        "id", "accuracy", "sparsity", "kept_layers"]
    assert front.best(kept_layers=3).kept_layers <= 3
    with pytest.raises(EvopruneError, match=r"^front: no point has kept_layers <= -1; the front reaches kept_layers 1\.0000$"):
        front.best(kept_layers=-1)
    with pytest.raises(TypeError, match="^best: found macs, expected accuracy, sparsity, kept_layers or drop$"):
        front.best(macs=1)
    with open(folder / "whole" / "log.csv", newline="") as file:
        last = list(csv.DictReader(file))[-1]
    assert float(last["best_kept_layers"]) == 1 and 0 < float(last["hvlog"]) < 1


def test_a_third_objective_gets_its_picture_below_the_front(folder):
    front = evoprune.load_front(folder / "whole")
    above, below = front.plot().axes
    assert above.get_ylabel().startswith("accuracy, %") and below.get_ylabel() == "kept layers"
    assert below.lines[0].get_ydata().tolist() == [p.kept_layers for p in beyond_chance(front, front.record.chance)]
    assert (folder / "whole" / "front.png").stat().st_size > 10_000


@pytest.mark.parametrize("engine", ["local", "processes"])
def test_a_run_with_three_is_the_same_on_two_engines_stopped_and_resumed(engine, folder, monkeypatch):
    monkeypatch.chdir(folder)
    settings = {**SETTINGS, "out": engine, "engine": engine, **({"workers": 2} if engine == "processes" else {})}
    evoprune.prune("lenet", objectives="accuracy,sparsity,kept.py:kept_layers", max_seconds=0.0, **settings)
    assert not (folder / engine / "done.json").exists()
    assert main(["--resume", engine]) == 0
    for name in ("front.csv", "masks.npz", "layers.csv"):
        assert (folder / engine / name).read_bytes() == (folder / "whole" / name).read_bytes()


@pytest.mark.parametrize("settings", [
    {"total_epochs": 6, "targets": "0.5,0.8", "generations": 3}, {"finetune_epochs": 1, "front": 3, "generations": 2},
    {"layerwise": True, "generations": 2}, {"repair": "least-squares", "start": "random", "generations": 2}],
    ids=lambda s: next(iter(s)))
def test_a_third_objective_goes_through_every_kind_of_run(settings, folder, lenet, digits, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    front = evoprune.prune(lenet, digits, objectives="accuracy,sparsity,kept.py:kept_layers", threads=1,
                           out=str(tmp_path / "run"), **{"population": 8, **settings})
    assert [p.kept_layers for p in front] == [sum(bool(m.any()) for m in p.masks().values()) for p in front]


# -------------------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(("text", "said"), [
    ("accuracy", "objectives: found 'accuracy', expected accuracy,sparsity, and more after a comma, each once"),
    ("accuracy,sparsity,sparsity", "objectives: found 'accuracy,sparsity,sparsity', expected accuracy,sparsity, and more after a "
                                   "comma, each once")])
def test_the_usual_two_are_always_there(text, said):
    with pytest.raises(EvopruneError) as error:
        Config(objectives=text)
    assert str(error.value) == said


def test_a_name_that_nothing_measures_is_one_line():
    with pytest.raises(EvopruneError, match=r"^objectives: found 'speed', expected accuracy, sparsity, (kept_layers, )?FILE\.py:"
                                            r"function or package\.module:function$"):
        Config(objectives="accuracy,sparsity,speed")


BAD = '''
from evoprune.objectives import Objective, measures


def bare(individual, layout):
    return 1.0


@measures(Objective("kept", 1.0, 0.0, 1.0))
def kept(individual, layout):
    return 1.0


@measures(Objective("endless", 1.0, 0.0, 1.0))
def endless(individual, layout):
    return float("inf")


@measures(Objective("broken", 1.0, 0.0, 1.0))
def broken(individual, layout):
    return {}["x"]
'''


@pytest.mark.parametrize(("name", "said"), [
    ("bare", "objectives: bad.py:bare measures no objective; declare it with @evoprune.objectives.measures(evoprune.objectives."
             "Objective('bare', ...))"),
    ("kept", "objectives: kept is the name of a column that every run has, expected another"),
    ("endless", "objectives: endless of a mask is inf, expected a finite number"),
    ("broken", "objectives: broken failed on a mask: KeyError: 'x'"),
    ("missing", "objectives: bad.py has no function 'missing'; there are bare, kept, endless, broken")])
def test_a_measure_that_cannot_be_used_is_one_line_and_leaves_no_folder(name, said, tmp_path, monkeypatch, lenet, digits):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.py").write_text(BAD)
    with pytest.raises(EvopruneError) as error:
        evoprune.prune(lenet, digits, objectives=f"accuracy,sparsity,bad.py:{name}", out="run", population=8, generations=1)
    assert str(error.value) == said and not (tmp_path / "run").exists()


def test_a_function_of_another_name_than_its_objective_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "odd.py").write_text(KEPT.replace("def kept_layers", "def layers_kept"))
    with pytest.raises(EvopruneError) as error:
        load_objectives("accuracy,sparsity,odd.py:layers_kept")
    assert "objectives: the function layers_kept measures 'kept_layers', expected one of that name" in str(error.value)


def test_two_are_what_a_run_has_unless_told():
    assert objectives_of(Config().objectives) == USUAL
    check_objectives(USUAL)
