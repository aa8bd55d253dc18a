"""A run that a folder holds stays whole until a new one has something to put in its place; what is refused leaves no trace."""

import multiprocessing
import os
import shutil
import subprocess
import sys

import pytest
from conftest import hashes
from test_pruning import SMALL
from torch import nn

import evoprune
from evoprune import EvopruneError, prune
from evoprune.errors import Stopped
from evoprune.evolution import default_toolbox
from evoprune.main import main
from evoprune.results import folder as folders
from evoprune.results.folder import Folder
from evoprune.results.front import load_front

CALLS = [0]  # of the forward pass of `Raises`


class Raises(nn.Module):
    """Cannot be traced, and raises in a later forward pass."""

    def __init__(self, after):
        super().__init__()
        self.layer, self.after = nn.Linear(64, 10), after

    def forward(self, x):
        CALLS[0] += 1
        if CALLS[0] > self.after:
            raise ValueError("enough")
        return self.layer(x.flatten(1)) if x.sum() > -1e9 else x


@pytest.fixture
def held(run_folder, tmp_path):
    """A folder with a finished run."""
    shutil.copytree(run_folder, tmp_path / "run")
    return tmp_path / "run"


REFUSED_LATE = [  # everything that can be refused once model and data have been read
    (["--total-epochs", "0.00001"], "total_epochs: found 1e-05, which is 0 steps for"),
    (["--total-epochs", "1", "--targets", "0.99999"], "targets: found 0.99999, expected at most"),
    (["--method", "oneshot:lamp", "--targets", "0.99999"], "targets: found 0.99999, expected at most"),
    (["--method", "multishot:lamp", "--targets", "0.99999"], "targets: found 0.99999, expected at most"),
    (["--method", "gradual:lamp", "--total-epochs", "0.01"], "total_epochs: found 0.01, which is 0 steps for"),
    (["--method", "oneshot:lamp", "--total-epochs", "0.01"], "total_epochs: found 0.01, which is 0 steps for"),
    (["--layer", "nothing"], "layer: nothing is called 'nothing'"), (["--skip", "*"], "layer, skip: nothing is left to search"),
    (["--include", "nothing"], "include: nothing is called"), (["--unit", "nothing=filter"], "unit: nothing is called"),
    (["--objectives", "accuracy,sparsity,nothing.py:f"], "objectives: nothing.py: no such file"),
    (["--train-images", "100000"], "train_images: found 100000"), (["--search-images", "100000"], "search_images: found 100000"),
    (["--test-images", "100000"], "test_images: found 100000"), (["--mean", "0.5"], "mean, std: found only one"),
    (["--engine", "dask", "--scheduler", "tcp://127.0.0.1:1"], "scheduler: tcp://127.0.0.1:1"),
    (["--engine", "processes", "--job-timeout", "1e300"], "job_timeout: found 1e+300, expected 0.01 to"),
    (["--engine", "processes", "--workers", "100000"], "workers: found 100,000, expected at most"),
]


