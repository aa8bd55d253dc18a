import csv
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from evoprune import EvopruneError, accuracy, load_front
from evoprune.inputs.tasks import wilson
from evoprune.objectives import USUAL
from evoprune.results.points import thin


@pytest.fixture
def front(run_folder, lenet):
    return load_front(run_folder, lenet)


def test_a_model_has_exactly_the_accuracy_and_the_zeros_that_are_stated(front, digits):
    assert len(front) >= 2
    for point in front:
        model = point.model()
        batch = front.record.batch_size
        assert accuracy(model, digits.search, batch) == point.accuracy
        assert accuracy(model, digits.test) == point.test_accuracy
        parameters = dict(model.named_parameters())
        kept = sum(int(mask.sum()) for mask in point.masks().values())
        assert kept == point.kept and 1 - kept / point.weights == pytest.approx(point.sparsity, abs=1e-12)
        for name, mask in point.masks().items():
            assert not parameters[name][~mask].any()


def test_the_models_are_new_ones_each_time(front, lenet):
    a, b = front[0].model(), front[0].model()
    a.fc1.weight.data.zero_()
    assert b.fc1.weight.any() and lenet.fc1.weight.any() and not b.training


def test_best_chooses_by_wish(front):
    sparse = max(front, key=lambda p: p.sparsity)
    assert front.best(accuracy=0.0) is sparse and front.best(sparsity=0.0).accuracy == max(p.accuracy for p in front)
    wish = sorted(p.accuracy for p in front)[-2]
    assert front.best(accuracy=wish).accuracy >= wish
    assert all(p.sparsity <= front.best(accuracy=wish).sparsity for p in front if p.accuracy >= wish)
    with pytest.raises(EvopruneError, match=r"no point has accuracy >= 0\.9999; the front reaches accuracy 0\.\d{4}$"):
        front.best(accuracy=0.9999)


@pytest.mark.parametrize("drop", [0.0, 0.02, 0.1, 1.0])
def test_best_within_a_drop_is_the_sparsest_that_loses_no_more(drop, front):
    dense = front.record.measured.accuracy
    fits = [p for p in front if dense - p.accuracy <= drop + 1e-12]
    assert front.best(drop=drop) is max(fits, key=lambda p: p.sparsity)
    assert front.best(drop=1.0, accuracy=front[0].accuracy) is front[0]


def test_the_knee_is_the_point_farthest_from_the_line_between_the_ends(front):
    x, y = (np.array([getattr(p, name) for p in front]) for name in ("sparsity", "accuracy"))
    x, y = (x - x.min()) / np.ptp(x), (y - y.min()) / np.ptp(y)
    ends = np.array([x[-1] - x[0], y[-1] - y[0]])
    distance = (ends[0] * (y - y[0]) - ends[1] * (x - x[0])) / np.linalg.norm(ends)  # above the line: positive
    assert front.knee() is front[int(distance.argmax())]
    assert USUAL.knee(np.array([(0.9, 0.1), (0.8, 0.6), (0.2, 0.9)])) == 1 and USUAL.knee(np.array([(0.5, 0.5)])) == 0
    assert USUAL.knee(np.array([(1.0, 0.0), (0.5, 0.5), (0.0, 1.0)])) == 2  # of equally far ones the last


def test_an_empty_front_says_that_there_is_nothing_to_choose_from(run_folder, tmp_path):
    shutil.copytree(run_folder, tmp_path / "run")
    table = tmp_path / "run" / "front.csv"
    table.write_text(table.read_text().splitlines()[0] + "\n")
    (tmp_path / "run" / "done.json").unlink()
    front = load_front(tmp_path / "run")
    for choose in (front.knee, front.best, lambda: front.best(accuracy=0.5)):
        with pytest.raises(EvopruneError) as error:
            choose()
        assert str(error.value) == f"front: {tmp_path / 'run'} has no point; lower the accuracy floor, or search longer"


def test_points_are_found_by_id_and_place(front):
    assert front["000"] is front[0] and front[-1] in front
    with pytest.raises(KeyError, match="no point '.*', expected one of 000"):
        front["nothing"]


