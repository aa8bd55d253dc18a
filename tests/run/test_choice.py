"""--choice-images: training images kept back, on which points are compared in the end."""

import copy
import csv
import json
import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import hashes

import evoprune
from evoprune import Data, EvopruneError
from evoprune.config import Config
from evoprune.inputs.splits import Split
from evoprune.objectives import USUAL
from evoprune.results.points import Measured, Pruned, columns, from_row, points_csv, undominated
from evoprune.results.record import read_record
from evoprune.run.run import choice_for, keep_back, with_choice
from evoprune.values.training import Recipe, tune
from evoprune.views.compare import chosen as of_compare

SEARCH = {"population": 8, "generations": 2, "threads": 1, "repair": "least-squares", "shots": 20, "choice_images": 300}


def point(id, accuracy, sparsity, choice):
    kept = round(1000 * (1 - sparsity))
    return Pruned(Measured(id, (accuracy, sparsity), kept, 1000, None, None, None, accuracy, 0, "x", "none", USUAL, choice), [])


def test_what_is_kept_back_is_in_no_other_split_and_beside_the_search_images(digits):
    data, kept = keep_back(Config(choice_images=300), digits)
    assert len(kept) == 300 and (data.search, data.test) == (digits.search, digits.test)

    def each(*splits):
        return sorted((bytes(image), int(label)) for split in splits for image, label in zip(split.images.numpy(), split.labels))

    assert each(data.train, kept) == each(digits.train)
    assert keep_back(Config(), digits) == keep_back(Config(choice_images=0), digits) == (digits, None)


@pytest.mark.parametrize("engine", ["local", "processes"])
def test_nothing_is_repaired_trained_or_planned_on_what_is_kept_back(engine, small, digits, tmp_path):
    images = {name: getattr(digits, name).images.float() / 255 for name in ("train", "search", "test")}
    _, kept = keep_back(Config(choice_images=300), replace_images(digits, {**images, "train": torch.arange(len(digits.train))}))
    images["train"][kept.images] = 1e30  # what learns from these is lost
    data = replace_images(digits, images)
    settings = {**SEARCH, "refine_epochs": 30.0, "targets": "0.5,0.8", "workers": None if engine == "local" else 2}
    front = evoprune.prune(small, data, out=tmp_path / "run", train_epochs=5, engine=engine, **settings)
    assert front.record.measured.accuracy > 0.5
    assert {"least-squares", "none"} == {point.repair for point in front if point.sparsity > 0}
    assert all(point.accuracy > 0.5 for point in front if point.sparsity < 0.8)
    assert front.record.splits["train"] == len(digits.train) - 300


def replace_images(data, images):
    return Data(*(replace(getattr(data, name), images=images[name], mean=None, std=None) for name in ("train", "search", "test")))


def test_points_are_compared_by_what_more_images_say():
    lucky, better, sparse = point("000", 0.99, 0.95, 0.90), point("001", 0.97, 0.90, 0.96), point("002", 0.90, 0.97, 0.91)
    assert undominated([lucky, better, sparse]) == [better, sparse]
    assert undominated([replace(p, measured=replace(p.measured, choice=None)) for p in (lucky, better)])[0].measured.id == "000"
    assert [p.measured.id for p in undominated([lucky, better, sparse], floor=0.95)] == ["001", "000"]  # of the search split


def test_a_point_below_the_floor_takes_no_place(digits):
    above, below, dense = point("001", 0.96, 0.9, 0.96), point("002", 0.94, 0.9, 0.97), point("000", 0.94, 0.0, 0.98)
    assert undominated([dense, above, below], floor=0.95) == [above]


def test_the_column_is_there_where_it_says_something():
    with_choice, without = point("000", 0.97, 0.9, 0.96), point("000", 0.97, 0.9, None)
    for each, names in ((with_choice, columns(USUAL, choice=True)), (without, columns(USUAL))):
        row, = csv.DictReader(points_csv([each], USUAL).splitlines())
        assert [*row] == names and Measured(**from_row(row, USUAL)) == each.measured
    assert with_choice.measured.choice_accuracy == 0.96 and without.measured.choice_accuracy is None


def on_all(point, digits):
    """The accuracy on the search images and those kept back, obviously."""
    _, kept = keep_back(point.front.record.config, digits)
    parts = [(evoprune.accuracy(point.model(), split), len(split)) for split in (digits.search, kept)]
    return sum(accuracy * count for accuracy, count in parts) / sum(count for _, count in parts)


@pytest.mark.parametrize("extra", [{}, {"refine_epochs": 2.0, "targets": "0.8,0.9"}, {"repair": "none"},
                                   {"repair": "none", "finetune_epochs": 1}])
def test_a_run_says_what_its_points_are_compared_by_and_chooses_so(extra, small, digits, tmp_path):
    front = evoprune.prune(small, digits, out=tmp_path / "run", **{**SEARCH, **extra})
    for each in front:
        assert on_all(each, digits) == pytest.approx(each.choice_accuracy, abs=1e-12)
        assert evoprune.accuracy(each.model(), digits.search) == pytest.approx(each.accuracy, abs=1e-12)
    if "finetune_epochs" in extra:  # only what no other dominates is trained
        trained = [each for each in front if each.trained]
        assert trained == sorted(trained, key=lambda each: each.accuracy_before, reverse=True)
    ranked = [each.choice_accuracy for each in front]
    assert ranked == sorted(ranked, reverse=True) and len(front) > 2
    for wish in (0.5, 0.8):
        fits = [each for each in front if each.sparsity >= wish]
        assert front.best(sparsity=wish) == fits[0]
    assert "compared on the search images and 300 training images kept back" in str(front)


