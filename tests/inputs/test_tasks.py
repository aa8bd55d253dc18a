"""Tasks: their metrics against scikit-learn's, guessing, and whole runs of each."""

import copy
import itertools

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score, jaccard_score, r2_score
from torch import nn
from torch.nn import functional as F

import evoprune
from evoprune import EvopruneError
from evoprune.config import Config
from evoprune.inputs.tasks import DRAWS, TASKS, Task, check_task, constant_score, guessed
from evoprune.main import main
from evoprune.results.points import columns
from evoprune.run.prepare import outputs_of, with_task

RNG = np.random.default_rng(0)


def batch(name, n=50):
    """Outputs and targets of a task."""
    torch.manual_seed(0)
    return {"classification": (torch.randn(n, 4), torch.randint(4, (n,))),
            "binary": (torch.randn(n, 1), torch.randint(2, (n,))),
            "multilabel": (torch.randn(n, 5), torch.randint(2, (n, 5))),
            "regression": (torch.randn(n, 3), 5 + torch.randn(n, 3)),
            "segmentation": (torch.randn(n, 4, 3, 5), torch.randint(-1, 4, (n, 3, 5))),
            "tokens": (torch.randn(n, 6, 4), torch.randint(-1, 4, (n, 6)))}[name]


def by_sklearn(name, outputs, targets):
    outputs, targets = outputs.numpy(), targets.numpy()
    if name == "classification":
        return accuracy_score(targets, outputs.argmax(1))
    if name == "binary":
        return accuracy_score(targets, outputs[:, 0] > 0)
    if name == "multilabel":
        return f1_score(targets, outputs > 0, average="micro")
    if name == "regression":
        return max(-1, np.mean(r2_score(targets, outputs, multioutput="raw_values")))
    said = outputs.argmax(1 if name == "segmentation" else -1)[targets >= 0]
    wanted = targets[targets >= 0]
    return accuracy_score(wanted, said) if name == "tokens" else jaccard_score(wanted, said, average="macro")


@pytest.mark.parametrize("name", TASKS)
def test_the_score_is_what_sklearn_says_however_the_examples_are_cut(name):
    task = TASKS[name]
    for shift in (0.0, 1.0):
        outputs, targets = batch(name)
        if shift:  # half right
            if name == "regression":
                outputs = targets + 0.3 * outputs
            elif name in ("binary", "multilabel"):
                outputs = outputs + 2 * (2 * targets.view(outputs.shape) - 1)
            else:
                outputs = outputs + 2 * F.one_hot(targets.clamp_min(0), 4).movedim(-1, task.dimension)
        sums = task.sums(outputs, targets)
        assert sums.shape[0] == len(targets) and sums.dtype in (torch.bool, torch.int64, torch.float64)
        total = sums.sum(0)
        parts = sum(task.sums(outputs[i:i + 7], targets[i:i + 7]).sum(0) for i in range(0, 50, 7))
        assert torch.allclose(total.double(), parts.double())
        assert task.score(total.tolist()) == pytest.approx(by_sklearn(name, outputs, targets), abs=1e-9)
        score, low, high = task.tested(sums)
        assert low <= score <= high and (low < high or score == task.worst)


def test_classes_that_are_one_hot_are_told(caplog):
    one_hot = torch.eye(5)[torch.arange(20) % 5]
    assert guessed(torch.randn(20, 5), one_hot).name == "multilabel"
    assert caplog.messages == ["each target is 1 in one of 5 places, which is taken for the task multilabel; if that place is a "
                               "class, hand in targets.argmax(1)"]
    one_hot[0] = 1
    assert guessed(torch.randn(20, 5), one_hot).name == "multilabel" and len(caplog.messages) == 1


