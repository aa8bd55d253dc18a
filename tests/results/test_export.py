import importlib.util
import json
import logging
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import evoprune
from evoprune import files
from evoprune.errors import EvopruneError
from evoprune.files import metadata_of
from evoprune.inputs.nested import described, examples
from evoprune.results import export, reload
from evoprune.values import sparse


@pytest.fixture(scope="module")
def named(tmp_path_factory, weights_file):
    """A run of whole filters on named data, with trained points; slim models of it are smaller."""
    out = tmp_path_factory.mktemp("named") / "run"
    return evoprune.prune("lenet", "digits", weights=weights_file, out=str(out), total_epochs=8, targets="0.4,0.7", threads=1,
                          unit="filter", skip="fc2")


@pytest.fixture
def said(caplog):
    caplog.set_level(logging.INFO)
    return caplog


def facts_in(path):
    """What a file says of itself beside its values."""
    if path.suffix == ".onnx":
        import onnx

        return {each.key: each.value for each in onnx.load(path).metadata_props}
    if path.suffix == ".pt2":
        found = dict.fromkeys(("run", "point", "kept", "inputs"), "")
        torch.export.load(path, extra_files=found)
        return found
    return metadata_of(path.read_bytes())


@pytest.mark.parametrize(("name", "options"), [
    ("a.safetensors", {}), ("a.pt", {}), ("a.packed.safetensors", {}), ("a.packed.safetensors", {"bits": 16}),
    ("a.packed.safetensors", {"bits": 8}), ("a.pt2", {"slim": True}), ("a.onnx", {"slim": True}), ("a.onnx", {})])
def test_every_kind_of_file_counts_what_front_csv_states(name, options, named, said, tmp_path):
    if name.endswith(".onnx"):
        pytest.importorskip("onnxruntime"), pytest.importorskip("onnxscript")
    point = named[-1]
    path = point.export(tmp_path / name, **options)
    assert [p.name for p in tmp_path.iterdir()] == [name] and path == tmp_path / name
    line = next(m for m in said.messages if m.startswith(str(path)))
    test, low, high = (f"{100 * value:.2f}" for value in (point.test, point.test_low, point.test_high))
    if options.get("bits", 32) == 32:
        assert f"opened in a fresh process, {test} ({low}-{high}) on 359 examples, {test} in the run's front" in line
    assert f"{path.stat().st_size:,} bytes, point {point.id}, {point.kept:,} of 11,208 weights, accuracy " \
        f"{100 * point.accuracy:.2f}, sparsity {100 * point.sparsity:.2f}, test {test} ({low}-{high}) (95 %); accuracy of" in line
    taken = "images in 0..1, less a mean of 0.3053, over a standard deviation of 0.3762"
    assert said.messages[-2] == f"it takes {taken}"
    facts = {"run": named.path.name, "point": point.id, "kept": f"{point.kept} of 11208 weights", "inputs": taken}
    assert name.endswith(".pt") or facts.items() <= facts_in(path).items()
    assert re.fullmatch(r"1 at a time take [\d.]+ ms, dense [\d.]+ ms \(medians of turns, 1 thread, .+\)", said.messages[-1])
    if options.get("slim"):
        assert any(m.startswith("slim: ") and "cut out of" in m for m in said.messages)


COUNT = """
import csv, sys
from pathlib import Path
from types import SimpleNamespace
import torch
import evoprune
from evoprune.config import Config
from evoprune.inputs.models import LeNet
from evoprune.inputs.sources import load_data
from evoprune.results.reload import outputs, tensors
torch.set_num_threads(1)
test, net = load_data(Config(), most=None).test, LeNet()
for path in sorted(Path(sys.argv[1]).iterdir()):
    kind = path.name[path.name.index("."):]
    if kind in (".pt2", ".onnx"):
        right = int((outputs(kind, path, {"0": test.inputs(slice(0, len(test)))}).argmax(1) == test.labels).sum())
    else:
        net.load_state_dict(tensors(kind, path))
        right = round(evoprune.accuracy(net, test) * len(test))
    print(path.name, right)
"""


