import os
import subprocess
import sys

import pytest
import torch

from evoprune.config import options
from evoprune.main import main, parser


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


def test_the_first_command_shows_progress_the_front_the_files_and_what_is_next(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, err = run(capsys, "--generations", 4, "--train-epochs", 3, "--population", 16, "--threads", 1)
    assert status == 0 and err == ""
    for said in ("lenet on digits: 11,208 weights in 4 layers", "training the dense model: 3 epochs", "dense accuracy: ",
                 "s a mask; the search of 80 masks will take about 0:0", "generation 4 of 4: hvlog ",
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


def test_help_works_from_the_file_as_a_launcher_runs_it():
    import evoprune.main

    done = subprocess.run([sys.executable, evoprune.main.__file__, "--help"], capture_output=True, text=True,
                          env={**os.environ, "COLUMNS": "200"})
    assert done.returncode == 0 and "--population N" in done.stdout