def test_outputs_in_another_order_than_targets_are_refused():
    outputs, targets = torch.randn(20, 4, 6), torch.randn(20, 4, 6)
    check_task(TASKS["regression"], outputs, targets, "x")
    check_task(TASKS["regression"], outputs.flatten(1), targets, "x")
    check_task(TASKS["regression"], outputs[:, None], targets, "x")
    with pytest.raises(EvopruneError, match=r"x: found targets of shape \(20, 6, 4\) and type torch.float32"):
        check_task(TASKS["regression"], outputs, targets.transpose(1, 2), "x")
    with pytest.raises(EvopruneError, match=r"model: returned outputs of shape \(20, 4, 6\) for targets of shape \(20, 6, 4\)"):
        TASKS["regression"].sums(outputs, targets.transpose(1, 2))


@pytest.mark.parametrize("name", ["classification", "binary", "multilabel", "segmentation", "tokens"])
def test_no_answer_that_is_the_same_for_all_scores_more_than_the_constant_one(name):
    outputs, targets = batch(name)
    task = TASKS[name]
    if task.link == "softmax":
        answers = [torch.eye(outputs.shape[task.dimension])[c] for c in range(outputs.shape[task.dimension])]
        shape = [-1 if i == task.dimension % outputs.dim() else 1 for i in range(outputs.dim())]
    else:
        answers = [torch.tensor(each) - 0.5 for each in itertools.product((0.0, 1.0), repeat=outputs[0].numel())]
        shape = [1, *outputs.shape[1:]]
    scores = [task.score(task.sums(answer.view(shape).expand(outputs.shape), targets).sum(0).tolist()) for answer in answers]
    assert constant_score(task, targets) == pytest.approx(max(scores))


@pytest.mark.parametrize("name", ["binary", "multilabel", "regression"])
def test_one_target_an_example_may_be_a_number_or_a_row_of_one(name):
    outputs, targets = (each[:, :1] for each in batch("multilabel" if name == "binary" else name))
    task = TASKS[name]
    expected = task.sums(outputs, targets)
    for said, wanted in ((outputs, targets[:, 0]), (outputs[:, 0], targets), (outputs[:, 0], targets[:, 0])):
        assert torch.equal(task.sums(said, wanted), expected)
        assert task.loss(said, wanted) == task.loss(outputs, targets)


@pytest.mark.parametrize(("name", "options"), [("regression", {"repair": "least-squares", "finetune_epochs": 1, "front": 3}),
                                               ("regression", {"total_epochs": 20, "targets": "0.5,0.9"}),
                                               ("binary", {"repair": "least-squares"})])
def test_a_run_takes_one_number_an_example_for_a_row_of_one(name, options, tmp_path):
    torch.manual_seed(1)
    x, model = torch.randn(240, 16), nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 1)).eval()
    said = model(x).detach() + 0.1 * torch.randn(240, 1)
    rows = said if name == "regression" else (said > 0).float()
    found = []
    for targets in (rows, rows[:, 0]):
        data = evoprune.Data(*((x[i:i + 80], targets[i:i + 80]) for i in (0, 80, 160)))
        front = evoprune.prune(model, data, out=tmp_path / str(targets.dim()), **SETTINGS, **options)
        assert front.record.config.task == name
        found.append((front.path / "front.csv").read_bytes())
    assert found[0] == found[1]


@pytest.mark.parametrize("name", TASKS)
def test_no_number_is_no_answer(name):
    task, (outputs, targets) = TASKS[name], batch(name)
    right = task.tested(task.sums(outputs.nan_to_num(), targets))[0]
    outputs = torch.full_like(outputs, float("nan"))
    worst = task.tested(task.sums(outputs, targets))[0]
    assert worst == task.worst <= right


def test_an_interval_by_bootstrap_is_the_one_of_drawing_examples():
    task, (outputs, targets) = TASKS["regression"], batch("regression")
    outputs = targets + 0.5 * outputs
    sums = task.sums(outputs, targets)
    rng, scores = np.random.default_rng(1), []
    for _ in range(DRAWS):
        index = torch.from_numpy(rng.integers(0, 50, 50))
        scores.append(by_sklearn("regression", outputs[index], targets[index]))
    assert task.tested(sums)[1:] == pytest.approx(np.quantile(scores, (0.025, 0.975)), abs=0.02)
    assert task.tested(sums) == task.tested(sums.clone())