@pytest.mark.parametrize("holds", [True, False])
@pytest.mark.parametrize(("flags", "said"), REFUSED_LATE)
def test_what_is_refused_late_changes_nothing(holds, flags, said, held, weights_file, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = hashes(held)
    out = held if holds else tmp_path / "new"
    common = ["--weights", str(weights_file), "--population", "4", "--generations", "1", "--out", str(out)]
    if "--total-epochs" in flags:
        del common[2:6]
    assert main([*common, *["--overwrite"] * holds, *flags]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert hashes(held) == before and load_front(held)[0].masks()
    assert holds or not out.exists()


def test_targets_and_budgets_are_refused_before_the_dense_model_is_trained(tmp_path, capsys):
    flags = ["--train-epochs", "100000", "--total-epochs", "0.00001", "--out", str(tmp_path / "run")]
    assert main(flags) == 2  # or an hour later
    assert "total_epochs: found 1e-05" in capsys.readouterr().err and not (tmp_path / "run").exists()


def none(evaluate, layout, config):
    return None


def raising(evaluate, layout, config):
    raise ZeroDivisionError("in the toolbox")


def measuring(*found):
    def make(evaluate, layout, config):
        made = default_toolbox(evaluate, layout, config)
        made.register("evaluate", lambda individual: found)
        return made

    return make


@pytest.mark.parametrize("holds", [True, False])
@pytest.mark.parametrize(("changes", "said"), [
    ({"model": Raises(3)}, "enough"), ({"model": Raises(7)}, "test_replacing.py, line .*, in forward: ValueError: enough"),
    ({"toolbox": None}, "toolbox: found None, expected a function"),
    ({"toolbox": none}, r"none\(\) returned None, expected a deap"),
    ({"toolbox": raising}, "in raising: ZeroDivisionError: in the toolbox"),
    ({"toolbox": measuring(0.5)}, r"toolbox: evaluate returned \(0.5,\), expected 2 finite numbers, one an objective"),
    ({"toolbox": measuring(0.5, float("nan"))}, "expected 2 finite numbers"),
    ({"toolbox": measuring("high", "low")}, "expected 2 finite numbers"), ({"toolbox": measuring(1, 2, 3)}, "2 finite numbers"),
])
def test_what_raises_late_changes_nothing(holds, changes, said, held, lenet, digits, tmp_path):
    CALLS[0] = 0
    before, out = hashes(held), held if holds else tmp_path / "new"
    with pytest.raises(EvopruneError, match=said):
        prune(**{"model": lenet, "data": digits, "out": str(out), "overwrite": holds, **SMALL, **changes})
    assert hashes(held) == before and load_front(held)[0].masks()
    assert holds or not out.exists()


def test_a_new_run_takes_the_place_of_the_old_one_once_it_has_measured_something(held, lenet, digits):
    old = hashes(held)

    def make(evaluate, layout, config):
        made = default_toolbox(evaluate, layout, config)
        usual = made.breed

        def breed(state, rng):
            if state.generation == 2:
                raise ZeroDivisionError("later")
            return usual(state, rng=rng)

        made.register("breed", breed)
        return made

    with pytest.raises(EvopruneError, match="ZeroDivisionError: later"):
        prune(lenet, digits, out=str(held), overwrite=True, toolbox=make, **SMALL)
    assert set(hashes(held).items()) & set(old.items()) <= {("dense.safetensors", old["dense.safetensors"])}
    assert prune(lenet, digits, resume=held).finished


def test_ctrl_c_before_the_new_run_has_anything_leaves_the_old_one(held, lenet, digits, caplog):
    caplog.set_level("INFO", "evoprune")
    before = hashes(held)

    def make(evaluate, layout, config):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prune(lenet, digits, out=str(held), overwrite=True, toolbox=make, **SMALL)
    assert hashes(held) == before
    assert f"start again ({held} holds the run that it held)" in caplog.text


def killed_after(moves, out):
    """Set a run aside, begin another, put the first back; be killed after so many moves of files."""
    done, real = [0], os.rename

    def rename(*args, **kwargs):
        if done[0] == moves:
            os._exit(9)
        done[0] += 1
        return real(*args, **kwargs)

    folders.Path.rename = lambda self, target: rename(self, target)
    with Folder(out, overwrite=True) as folder:
        folder.set_aside()
        folder.write("config.json", "{}")
        folder.write("front.csv", "nothing yet")
        folder.put_back()
        os._exit(0)


@pytest.mark.parametrize("moves", [0, 1, 5, 12, 13, 14, 20, 27, 30, 31, 40])
def test_kill_9_at_any_move_of_a_file_loses_nothing(moves, held):
    before = hashes(held)
    process = multiprocessing.get_context("fork").Process(target=killed_after, args=(moves, held))
    process.start()
    process.join()
    ends = {9} if moves < 28 else {0} if moves == 40 else {0, 9}  # how many checkpoints there are depends on the time
    assert process.exitcode in ends
    with Folder(held, resume=True):  # the next to open it
        pass
    assert hashes(held) == before


def test_a_run_that_is_set_aside_is_still_the_one_that_is_looked_at_and_resumed(held, lenet, digits):
    points = [point.id for point in load_front(held)]
    process = multiprocessing.get_context("fork").Process(target=leave_aside, args=(held,))
    process.start()
    process.join()
    assert (held / "config.json").read_text() == "{}"
    assert [point.id for point in load_front(held)] == points and load_front(held)[3].masks()
    assert prune(lenet, digits, resume=held).finished
    assert [point.id for point in load_front(held)] == points and not (held / "checkpoint" / "replaced").exists()


def leave_aside(out):
    folder = Folder(out, overwrite=True).__enter__()
    folder.set_aside()
    folder.write("config.json", "{}")
    os._exit(9)


def test_whoever_waits_for_a_folder_that_goes_away_gets_one_of_its_own(tmp_path, monkeypatch):
    first, second = Folder(tmp_path / "run"), Folder(tmp_path / "run")
    real = folders.fcntl.flock

    def flock(file, how):
        if first.path.exists() and not getattr(flock, "done", False):
            flock.done = True
            first.__exit__(ValueError, ValueError("refused"), None)  # between the second's opening the lock and its taking it
        real(file, how)

    first.__enter__()
    monkeypatch.setattr(folders.fcntl, "flock", flock)
    with second:
        second.write("config.json", "{}")
        with pytest.raises(EvopruneError, match="in use by another process"):
            Folder(tmp_path / "run", resume=True).__enter__()
    assert (tmp_path / "run" / "config.json").exists()


def test_a_killed_search_in_the_place_of_another_goes_on(held, tmp_path):
    """Killed after its first generation, the new run is what the folder holds."""
    script = tmp_path / "killed.py"
    script.write_text("""
import os, torch, evoprune
from evoprune.evolution import default_toolbox
def make(evaluate, layout, config):
    made = default_toolbox(evaluate, layout, config)
    usual = made.breed
    def breed(state, rng):
        if state.generation == 1: os._exit(9)
        return usual(state, rng=rng)
    made.register("breed", breed)
    return made
torch.manual_seed(0)
evoprune.prune(torch.nn.Linear(4, 3), (torch.randn(40, 4), torch.arange(40) % 3), out="run", overwrite=True, toolbox=make,
               population=4, generations=3, threads=1)
""")
    assert subprocess.run([sys.executable, script], cwd=tmp_path).returncode == 9
    assert load_front_settings(held) == "Linear"


def load_front_settings(out):
    return evoprune.results.record.read_record(folders.home_of(out) / "config.json").settings["model"]


def raising_at(generation):
    def make(evaluate, layout, config):
        made = default_toolbox(evaluate, layout, config)
        usual = made.breed

        def breed(state, rng):
            if state.generation == generation:
                raise ZeroDivisionError("in breed")
            return usual(state, rng=rng)

        made.register("breed", breed)
        return made

    return make


def raises(error):
    def function(*given):
        raise error

    return function


def test_a_finished_run_that_does_not_get_farther_stays_finished(lenet, digits, tmp_path):
    out = tmp_path / "run"
    prune(lenet, digits, out=str(out), population=4, generations=3, threads=1)
    before = hashes(out)
    with pytest.raises(EvopruneError, match="ZeroDivisionError: in breed"):
        prune(lenet, digits, resume=out, generations=6, toolbox=raising_at(3))
    assert hashes(out) == before
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("evoprune.run.search.evolve", raises(Stopped("max_seconds")))
        assert len(prune(lenet, digits, resume=out, generations=6)) and hashes(out) == before
    with pytest.raises(EvopruneError, match="ZeroDivisionError: in breed"):
        prune(lenet, digits, resume=out, generations=6, toolbox=raising_at(4))
    assert not (out / "done.json").exists() and prune(lenet, digits, resume=out).record.config.generations == 6
