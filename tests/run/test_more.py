"""Training that is added to a finished run."""

import csv
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import hashes

import evoprune
from evoprune.config import Config
from evoprune.errors import EvopruneError
from evoprune.main import check
from evoprune.results import folder as folders
from evoprune.results.written import RIGHT
from evoprune.run.rebuild import RunBuilder, kept_in
from evoprune.run.settings import settle

SETTINGS = {"repair": "least-squares", "shots": 5, "population": 6, "generations": 1, "threads": 1, "front": 3}


@pytest.fixture(scope="module")
def small_run(small, digits, tmp_path_factory):
    """A finished run without training; do not change it."""
    return evoprune.prune(small, digits, out=tmp_path_factory.mktemp("more") / "run", **SETTINGS).path


@pytest.fixture
def run(small_run, tmp_path):
    return shutil.copytree(small_run, tmp_path / "run")


@pytest.fixture(scope="module")
def trained(small_run, small, digits, tmp_path_factory):
    """That run with five epochs more, in one go; do not change it."""
    path = shutil.copytree(small_run, tmp_path_factory.mktemp("more") / "run")
    return evoprune.prune(small, digits, resume=path, finetune_epochs=5).path


def rows(path):
    """Rows of all points by id."""
    found = {}
    for name in ("front.csv", "dominated.csv"):
        if (path / name).exists():
            with open(path / name, newline="") as file:
                found.update((row["id"], row) for row in csv.DictReader(file))
    return found


def same(path, other):
    """Say whether all but what the machine and the clock decide is equal."""
    apart = ("config.json", "done.json", "checkpoint/")  # the folder's name and what is kept for a resume
    a, b = ({name: value for name, value in hashes(each).items() if not name.startswith(apart)} for each in (path, other))
    return a == b and len(a) > 10


def test_points_stay_and_those_that_training_makes_better_join_them(small_run, trained, digits):
    before, after = rows(small_run), rows(trained)
    new = sorted(after.keys() - before.keys())
    assert after.keys() >= before.keys() and all(after[id] == before[id] for id in before)
    assert [int(id) for id in new] == list(range(len(before), len(before) + len(new))) and 1 <= len(new) <= 3
    old_files, files = hashes(small_run / "models"), hashes(trained / "models")
    assert all(files[name] == old_files[name] for name in old_files) and len(files) == len(old_files) + len(new)
    front = evoprune.load_front(trained)
    assert front.finished and front.record.config.more_epochs == 5 and front.record.more_from == len(before)
    for id in new:
        point, start = after[id], before[next(i for i in before if after[i]["sparsity"] == after[id]["sparsity"])]
        assert float(point["accuracy"]) > float(start["accuracy"]) == float(point["accuracy_before"])
        assert point["origin"] == f"{start['origin']}+repair+tune" and point["repair"] == "none" and point["test_accuracy"]
        assert front[id].trained and int(point["kept"]) >= sum(int(v.count_nonzero()) for v in
                                                              (front[id].state_dict()[layer.name] for layer in front.layout))
    right = front.written.per_image([*front, *front.read("dominated.csv")], len(digits.test))
    assert right is not None and right.points.keys() == after.keys()  # held against front.csv when it is read


def test_training_starts_gently_from_repaired_values(small, digits, run, monkeypatch):
    from evoprune.run import jobs

    seen = []
    tune = jobs.tune

    def seeing(net, train, recipe, *rest, **more):
        seen.append((recipe.learning_rate, recipe.epochs, net.state_dict()["fc1.weight"].clone()))
        return tune(net, train, recipe, *rest, **more)

    monkeypatch.setattr(jobs, "tune", seeing)
    repaired = [point.state_dict()["fc1.weight"] for point in evoprune.load_front(run)]
    evoprune.prune(small, digits, resume=run, more_epochs=1)
    assert [(rate, epochs) for rate, epochs, _ in seen] == [(0.005, 1)] * len(seen) and len(seen) <= 3
    assert all(any(torch.equal(began, values) for values in repaired) for _, _, began in seen)


