"""What a run wrote is read back as it was written or not at all, and none of its code is run."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import hashes
from test_robustness import Tokens

import evoprune
from evoprune import EvopruneError, load_front, prune
from evoprune.masks.genome import kept_genes
from evoprune.results.written import DONE, FILES, MODELS, SECONDS, Stopwatch, free_file

SMALL = {"population": 4, "generations": 2, "threads": 1}


@pytest.fixture(scope="module")
def plain(lenet, digits, tmp_path_factory):
    """A finished run without training: its models are dense values and masks."""
    out = tmp_path_factory.mktemp("plain") / "run"
    prune(lenet, digits, out=str(out), **SMALL)
    return out


@pytest.mark.parametrize(("name", "line"), [
    (None, "export: found None, expected the name of a file that ends in .pt, .onnx"),
    (3, "export: found 3, expected the name of a file that ends in .pt, .onnx"),
    ("a\0.pt", "export: found 'a\\x00.pt', expected the name of a file that ends in .pt, .onnx"),
    ("a.foo", "export: found 'a.foo', expected a name that ends in .pt, .onnx"),
    (f"{'a' * 300}.pt", f"{'a' * 300}.pt: File name too long; expected another name"),
    ("link.pt", "link.pt: is there already; expected another name, or overwrite=True for a file"),
    ("folder.pt", "folder.pt: is there already; expected another name, or overwrite=True for a file"),
    ("none/a.pt", "none/a.pt: no folder none, expected one that is there")])
def test_a_file_that_cannot_be_is_one_line(name, line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link.pt").symlink_to("nowhere/x.pt")
    (tmp_path / "folder.pt").mkdir()
    with pytest.raises(EvopruneError) as error:
        free_file("export", name, (".pt", ".onnx"), False)
    assert str(error.value) == line
    assert free_file("export", "A.PT", (".pt",), False).name == "A.PT" and free_file("out", "link.pt", (".pt",), True)


@pytest.fixture
def copied(plain, tmp_path):
    shutil.copytree(plain, tmp_path / "run")
    return tmp_path / "run"


def without_hashes(out):
    """As an older evoprune left it."""
    done = json.loads((out / DONE).read_text())
    del done["files"]
    (out / DONE).write_text(json.dumps(done))


def use(out, model):
    """All that can be had of a front."""
    front = load_front(out, model)
    str(front)
    for point in (front.best(accuracy=0.0), front.knee(), *front):
        point.masks()
        point.model()


def test_done_json_has_a_hash_of_every_file(run_folder):
    files = json.loads((run_folder / DONE).read_text())["files"]
    there = hashes(run_folder)
    assert files == {name: there[name] for name in there if name != DONE and not name.startswith("checkpoint/")}
    assert {name.split("/")[0] for name in files} == {*FILES} - {DONE, "dominated.csv"} | (
        {"dominated.csv"} if (run_folder / "dominated.csv").exists() else set()) and MODELS in FILES


def test_a_run_that_was_stopped_counts_the_seconds_of_all_its_parts(lenet, digits, tmp_path, monkeypatch):
    def interrupt(row):
        there.append(file.exists())
        if row["generation"] == generation:
            raise KeyboardInterrupt

    out = tmp_path / "run"
    file, there, generation = out / "checkpoint" / SECONDS, [], 0
    with pytest.raises(KeyboardInterrupt):
        prune(lenet, digits, out=str(out), on_generation=interrupt, **SMALL)
    assert 0 < float(file.read_text()) < 1000
    file.unlink()
    monkeypatch.setattr("evoprune.results.written.NOTE_EVERY", 0.0)  # for whoever kills it
    generation = 1
    with pytest.raises(KeyboardInterrupt):
        prune(lenet, digits, resume=out, on_generation=interrupt)
    assert there == [False, False, True]
    file.write_text("1000\n")
    prune(lenet, digits, resume=out)
    whole = json.loads((out / DONE).read_text())["seconds"]
    assert 1000 < whole <= float(file.read_text()) < 2000
    prune(lenet, digits, resume=out, finetune_epochs=1)  # more of a finished run
    assert whole < json.loads((out / DONE).read_text())["seconds"] < 2000
    prune(lenet, digits, out=str(out), overwrite=True, **SMALL)
    assert json.loads((out / DONE).read_text())["seconds"] < 1000


@pytest.mark.parametrize(("text", "earlier"), [("12.5", 12.5), ("", 0), ("x", 0), ("nan", 0), ("inf", 0), ("-1", 0), (None, 0)])
def test_a_stopwatch_goes_on_from_what_it_can_read(text, earlier, tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("evoprune.results.written.monotonic", lambda: now[0])
    (tmp_path / "checkpoint").mkdir()
    file = tmp_path / "checkpoint" / SECONDS
    if text is not None:
        file.write_text(text)
    watch, new = Stopwatch(tmp_path, True), Stopwatch(tmp_path, False)
    now[0] += 59
    assert watch.seconds == earlier + 59 and new.seconds == 59
    watch.note(60)
    assert not file.exists() if text is None else file.read_text() == text
    now[0] += 1
    watch.note(60)
    assert float(file.read_text()) == earlier + 60 == Stopwatch(tmp_path, True).seconds
    now[0] += 1
    watch.note()
    assert float(file.read_text()) == earlier + 61


@pytest.mark.parametrize("name", ["config.json", "front.csv", "layers.csv", "masks.npz", "dense.safetensors"])
@pytest.mark.parametrize("place", [0.0, 0.5, 0.999])
def test_a_flipped_bit_anywhere_is_one_line(name, place, copied, lenet):
    path = copied / name
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 1
    path.write_bytes(content)
    with pytest.raises(EvopruneError) as error:
        use(copied, lenet)
    assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)
    if name != "config.json":  # which is read before its hash is known
        assert "damaged or changed since the run wrote it (its SHA-256 is not that in done.json)" in str(error.value)


@pytest.mark.parametrize("name", ["config.json", "front.csv", "layers.csv", "masks.npz", "dense.safetensors"])
@pytest.mark.parametrize("content", [None, b"", b"garbage", b"[]", b"5", b"null", b"\x80\x04N.", b"[" * 100_000])
@pytest.mark.parametrize("hashed", [True, False])
def test_a_file_that_is_missing_or_garbage_is_one_line(name, content, hashed, copied, lenet):
    if not hashed:
        without_hashes(copied)
    path = copied / name
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(EvopruneError) as error:
        use(copied, lenet)
    assert str(error.value).startswith(str(copied)) and "\n" not in str(error.value)


@pytest.mark.parametrize("content", ["[]", "5", "null", "{}", '{"generations": "2"}', '{"generations": 2, "files": []}', "{", ""])
def test_a_damaged_done_json_is_one_line(content, copied, lenet, digits):
    (copied / DONE).write_text(content)
    for read in (lambda: load_front(copied), lambda: prune(lenet, digits, resume=copied)):
        with pytest.raises(EvopruneError) as error:
            read()
        assert str(error.value).startswith(f"{copied}/done.json: ") and "\n" not in str(error.value)


@pytest.mark.parametrize("damage", [
    lambda bits: ~bits, lambda bits: bits[:-1], lambda bits: bits[:0], lambda bits: np.append(bits, np.uint8(0)),
    lambda bits: bits[None], lambda bits: bits.astype(np.int64), lambda bits: bits.astype(float), lambda bits: bits ^ 1,
])
def test_a_mask_that_layers_csv_does_not_count_is_refused(damage, copied, lenet):
    """Without hashes, as in a run that has not finished."""
    (copied / DONE).unlink()
    front = load_front(copied, lenet)
    with np.load(copied / "masks.npz") as file:
        arrays = dict(file)
    name = next(name for name, bits in arrays.items() if name.startswith("001/") and 2 * kept_genes(bits) != 8 * bits.size)
    arrays[name] = damage(arrays[name])
    np.savez(copied / "masks.npz", **arrays)
    front["000"].masks()
    with pytest.raises(EvopruneError, match=rf"masks\.npz: damaged \({name} is not the mask that layers\.csv counts\)"):
        front["001"].model()


def test_a_model_that_training_left_is_not_replaced_by_the_dense_one(run_folder, lenet, tmp_path):
    shutil.copytree(run_folder, tmp_path / "run")
    point = next(p for p in load_front(tmp_path / "run", lenet) if p.kept < p.weights)
    (tmp_path / "run" / MODELS / f"{point.id}.safetensors").unlink()
    for change in (lambda out: None, without_hashes):
        change(tmp_path / "run")
        with pytest.raises(EvopruneError, match=rf"models/{point.id}\.safetensors: "):
            load_front(tmp_path / "run", lenet)[point.id].model()


def test_an_older_run_loads_with_one_line_that_it_cannot_be_checked(copied, lenet, caplog):
    without_hashes(copied)
    record = json.loads((copied / "config.json").read_text())
    del record["aliases"], record["toolbox"], record["versions"]["commit"]
    (copied / "config.json").write_text(json.dumps(record))
    use(copied, lenet)
    said = f"{copied}: written by an older evoprune, without hashes: nothing in it can be checked"
    assert [r.message for r in caplog.records] == [said]


@pytest.mark.parametrize(("column", "value"), [("id", "../../secret"), ("id", "000"), ("origin", "\x1b[2J"), ("kept", "-1"),
                                               ("accuracy", "nan"), ("sparsity", "inf"), ("weights", "5"), ("kept", "")])
def test_points_that_no_run_wrote_are_refused(column, value, copied):
    (copied / DONE).unlink()
    head, first, second, *rest = (copied / "front.csv").read_text().splitlines()
    cells = second.split(",")
    cells[head.split(",").index(column)] = value
    (copied / "front.csv").write_text("\n".join([head, first, ",".join(cells), *rest]) + "\n")
    with pytest.raises(EvopruneError, match=r"front\.csv: damaged \(") as error:
        load_front(copied)
    assert str(error.value).isprintable()


@pytest.mark.parametrize(("entry", "value"), [("search_batch_size", -1), ("search_batch_size", 0), ("search_batch_size", None),
                                              ("search_batch_size", "x"), ("batch_size", 0), ("threads", 0), ("command", 5),
                                              ("layout", []), ("aliases", [[1]]), ("rebuildable", "yes")])
def test_each_entry_of_config_json_is_checked_when_it_is_read(entry, value, copied, lenet, digits):
    record = json.loads((copied / "config.json").read_text())
    (copied / DONE).unlink()
    (copied / "config.json").write_text(json.dumps({**record, entry: value}))
    for read in (lambda: load_front(copied), lambda: prune(lenet, digits, resume=copied)):
        with pytest.raises(EvopruneError, match=rf"config\.json: {entry}(\[0\])*: found "):
            read()


def test_another_batch_size_of_the_search_is_another_run(copied, lenet, digits):
    record = json.loads((copied / "config.json").read_text())
    (copied / DONE).unlink()
    (copied / "config.json").write_text(json.dumps({**record, "search_batch_size": record["search_batch_size"] // 2}))
    with pytest.raises(EvopruneError, match="belongs to another run"):
        prune(lenet, digits, resume=copied)


@pytest.fixture
def received(tmp_path, monkeypatch):
    """A finished run of a model with tied weights and of data that a file's functions make, and what they leave when called."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "theirs.py").write_text("""
