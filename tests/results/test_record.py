import json
import shutil

import pytest
from conftest import ROOT

import evoprune
from evoprune import EvopruneError
from evoprune.results.folder import CONFIG
from evoprune.results.record import read_record

OLD = ROOT / "results" / "lenet5_mnist"  # written by an earlier version


def test_a_record_is_written_as_it_was_read(run_folder):
    text = (run_folder / CONFIG).read_text()
    assert read_record(run_folder / CONFIG).to_json() == text


def test_folders_of_earlier_versions_load_look_and_choose():
    front = evoprune.load_front(OLD)
    point = front.best(accuracy=0.98)
    assert front.record.config.generations == 40 and front.record.measured.test_accuracy == 0.9886
    assert (point.id, point.sparsity > 0.97, point.repair) == (front[point.id].id, True, "none") and "99." in str(front)
    assert sum(int(mask.sum()) for mask in point.masks().values()) == point.kept


@pytest.mark.parametrize(("changes", "said"), [
    ({"search_batch_size": -1}, "search_batch_size: found -1, expected int or null of at least 1, as the run wrote it"),
    ({"search_batch_size": 0}, "search_batch_size: found 0, expected int or null of at least 1, as the run wrote it"),
    ({"batch_size": "x"}, "batch_size: found 'x', expected int of at least 1, as the run wrote it"),
    ({"threads": True}, "threads: found True, expected int of at least 1, as the run wrote it"),
    ({"threads": None}, "threads: found None, expected int of at least 1, as the run wrote it"),
    ({"weights": 0.5}, "weights: found 0.5, expected int of at least 1, as the run wrote it"),
    ({"rebuildable": 1}, "rebuildable: found 1, expected bool, as the run wrote it"),
    ({"splits": []}, "splits: found [], expected dict, as the run wrote it"),
    ({"device": None}, "device: found None, expected str, as the run wrote it"),
    ({"dense": {"accuracy": 1.0}}, "Dense.__init__() missing 3 required positional arguments: 'test_accuracy', 'test_low', and "
                                   "'test_high'; expected what the run wrote"),
    ({"layout": [{"name": "a"}]}, "KeyError: 'shape'; expected what the run wrote"),
    ({"settings": {"population": 7}}, "population: found 7, expected an even number of at least 4; try 8")])
def test_a_damaged_entry_is_named_whoever_reads_it(changes, said, tmp_path):
    content = json.loads((OLD / CONFIG).read_text()) | changes
    shutil.copytree(OLD, tmp_path / "run")
    (tmp_path / "run" / CONFIG).write_text(json.dumps(content))
    for use in (lambda: evoprune.load_front(tmp_path / "run"), lambda: evoprune.prune(resume=tmp_path / "run")):
        with pytest.raises(EvopruneError) as error:
            use()
        assert str(error.value) == f"{tmp_path / 'run' / CONFIG}: {said}"


def test_a_missing_entry_is_named(tmp_path):
    content = json.loads((OLD / CONFIG).read_text())
    del content["outputs"]
    (tmp_path / CONFIG).write_text(json.dumps(content))
    with pytest.raises(EvopruneError) as error:
        read_record(tmp_path / CONFIG)
    assert str(error.value) == f"{tmp_path / CONFIG}: outputs is missing; expected what the run wrote"