def test_every_export_of_every_point_counts_in_a_fresh_process_what_front_csv_states(weights_file, tmp_path, monkeypatch):
    """Trained and repaired points. While it is written a file is opened in this process, all of them in a new one at last."""
    monkeypatch.setattr(export, "subprocess", SimpleNamespace(run=in_this_process))
    monkeypatch.setattr(export, "timed", lambda *functions, threads: [1.0, 1.0])
    onnx = [".onnx"] if importlib.util.find_spec("onnxscript") and importlib.util.find_spec("onnxruntime") else []
    common, expected, kinds = {"weights": weights_file, "threads": 1}, {}, set()
    runs = {"trained": {"total_epochs": 3, "targets": "0.5,0.8", "population": 4, "generations": 1},
            "repaired": {"repair": "least-squares", "start": "lamp", "knowledge": "weights", "population": 4, "generations": 0}}
    (tmp_path / "files").mkdir()
    for run, settings in runs.items():
        for point in evoprune.prune("lenet", "digits", out=tmp_path / run, **common, **settings):
            kinds.add((point.repair, (point.front.path / "models" / f"{point.id}.safetensors").exists()))
            for suffix in (".safetensors", ".pt", ".packed.safetensors", ".pt2", *onnx):
                name = f"{run}-{point.id}{suffix}"
                point.export(tmp_path / "files" / name, slim=suffix in (".pt2", ".onnx"))
                expected[name] = round(point.test * 359)
    assert kinds == {("none", False), ("none", True), ("least-squares", True)} and len(expected) >= 20
    done = subprocess.run([sys.executable, "-c", COUNT, tmp_path / "files"], capture_output=True, text=True)
    assert {name: int(right) for name, right in map(str.split, done.stdout.splitlines())} == expected, done.stderr


def in_this_process(command, capture_output, text):
    *_, kind, path, given, out, place = command
    reload.reopen(kind, Path(path), Path(given), Path(out), int(place))
    return subprocess.CompletedProcess(command, 0, "", "")


def test_a_packed_file_is_read_into_a_model(named, digits, tmp_path):
    point = named[-1]
    model = evoprune.load_packed(point.export(tmp_path / "a.packed.safetensors"), point.model())
    assert evoprune.accuracy(model, digits.test) == point.test_accuracy
    assert all(torch.equal(model.state_dict()[name], value) for name, value in point.state_dict().items())
    half = point.export(tmp_path / "b.packed.safetensors", bits=8)
    assert half.stat().st_size < (tmp_path / "a.packed.safetensors").stat().st_size / 2
    said = json.loads(half.read_bytes()[8:8 + int.from_bytes(half.read_bytes()[:8], "little")])["__metadata__"]["measured"]
    rounded = evoprune.accuracy(evoprune.load_packed(half, point.model()), digits.test)
    assert said == f"{rounded} on 359 examples"


def test_a_slim_model_has_the_points_accuracy(named, digits):
    for point in named:
        small, whole = point.model(slim=True), point.model()
        assert evoprune.accuracy(small, digits.test) == point.test_accuracy
        assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in whole.parameters()) or point.sparsity < 0.3


def test_a_model_that_skips_zeros_has_the_points_accuracy(named, digits, said):
    model = named[-1].model(sparse=True, slim=True, latency_batch=2)
    assert abs(evoprune.accuracy(model, digits.test) - named[-1].test_accuracy) <= 1 / 359  # rounding may decide for an image
    assert any(message.startswith("sparse: ") for message in said.messages)


def test_layers_are_measured_at_the_runs_batch_unless_another_is_given(run_folder, lenet, said, monkeypatch):
    monkeypatch.setattr(sparse, "timed", lambda *functions: [3.0, 1.0])
    monkeypatch.setattr(sparse, "LEAST", 0.0)
    front = evoprune.load_front(run_folder, model=lenet)
    assert "latency_batch" in front.record.settings
    front.record = replace(front.record, settings={**front.record.settings, "latency_batch": 3})
    for given, batch in ((None, 3), (7, 7)):
        model = front[-1].model(sparse=True, latency_batch=given)
        assert f"at batch {batch} on" in said.messages[-1]
        assert model.sparse_layers == dict.fromkeys(("conv1", "conv2", "fc1", "fc2"), 3.0)
    with pytest.raises(EvopruneError, match="latency_batch: found 0, expected 1 to 4096"):
        front[-1].model(sparse=True, latency_batch=0)


