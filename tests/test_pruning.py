import copy
import csv
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import Small
from safetensors.torch import load_file
from torch import nn

import evoprune
from evoprune.evolution.starts import first_population
from evoprune.evolution.toolbox import default_toolbox
from evoprune.pruning import how_to_go_on, prune, with_threads
from evoprune.results.folder import Folder
from evoprune.results.written import CHECKPOINT, DOMINATED, DONE, FILES, FRONT, LOG, MODELS

ALWAYS = {*FILES, CHECKPOINT} - {DOMINATED, MODELS}
SMALL = {"population": 8, "generations": 6, "threads": 1}


def results(folder):
    return (folder / "front.csv").read_bytes(), (folder / "masks.npz").read_bytes()


def test_a_run_leaves_its_files(run_folder, digits):
    names = {p.name for p in run_folder.iterdir()}
    assert names - {DOMINATED} == ALWAYS | {MODELS}
    config = json.loads((run_folder / "config.json").read_text())
    assert config["settings"]["population"] == 8 and config["settings"]["threads"] == 1 and config["weights"] == 11_208
    assert config["splits"] == {"train": 1151, "search": 287, "test": 359} and config["outputs"] == 10
    assert [layer["name"] for layer in config["layout"]] == ["conv1.weight", "conv2.weight", "fc1.weight", "fc2.weight"]
    assert {"torch", "numpy", "deap", "evoprune", "python"} <= set(config["versions"])
    done = json.loads((run_folder / "done.json").read_text())
    assert done["epochs"] == 4 and done["generations"] == 3
    with open(run_folder / "front.csv", newline="") as file:
        columns = next(csv.reader(file))
    assert columns == ["id", "accuracy", "sparsity", "kept", "weights", "test_accuracy", "test_low", "test_high",
                       "accuracy_before", "generation", "origin", "repair"]
    with open(run_folder / "log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["generation", "evaluations", "epochs", "seconds", "hvlog", "points", "best_accuracy",
                             "max_sparsity"]
    assert [int(r["generation"]) for r in rows] == [0, 1, 2, 3]
    assert float(rows[-1]["hvlog"]) > float(rows[0]["hvlog"]) > 0
    for name in ("front.png", "layers.png", "progress.png"):
        assert (run_folder / name).read_bytes()[:4] == b"\x89PNG"


def test_trained_points_keep_their_zeros_and_gain(run_folder, lenet):
    front = evoprune.load_front(run_folder, lenet)
    trained = [p for p in front if p.origin != "dense"]
    assert trained and any(p.accuracy > p.accuracy_before for p in trained)
    for point in trained:
        state = load_file(run_folder / "models" / f"{point.id}.safetensors")
        assert all(not state[name][~mask].any() for name, mask in point.masks().items())
        assert not torch.equal(state["fc1.bias"], lenet.fc1.bias)


def test_the_users_model_is_untouched(lenet, digits, tmp_path):
    model = copy.deepcopy(lenet).train()
    before = copy.deepcopy(model.state_dict())
    prune(model, digits, out=str(tmp_path / "run"), finetune_epochs=1, front=2, **SMALL)
    assert model.training and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(lenet, digits, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        prune(lenet, digits, out=str(tmp_path / name), seed=seed, finetune_epochs=1, front=2, **SMALL)
    assert results(tmp_path / "a") == results(tmp_path / "b") != results(tmp_path / "c")


class Stops:
    """A toolbox whose evaluation is interrupted when it has measured so many masks."""

    def __init__(self, after):
        self.after = after

    def __call__(self, evaluator, layout, config):
        def evaluate(individual):
            self.after -= 1
            if self.after < 0:
                raise KeyboardInterrupt
            return evaluator(individual)

        toolbox = default_toolbox(evaluator, layout, config)
        toolbox.register("evaluate", evaluate)
        return toolbox


@pytest.mark.parametrize("after", [3, 8, 9, 20, 40])
def test_interrupted_and_resumed_is_never_interrupted(after, lenet, digits, tmp_path):
    settings = {"finetune_epochs": 1, "front": 2, **SMALL}
    prune(lenet, digits, out=str(tmp_path / "whole"), **settings)
    with pytest.raises(KeyboardInterrupt):
        prune(lenet, digits, out=str(tmp_path / "run"), toolbox=Stops(after), **settings)
    assert not (tmp_path / "run" / "done.json").exists()
    assert (tmp_path / "run" / "front.csv").exists() == (after >= 8)  # once the first masks are measured
    prune(lenet, digits, resume=tmp_path / "run")
    assert results(tmp_path / "run") == results(tmp_path / "whole")
    assert (tmp_path / "run" / "done.json").exists()


@pytest.mark.parametrize("name", [FRONT, DONE])
def test_a_signal_while_the_last_files_are_written_loses_nothing(name, lenet, digits, tmp_path, monkeypatch):
    settings = {"finetune_epochs": 1, "front": 2, **SMALL}
    prune(lenet, digits, out=str(tmp_path / "whole"), **settings)
    write = Folder.write

    def interrupted(folder, file, content):
        write(folder, file, content)
        if file == name:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Folder, "write", interrupted)
        prune(lenet, digits, out=str(tmp_path / "run"), **settings)
    assert results(tmp_path / "run") == results(tmp_path / "whole") and list((tmp_path / "run" / MODELS).iterdir())
    assert prune(lenet, digits, resume=tmp_path / "run").finished
    assert results(tmp_path / "run") == results(tmp_path / "whole")


