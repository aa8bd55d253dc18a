"""Every engine gives the bytes of `local`, whatever happens to its workers."""

import contextlib
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, Small
from processes_of import kill, listening, origin, running, tree, wait_for, workers

import evoprune
from evoprune.config import ENGINES, Config
from evoprune.engines.engine import Engine, open_engine
from evoprune.engines.processes import Processes
from evoprune.engines.team import Team
from evoprune.engines.worker import ignore, take_slot
from evoprune.errors import EvopruneError
from evoprune.evolution.toolbox import default_toolbox
from evoprune.inputs.sources import read_digits
from evoprune.main import main
from evoprune.pruning import prune

POOLS = [name for name in ENGINES if name != "local"]
SLOW = [name if name == "processes" else pytest.param(name, marks=pytest.mark.slow) for name in POOLS]
LOOPBACK = {"0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F"}
SETTINGS = {"model": f"{ROOT / 'tests' / 'faulty.py'}:make", "data": "npz:digits.npz", "search_images": 100,
            "population": 8, "generations": 4, "threads": 1, "finetune_epochs": 1, "front": 2,
            "unit": "filter"}
FLAGS = [part for name, value in SETTINGS.items() for part in (f"--{name.replace('_', '-')}", str(value))]
COMMAND = [sys.executable, "-m", "evoprune.main"]


def results(folder):
    return tuple((folder / name).read_bytes() for name in ("front.csv", "masks.npz", "right.npz"))


@pytest.fixture(scope="module", autouse=True)
def work_in(tmp_path_factory):
    """Work in a folder that has the data as a file, which takes a worker less time to read than scikit-learn to import."""
    folder = tmp_path_factory.mktemp("engines")
    raw = read_digits("").train
    images, labels = raw.read(np.arange(400), None).numpy(), raw.labels[:400]
    np.savez(folder / "digits.npz", x_train=images[:300], y_train=labels[:300], x_test=images[300:], y_test=labels[300:])
    with contextlib.chdir(folder):
        yield


@pytest.fixture(scope="module")
def undisturbed(work_in, tmp_path_factory):
    """The results of a run on `local`."""
    out = tmp_path_factory.mktemp("local") / "run"
    prune(out=str(out), **SETTINGS)
    return results(out)


@pytest.fixture
def faults(tmp_path, monkeypatch):
    """A folder of faults that processes started from now on look into."""
    (tmp_path / "faults").mkdir()
    monkeypatch.setenv("FAULTS", str(tmp_path / "faults"))
    return tmp_path / "faults"