def test_r2_of_far_away_targets_keeps_its_digits_and_of_constant_ones_is_all_or_nothing():
    wanted = torch.from_numpy(2e6 + RNG.standard_normal((200, 1)))
    said = wanted + 0.5 * torch.from_numpy(RNG.standard_normal((200, 1)))
    task = TASKS["regression"]
    assert task.score(task.sums(said, wanted).sum(0).tolist()) == pytest.approx(r2_score(wanted.numpy(), said.numpy()), abs=1e-3)
    constant = torch.ones(5, 1)
    assert [task.score(task.sums(each, constant).sum(0).tolist()) for each in (constant, constant + 1)] == [1.0, -1.0]


@pytest.mark.parametrize("name", TASKS)
def test_the_loss_has_gradients_and_ignores_what_does_not_count(name):
    task, (outputs, targets) = TASKS[name], batch(name)
    outputs.requires_grad_()
    task.loss(outputs, targets).backward()
    assert outputs.grad.abs().sum() > 0
    if name == "tokens":
        assert outputs.grad[targets < 0].abs().sum() == 0
    if name == "segmentation":
        assert outputs.grad.movedim(1, -1)[targets < 0].abs().sum() == 0


@pytest.mark.parametrize("name", TASKS)
def test_the_task_is_guessed_from_outputs_and_targets(name):
    outputs, targets = batch(name)
    assert guessed(outputs[:2], targets).name == name
    check_task(TASKS[name], outputs[:2], targets, "data")


def test_a_label_that_counts_for_nothing_is_no_class():
    labels = torch.randint(4, (6, 3, 5))
    labels[0, 0] = 255
    data = evoprune.Data(None, (torch.zeros(6, 3, 3, 5), labels), None)
    assert with_task(Config(), data, torch.zeros(2, 4, 3, 5))[0].task == "segmentation"
    with pytest.raises(EvopruneError, match="found label 4, expected 0 to 3"):
        with_task(Config(), evoprune.Data(None, (torch.zeros(6, 3, 3, 5), labels.clamp(max=4)), None), torch.zeros(2, 4, 3, 5))


@pytest.mark.parametrize(("task", "outputs"), [("multilabel", 5), ("regression", 5), ("binary", 1), (None, 2)])
def test_a_model_is_made_with_as_many_outputs_as_the_task_has(task, outputs):
    data = evoprune.Data(None, (torch.zeros(6, 3), torch.ones(6, 5).long()), None)
    assert outputs_of(Config(task=task), data) == outputs


def test_tokens_of_one_example_are_no_examples_of_their_own():
    sums = torch.tensor([[100, 100]] * 5 + [[0, 100]] * 5)
    score, low, high = TASKS["tokens"].tested(sums)
    assert score == 0.5 and low < 0.25 and high > 0.75  # of ten, not of a thousand


@pytest.mark.parametrize("shape", [(50, 3, 4), (50, 1, 3, 4)])
def test_one_logit_a_pixel_is_many_labels_of_one_example(shape):
    outputs, targets = torch.randn(50, 1, 3, 4), torch.randint(2, shape)
    task = guessed(outputs[:2], targets)
    assert task.name == "multilabel" and task.sums(outputs, targets).shape == (50, 3)
    assert task.score(task.sums(outputs, targets).sum(0).tolist()) == pytest.approx(
        f1_score(targets.flatten(), outputs.flatten() > 0))
    with pytest.raises(EvopruneError, match="expected one target each for the task binary; several are multilabel"):
        check_task(TASKS["binary"], outputs[:2], targets, "data")