def test_an_evaluation_of_ones_own_shows_how_long_it_will_take(lenet, digits, tmp_path, caplog):
    with caplog.at_level("INFO", "evoprune"), pytest.raises(KeyboardInterrupt):
        prune(lenet, digits, out=str(tmp_path / "run"), toolbox=Stops(20), **SMALL)
    assert "s a mask; 56 masks will take about" in caplog.text


def test_making_the_first_masks_does_not_count_as_measuring_them(lenet, digits, tmp_path, caplog, monkeypatch):
    def slowly(*given):
        time.sleep(2)
        return first_population(*given)

    monkeypatch.setattr("evoprune.run.search.first_population", slowly)
    with caplog.at_level("INFO", "evoprune"):
        prune(lenet, digits, out=str(tmp_path / "run"), **SMALL)
    assert float(re.search(r"(\S+) s a mask", caplog.text)[1]) < 0.2


def test_max_seconds_stops_in_time_and_resume_may_lift_it(lenet, digits, tmp_path):
    prune(lenet, digits, out=str(tmp_path / "whole"), **SMALL)
    front = prune(lenet, digits, out=str(tmp_path / "run"), max_seconds=0, **SMALL)
    assert not front.finished and len(front) > 1 and all(p.test_accuracy is None for p in front)
    assert prune(lenet, digits, resume=tmp_path / "run").finished
    assert results(tmp_path / "run") == results(tmp_path / "whole")


def test_more_generations_go_on_from_a_finished_run(lenet, digits, tmp_path):
    prune(lenet, digits, out=str(tmp_path / "whole"), **SMALL)
    prune(lenet, digits, out=str(tmp_path / "run"), **{**SMALL, "generations": 2})
    prune(lenet, digits, resume=tmp_path / "run", generations=6)
    assert results(tmp_path / "run") == results(tmp_path / "whole")
    with pytest.raises(evoprune.EvopruneError, match="generations: found 3, but the run in .* has had 6"):
        prune(lenet, digits, resume=tmp_path / "run", generations=3)


def test_a_damaged_checkpoint_falls_back_to_the_older_one(lenet, digits, tmp_path, caplog):
    prune(lenet, digits, out=str(tmp_path / "run"), **SMALL)
    newest = max((tmp_path / "run" / "checkpoint").glob("*.npz"))
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 255
    newest.write_bytes(content)
    before = results(tmp_path / "run")
    (tmp_path / "run" / "done.json").unlink()
    prune(lenet, digits, resume=tmp_path / "run")
    assert results(tmp_path / "run") == before and "damaged, looking for an older one" in caplog.text


def test_resume_refuses_other_settings_and_models(lenet, digits, run_folder, tmp_path):
    prune(lenet, digits, out=str(tmp_path / "run"), **SMALL)
    with pytest.raises(evoprune.EvopruneError, match=r"population: found 16, but the run in .* has 8; resume= may change "
                       r"engine, max_seconds, generations"):
        prune(lenet, digits, resume=tmp_path / "run", population=16)
    with pytest.raises(evoprune.EvopruneError, match="generations: found 99, but the run"):
        prune(lenet, digits, resume=run_folder, generations=99)
    other = copy.deepcopy(lenet)
    other.fc1.weight.data[0, 0] += 1
    with pytest.raises(evoprune.EvopruneError, match="holds another model than the one handed in"):
        prune(other, digits, resume=tmp_path / "run")
    with pytest.raises(evoprune.EvopruneError, match="belongs to another run"):
        prune(lenet, evoprune.Data(None, digits.test, digits.search), resume=tmp_path / "run")


