"""What users hand in that nobody planned for: each is either made to work or told in one line, and costs no run."""

import shutil
import subprocess
import sys
import warnings
import zipfile

import numpy as np
import pytest
import torch
from conftest import ROOT, Small
from test_pruning import SMALL, results
from torch import nn

import evoprune
from evoprune import EvopruneError, prune
from evoprune.main import main


def split_of(count=60, features=16, classes=3):
    torch.manual_seed(0)
    return torch.randn(count, features), torch.arange(count) % classes


def small(**changes):
    return {**SMALL, "generations": 2, **changes}


def test_a_finished_run_is_left_alone_when_resumed(lenet, digits, tmp_path, caplog):
    caplog.set_level("INFO", "evoprune")
    out = tmp_path / "run"
    prune(lenet, digits, out=str(out), finetune_epochs=1, front=3, **SMALL)
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file() and p.name != "lock"}
    assert prune(lenet, digits, resume=out, max_seconds=0.0).finished
    assert before == {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file() and p.name != "lock"}
    assert "is finished: nothing to do" in caplog.text


def test_a_refused_resume_changes_nothing(lenet, digits, tmp_path):
    out = tmp_path / "run"
    prune(lenet, digits, out=str(out), **SMALL)
    before = (out / "config.json").read_bytes()
    for data, changes in ((digits, {"generations": 3}),
                          (evoprune.Data(None, digits.test, digits.search), {"generations": 9})):
        with pytest.raises(EvopruneError):
            prune(lenet, data, resume=out, **changes)
        assert (out / "config.json").read_bytes() == before and (out / "done.json").exists()


def bad_test_split(digits):
    return {"data": evoprune.Data(digits.train, digits.search, (torch.zeros(5, 1, 9, 9), torch.zeros(5).long()))}


@pytest.mark.parametrize(("change", "said"), [
    (bad_test_split, r"data: test images have shape \(1, 9, 9\), search images \(1, 8, 8\); expected the same"),
    (lambda digits: {"mean": "nan", "std": "1", "data": (digits.search.images, digits.search.labels)}, "finite numbers"),
    (lambda digits: {"learning_rate": 0}, "learning_rate: found 0, expected 1e-09 to"),
    (lambda digits: {"model": nn.Embedding(4, 4)}, "Embedding has no prunable weights"),
    (lambda digits: {"model": frozen()}, "every parameter is frozen"),
])
def test_bad_input_never_costs_the_run_that_would_be_replaced(change, said, lenet, digits, tmp_path):
    out = tmp_path / "run"
    prune(lenet, digits, out=str(out), **SMALL)
    before = results(out)
    with pytest.raises(EvopruneError, match=said):
        prune(**{"model": lenet, "data": digits, "out": str(out), "overwrite": True, "finetune_epochs": 1, **SMALL,
                 **change(digits)})
    assert results(out) == before and (out / "done.json").exists()


def frozen():
    return Small().requires_grad_(False)


class Indexed(nn.Module):
    """Has whole numbers among its parameters."""

    def __init__(self):
        super().__init__()
        self.index, self.fc = nn.Parameter(torch.arange(15, -1, -1), requires_grad=False), nn.Linear(16, 3)

    def forward(self, x):
        return self.fc(x[:, self.index])