@pytest.mark.parametrize(("name", "outputs", "targets", "said"), [
    ("classification", torch.zeros(2, 3), torch.tensor([0, 3]), "data: found label 3, expected 0 to 2: the model has 3 outputs"),
    ("classification", torch.zeros(2, 3), torch.tensor([0, -1]), "data: found label -1, expected whole numbers from 0"),
    ("classification", torch.zeros(2, 3), torch.tensor([0, 0.5]), "data: found labels of type torch.float32, expected"),
    ("classification", torch.zeros(2, 3, 4), torch.zeros(2, 9).long(), "which are like no task; name one with --task"),
    ("binary", torch.zeros(2, 1), torch.tensor([0, 2]), "expected 0 and 1 for the task binary"),
    ("regression", torch.zeros(2, 3), torch.zeros(2, 2), "expected as many for the task regression"),
    ("segmentation", torch.zeros(2, 3, 4, 4), torch.zeros(2, 5, 4).long(), r"expected a label for each of \(4, 4\)"),
    ("tokens", torch.zeros(2, 5, 3), torch.full((2, 5), 3), "found label 3, expected 0 to 2")])
def test_targets_that_do_not_fit_are_one_line(name, outputs, targets, said):
    with pytest.raises(EvopruneError, match=said):
        check_task(TASKS[name], outputs, targets, "data")


class Net(nn.Module):
    """16 numbers in, through two layers, to outputs of a shape."""

    def __init__(self, *shape):
        super().__init__()
        self.shape = shape
        self.body, self.head = nn.Linear(16, 24), nn.Linear(24, int(np.prod(shape)))

    def forward(self, x):
        return self.head(self.body(x).relu()).unflatten(1, self.shape) if len(self.shape) > 1 else self.head(self.body(x).relu())


def problem(name, n=240):
    """A dense model and data that it fits rather well."""
    torch.manual_seed(1)
    x = torch.randn(n, 16)
    shapes = {"classification": (4,), "binary": (1,), "multilabel": (5,), "regression": (2,), "segmentation": (3, 4, 4),
              "tokens": (6, 3)}
    model = Net(*shapes[name]).eval()
    outputs = model(x).detach()
    if name == "classification":
        targets = outputs.argmax(1)
    elif name in ("binary", "multilabel"):
        targets = (outputs > 0).long()
    elif name == "regression":
        targets = outputs + 0.1 * outputs.std() * torch.randn(n, 2)
    else:
        targets = outputs.argmax(TASKS[name].dimension)
        targets[:, 0] = -100
    return model, evoprune.Data(*((x[i:i + 80], targets[i:i + 80]) for i in (0, 80, 160)))


SETTINGS = {"population": 8, "generations": 3, "threads": 1}


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("options", [{}, {"repair": "least-squares"}, {"total_epochs": 20, "targets": "0.5,0.9"}], ids=str)
def test_a_run_of_each_task_states_what_its_models_score(name, options, tmp_path, caplog):
    caplog.set_level("INFO", "evoprune")
    model, data = problem(name)
    front = evoprune.prune(model, data, out=tmp_path / "run", **{**SETTINGS, **options})
    usual, metric = name == "classification", TASKS[name].metric
    score = "accuracy" if usual else "score"
    assert front.record.config.task == name and front.record.optimised[0].title == metric
    assert columns(front.record.optimised)[1] == score and f"test_{score}" in columns(front.record.optimised)
    assert any(f"dense {metric}: " in line for line in caplog.messages)
    assert any(line.startswith(f"task: {name}, measured by {metric}") for line in caplog.messages) is not usual
    sparse = front.points[-1]
    assert sparse.sparsity > 0.4 and front.best(score=0.0) == front.best(**{score: 0.0})
    assert f"test {metric} (95 %)" in str(front)
    for point in front.points[::3]:
        again = evoprune.accuracy(point.model(), (data.test.images, data.test.labels))
        assert again == pytest.approx(point.test, abs=1e-9 if name != "regression" else 1e-6)
        assert point.test_low <= point.test <= point.test_high