def test_one_layer_is_searched_and_the_others_stay(lenet, digits, tmp_path):
    front = prune(lenet, digits, layer="fc1", out=str(tmp_path / "run"), **SMALL)
    assert list(front[0].masks()) == ["fc1.weight"] and front[0].weights == 11_208
    assert max(p.sparsity for p in front) < 8192 / 11_208
    assert torch.equal(front[-1].model().conv2.weight, lenet.conv2.weight)


def test_points_below_the_floor_never_enter_the_front(lenet, digits, tmp_path):
    for tuned in ({}, {"finetune_epochs": 1, "front": 3}):
        front = prune(lenet, digits, accuracy_floor=0.9, out=str(tmp_path / f"run{len(tuned)}"), **tuned, **SMALL)
        assert len(front) and min(p.accuracy for p in front) >= 0.9
    front = prune(lenet, digits, accuracy_floor=1.0, out=str(tmp_path / "none"), **SMALL)
    assert len(front) == 0 and "dense" in str(front)


def test_a_pair_is_enough_and_a_dataset_too(lenet, digits, tmp_path):
    images = digits.search.inputs(slice(None))
    a = prune(lenet, (images, digits.search.labels), out=str(tmp_path / "a"), **SMALL)
    b = prune(lenet, torch.utils.data.TensorDataset(images, digits.search.labels), out=str(tmp_path / "b"), **SMALL)
    assert a.record.splits == {"train": 0, "search": 144, "test": 143}
    assert results(a.path) == results(b.path)


def test_random_masks_alone_are_a_start(digits, tmp_path):
    front = prune(Small(), digits, start="random", out=str(tmp_path / "run"), **{**SMALL, "generations": 0})
    assert {p.origin.split("@")[0] for p in front} - {"dense"} == {"random"}


@pytest.mark.parametrize(("settings", "said"), [
    ({"populations": 8}, "populations: no such setting, expected one of model, weights"),
    ({"start": "random,lottery"}, "start: found 'lottery', expected random, narrow, magnitude, erk, lamp, fisher, "
     "multishot, with commas between, or auto"),
    ({"layer": "fc9"}, "layer: nothing is called 'fc9'; there are conv1.weight, conv2.weight, fc1.weight, fc2.weight"),
    ({"search_images": 999}, "search_images: found 999, expected at most the 287 images there are"),
    ({"weights": "nowhere.pt"}, "weights: nowhere.pt: no such file"),
])
def test_bad_settings_leave_no_folder(settings, said, lenet, digits, tmp_path):
    with pytest.raises(evoprune.EvopruneError) as error:
        prune(lenet, digits, out=str(tmp_path / "run"), **settings)
    assert str(error.value).startswith(said) and not (tmp_path / "run").exists()


def test_bad_input_does_not_cost_the_run_that_would_be_replaced(lenet, digits, tmp_path):
    prune(lenet, digits, out=str(tmp_path / "run"), **SMALL)
    before = results(tmp_path / "run")
    with pytest.raises(evoprune.EvopruneError, match="data: found no train split"):
        prune(lenet, (digits.search.images, digits.search.labels), out=str(tmp_path / "run"), overwrite=True, finetune_epochs=1)
    assert results(tmp_path / "run") == before
    prune(lenet, digits, out=str(tmp_path / "run"), overwrite=True, seed=5, **SMALL)
    assert results(tmp_path / "run") != before