def test_the_printed_table_has_every_point_and_the_dense_model(front):
    head, dense, *rows = str(front).splitlines()
    assert head.split()[0] == "id" and "test accuracy (95 %)" in head
    assert dense.split()[:3] == ["dense", f"{100 * front.record.measured.accuracy:.2f}", "0.00"]
    shown = [p for p in front if p.score > front.record.chance]
    if len(shown) < len(front):
        assert rows.pop() == f"{len(front) - len(shown)} no better than one answer for all (11.50 %) left out"
    assert [row.split()[:4] for row in rows] == [
        [p.id, f"{100 * p.accuracy:.2f}", f"{100 * p.sparsity:.2f}", f"{p.kept:,}"] for p in shown]


def test_the_front_has_no_dominated_point_and_is_sorted(front):
    sparsity, share = ([getattr(p, k) for p in front] for k in ("sparsity", "accuracy"))
    assert sparsity == sorted(sparsity) and share == sorted(share, reverse=True) and len(set(share)) == len(share)


def test_layers_csv_adds_up_to_front_csv(front, run_folder):
    with open(run_folder / "layers.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for point in front:
        mine = [row for row in rows if row["id"] == point.id]
        assert sum(int(row["kept"]) for row in mine) == point.kept
        assert sum(int(row["weights"]) for row in mine) == point.weights == 11_208
        assert all(float(row["sparsity"]) == 1 - int(row["kept"]) / int(row["weights"]) for row in mine)


def test_a_model_handed_in_must_be_handed_in_again(run_folder):
    with pytest.raises(EvopruneError, match=r"made from a model handed in; in Python, load_front\(dir, model=mine\) takes it"):
        load_front(run_folder)[0].model()


def test_a_folder_without_a_front_is_refused(run_folder, tmp_path):
    with pytest.raises(EvopruneError, match="no run there"):
        load_front(tmp_path)
    shutil.copy(run_folder / "config.json", tmp_path)
    with pytest.raises(EvopruneError, match="no front yet; resume the run first"):
        load_front(tmp_path)


def test_a_named_model_is_rebuilt_in_a_fresh_process(weights_file, tmp_path):
    program = """
import sys, evoprune
from evoprune.inputs.sources import load_data
front = evoprune.load_front(sys.argv[1])
data = load_data(evoprune.Config(), most=0)
for point in front:
    assert evoprune.accuracy(point.model(), data.search) == point.accuracy, point
    assert evoprune.accuracy(point.model(), data.test) == point.test_accuracy, point
print(len(front))
"""
    from evoprune import prune

    front = prune("lenet", "digits", weights=weights_file, out=str(tmp_path / "run"), population=8, generations=2, threads=1)
    done = subprocess.run([sys.executable, "-c", program, front.path], capture_output=True, text=True)
    assert done.stdout == f"{len(front)}\n", done.stderr


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(16, 16)
        self.b = nn.Linear(16, 16)
        self.b.weight = self.a.weight
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        return self.head(self.b(self.a(x).relu()).relu())


def test_tied_weights_are_pruned_under_both_names(tmp_path):
    from evoprune import prune

    torch.manual_seed(0)
    model, images = Tied(), torch.randn(60, 16)
    front = prune(model, (images, model(images).argmax(1)), out=str(tmp_path / "run"), population=8, generations=2)
    point = min(front, key=lambda p: p.kept)
    pruned = point.model()
    assert pruned.a.weight is pruned.b.weight and int((pruned.a.weight != 0).sum()) == int(point.masks()["a.weight"].sum())
    assert front.layout.total == 16 * 16 + 48


def test_wilson_intervals():
    assert wilson(98, 100) == pytest.approx((0.9300, 0.9945), abs=1e-4)
    assert wilson(0, 10)[0] == pytest.approx(0) and wilson(10, 10) == pytest.approx((0.7225, 1), abs=1e-4)


def test_thinning_is_even_in_log_density_and_keeps_the_ends():
    class P:
        def __init__(self, density):
            self.density = density

    points = [P(d) for d in np.geomspace(0.8, 0.004, 200)]
    kept = thin(points, 16)
    steps = np.diff(np.log([p.density for p in kept]))
    assert len(kept) == 16 and kept[0] is points[0] and kept[-1] is points[-1]
    assert steps.min() / steps.max() < 1.2
    empty = [*points, P(0.0), P(0.0)]
    assert sum(p.density < 0.002 for p in thin(empty, 16)) == 1
    assert thin(points[:5], 16) == points[:5]
