import errno
import signal
import zipfile

import numpy as np
import pytest
import torch
from test_generations import CONFIG, LAYOUT, Counting, digest, start

from evoprune import files
from evoprune.errors import EvopruneError
from evoprune.evolution.checkpoint import load, save
from evoprune.evolution.generations import evolve
from evoprune.files import fingerprint, write_atomic
from evoprune.objectives import USUAL
from evoprune.results.folder import Folder


@pytest.fixture
def states():
    toolbox, state = start(Counting())
    return [state, *evolve(state, toolbox, CONFIG)]


def test_a_state_comes_back_exactly_and_goes_on_the_same_way(states, tmp_path):
    save(tmp_path, states[4], "run")
    state = load(tmp_path, LAYOUT, USUAL, "run")
    assert digest(state) == digest(states[4])
    *_, last = evolve(state, start(Counting())[0], CONFIG)
    assert digest(last) == digest(states[-1])


def test_what_individuals_inherited_comes_back_and_shared_arrays_are_stored_once(states, tmp_path, rng):
    state = states[2]
    for individual in state.population + state.archive:
        individual.saliency = {}
    empty = save(tmp_path, state, "run").stat().st_size
    big = rng.random(100_000)
    for i, individual in enumerate(state.population + state.archive):
        individual.saliency = {"big": big, "own": np.full((2, i), i, np.float16)}
        individual.values = {"big": big}
        individual.strategy = np.array([i, 1, 1, np.nan, 1]) if i % 2 else None
    size = save(tmp_path, state, "run").stat().st_size
    assert size < empty + big.nbytes + 10_000
    again = load(tmp_path, LAYOUT, USUAL, "run")
    for old, new in zip(state.population + state.archive, again.population + again.archive):
        assert {k: (v.dtype, v.tolist()) for k, v in old.saliency.items()} == \
            {k: (v.dtype, v.tolist()) for k, v in new.saliency.items()}
        assert np.array_equal(old.strategy, new.strategy, equal_nan=True) if old.strategy is not None else new.strategy is None
    assert again.population[0].saliency["big"] is again.archive[0].saliency["big"] is again.archive[0].values["big"]


def test_a_checkpoint_of_another_version_is_told_from_a_damaged_one(states, tmp_path):
    path = save(tmp_path, states[1], "run")
    path.write_bytes(path.read_bytes().replace(b"checkpoint 5", b"checkpoint 4", 1))
    with pytest.raises(EvopruneError) as error:
        load(tmp_path, LAYOUT, USUAL, "run")
    assert str(error.value) == (f"{path}: written by another version of evoprune, expected 'evoprune checkpoint 5'; go on with "
                                f"that version, or start the run again with --overwrite")


def test_two_generations_are_kept(states, tmp_path):
    for state in states[:5]:
        save(tmp_path, state, "run")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["000003.npz", "000004.npz"]
    assert load(tmp_path / "empty", LAYOUT, USUAL, "run") is None


def test_any_changed_byte_or_missing_end_is_noticed(states, tmp_path, caplog, rng):
    save(tmp_path, states[1], "run")
    good = save(tmp_path, states[2], "run").read_bytes()
    newest = tmp_path / "000002.npz"
    for position in [0, 22, 40, 60, len(good) - 1, *rng.integers(len(good), size=20)]:
        newest.write_bytes(good[:position] + bytes([good[position] ^ 1]) + good[position + 1:])
        assert load(tmp_path, LAYOUT, USUAL, "run").generation == 1
    for length in (0, 10, 60, len(good) - 1):
        newest.write_bytes(good[:length])
        assert load(tmp_path, LAYOUT, USUAL, "run").generation == 1
    assert "000002.npz: damaged, looking for an older one" in caplog.text


def test_none_whole_or_another_run_is_refused(states, tmp_path):
    save(tmp_path, states[1], "run")
    with pytest.raises(EvopruneError, match="belongs to another run"):
        load(tmp_path, LAYOUT, USUAL, "other")
    (tmp_path / "000001.npz").write_bytes(b"x")
    with pytest.raises(EvopruneError, match="1 checkpoint and none whole, expected one"):
        load(tmp_path, LAYOUT, USUAL, "run")