def test_a_tuned_run_replaces_nothing_before_its_first_child(lenet, digits, tmp_path, monkeypatch):
    def interrupted(*given):
        raise KeyboardInterrupt

    prune(lenet, digits, out=str(tmp_path / "run"), **SMALL)
    before = results(tmp_path / "run")
    monkeypatch.setattr("evoprune.run.jobs.tune", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prune(lenet, digits, out=str(tmp_path / "run"), overwrite=True, total_epochs=5, targets="0.8,0.9")
    assert results(tmp_path / "run") == before and evoprune.load_front(tmp_path / "run").finished


def test_a_regression_as_bad_as_can_be_is_warned_about(tmp_path, caplog):
    x, model = torch.randn(60, 4), torch.nn.Linear(4, 1)
    for shift, warned in ((0.0, False), (9.0, True)):
        caplog.clear()
        evoprune.prune(model, (x, model(x).detach() + shift), out=tmp_path / str(shift), population=4, generations=0, threads=1)
        assert ("that is as low as it is counted, and no pruned model can be worse" in caplog.text) is warned


def test_how_long_a_full_search_takes_goes_by_the_masks_after_the_first(lenet, digits, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("evoprune.pruning.say_full_size", lambda masks, images, each: said.append(each))
    front = evoprune.prune(lenet, digits, out=tmp_path / "run", population=6, generations=2, threads=1)
    first, *_, last = front.written.rows(LOG, ("seconds", "evaluations"))
    masks, seconds = (float(last[name]) - float(first[name]) for name in ("evaluations", "seconds"))
    assert said == [pytest.approx(seconds / masks / len(digits.search))] and masks >= 3
    evoprune.prune(lenet, digits, out=tmp_path / "none", population=6, generations=0, threads=1)
    assert len(said) == 1


def test_a_search_near_chance_is_warned_about(digits, tmp_path, caplog):
    torch.manual_seed(0)
    prune(Small(), digits, out=str(tmp_path / "run"), **SMALL)
    assert "that is near chance (10.00 %)" in caplog.text


COMMAND = [sys.executable, "-m", "evoprune.main", "--population", "16", "--generations", "60", "--train-epochs", "2",
           "--finetune-epochs", "2", "--front", "4", "--threads", "1", "--test-images", "100"]


def kill_when(condition, arguments, **options):
    """Start a run and kill -9 it as soon as the condition holds; return whether it was still running."""
    process = subprocess.Popen([*COMMAND, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **options)
    deadline = time.monotonic() + 60
    while not condition() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    running = process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    return running


def test_kill_9_and_resume_ends_with_the_same_bytes(tmp_path):
    whole, run = tmp_path / "whole", tmp_path / "run"
    prune("lenet", "digits", out=whole, population=16, generations=60, train_epochs=2, finetune_epochs=2, front=4, threads=1,
          test_images=100)
    checkpoint = run / "checkpoint"
    killed = [kill_when((run / "config.json").exists, ["--out", run]),
              kill_when(lambda: list(checkpoint.glob("*.npz")), ["--resume", run]),
              kill_when(lambda: (checkpoint / "trained").exists() and len(list((checkpoint / "trained").iterdir())) >= 2,
                        ["--resume", run])]
    assert killed == [True] * 3
    assert not (run / "done.json").exists()
    done = subprocess.run([*COMMAND, "--resume", run], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert results(run) == results(whole)


@pytest.mark.parametrize(("sent", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_says_how_to_go_on(sent, status, tmp_path):
    run = tmp_path / "run"
    process = subprocess.Popen([*COMMAND[:6], "100000", *COMMAND[7:], "--out", run], stdout=subprocess.PIPE, text=True)
    while not list((run / "checkpoint").glob("*.npz")):
        time.sleep(0.05)
    process.send_signal(sent)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == status
    assert f"stopped (interrupted); go on with: python -m evoprune.main --resume {run}" in output
    assert len(evoprune.load_front(run)) > 0 and not (run / "done.json").exists()


def test_who_prunes_in_python_is_told_in_python_how_to_go_on(digits, tmp_path, caplog):
    caplog.set_level("INFO", "evoprune")
    run = str(tmp_path / "it's")
    evoprune.prune(Small(), digits, out=run, max_seconds=0.0, **SMALL)
    line, = (line for line in caplog.messages if line.startswith("stopped (max_seconds); go on with: "))
    assert line.endswith(f"evoprune.prune(model, data, resume={run!r})")
    assert how_to_go_on(run, None, "lenet", "digits") == f"evoprune.prune(resume={run!r})"
    assert how_to_go_on(run, "evoprune", "lenet", "digits") == f"python -m evoprune.main --resume {shlex.quote(run)}"


def test_a_signal_while_the_first_checkpoint_is_written_leaves_a_front(digits, tmp_path, monkeypatch):
    save = evoprune.run.search.save

    def signalled(*arguments):
        path = save(*arguments)
        signal.raise_signal(signal.SIGINT)
        return path

    monkeypatch.setattr("evoprune.run.search.save", signalled)
    with pytest.raises(KeyboardInterrupt):
        evoprune.prune(Small(), digits, out=str(tmp_path / "run"), **SMALL)
    assert len(evoprune.load_front(tmp_path / "run")) > 0


@pytest.mark.skipif(os.geteuid() != 0 or not os.path.exists("/proc/mounts"), reason="mounting a tmpfs needs root")
def test_a_full_disk_is_one_line_and_what_was_written_stays(lenet, digits, tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600k", "none", small], capture_output=True).returncode:
        pytest.skip("this machine allows no mounts")
    try:
        with pytest.raises(evoprune.EvopruneError, match=r"No space left on device; all files written before are whole: make "
                           r"room, then go on with: evoprune\.prune\(model, data, resume='"):
            prune(lenet, digits, out=str(small / "run"), finetune_epochs=1, front=16, population=16, generations=6, threads=1)
        assert not list(small.rglob("*.part"))
        assert list((small / "run" / "checkpoint").glob("*.npz"))
        subprocess.run(["mount", "-o", "remount,size=20m", small], check=True)
        front = prune(lenet, digits, resume=small / "run")
        prune(lenet, digits, out=str(tmp_path / "whole"), finetune_epochs=1, front=16, population=16, generations=6, threads=1)
        assert front.finished and results(small / "run") == results(tmp_path / "whole")
    finally:
        subprocess.run(["umount", small], check=True)


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_the_search_gains_over_its_first_masks_and_over_chance(seed, weights_file, tmp_path):
    def hvlogs(name, toolbox):
        prune("lenet", "digits", weights=weights_file, out=str(tmp_path / name), population=32, generations=30, seed=seed,
              threads=1, toolbox=toolbox)
        with open(tmp_path / name / "log.csv", newline="") as file:
            rows = [float(row["hvlog"]) for row in csv.DictReader(file)]
        return rows[0], rows[-1]

    def by_chance(evaluator, layout, config):
        toolbox = default_toolbox(evaluator, layout, config)
        toolbox.register("select", lambda group, k, rng: [group[i] for i in rng.integers(len(group), size=k)])
        toolbox.register("survive", lambda group, k, rng: [group[i] for i in rng.choice(len(group), k, replace=False)])
        return toolbox

    first, final = hvlogs("search", default_toolbox)
    assert final >= first + 0.03 and final > hvlogs("chance", by_chance)[1]


def test_masks_are_plain_packed_bits(run_folder, lenet):
    with np.load(run_folder / "masks.npz", allow_pickle=False) as file:
        assert file["000/fc1.weight"].dtype == np.uint8 and file["000/fc1.weight"].shape == (1024,)


def test_the_dense_model_is_a_point_as_it_came_where_repair_makes_it_worse(tmp_path):
    """A batch norm whose statistics only the dense model has: on a few images they are worth nothing."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    model[1].running_mean.normal_()
    images = torch.randn(40, 6)
    labels = model.eval()(images).argmax(1)
    front = evoprune.prune(model, (images, labels), out=tmp_path / "run", population=4, generations=0, start="random", seed=1)
    first = front.points[0]
    assert (first.origin, first.repair, first.accuracy, first.sparsity, first.test_accuracy) == ("dense", "none", 1.0, 0.0, 1.0)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in first.state_dict().items())


def test_a_front_of_nothing_better_than_one_label_says_so(tmp_path, caplog):
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    labels = torch.arange(30) % 3
    data = evoprune.Data(None, (torch.zeros(30, 6), labels), (torch.zeros(30, 6), labels))
    evoprune.prune(model, data, out=tmp_path / "run", population=4, generations=0)
    said = [record.getMessage() for record in caplog.records if "no pruned model" in record.getMessage()]
    assert said == ["warning: no pruned model is better than one answer for every image (accuracy 33.33 %): more "
                    "--population, --generations or training may find some"]
    evoprune.prune(model, data, out=tmp_path / "floor", population=4, generations=0, accuracy_floor=0.9)
    assert "warning: no pruned model reaches --accuracy-floor, 90.00 %: lower it, search longer or train" in caplog.messages


@pytest.mark.parametrize(("settings", "said"), [
    ({"threads": 2}, None), ({"threads": 1, "engine": "processes", "workers": 4}, None),
    ({"threads": 3}, "3 threads on 2 cores wait for one another, which may take several times as long; --threads 2 does not"),
    ({"threads": 2, "engine": "processes", "workers": 4}, "2 threads in each of 4 workers on 2 cores wait for one another, which "
                                                          "may take several times as long; --threads 1 does not")])
def test_more_threads_than_cores_are_told(settings, said, caplog, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1})
    with with_threads(evoprune.Config(**settings)):
        assert torch.get_num_threads() == settings["threads"]
    assert caplog.messages == ([said] if said else [])
