import json
import shutil

import pytest
from conftest import ROOT

import evoprune
from evoprune import EvopruneError
from evoprune.results.record import read_record
from evoprune.results.written import CONFIG

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
    ({"search_batch_size": -1}, "search_batch_size: found -1, expected at least 1"),
    ({"search_batch_size": 0}, "search_batch_size: found 0, expected at least 1"),
    ({"search_batch_size": "x"}, "search_batch_size: found 'x', expected int or null"),
    ({"batch_size": None}, "batch_size: found None, expected int"),
    ({"threads": True}, "threads: found True, expected int"),
    ({"weights": 0.5}, "weights: found 0.5, expected int"),
    ({"rebuildable": 1}, "rebuildable: found 1, expected bool"),
    ({"splits": []}, "splits: found [], expected object"),
    ({"splits": {}}, "splits: found {}, expected how many images train, search and test have"),
    ({"splits": {"search": 9, "test": "x"}}, "splits: found {'search': 9, 'test': 'x'}, expected how many images train, search "
                                             "and test have"),
    ({"mean": ["a"]}, "mean[0]: found 'a', expected float"),
    ({"device": None}, "device: found None, expected str"),
    ({"dense": {"accuracy": 1.0}}, "dense.test_accuracy is missing, expected what the run wrote"),
    ({"dense": {"accuracy": "x", "test_accuracy": 1, "test_low": 1, "test_high": 1}},
     "dense.accuracy: found 'x', expected float"),
    ({"layout": [{"name": "a"}]}, "layout[0].shape is missing, expected what the run wrote"),
    ({"layout": [{"name": "a", "shape": [2, 3], "unit": "row"}]}, "layer a: found unit 'row', expected weight or filter"),
    ({"layout": [{"name": "a", "shape": [2, 3], "output": 2}]}, "layer a: found output 2, expected a dimension of (2, 3)"),
    ({"objectives": []}, "objectives: found none, expected accuracy, sparsity as the run wrote them"),
    ({"layout": [{"name": "a", "shape": "ab"}]}, "layout[0].shape: found 'ab', expected list"),
    ({"settings": {"colour": 7}}, "settings: Config.__init__() got an unexpected keyword argument 'colour'; expected what the "
                                  "run wrote"),
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
    assert str(error.value) == f"{tmp_path / CONFIG}: outputs is missing, expected what the run wrote"
