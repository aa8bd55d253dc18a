import copy
import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import hashes
from test_evaluation import population

import evoprune
from evoprune import EvopruneError
from evoprune.evaluation.evaluator import Evaluator
from evoprune.evaluation.judged import judged
from evoprune.inputs.models import logits_of
from evoprune.inputs.nested import taken
from evoprune.inputs.splits import example_sums
from evoprune.inputs.tasks import task_of
from evoprune.masks.genome import dense_individual
from evoprune.masks.tensors import masks


def part(split, indices):
    return replace(split, images=taken(split.images, indices), labels=split.labels[indices])


def masked(model, layout, individual):
    model = copy.deepcopy(model).eval()
    for layer, mask in zip(layout, masks(individual, layout)):
        model.get_parameter(layer.name).data *= mask
    return model


def answers(model, split):
    with torch.no_grad():
        return logits_of(model.eval()(split.inputs(slice(None)))).argmax(1)


@pytest.mark.parametrize("batch_size", [7, 64])
def test_the_estimate_is_the_obvious_one(lenet, digits, layout, batch_size):
    others = part(digits.train, torch.arange(500))
    evaluator = Evaluator(lenet, layout, judged(lenet, digits.search, others, batch_size), batch_size)
    dense = [answers(copy.deepcopy(lenet), split) for split in (digits.search, others)]
    found = set()
    for individual in population(lenet, layout, 8):
        said = [answers(masked(lenet, layout, individual), split) for split in (digits.search, others)]
        right = (said[0] == digits.search.labels).sum().item()
        alike = [(a == b).sum().item() for a, b in zip(said, dense)]
        estimate = (right - alike[0]) / 287 + sum(alike) / 787
        assert evaluator(individual)[0] == pytest.approx(min(1, max(0, estimate)), abs=1e-12)
        found.add(round(estimate, 6))
    assert len(found) > 3
    plain = Evaluator(lenet, layout, digits.search, batch_size)
    assert evaluator(dense_individual(layout))[0] == pytest.approx(plain(dense_individual(layout))[0], abs=1e-12)


def test_luck_moves_the_estimate_less_than_the_accuracy(lenet, digits, layout):
    every = digits.test
    individual = next(each for each in population(lenet, layout, 40)
                      if 0.6 < Evaluator(lenet, layout, every, 64)(each)[0] < 0.9)
    model = masked(lenet, layout, individual)
    truth = float((answers(model, every) == every.labels).double().mean())
    accuracies, estimates = [], []
    for seed in range(30):
        order = torch.randperm(359, generator=torch.Generator().manual_seed(seed))
        search, others = part(every, order[:60]), part(every, order[60:])
        split = judged(lenet, search, others, 64)
        estimates.append(split.task.score(example_sums(model, split, 64).sum(0).tolist()))
        accuracies.append(float((answers(model, search) == search.labels).double().mean()))
    assert np.std(estimates) < 0.5 * np.std(accuracies)
    assert abs(np.mean(estimates) - truth) < 0.01


@pytest.mark.parametrize("repair", ["none", "least-squares"])
def test_a_run_reports_right_answers_alone_and_engines_agree(repair, small, digits, tmp_path):
    search = {"population": 8, "generations": 2, "threads": 1, "repair": repair, "shots": 20, "judge_images": 100}
    judged_by = []
    front = evoprune.prune(small, digits, out=tmp_path / "run", on_generation=judged_by.append, **search)
    for point in front:
        right = point.accuracy * len(digits.search)
        assert right == pytest.approx(round(right), abs=1e-9)
        assert evoprune.accuracy(point.model(), digits.search) == pytest.approx(point.accuracy, abs=1e-12)
    plain = []
    evoprune.prune(small, digits, out=tmp_path / "plain", on_generation=plain.append, **{**search, "judge_images": 0})
    assert judged_by[0]["hvlog"] != plain[0]["hvlog"]  # the same masks
    if repair == "none":
        evoprune.prune(small, digits, out=tmp_path / "others", engine="processes", workers=2, **search)
        mine, theirs = hashes(tmp_path / "run"), hashes(tmp_path / "others")
        assert all(mine[name] == theirs[name] for name in ("front.csv", "layers.csv", "masks.npz"))


def test_a_stopped_run_says_that_accuracies_are_estimates(small, digits, tmp_path, caplog):
    settings = {"population": 8, "generations": 50, "threads": 1, "shots": 20, "judge_images": 100, "max_seconds": 0}
    with caplog.at_level(logging.INFO, "evoprune"):
        evoprune.prune(small, digits, out=tmp_path / "run", repair="least-squares", **settings)
    assert "accuracies are estimates of the search until the run is finished" in caplog.messages


@pytest.mark.parametrize("settings, message", [
    ({"judge_images": 2000},
     "judge_images: found 2,000, expected at most 1,151, the training images that masks are not repaired on"),
    ({"judge_images": 400, "repair": "least-squares"},
     "judge_images: found 400, expected at most 383, the training images that masks are not repaired on"),
    ({"judge_images": 10, "total_epochs": 1.0},
     "judge_images: found 10, which does nothing without masks that evolve all together, before any training; leave it out, or "
     "give that too")])
def test_what_cannot_be_judged_on_is_one_line(settings, message, small, digits, tmp_path):
    with pytest.raises(EvopruneError) as error:
        evoprune.prune(small, digits, out=tmp_path / "run", population=8, generations=1, threads=1, **settings)
    assert str(error.value) == message and not (tmp_path / "run").exists()


def test_only_answers_among_classes_are_judged_so(small, digits):
    split = replace(digits.search, task=task_of("regression"))
    with pytest.raises(EvopruneError) as error:
        judged(small, split, digits.train, 64)
    assert str(error.value) == ("judge_images: found 1,151 for the task regression, expected 0: only answers among classes are "
                                "compared with the dense model's")