from pathlib import Path
import torch
from test_robustness import Tokens
def model():
    Path("called").touch()
    torch.manual_seed(0)
    return Tokens()
def data():
    Path("called").touch()
    torch.manual_seed(1)
    return torch.randint(20, (60, 5)), torch.arange(60) % 20
""")
    prune("theirs.py:model", "theirs.py:data", include="embed", out="run", **SMALL)
    (tmp_path / "called").unlink()
    return tmp_path


def test_looking_choosing_and_exporting_run_no_code_of_a_folder(received, caplog):
    front = load_front("run")
    str(front)
    for point in (front.best(accuracy=0.0), front.knee(), front[-1]):
        state = point.state_dict()
        assert torch.equal(state["embed.weight"], state["head.weight"])
        assert not state["head.weight"][~point.masks()["embed.weight"]].any()
    assert prune(resume="run").finished and evoprune.main.main(["--resume", "run"]) == 0
    assert load_front("run", Tokens())[0].model() and not (received / "called").exists()
    caplog.clear()
    front[0].model()
    assert (received / "called").exists()
    assert [r.message for r in caplog.records] == [f"building the model calls the function model of the file "
                                                   f"{received / 'theirs.py'}; load_front(dir, model=mine) calls nothing"]


def test_tied_weights_of_an_older_run_are_found_in_the_model(received):
    record = json.loads((received / "run" / "config.json").read_text())
    assert record["aliases"] == [["embed.weight", "head.weight"]]
    expected = [point.state_dict() for point in load_front("run")]
    (received / "run" / DONE).unlink()
    (received / "run" / "config.json").write_text(json.dumps({**record, "aliases": None}))
    for point, state in zip(load_front("run", Tokens()), expected):
        assert all(torch.equal(value, state[name]) for name, value in point.state_dict().items())
    with pytest.raises(EvopruneError, match="run: does not say which weights are tied, and finding out would call .*theirs.py"):
        load_front("run")[0].state_dict()
    assert not (received / "called").exists()


@pytest.mark.parametrize(("call", "said"), [
    (lambda out: load_front(None), "load_front: found NoneType, expected the folder of a run"),
    (lambda out: load_front(out, "lenet"), "load_front: found 'lenet' for a model, expected an nn.Module"),
    (lambda out: load_front(out, torch.nn.Linear(3, 3))[0].model(), r"weights: .*run, point 000: .* is missing|has no"),
    (lambda out: load_front(out).best(accuracy="a"), "best: found accuracy='a', expected a number from 0 to 1"),
    (lambda out: load_front(out).best(drop=float("nan")), "best: found drop=nan, expected a number from 0 to 1"),
    (lambda out: prune(resume=5), "resume: found 5, expected the folder of a run"),
])
def test_misuse_is_one_line(call, said, copied):
    with pytest.raises(EvopruneError, match=said) as error:
        call(copied)
    assert "\n" not in str(error.value)