def test_a_packed_file_is_read_into_a_model_that_skips_zeros(run_folder, lenet, digits, tmp_path, monkeypatch):
    monkeypatch.setattr(sparse, "timed", lambda *functions: [3.0, 1.0])
    point, x = evoprune.load_front(run_folder, model=lenet)[-1], digits.test.inputs(slice(0, 4))
    path = point.export(tmp_path / "a.packed.safetensors")
    model = evoprune.load_packed(path, lenet, sparse=True, inputs=x.numpy())
    assert model.sparse_layers and torch.allclose(model(x), point.model()(x), atol=1e-5)
    for options, message in (({"sparse": True}, "load_packed: found sparse=True without inputs=; give both"),
                             ({"inputs": x}, "load_packed: found inputs= without sparse=True; give both"),
                             ({"sparse": True, "inputs": x[0, 0]}, "load_packed: inputs do not go through the model: ")):
        with pytest.raises(EvopruneError, match=message):
            evoprune.load_packed(path, lenet, **options)


def test_a_model_and_data_handed_in(run_folder, lenet, digits, said, tmp_path):
    point = evoprune.load_front(run_folder, model=lenet)[1]
    point.export(tmp_path / "a.pt2")
    assert "was not counted again, for want of data: Python can hand in data= (outputs for 64 random" in said.messages[-3]
    point.export(tmp_path / "b.safetensors", data=(digits.test.images, digits.test.labels))
    assert f"{100 * point.test:.2f} (" in said.messages[-3] and ") on 359 examples" in said.messages[-3]
    alone = evoprune.load_front(run_folder)[1]
    alone.export(tmp_path / "c.pt")  # no model of it is here
    assert "was not counted again, for want of data" in said.messages[-3]
    assert said.messages[-1] == "not timed: its model is not here: load_front can be given it"
    alone.export(tmp_path / "d.pt", data=(digits.test.images, digits.test.labels))
    assert said.messages[-3].endswith("; accuracy was not counted again, for its model is not here: load_front can be given it")
    assert torch.load(tmp_path / "c.pt", weights_only=True).keys() == load_file(tmp_path / "b.safetensors").keys()