def test_the_best_by_luck_is_not_taken(digits, tmp_path):
    """Search images whose labels are wrong tell nothing: what is kept back decides."""
    wrong = torch.from_numpy(np.random.default_rng(0).integers(0, 10, 20))
    search = Split(digits.search.images[:20], wrong, digits.search.mean, digits.search.std)
    data = Data(digits.train, search, digits.test, classes=10)
    plain, chosen = (evoprune.prune("lenet", data, train_epochs=10, out=tmp_path / str(images),
                                    **{**SEARCH, "choice_images": images}) for images in (0, 300))
    best = chosen.best(sparsity=0.5)
    assert best.test_accuracy > plain.best(sparsity=0.5).test_accuracy + 0.05
    fits = [point for point in chosen if point.sparsity >= 0.5]
    assert best == fits[0] == of_compare(chosen, 0.5) != max(fits, key=lambda point: point.accuracy)
    assert any(point.generation == 0 and point.sparsity > 0 for point in chosen)  # the first masks stay to the end


@pytest.mark.parametrize("named", [True, False])
def test_engines_agree_on_what_is_kept_back(named, digits, small, tmp_path):
    model, data = ("lenet", "digits") if named else (small, digits)
    settings = {**SEARCH, "train_epochs": 2 if named else 0, "refine_epochs": 1.0, "targets": "0.8"}
    for engine in ("local", "processes"):
        evoprune.prune(model, data, out=tmp_path / engine, engine=engine, workers=None if engine == "local" else 2, **settings)
    mine, theirs = hashes(tmp_path / "local"), hashes(tmp_path / "processes")
    names = {name for name in mine if name in ("front.csv", "layers.csv", "masks.npz") or name.startswith("models/")}
    assert len(names) > 4 and all(mine[name] == theirs[name] for name in names)


def test_a_finished_run_is_trained_further_without_what_it_kept_back(small, digits, tmp_path):
    before = evoprune.prune(small, digits, out=tmp_path / "run", **SEARCH)
    after = evoprune.prune(small, digits, resume=tmp_path / "run", more_epochs=3)
    assert {each.id for each in after} - {each.id for each in before}
    for each in after:
        assert on_all(each, digits) == pytest.approx(each.choice_accuracy, abs=1e-12)


@pytest.mark.parametrize("train, search, count", [(50_000, 300, 4096), (8_000, 1_000, 1_000), (7_999, 1_000, 0),
                                                  (50_000, 5_000, 0), (1_151, 287, 0), (0, 300, 0)])
def test_a_plan_keeps_images_back_where_there_are_few_to_search_on_and_many_to_train_on(train, search, count):
    assert choice_for({"train": train, "search": search, "test": 0}) == count


def test_a_plan_is_repeated_with_what_it_kept_back(small, digits, tmp_path):
    few = Data(digits.train, Split(digits.search.images[:100], digits.search.labels[:100], digits.search.mean,
                                            digits.search.std), digits.test)
    first = evoprune.prune(small, few, out=tmp_path / "first", minutes=0.1, threads=1)
    assert first.record.config.choice_images == len(digits.train) // 8
    evoprune.prune(small, few, out=tmp_path / "again", plan=str(tmp_path / "first"), threads=1)
    assert hashes(tmp_path / "first")["front.csv"] == hashes(tmp_path / "again")["front.csv"]
    for own in (200, 0):
        found = evoprune.prune(small, few, out=tmp_path / f"own-{own}", minutes=0.1, choice_images=own, threads=1)
        assert found.record.config.plan == "auto" and found.record.config.choice_images == own
    other = evoprune.prune(small, few, out=tmp_path / "other", plan=str(tmp_path / "first"), choice_images=0, threads=1)
    assert (other.record.config.choice_images, other.record.config.shots) == (0, first.record.config.shots)


def test_no_images_are_kept_back_that_a_model_knows_by_heart(lenet, digits, caplog):
    """Learnt labels that say nothing: right on what it has seen, not on others."""
    labels = torch.from_numpy(np.random.default_rng(0).integers(0, 10, 40))
    many = replace(digits.train, images=digits.train.images[:40].repeat(8, 1, 1, 1), labels=labels.repeat(8))
    data = Data(many, replace(digits.search, images=digits.search.images[:40], labels=digits.search.labels[:40]), None)
    net = copy.deepcopy(lenet)
    tune(net, data.train, Recipe(60, "adam", 0.01, 64, 0, False))
    config = Config(plan="auto", train_epochs=0)
    with caplog.at_level(logging.INFO, "evoprune"):
        assert with_choice(config, net, data, None).choice_images is None
    assert "no training images are kept back for the last choice: the model knows them, and scores" in caplog.text
    assert with_choice(replace(config, train_epochs=1), net, data, None).choice_images == 40
    assert with_choice(replace(config, plan=None), net, data, None).choice_images is None


@pytest.mark.parametrize("settings, message", [
    ({"choice_images": 576}, "choice_images: found 576, expected at most 575, half of the training images"),
    ({"choice_images": 10, "layerwise": True},
     "choice_images: found 10, which does nothing without all layers searched together; leave it out, or give that too")])
def test_what_cannot_be_kept_back_is_one_line(settings, message, small, digits, tmp_path):
    with pytest.raises(EvopruneError) as error:
        evoprune.prune(small, digits, out=tmp_path / "run", population=8, generations=1, threads=1, **settings)
    assert str(error.value) == message and not (tmp_path / "run").exists()


def test_a_run_with_a_setting_that_is_no_more_can_be_read(small, digits, tmp_path):
    front = evoprune.prune(small, digits, out=tmp_path / "run", **{**SEARCH, "choice_images": 0})
    path = tmp_path / "run" / "config.json"
    content = json.loads(path.read_text())
    content["settings"]["judge_images"] = 100
    path.write_text(json.dumps(content))
    assert read_record(path).config == front.record.config