@pytest.mark.parametrize("engine", ["local", "processes"])
def test_stopped_anywhere_it_goes_on_to_the_same_files(small, digits, run, trained, engine, monkeypatch):
    """Stopped after the first trained point, then before each file of the results."""
    state = {"writes": 0, "stop": "trained"}

    def stopping(name, write):
        def written(self, *given):
            if state["stop"] in (name, given[0]):
                raise KeyboardInterrupt
            return write(self, *given)
        return written

    def after(write):
        def written(self, *given):
            write(self, *given)
            if state["stop"] == "trained":
                raise KeyboardInterrupt
        return written

    monkeypatch.setattr(folders.Folder, "write_trained", after(folders.Folder.write_trained))
    monkeypatch.setattr(folders.Folder, "write", stopping("", folders.Folder.write))
    workers = {} if engine == "local" else {"engine": engine, "workers": 1}
    asked = {"finetune_epochs": 5}
    for stop in ("trained", "masks.npz", "front.csv", RIGHT, "done.json") if engine == "local" else ("trained",):
        state["stop"] = stop
        with pytest.raises(KeyboardInterrupt):
            evoprune.prune(small, digits, resume=run, **asked, **workers)
        assert len(evoprune.load_front(run)) > 3 and not (run / "done.json").exists()  # there is a front at any moment
        asked = {}
    state["stop"] = None
    evoprune.prune(small, digits, resume=run, **workers)
    assert same(run, trained)


def test_a_stop_before_anything_is_trained_says_that_the_run_is_as_it_was(small, digits, run, monkeypatch, caplog):
    def interrupted(*given):
        raise KeyboardInterrupt

    caplog.set_level("INFO", "evoprune")
    monkeypatch.setattr("evoprune.run.finish.train_points", interrupted)
    before = hashes(run)
    with pytest.raises(KeyboardInterrupt):
        evoprune.prune(small, digits, resume=run, finetune_epochs=1)
    assert caplog.messages[-1] == f"stopped (interrupted); {run} is as it was; the same command again goes on"
    assert hashes(run) == before


def test_what_is_finished_has_nothing_to_do_and_can_be_trained_again(small, digits, trained, tmp_path):
    path = shutil.copytree(trained, tmp_path / "run")
    before = hashes(path)
    evoprune.prune(small, digits, resume=path)
    assert hashes(path) == before
    evoprune.prune(small, digits, resume=path, more_epochs=2)
    first, second = rows(trained), rows(path)
    assert all(second[id] == first[id] for id in first)
    assert evoprune.load_front(path).record.more_from == len(first)


def test_minutes_plan_the_epochs(small, digits, run, caplog):
    caplog.set_level("INFO", "evoprune")
    from evoprune.run import plan

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "timed_step", lambda *_: 0.005)  # seconds; 18 steps an epoch
        evoprune.prune(small, digits, resume=run, minutes=0.1)
    record = evoprune.load_front(run).record
    assert record.config.more_epochs == 8 and record.config.minutes is None  # (0.9 * 6 s - 3 s) / 3 points / 0.09 s is 8.9
    assert "3 points are trained for 8 epochs more" in caplog.text


@pytest.mark.parametrize(("settings", "asked"), [
    ({"refine_epochs": 3.0}, {"finetune_epochs": 1}), ({"finetune_epochs": 2}, {"minutes": 0.1}),
    ({"total_epochs": 9.0}, {"minutes": 0.1, "finetune_epochs": 2})])
def test_the_command_line_adds_training_to_runs_of_every_kind(settings, asked, monkeypatch):
    monkeypatch.setattr("evoprune.main.read_to_resume", lambda path: SimpleNamespace(config=Config(**settings)))
    check({"resume": "run", **asked})
    with pytest.raises(EvopruneError, match="found 'one'"):
        check({"resume": "run", **dict.fromkeys(asked, "one")})


