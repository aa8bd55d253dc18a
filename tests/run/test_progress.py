import re
from itertools import count

import pytest
import torch
from conftest import Small

from evoprune import prune
from evoprune.objectives import USUAL
from evoprune.run import progress
from evoprune.run.progress import Pace, SearchProgress, clock, training_progress

ROW = {"generation": 1, "evaluations": 20, "epochs": 2.0, "hvlog": 0.5, "points": 3, "max_sparsity": 0.9}


@pytest.fixture
def time(monkeypatch):
    """A clock that is set by hand."""
    now = [0.0]
    monkeypatch.setattr(progress, "monotonic", lambda: now[0])
    return now


def said(caplog):
    return [record.message for record in caplog.records]


def test_durations_read_like_clocks():
    assert [clock(s) for s in (7, 750, 11100)] == ["0:07", "12:30", "3:05:00"]


def test_the_rest_takes_as_long_a_piece_as_what_is_done(time):
    pace = Pace(10, done=2)
    time[0], pace.done = 8.0, 6
    assert pace.each() == 2 and pace.left() == "0:08"
    assert pace.due(5) and not pace.due(5)


def test_a_search_of_masks_says_what_it_will_take_and_then_now_and_then(time, caplog):
    caplog.set_level("INFO", "evoprune")
    told = SearchProgress(3, 80, False, 0, USUAL)
    for i in range(1, 21):
        time[0] += 0.1
        told.evaluated(i, 20)
    told.generation({**ROW, "generation": 0})
    told.generation(ROW)  # nothing new within seconds
    time[0] += 5
    told.generation(ROW)
    told.generation({**ROW, "generation": 3})
    assert said(caplog) == [
        "0.1 s a mask; the search of 80 masks will take about 0:08",
        "generation 0 of 3: hvlog 0.5000, 3 points up to 90.00 % sparsity, 20 masks, 0:06 left",
        "generation 1 of 3: hvlog 0.5000, 3 points up to 90.00 % sparsity, 20 masks, 0:21 left",
        "generation 3 of 3: hvlog 0.5000, 3 points up to 90.00 % sparsity, 20 masks"]


def test_a_tuned_run_counts_epochs(time, caplog):
    caplog.set_level("INFO", "evoprune")
    told = SearchProgress(3, 6.0, True, 0, USUAL)
    told.evaluated(1, 3)
    time[0] = 10.0
    told.generation(ROW)
    assert said(caplog) == ["generation 1 of 3, 2 of 6 epochs: hvlog 0.5000, 3 points up to 90.00 % sparsity, 0:20 left"]


def test_a_long_path_says_how_far_it_is(monkeypatch, caplog, tmp_path):
    caplog.set_level("INFO", "evoprune")
    ticks = count(0, 3)
    monkeypatch.setattr(progress, "monotonic", lambda: next(ticks))
    data = torch.randn(40, 64), torch.arange(40) % 10
    prune(Small(), data, out=tmp_path / "run", repair="least-squares", population=4, generations=0, threads=1)
    steps = [line for line in said(caplog) if line.startswith("the multi-shot path: ")]
    assert len(steps) > 50 and re.fullmatch(r"the multi-shot path: \d+ of 160 steps, \d+:\d\d left", steps[0])


def test_training_says_every_five_seconds_how_long_the_rest_takes(time, caplog):
    caplog.set_level("INFO", "evoprune")
    told = training_progress("a child")
    for step in range(1, 13):
        time[0] += 1
        told(step, 12)
    assert said(caplog) == ["training a child: 5 of 12 steps, 0:07 left", "training a child: 10 of 12 steps, 0:02 left"]
