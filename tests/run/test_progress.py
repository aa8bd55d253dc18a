import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from contextlib import suppress
from itertools import count
from types import SimpleNamespace

import pytest
import torch
from conftest import Small

from evoprune import EvopruneError, prune
from evoprune.objectives import USUAL
from evoprune.run import progress
from evoprune.run.progress import Bar, Pace, SearchProgress, clock, looked_at, training_progress

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
        "0.1 s a mask; 80 masks will take about 0:08",
        "generation 0 of 3: hvlog 0.5000, 3 points up to 90.00 % sparsity, 20 masks, 0:06 left",
        "generation 1 of 3: hvlog 0.5000, 3 points up to 90.00 % sparsity, 20 masks, 0:10 left",
        "generation 3 of 3: hvlog 0.5000, 3 points up to 90.00 % sparsity, 20 masks"]


@pytest.mark.parametrize(("start", "each", "batch", "expected"), [
    (30, 1, 20, "2.45 s a mask; 80 masks will take about 3:16"),  # over before more is known: the start counts
    (30, 2, 20, "2 s a mask; 80 masks will take about 3:08"),
    (4, 20, 20, "20 s a mask; 80 masks will take about 26:24"),
    (0, 20, 1, "0 s a mask; 80 masks will take about 0:00")])
def test_what_a_start_takes_is_not_taken_for_what_a_mask_takes(start, each, batch, expected, time, caplog):
    caplog.set_level("INFO", "evoprune")
    told = SearchProgress(3, 80, False, 0, USUAL)
    time[0] += start
    for i in range(1, batch + 1):
        told.evaluated(i, batch)
        time[0] += each
    assert said(caplog)[0] == expected


@pytest.mark.parametrize(("trains", "expected"), [
    (False, "the first masks: hvlog 0.5000, 3 points up to 90.00 % sparsity, 20 masks"),
    (True, "training, 4 of 4 epochs: hvlog 0.5000, 3 points up to 90.00 % sparsity")])
def test_a_search_without_generations_speaks_of_none(trains, expected, time, caplog):
    caplog.set_level("INFO", "evoprune")
    SearchProgress(0, 4, trains, 0, USUAL).generation({**ROW, "generation": 0, "epochs": 4})
    assert said(caplog) == [expected]


def test_the_time_left_goes_by_generations_for_not_every_child_is_measured(time, caplog):
    """Of the 100 masks planned, 20 a generation, only ten a generation are new."""
    caplog.set_level("INFO", "evoprune")
    told = SearchProgress(4, 100, False, 0, USUAL)
    for generation in range(4):
        for i in range(1, 11):
            time[0] += 1.0
            told.evaluated(i, 10)
        told.generation({**ROW, "generation": generation})
    left = [re.search(r"generation (\d) of 4.* (\d:\d\d) left", line) for line in said(caplog) if "hvlog" in line]
    assert [found.groups() for found in left] == [("0", "1:30"), ("1", "0:30"), ("2", "0:20"), ("3", "0:10")]


def test_a_resumed_search_counts_only_what_is_to_go(caplog, tmp_path):
    caplog.set_level("INFO", "evoprune")
    data = torch.randn(40, 64), torch.arange(40) % 10
    small = {"population": 4, "threads": 1}
    net = Small()
    prune(net, data, out=tmp_path / "again", generations=5, max_seconds=0.0, **small)
    caplog.clear()
    prune(net, data, resume=tmp_path / "again")
    planned = [re.search(r"s a mask; (\d+) masks will take", line) for line in said(caplog)]
    assert [int(found[1]) for found in planned if found] == [16]  # four generations of four: two are measured


class Lines:
    """A bar that keeps what it shows."""

    def __init__(self):
        self.shown, self.share = [], 0.0

    def show(self, what, share, rest):
        self.shown.append(f"{what} | {rest}")
        self.share = share

    def end(self):
        self.shown.append("")