def test_a_state_dict_of_a_received_folder_runs_none_of_its_code(tmp_path, monkeypatch, digits, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text("from pathlib import Path\nfrom evoprune.inputs.models import LeNet\n"
                                     "def make():\n    Path('called').touch()\n    return LeNet()\n"
                                     "def data():\n    Path('called').touch()\n    from sklearn.datasets import load_digits\n"
                                     "    x, y = load_digits(return_X_y=True)\n"
                                     "    return x.reshape(-1, 1, 8, 8).astype('float32') / 16, y\n")
    evoprune.prune("net.py:make", "net.py:data", out="run", population=4, generations=0, threads=1, start="random")
    (tmp_path / "called").unlink()
    point = evoprune.load_front("run")[0]
    for name in ("a.safetensors", "a.pt", "a.packed.safetensors", "b.packed.safetensors"):
        point.export(name, bits=8 if name.startswith("b") else 32)
        assert "was not counted again, for want of data: Python can hand in data=" in said.messages[-2]
        assert said.messages[-1] == ("not timed: its model is not built: a function that the run's folder names would be called, "
                                     "as a .pt2 or .onnx needs it")
    assert not (tmp_path / "called").exists()
    point.export("a.pt2")
    assert (tmp_path / "called").exists() and any("calls the function make of the file" in m for m in said.messages)


def test_what_a_tasks_function_is_called_for_is_said(tmp_path, monkeypatch, lenet, digits, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "task.py").write_text("from evoprune.inputs.tasks import CLASSIFICATION as A\ndef make():\n    return A\n")
    evoprune.prune(lenet, digits, out="run", population=4, generations=0, threads=1, start="random", task="task.py:make")
    evoprune.load_front("run")[0].export("a.pt", data=(digits.test.images[:9], digits.test.labels[:9]))
    assert f"counting on data= calls the function make of the file {tmp_path / 'task.py'}; exporting without it calls nothing" \
        in said.messages


def test_a_run_that_has_not_recorded_its_inputs(run_folder, lenet, digits, tmp_path, said):
    front = evoprune.load_front(run_folder, model=lenet)
    front.record = replace(front.record, inputs=None)
    front[0].export(tmp_path / "a.pt")
    assert said.messages[-1] == "not timed: the run has not recorded what inputs are like"
    for wish in (lambda: front[0].export(tmp_path / "a.pt2"), lambda: front[0].model(slim=True)):
        with pytest.raises(EvopruneError, match="an older evoprune has not recorded what inputs are like; hand in data="):
            wish()
    front[0].export(tmp_path / "a.pt2", data=(digits.test.images, digits.test.labels))


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(3, 4)
        self.head = nn.Linear(12, 4)

    def forward(self, image, table):
        features = torch.cat([self.a(image).relu(), self.b(table)], 1)
        return {"features": features, "logits": self.head(features)}


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("kind", ["pt2", "onnx"])
def test_programs_of_several_inputs(kind, named, tmp_path, said):
    if kind == "onnx":
        pytest.importorskip("onnxruntime"), pytest.importorskip("onnxscript")
    torch.manual_seed(0)
    net, (image, table) = TwoInputs(), (torch.randn(60, 6), torch.randn(60, 3))
    inputs = {"image": image, "table": table} if named else (image, table)
    front = evoprune.prune(net, (inputs, net(image, table)["logits"].argmax(1)), out=tmp_path / "run", population=4,
                           generations=1, threads=1, start="random")
    front[0].export(tmp_path / f"a.{kind}", slim=True)
    assert "outputs for 64 random inputs differ by" in said.messages[-2]
    front[0].export(tmp_path / f"b.{kind}", data=(inputs, net(image, table)["logits"].argmax(1)))
    assert "on 60 examples" in said.messages[-2]


def test_a_file_that_is_there_stays_unless_asked(run_folder, lenet, tmp_path, monkeypatch):
    point = evoprune.load_front(run_folder, model=lenet)[0]
    (tmp_path / "a.pt").write_bytes(b"mine")
    with pytest.raises(EvopruneError, match=r"a\.pt: is there already; expected another name, or overwrite=True"):
        point.export(tmp_path / "a.pt")
    assert (tmp_path / "a.pt").read_bytes() == b"mine"
    point.export(tmp_path / "a.pt", overwrite=True)
    assert torch.load(tmp_path / "a.pt", weights_only=True)
    monkeypatch.setattr(files.os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    before = (tmp_path / "a.pt").read_bytes()
    with pytest.raises(EvopruneError, match=r"a\.pt: No space left on device; nothing is written"):
        point.export(tmp_path / "a.pt", overwrite=True)
    assert (tmp_path / "a.pt").read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["a.pt"]


@pytest.mark.parametrize(("name", "options", "said"), [
    ("a.bin", {}, "export: found 'a.bin', expected a name that ends in .packed.safetensors, .safetensors, .pt, .pt2, .onnx"),
    ("a.pt", {"bits": 8}, "export: found bits=8, expected 32, or in .packed.safetensors 16 or 8"),
    ("a.packed.safetensors", {"bits": 4}, "export: found bits=4, expected 32"),
    ("a.safetensors", {"slim": True}, "export: a state dict (.safetensors) has the shapes of your model; a slim one goes into"),
    ("no/a.pt", {}, "no folder"), (".pt/", {}, "is there already"), ("a.pt", {"data": 5}, "data: found")])
def test_what_cannot_be_is_one_line(name, options, said, run_folder, lenet, tmp_path):
    (tmp_path / ".pt").mkdir()
    point = evoprune.load_front(run_folder, model=lenet)[0]
    with pytest.raises(EvopruneError) as error:
        point.export(tmp_path / name, **options)
    assert said in str(error.value) and "\n" not in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == [".pt"]


@pytest.mark.parametrize("kind", [".packed.safetensors", ".pt2"])
def test_a_file_with_other_values_is_refused_and_nothing_is_left(kind, run_folder, lenet, tmp_path, monkeypatch):
    point = evoprune.load_front(run_folder, model=lenet)[0]
    real_pack, real_program = export.pack, export.write_program

    def other_values(state, bits):
        return real_pack({name: value + 1 if value.dim() > 1 else value for name, value in state.items()}, bits)

    def other_program(kind, model, inputs, path, facts):
        with torch.no_grad():
            next(model.parameters()).add_(1)
        real_program(kind, model, inputs, path, facts)
        with torch.no_grad():
            next(model.parameters()).sub_(1)

    monkeypatch.setattr(export, "write_program", other_program)
    if kind == ".pt2":
        with pytest.raises(EvopruneError, match="gives other outputs than the model"):
            point.export(tmp_path / f"a{kind}")
    else:
        entries, metadata = other_values(point.state_dict(), 32)
        monkeypatch.setattr(export, "save", lambda e, m, calls=[]: (calls.append(1), (
            real_save(e, m) if len(calls) == 1 else real_save(entries, metadata)))[1])
        with pytest.raises(EvopruneError, match="has other values than the point"):
            point.export(tmp_path / f"a{kind}")
    assert not list(tmp_path.iterdir())


real_save = export.save


def test_a_process_that_cannot_open_the_file_is_told(tmp_path):
    (tmp_path / "a").write_bytes(b"no file of ours")
    with pytest.raises(EvopruneError, match="expected a safetensors file"):
        reload.tensors(".packed.safetensors", tmp_path / "a")
    done = subprocess.run([sys.executable, "-m", "evoprune.results.reload", ".safetensors", tmp_path / "a", "none", "out", "0"],
                          capture_output=True, text=True)
    assert done.returncode and done.stderr.splitlines()[-1].startswith("evoprune.errors.EvopruneError: ")


@pytest.mark.parametrize(("path", "model", "said"), [
    ("none", nn.Linear(2, 2), "none: No such file or directory, expected a packed file"), ("none", 5, "load_packed: found 5")])
def test_load_packed_says_what_it_wants(path, model, said):
    with pytest.raises(EvopruneError, match=said):
        evoprune.load_packed(path, model)


@pytest.mark.parametrize("inputs", [
    torch.rand(5, 3, 4), (torch.rand(5, 2).double(), torch.randint(9, (5, 7))),
    {"x": torch.rand(5, 1), "deep": (torch.zeros(5, 2, dtype=torch.bool), torch.rand(5))}])
def test_examples_are_like_what_was_described(inputs):
    like = json.loads(json.dumps(described(inputs)))
    assert without_range(described(examples(like, 300))) == without_range(like)
    assert torch.equal(np_first(examples(like, 4)), np_first(examples(like, 4)))
    with pytest.raises(EvopruneError, match="expected what the run wrote"):
        examples({"type": "system", "shape": "a", "largest": None}, 3)


def without_range(like):
    return re.sub(r", 'range': [^]]*]", "", str(like))


def test_examples_lie_where_the_inputs_do():
    found = examples(described(torch.tensor([[2.0], [5.0]])), 300)
    assert 2 <= found.min() < 2.1 and 4.9 < found.max() <= 5
    assert described(torch.tensor([torch.nan])).keys() == {"type", "shape", "largest"}  # nothing to draw from


def np_first(inputs):
    while not isinstance(inputs, torch.Tensor):
        inputs = next(iter(inputs.values() if isinstance(inputs, dict) else inputs))
    assert np.isfinite(inputs.double().numpy()).all()
    return inputs