def test_workers_and_resumes_of_a_regression_give_the_same_bytes(tmp_path):
    model, data = problem("regression")
    texts = []
    for name, options in (("a", {}), ("b", {"engine": "processes", "workers": 2})):
        evoprune.prune(model, data, out=tmp_path / name, finetune_epochs=2, front=3, **SETTINGS, **options)
        texts.append((tmp_path / name / "front.csv").read_bytes())
    evoprune.prune(model, data, out=tmp_path / "c", finetune_epochs=2, front=3, **SETTINGS, max_seconds=0.0)
    evoprune.prune(model, data, resume=tmp_path / "c")
    assert texts[0] == texts[1] == (tmp_path / "c" / "front.csv").read_bytes()


def test_least_squares_helps_a_regression_and_training_too(tmp_path):
    model, data = problem("regression")
    ways = {}, {"repair": "least-squares", "knowledge": "weights"}, {"finetune_epochs": 30, "front": 8}
    fronts = [evoprune.prune(model, data, out=tmp_path / str(i), start="lamp", **SETTINGS, **options)
              for i, options in enumerate(ways)]
    plain, repaired, trained = (front.best(sparsity=0.5).score for front in fronts)
    assert repaired > plain and trained > plain


OWN = """
import torch
from evoprune import Task

def nearest():
    \"\"\"The share of examples within 0.5 of their target.\"\"\"
    def sums(output, targets):
        near = ((output - targets).abs() < 0.5).all(1)
        return torch.stack([near, torch.ones_like(near)], 1)
    return Task("nearest", "share within 0.5", sums, lambda sums: sums[0] / sums[1],
                lambda output, targets: (output - targets).abs().mean())

def nothing():
    return 3

def make():
    torch.manual_seed(0)
    return torch.nn.Linear(6, 2)

def data():
    x = torch.randn(60, 6, generator=torch.Generator().manual_seed(0))
    return x, make()(x).detach()
"""


def test_a_task_of_your_own_by_its_file(tmp_path, monkeypatch, capsys):
    (tmp_path / "mine.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    run = ["--model", "mine.py:make", "--data", "mine.py:data", "--population", "8", "--generations", "2", "--threads", "1"]
    assert main([*run, "--task", "mine.py:nearest", "--out", "run"]) == 0
    out = capsys.readouterr().out
    assert "share within 0.5" in out and "score=" in out
    assert main([*run, "--task", "mine.py:nearest", "--out", "again", "--engine", "processes", "--workers", "1",
                 "--score-floor", "0"]) == 0
    assert (tmp_path / "run/front.csv").read_bytes() == (tmp_path / "again/front.csv").read_bytes()
    capsys.readouterr()
    for spec, said in (("mine.py:nothing", "task: mine.py:nothing returned int, expected an evoprune.Task"),
                       ("ranking", "task: found 'ranking', expected classification, binary"),
                       ("tokens", "expected")):
        assert main([*run, "--task", spec, "--out", "bad"]) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "bad").exists()


def test_a_flag_overrides_the_guess(tmp_path):
    model, data = problem("binary")
    front = evoprune.prune(model, data, out=tmp_path / "run", task="regression", **SETTINGS)
    assert front.record.optimised[0].title == "R2"
    assert isinstance(copy.copy(TASKS["regression"]), Task)


def test_pictures_whose_pixels_have_labels_are_not_moved_away_from_them():
    from evoprune.inputs.splits import Split
    from evoprune.values.training import recipe_for, tune

    torch.manual_seed(0)
    split = Split(torch.randn(12, 3, 8, 8), torch.randint(2, (12, 8, 8)), task=TASKS["segmentation"])
    nets = [nn.Conv2d(3, 2, 3, padding=1) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    for net, augment in zip(nets, (True, False)):
        tune(net, split, recipe_for(net, 2, 0, augment=augment))
    assert torch.equal(nets[0].weight, nets[1].weight)


def test_a_class_that_is_there_and_never_right_counts_in_the_mean():
    assert TASKS["segmentation"].score([3, 0, 0, 4, 2, 0]) == 0.375  # the third is neither there nor said