def test_a_failed_write_leaves_the_old_file_and_no_part(tmp_path, monkeypatch):
    write_atomic(tmp_path / "a", "old")

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError) as error:
        write_atomic(tmp_path / "a", "new")
    assert error.value.filename == str(tmp_path / "a")
    assert [p.name for p in tmp_path.iterdir()] == ["a"] and (tmp_path / "a").read_text() == "old"


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_the_middle_of_a_write_waits_for_its_end(sent, states, tmp_path, monkeypatch):
    class Stop(Exception):
        """What the handler raises."""

    def stop(number, frame):
        raise Stop

    def compressor(*args):
        signal.raise_signal(sent)
        written.append(args)
        return real(*args)

    real, written = zipfile._get_compressor, []
    monkeypatch.setattr(zipfile, "_get_compressor", compressor)
    before = signal.signal(sent, stop)
    try:
        with pytest.raises(Stop):
            save(tmp_path, states[0], "run")
        assert len(written) > 1 and not list(tmp_path.iterdir()) and signal.getsignal(sent) is stop
    finally:
        signal.signal(sent, before)


def test_a_folder_is_one_runs_own(tmp_path):
    with Folder(tmp_path / "run") as folder:
        folder.write("config.json", "{}")
        with pytest.raises(EvopruneError, match="in use by another process"), Folder(tmp_path / "run", resume=True):
            pass
    with pytest.raises(EvopruneError, match=r"already holds a run; go on with --resume .*run, replace it with --overwrite"):
        Folder(tmp_path / "run")
    with Folder(tmp_path / "run", overwrite=True) as folder:
        (folder.path / "notes.txt").write_text("mine")
        folder.clear()
        assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["checkpoint", "notes.txt"]


def test_a_folder_without_a_run_is_neither_resumed_nor_filled(tmp_path):
    with pytest.raises(EvopruneError, match="no run to resume"):
        Folder(tmp_path, resume=True)
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(EvopruneError, match="holds other files and no run"):
        Folder(tmp_path, overwrite=True)
    with pytest.raises(EvopruneError, match="is a file"):
        Folder(tmp_path / "thesis.tex")


@pytest.mark.parametrize(("name", "content"), [
    ("models/teacher.pt", "x"), ("checkpoint/epoch_10.pt", "x"), ("log.csv", "x"), ("config.json", '{"model_type": "bert"}'),
    ("config.json", "no JSON")])
def test_a_users_own_files_of_names_that_a_run_has_are_not_touched(name, content, tmp_path):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(content)
    for overwrite in (False, True):
        with pytest.raises(EvopruneError, match="holds other files and no run, expected a new or an empty folder"), \
                Folder(tmp_path, overwrite=overwrite) as folder:
            folder.set_aside()
    assert (tmp_path / name).read_text() == content and not (tmp_path / "checkpoint" / "lock").exists()


def test_a_folder_in_which_nothing_was_started_leaves_no_trace(tmp_path):
    with pytest.raises(EvopruneError), Folder(tmp_path / "a" / "b"):
        raise EvopruneError("bad input")
    assert not (tmp_path / "a" / "b").exists()


def test_trained_values_are_read_back_only_when_whole_and_of_this_run(tmp_path, caplog):
    with Folder(tmp_path / "run") as folder:
        state = {"w": torch.randn(3, 4), "n": torch.tensor(5)}
        folder.write_trained("key", "run:key", state)
        again = folder.read_trained("key", "run:key")
        assert all(torch.equal(state[k], again[k]) for k in state)
        assert folder.read_trained("key", "other:key") is None
        assert folder.read_trained("nothing", "run:nothing") is None
        path = folder.checkpoint / "trained" / "key"
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
        assert folder.read_trained("key", "run:key") is None
    assert "making it again" in caplog.text


def test_fingerprints_tell_arrays_apart():
    a = np.zeros(4, np.float32)
    assert len({fingerprint(x) for x in (a, a.reshape(2, 2), a.astype(int), a + 1, [0.0] * 4)}) == 5