@pytest.fixture
def started():
    """Start the command line in a process group of its own; at the end nothing of it may be left."""
    processes = []

    def start(*arguments):
        processes.append(subprocess.Popen([*COMMAND, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                          text=True, start_new_session=True))
        return processes[-1]

    yield start
    for process in processes:
        kill(tree(process.pid))
        process.communicate()


def finish(process, status=0):
    """Wait for the end and return what was said."""
    below = tree(process.pid)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == status, output
    wait_for(lambda: not running(below), 60)
    return output


def test_sockets_are_found():
    with socket.socket() as everywhere, socket.socket() as here:
        everywhere.listen()
        assert listening([os.getpid()]) - LOOPBACK == {"00000000"}
        here.bind(("127.0.0.1", 0))
        here.listen()
        assert "0100007F" in listening([os.getpid()])


@pytest.mark.parametrize("engine", POOLS)
def test_an_engine_gives_the_bytes_of_local_and_is_open_to_nobody_else(engine, faults, started, undisturbed, tmp_path):
    (faults / "hold").touch()
    process = started(*FLAGS, "--engine", engine, "--workers", 2, "--out", tmp_path / "run")
    wait_for(lambda: list(faults.glob("held.*")))
    found = listening(tree(process.pid))
    assert found <= LOOPBACK and bool(found) == (engine != "processes")  # which opens no port at all
    (faults / "hold").unlink()
    finish(process)
    assert results(tmp_path / "run") == undisturbed


@pytest.mark.parametrize("engine", SLOW)
def test_workers_killed_idle_or_busy_or_all_at_once_change_nothing(engine, faults, started, undisturbed, tmp_path):
    hold = faults / "hold"
    hold.touch()
    process = started(*FLAGS, "--engine", engine, "--workers", 2, "--out", tmp_path / "run")

    def held():
        """Return the worker that holds the job that waits."""
        return [p for p in workers(process.pid) if (faults / f"held.{p}").exists()]

    wait_for(held)
    kill(set(workers(process.pid)) - set(held()))
    busy = wait_for(held)
    kill(busy)
    wait_for(lambda: held() and set(held()) != set(busy))
    kill(workers(process.pid))
    wait_for(held)
    hold.unlink()
    assert "a worker died or hung; its job runs again, alone" in finish(process)
    assert results(tmp_path / "run") == undisturbed


@pytest.mark.parametrize("engine", SLOW)
def test_a_job_that_hangs_or_kills_is_repeated_and_then_given_up(engine, faults, started, tmp_path):
    (faults / "hang").touch()
    (faults / "poison").touch()
    few = {**SETTINGS, "generations": 0, "finetune_epochs": 0}  # no job that a loaded machine takes seconds for
    process = started(*FLAGS, "--engine", engine, "--workers", 2, "--job-timeout", 8, "--out", tmp_path / "run",
                      "--generations", 0, "--finetune-epochs", 0)
    output = finish(process)
    assert not (faults / "hang").exists()
    assert "a job killed its worker 3 times running alone: given up" in output

    def given_up(evaluator, layout, config):
        """What the search is told of masks that no worker survives."""
        from faulty import POISONED

        from evoprune.masks.genome import get_bits

        def evaluate(individual):
            return (0, 0) if POISONED[0] < get_bits(individual, 0, layout).mean() < POISONED[1] else evaluator(individual)

        toolbox = default_toolbox(evaluator, layout, config)
        toolbox.register("evaluate", evaluate)
        return toolbox

    prune(out=str(tmp_path / "expected"), toolbox=given_up, **few)
    assert results(tmp_path / "run") == results(tmp_path / "expected")


@pytest.mark.parametrize(("engine", "target", "other"), [
    ("processes", origin, "local"), pytest.param("processes", origin, "scoop", marks=pytest.mark.slow),
    pytest.param("scoop", origin, "dask", marks=pytest.mark.slow), ("scoop", lambda pid: pid, "processes"),
    pytest.param("dask", origin, "processes", marks=pytest.mark.slow)])
def test_a_killed_search_or_launcher_leaves_nothing_running_and_resumes_anywhere(engine, target, other, faults, started,
                                                                                 undisturbed, tmp_path):
    (faults / "hold").touch()
    process = started(*FLAGS, "--engine", engine, "--workers", 2, "--out", tmp_path / "run")
    wait_for(lambda: list(faults.glob("held.*")))
    (faults / "hold").unlink()
    (faults / "slow").touch()
    wait_for(lambda: list((tmp_path / "run" / "checkpoint").glob("*.npz")))
    everything = tree(process.pid)
    kill([target(process.pid)])
    process.wait(60)
    assert process.returncode == (137 if target(process.pid) != process.pid else -9) or engine == "scoop"
    wait_for(lambda: not running(everything), 60)
    (faults / "slow").unlink()
    output = finish(started("--resume", tmp_path / "run", "--engine", other, "--workers", 1))
    assert "generation 4 of 4" in output and results(tmp_path / "run") == undisturbed


@pytest.mark.parametrize(("engine", "sent", "status"), [
    ("processes", signal.SIGINT, 130), ("scoop", signal.SIGTERM, 143),
    pytest.param("scoop", signal.SIGINT, 130, marks=pytest.mark.slow),
    pytest.param("dask", signal.SIGINT, 130, marks=pytest.mark.slow)])
def test_a_signal_saves_says_how_to_go_on_and_has_its_status(engine, sent, status, faults, started, tmp_path):
    (faults / "slow").touch()
    run = tmp_path / "run"
    process = started(*FLAGS, "--engine", engine, "--workers", 2, "--out", run, "--generations", 10_000)
    wait_for(lambda: [saved for saved in (run / "checkpoint").glob("*.npz") if saved.stem != "000000"])  # it goes on now
    if sent == signal.SIGINT:
        os.killpg(process.pid, sent)  # as a terminal does
    else:
        process.send_signal(sent)
    output = finish(process, status)
    assert f"stopped (interrupted); go on with: python -m evoprune.main --resume {run}" in output
    assert "Traceback" not in output and len(evoprune.load_front(run)) > 0 and not (run / "done.json").exists()


def test_workers_give_the_bytes_of_one_process_for_a_model_handed_in(lenet, digits, tmp_path):
    settings = {"population": 16, "generations": 4, "finetune_epochs": 1, "front": 4, "threads": 1}
    for engine, count in (("local", None), ("processes", 3)):
        prune(lenet, digits, out=str(tmp_path / engine), engine=engine, workers=count, **settings)
    assert results(tmp_path / "local") == results(tmp_path / "processes")


def test_scoops_own_launcher_works_and_says_what_it_cannot_promise(undisturbed, tmp_path):
    done = subprocess.run([sys.executable, "-m", "scoop", "-n", "2", ROOT / "evoprune" / "main.py", *FLAGS, "--out",
                           tmp_path / "run"], capture_output=True, text=True, timeout=120)
    assert "warning: python -m scoop cannot promise" in done.stdout, done.stderr
    assert results(tmp_path / "run") == undisturbed


@pytest.mark.parametrize(("command", "engine"), [
    ([Path(sys.executable).with_name("evoprune")], "processes"),
    pytest.param([sys.executable, "-m", "evoprune"], "scoop", marks=pytest.mark.slow),
    pytest.param([Path(sys.executable).with_name("evoprune")], "scoop", marks=pytest.mark.slow),
    pytest.param([sys.executable, "-m", "evoprune"], "processes", marks=pytest.mark.slow)])
def test_other_names_of_the_command_do_and_record_the_same(command, engine, undisturbed, tmp_path):
    flags = [*FLAGS, "--out", str(tmp_path / "run"), "--engine", engine, "--workers", "2"]
    done = subprocess.run([*command, *flags], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert results(tmp_path / "run") == undisturbed
    assert evoprune.load_front(tmp_path / "run").record.command == shlex.join(["python", "-m", "evoprune.main", *flags])


@pytest.mark.slow
def test_scoop_starts_workers_of_a_hostfile_over_ssh(started, undisturbed, tmp_path, monkeypatch):
    ssh = tmp_path / "bin" / "ssh"  # stands for the real one: runs the command here, and ends with its input
    ssh.parent.mkdir()
    ssh.write_text('#!/bin/sh\nexec sh -c "$4"\n')
    ssh.chmod(0o755)
    monkeypatch.setenv("PATH", f"{ssh.parent}:{os.environ['PATH']}")
    (tmp_path / "hosts").write_text("first 1\nsecond 1\n")
    process = started(*FLAGS, "--engine", "scoop", "--listen", "127.0.0.1", "--hostfile", tmp_path / "hosts",
                      "--out", tmp_path / "run")
    wait_for(lambda: len(workers(process.pid)) == 2)
    finish(process)
    assert results(tmp_path / "run") == undisturbed


def test_dask_makes_a_result_again_that_went_with_its_worker(monkeypatch):
    distributed = pytest.importorskip("distributed")
    engine, result, killed = open_engine(Config(engine="dask", workers=1), ignore), distributed.Future.result, []

    def after_a_kill(future, timeout=None):
        if not killed:
            killed.append(kill(workers(os.getpid())))
        return result(future, timeout=timeout)

    monkeypatch.setattr(distributed.Future, "result", after_a_kill)
    try:
        assert engine.map(abs, [-1, -2, -3]) == [1, 2, 3] and killed
    finally:
        engine.close()


def test_a_dask_cluster_that_runs_already_is_used_and_left(started, undisturbed, tmp_path):
    module = "distributed.cli.dask_"
    pytest.importorskip("distributed")
    file = tmp_path / "scheduler.json"
    cluster = [subprocess.Popen([sys.executable, "-m", f"{module}{what}", "--scheduler-file", file, "--no-dashboard", *more],
                                stderr=subprocess.DEVNULL) for what, more in
               (("scheduler", ["--host", "127.0.0.1", "--port", "0"]), ("worker", ["--nthreads", "1", "--host", "127.0.0.1"]))]
    try:
        address = wait_for(lambda: file.exists() and re.search(r"tcp://[\d.:]+", file.read_text()))[0]
        finish(started(*FLAGS, "--engine", "dask", "--scheduler", address, "--out", tmp_path / "run"))
        assert results(tmp_path / "run") == undisturbed and all(p.poll() is None for p in cluster)
    finally:
        for process in cluster:
            kill(tree(process.pid))
            process.wait()


# ---------------------------------------------------------------------------------------------------- what users get wrong


def test_models_handed_in_need_an_engine_of_this_machine(digits, tmp_path, monkeypatch):
    monkeypatch.setattr("evoprune.engines.engine.under_scoop", lambda: True)
    for engine in ("scoop", "dask"):
        with pytest.raises(EvopruneError, match=f"engine: {engine} needs a model and data that its workers can import"):
            prune(Small(), digits, engine=engine, out=str(tmp_path / engine))
        assert not (tmp_path / engine).exists()


def test_scoop_from_python_says_how_to_start_it(tmp_path):
    with pytest.raises(EvopruneError, match="engine: scoop runs programs that were started under it"):
        prune(engine="scoop", out=str(tmp_path / "run"), **SETTINGS)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("flags", "said"), [
    (["--engine", "scoop", "--hostfile", "hosts"], "hostfile: workers of other machines need --listen ADDRESS"),
    (["--engine", "scoop", "--listen", "192.0.2.1"], "listen: 192.0.2.1: "),
    (["--engine", "scoop", "--listen", "127.0.0.1", "--hostfile", "nowhere"], "hostfile: nowhere: "),
    (["--engine", "dask", "--scheduler", "127.0.0.1:1"], "scheduler: 127.0.0.1:1: "),
    (["--workers", "0"], "workers: found 0, expected at least 1"),
])
def test_bad_settings_of_engines_are_one_line_and_status_2(flags, said, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("evoprune.engines.dask_pool.CONNECT", "1s")
    assert main([*FLAGS, *flags, "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"evoprune: {said}") and error.count("\n") == 1


# ------------------------------------------------------------------------------------------------------- engines by themselves


def square(x):
    if x < 0:
        raise ValueError(f"{x} is\nnegative")
    return x * x


def dies(x):
    if x == 3:
        sys.exit("no")
    return os.getpid()


@pytest.fixture(scope="module")
def pair():
    engine = open_engine(Config(engine="processes", workers=2), ignore)
    yield engine
    engine.close()


def test_order_is_kept_and_an_exception_is_one_line(pair):
    arrived, progress = [], []
    assert pair.map(square, range(50), progress=lambda done, of: progress.append((done, of))) == [x * x for x in range(50)]
    assert pair.map(square, range(50), lambda i, result: arrived.append((i, result))) == []
    assert sorted(arrived) == [(x, x * x) for x in range(50)] and progress[-1] == (50, 50)
    with pytest.raises(EvopruneError, match="^engine processes: ValueError: -1 is$"):
        pair.map(square, [1, -1, 2])
    with pytest.raises(EvopruneError, match="engine processes: SystemExit: no"):
        pair.map(dies, [3])
    assert pair.map(square, [5]) == [25]  # whoever was stopped in the middle is replaced
    with pytest.raises(EvopruneError, match="evaluate cannot be sent to worker processes"):
        pair.map(lambda x: x, [1])


def test_ctrl_c_while_a_worker_is_started_leaves_no_signal_blocked(pair, monkeypatch):
    def interrupted(how, signals):
        before = real(how, signals)
        if how == signal.SIG_BLOCK and signals:  # as the real one, where a signal has just come
            raise KeyboardInterrupt
        return before

    real = signal.pthread_sigmask
    monkeypatch.setattr(signal, "pthread_sigmask", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pair.pool.start_worker()
    assert signal.SIGINT not in real(signal.SIG_UNBLOCK, [signal.SIGINT])


def test_a_stopped_worker_that_takes_no_job_is_replaced():
    engine = open_engine(Config(engine="processes", workers=2, job_timeout=3.0), ignore)
    try:
        while not all(worker.ready for worker in engine.pool.workers):
            engine.map(np.sum, [np.ones(5)])  # for a function of this file a worker imports torch first, beyond the limit
        os.kill(engine.pool.workers[0].process.pid, signal.SIGSTOP)
        assert engine.map(np.sum, [np.ones(1_400_000, np.uint8)] * 4) == [1_400_000] * 4  # more than a pipe holds
    finally:
        engine.close()


def test_a_worker_stopped_while_it_starts_is_replaced():
    engine = open_engine(Config(engine="processes", workers=1), ignore)
    team = Team([[sys.executable, "-c", "import time; time.sleep(600)"]])
    try:
        for pid in (engine.pool.workers[0].process.pid, before := team.processes[0].pid):
            os.kill(pid, signal.SIGSTOP)
        assert engine.map(square, [3]) == [9]
        wait_for(lambda: team.look() or team.processes[0].pid != before)
    finally:
        engine.close()
        team.end()


def test_each_process_of_a_host_has_a_slot_of_its_own(tmp_path):
    assert take_slot(tmp_path) == 0 and take_slot(tmp_path) == 1
    code = "import sys, pathlib; from evoprune.engines.worker import take_slot; print(take_slot(pathlib.Path(sys.argv[1])))"
    for _ in range(2):  # a slot is free again when its process has ended
        assert subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True).stdout == "2\n"


def refuses():
    raise EvopruneError("no data here")


def ends():
    os._exit(3)


def test_workers_that_cannot_start_stop_the_run(monkeypatch):
    monkeypatch.setattr("evoprune.engines.processes.UNREADY", 2)
    for start, said in ((refuses, "a worker could not start: no data here"), (ends, r"3 workers ended before they were ready "
                        r"\(the last with exit status 3\)")):
        engine = Engine("processes", Processes(start, 2, None))
        with pytest.raises(EvopruneError, match=said):
            engine.map(square, [1, 2, 3])
        engine.close()