def test_a_bar_has_the_phase_the_child_the_front_and_the_time_left(time, caplog, monkeypatch):
    caplog.set_level("INFO", "evoprune")
    bar = Lines()
    monkeypatch.setattr(progress, "BARS", [bar])
    told = SearchProgress(3, 16, False, 0, USUAL)
    for i in range(1, 5):
        time[0] += 2.0
        told.evaluated(i, 4)
    told.generation({**ROW, "generation": 0}, [(0.9, 0.5), (0.8, 0.85), (0.6, 0.96), (0.5, 0.97)])
    time[0] += 2.0
    told.evaluated(1, 4)
    assert bar.shown[0] == "generation 0 of 3, child 1 of 4 | 0:30 left" and bar.share == 5 / 16
    assert bar.shown[-1] == ("generation 1 of 3, child 1 of 4 | accuracy 80.00 at 80 %, 60.00 at 95 %, - at 99 %; 0:22 left")
    steps = training_progress("a child")
    steps(3, 12)
    assert bar.shown[-1] == "training a child | 3 of 12 steps" and bar.share == 0.25  # too early to say when it ends
    time[0] += 3.0
    steps(6, 12)
    steps(12, 12)
    assert bar.shown[-3:] == ["training a child | 6 of 12 steps, 0:04 left", "training a child | 12 of 12 steps, 0:00 left", ""]
    assert said(caplog) == []  # a bar stands for the lines


def test_without_a_terminal_progress_is_lines_and_only_where_wanted(tmp_path):
    program = """
import sys, torch, evoprune
from torch import nn
net, x = nn.Linear(16, 3), torch.randn(40, 16)
rows = []
front = evoprune.prune(net, (x, net(x).argmax(1)), out=sys.argv[1], population=4, generations=2, threads=1,
                       progress={"None": None, "True": True, "False": False}[sys.argv[2]], on_generation=rows.append)
with open(front.path / "log.csv") as file:
    assert [str(row["hvlog"]) for row in rows] == [line.split(",")[4] for line in file.read().splitlines()[1:]], rows
assert [row["generation"] for row in rows] == [0, 1, 2]
"""
    for wish, lines in (("None", False), ("True", True), ("False", False)):
        done = subprocess.run([sys.executable, "-c", program, str(tmp_path / wish), wish], capture_output=True, text=True)
        assert done.returncode == 0 and done.stdout == "", done.stderr
        assert ("generation 2 of 2: hvlog" in done.stderr) is lines and "\r" not in done.stderr


def test_on_a_terminal_there_is_a_bar_and_quiet_has_none(tmp_path):
    for flags, bar in (((), True), (("--quiet",), False)):
        master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 200, 0, 0))
        command = [sys.executable, "-m", "evoprune.main", "--generations", "30", "--train-epochs", "1", "--population", "8",
                   "--threads", "1", *flags]
        process = subprocess.Popen(command, cwd=tmp_path, stdout=slave, stderr=slave)
        os.close(slave)
        text = b""
        with suppress(OSError):  # the end of a terminal
            while more := os.read(master, 1 << 16):
                text += more
        assert process.wait(60) == 0
        os.close(master)
        assert bool(re.search(rb"generation \d+ of 30, child \d of 8 \|.*accuracy .* at 80 %, ", text)) is bar
        assert (b"test accuracy (95 %)" in text) is bar and (text == b"") is not bar


@pytest.mark.parametrize(("columns", "shown"), [
    (200, r"generation 2 of 3, child 1 of 4 \|.+\| accuracy 80\.00; 0:22 left"),
    (79, r"generation 2/3, child 1/4; 0:22 left; accuracy 80\.00")])
def test_a_narrow_terminal_has_the_time_left_in_place_of_the_bar(columns, shown, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(columns))
    bar = Bar()
    bar.show("generation 2 of 3, child 1 of 4", 0.4, "accuracy 80.00; 0:22 left")
    bar.bar.ncols, bar.bar.dynamic_ncols = columns, None
    bar.bar.refresh()
    assert re.search(shown, capsys.readouterr().err.split("\r")[-1])
    bar.end()


def test_a_terminal_of_no_size_has_lines(monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setattr("sys.stderr", SimpleNamespace(isatty=lambda: True, fileno=lambda: 2))
    for size, looked in (((40, 0), False), ((0, 0), False), ((40, 24), True)):
        monkeypatch.setattr("os.get_terminal_size", lambda file: size)  # noqa: B023  # called in this turn
        assert looked_at() is looked


@pytest.mark.parametrize("wrong", [{"progress": "yes"}, {"on_generation": 3}])
def test_what_cannot_show_progress_is_refused(wrong, tmp_path):
    name, = wrong
    with pytest.raises(EvopruneError, match=f"^{name}: found "):
        prune(Small(), (torch.randn(40, 64), torch.arange(40) % 10), out=tmp_path / "run", **wrong)
    assert not (tmp_path / "run").exists()


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