@pytest.mark.parametrize("settings", [{"total_epochs": 9.0}, {"method": "multishot:lamp"}, {"finetune_epochs": 1},
                                      {"layerwise": True}])
def test_a_run_that_trains_or_follows_a_rule_gets_no_more_generations(settings, monkeypatch, tmp_path):
    record = SimpleNamespace(config=Config(**settings), threads=1, rebuildable=True, named_data=True)
    monkeypatch.setattr("evoprune.run.settings.read_to_resume", lambda path: record)
    with pytest.raises(EvopruneError, match="generations: found 5, .* of a search of masks, without training"):
        settle("lenet", "digits", tmp_path, {"generations": 5})
    record.config = Config(train_epochs=30)  # of the dense model alone
    assert settle("lenet", "digits", tmp_path, {"generations": 5}).generations == 5


def test_a_worker_that_stays_builds_a_run_again_for_other_epochs_or_another_folder(monkeypatch):
    built = []

    def rebuild(start):
        built.append((start.folder, start.more_epochs))
        return SimpleNamespace(config=Config(more_epochs=start.more_epochs), trained_at=kept_in(start.folder))

    monkeypatch.setattr("evoprune.run.rebuild.rebuild", rebuild)
    monkeypatch.setattr("evoprune.run.rebuild.RUNS", {})
    for asked in (("/a", None), ("/a", None), ("/a", 5), ("/a", 5), ("/a", 9), ("/b", 9)):
        RunBuilder(asked[0], ".", "same", more_epochs=asked[1])()
    assert built == [("/a", None), ("/a", 5), ("/a", 9), ("/b", 9)]


def no_engine(*_):
    raise EvopruneError("engine: none here")


@pytest.mark.parametrize(("settings", "said"), [
    ({"more_epochs": 1, "minutes": 1}, "minutes: found 1 with 1 epochs to add; expected one of them"),
    ({"more_epochs": 1, "population": 8}, "population: found 8, but the run in .* has 6"),
    ({"generations": 2, "finetune_epochs": 1}, "generations: found 2, but the run in .* has 1; .* of masks, without training"),
    ({"more_epochs": 0}, "more_epochs: found 0, expected at least 1"),
    ({"more_epochs": 1, "engine": "processes"}, "engine: none here"),
    ({"minutes": 0.1, "front": 3}, "minutes: found 0.1, in which 3 points cannot be trained for an epoch"),
])
def test_what_cannot_be_added_leaves_the_run_as_it_was(small, digits, run, settings, said, monkeypatch):
    from evoprune.run import plan

    monkeypatch.setattr(plan, "timed_step", lambda *_: 1.0)
    if "engine" in settings:  # refused as late as can be
        monkeypatch.setattr("evoprune.pruning.open_engine", no_engine)
    before = hashes(run)
    with pytest.raises(EvopruneError, match=said):
        evoprune.prune(small, digits, resume=run, **settings)
    assert hashes(run) == before


def test_it_is_for_finished_runs_and_their_own_images(small, digits, run, tmp_path):
    with pytest.raises(EvopruneError, match="more_epochs: found 3 without a finished run to resume=; expected both"):
        evoprune.prune(small, digits, out=tmp_path / "new", more_epochs=3)
    parts, before = {name: getattr(digits, name) for name in ("train", "search", "test")}, hashes(run)
    for name in ("search", "test"):
        others = evoprune.Data(**{part: tuple(each.flip(0) if part == name else each for each in (split.images, split.labels))
                                  for part, split in parts.items()})
        with pytest.raises(EvopruneError, match=f"data: found other {name} images than those of the run in"):
            evoprune.prune(small, others, resume=run, more_epochs=1)
        assert hashes(run) == before
    (run / "done.json").unlink()
    with pytest.raises(EvopruneError, match="is not finished; resume it without, then add training"):
        evoprune.prune(small, digits, resume=run, more_epochs=1)