class Tokens(nn.Module):
    """Tied embedding and head, attention, int64 inputs."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.head = nn.Linear(8, 20)
        self.head.weight = self.embed.weight

    def forward(self, x):
        return self.head(self.block(self.embed(x)).mean(1))


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(16, 16)
        self.b = self.a
        self.module = nn.Linear(16, 3)  # a name like nn.DataParallel's

    def forward(self, x):
        return {"logits": self.module(self.b(self.a(x).relu()).relu())}


@pytest.mark.parametrize("make", [
    lambda: (Tokens(), torch.randint(20, (60, 5)), torch.arange(60) % 20),
    lambda: (Shared(), *split_of()), lambda: (Indexed(), *split_of()),
    lambda: (Shared().double(), *split_of()),
    lambda: (nn.Sequential(nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4), nn.Flatten(), nn.Linear(24, 3)).bfloat16(),
             torch.randn(60, 2, 8), torch.arange(60) % 3),
    lambda: (nn.Sequential(nn.Linear(16, 1)), *split_of(classes=1)),
])
def test_models_of_all_kinds_are_pruned_trained_and_resumed(make, tmp_path):
    model, images, labels = make()
    data = evoprune.Data((images, labels), (images, labels), (images, labels))
    front = prune(model, data, out=str(tmp_path / "run"), finetune_epochs=1, front=3, **small())
    for point in front:
        assert evoprune.accuracy(point.model(), data.search) == point.accuracy
    before = results(tmp_path / "run")
    (tmp_path / "run" / "done.json").unlink()
    prune(model, data, resume=tmp_path / "run")
    assert results(tmp_path / "run") == before


@pytest.mark.parametrize(("data", "said"), [
    (None, "data: found NoneType, expected"), ({"a": 1}, "data: found dict, expected"), (("a", "b"), "data: images and labels"),
    ((np.array([None, "x"], object), np.arange(2)), "data: images and labels cannot be read as tensors"),
    ((torch.randn(4, 16), np.array(["cat", "dog"] * 2)), "data: images and labels cannot be read as tensors: TypeError: found "
                                                         "'cat', expected numbers"),
    (((torch.randn(4, 8), torch.randn(4, 8)), torch.arange(3)), "data: found labels of shape (3,) for 4 images, expected"),
    ((torch.randn(4, 8), torch.randn(4, 8), torch.arange(4)), "data: found a tuple of 3, expected (inputs, labels)"),
    (torch.randn(4, 16), "data: found Tensor, expected (images, labels)"),
    ((torch.randn(4, 16), None), "data: images and labels cannot be read"),
    ([(torch.randn(16), 0.5), (torch.randn(16), 1)], "data: search: found labels of type torch.float32, expected"),
    (iter([1]), "data: found list_iterator, expected"),
])
def test_data_that_cannot_be_read_is_one_line(data, said, tmp_path):
    with pytest.raises(EvopruneError) as error:
        prune(nn.Linear(16, 3), data, out=str(tmp_path / "run"), **small())
    assert str(error.value).startswith(said) and "\n" not in str(error.value) and not (tmp_path / "run").exists()


@pytest.mark.parametrize("labels", [np.arange(60, dtype=t) % 3 for t in ("u2", ">i4", "i1", "u8")])
def test_labels_of_every_whole_type_are_taken(labels, tmp_path):
    assert len(prune(nn.Linear(16, 3), (split_of()[0], labels), out=tmp_path / "run", **small(seed=np.int64(1))))


def test_two_samples_in_a_list_are_a_dataset(tmp_path):
    front = prune(nn.Linear(16, 3), [(torch.randn(16), 0), (torch.randn(16), 1)], out=tmp_path / "run", **small())
    assert front.record.splits == {"train": 0, "search": 1, "test": 1}


@pytest.mark.parametrize(("model", "said"), [
    (None, "model: found None, expected an nn.Module"), (nn.Linear, "model: found <class"),
    (nn.LazyLinear(3), "model: weight has no values yet"), (nn.Linear(16, 3, device="meta"), "model: weight has no values yet"),
])
def test_things_that_are_no_model_are_one_line(model, said, tmp_path):
    with pytest.raises(EvopruneError) as error:
        prune(model, split_of(), out=tmp_path / "run", **small())
    assert str(error.value).startswith(said) and not (tmp_path / "run").exists()


def test_a_compiled_model_is_pruned_as_what_was_compiled(tmp_path):
    net, fronts = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3)), []
    for name, model in (("plain", net), ("compiled", torch.compile(net, backend="eager"))):
        fronts.append(prune(model, split_of(), out=tmp_path / name, **small()))
    plain, compiled = ((front.path / "front.csv").read_bytes() for front in fronts)
    assert plain == compiled and not isinstance(fronts[1][0].model(), type(torch.compile(net, backend="eager")))


def test_a_model_of_torchscript_is_one_line(tmp_path):
    with warnings.catch_warnings(action="ignore"):
        model = torch.jit.trace(nn.Linear(16, 3), torch.zeros(1, 16))
    with pytest.raises(EvopruneError) as error:
        prune(model, split_of(), out=tmp_path / "run", **small())
    assert str(error.value) == "model: found TopLevelTracedModule of TorchScript, expected the module that it was made of"


def test_users_code_that_fails_is_one_line_with_its_place(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text("import sys\ndef f():\n    return 1 / 0\ndef g():\n    sys.exit(3)\ndef h(x): ...\n")
    for spec, said in (("mine.py:f", "model: mine.py:f: division by zero (mine.py, line 3)"),
                       ("mine.py:g", "model: mine.py:g: SystemExit: 3 (mine.py, line 5)"),
                       ("mine.py:h", "model: mine.py:h: h() missing 1 required positional argument"),
                       (":f", "model: found ':f', expected package.module:function"),
                       (".a:f", "model: found '.a:f', expected package.module:function")):
        assert main(["--model", spec, "--out", "run"]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"evoprune: {said}") and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("arguments", "said"), [
    (["--population", "x"], "argument --population: invalid int value: 'x'; see --help"),
    (["--nope"], "unrecognized arguments: --nope; see --help"),
])
def test_wrong_flags_are_one_line(arguments, said, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2 and capsys.readouterr().err == f"evoprune: {said}\n"


@pytest.mark.parametrize(("arguments", "said"), [
    (["--seed", "99999999999999999999"], "seed: found 99999999999999999999, expected 0 to 4294967295"),
    (["--threads", "100000"], "threads: found 100000, expected 1 to 1024"),
    (["--population", "1000000000000"], "population: found 1000000000000, expected 4 to 1000000"),
    (["--data", "npz:"], "data: found 'npz:', expected npz:PATH"),
    (["--data", "npz:cut.npz"], "data: cut.npz: "), (["--data", "npz:one.npy"], "data: one.npy: "),
    (["--weights", "numbers.pt"], "weights: numbers.pt: found dict of other things"),
    (["--out", "mine.txt/run"], "mine.txt/run/checkpoint: Not a directory, expected a folder that can be written"),
    (["--out", "dangling/run"], "dangling/run: cannot be made in dangling: File exists; choose another --out"),
    (["--model", "nowhere.py:net"], "model: nowhere.py: no such file, expected FILE.py:function"),
    (["--out", "x" * 300], "xxx"), (["--out", "a\0b"], "out: found a NUL character, expected none"),
    (["--resume", "damaged"], "damaged/config.json: "),
    (["--resume", "whole", "--out", "elsewhere"], "out: found 'elsewhere' together with --resume whole"),
])
def test_more_bad_input_is_one_line(arguments, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.txt").write_text("mine")
    (tmp_path / "dangling").symlink_to("nothing")
    np.savez(tmp_path / "cut.npz", x_train=np.zeros(1000))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "cut.npz").read_bytes()[:500])
    assert not zipfile.is_zipfile(tmp_path / "cut.npz")
    np.save(tmp_path / "one.npy", np.zeros(3))
    torch.save({1: torch.zeros(1)}, tmp_path / "numbers.pt")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "config.json").write_text('{"settings": {}}')
    (tmp_path / "whole").mkdir()
    shutil.copy(ROOT / "results" / "lenet5_mnist" / "config.json", tmp_path / "whole")
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"evoprune: {said}") and error.count("\n") == 1


@pytest.mark.parametrize("left", ["config.json.part", "dense.safetensors"])
def test_what_an_interrupted_start_leaves_can_be_started_again(left, lenet, digits, tmp_path):
    out = tmp_path / "run"
    (out / "checkpoint").mkdir(parents=True)
    (out / "checkpoint" / "lock").touch()
    (out / left).write_text("x")
    assert prune(lenet, digits, out=out, **small()).finished
    assert not (out / "config.json.part").exists()


def test_damaged_results_are_one_line(lenet, digits, tmp_path):
    out = tmp_path / "run"
    prune(lenet, digits, out=out, **small())
    (out / "front.csv").write_text("id,accuracy\nx,y\n")
    with pytest.raises(EvopruneError, match=r"run/front\.csv: damaged or changed since the run wrote it \(its SHA-256 is not"):
        evoprune.load_front(out)
    (out / "done.json").unlink()
    with pytest.raises(EvopruneError, match=r"run/front\.csv: damaged \(ValueError: no column sparsity\)"):
        evoprune.load_front(out)
    (out / "config.json").write_text("[]")
    with pytest.raises(EvopruneError, match=r"run/config\.json: found \[\], expected object"):
        evoprune.load_front(out)


def test_a_run_of_a_model_handed_in_says_so_when_resumed_by_name(lenet, digits, tmp_path):
    prune(lenet, digits, out=tmp_path / "run", max_seconds=0.0, **small())
    with pytest.raises(EvopruneError, match=r"model: the run in .* was started with one handed in \(LeNet\); resume with"):
        prune(resume=tmp_path / "run")


def test_a_reader_that_goes_away_does_not_end_the_run(tmp_path, weights_file):
    command = f"{sys.executable} -m evoprune.main --weights {weights_file} --population 4 --generations 2 --out run | head -1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "" and (tmp_path / "run" / "done.json").exists()


def test_an_engine_that_is_not_installed_leaves_no_folder(lenet, digits, tmp_path, monkeypatch):
    monkeypatch.setattr("evoprune.engines.engine.find_spec", lambda name: None)
    with pytest.raises(EvopruneError, match=r"^engine: dask is not installed; pip install 'evoprune\[dask\]'$"):
        prune(lenet, digits, out=tmp_path / "run", engine="dask", **small())
    assert not (tmp_path / "run").exists()
