"""Nothing is lost: small searches, each hit by random faults at random moments and resumed until done.

    python scripts/chaos.py processes --runs 100
    python scripts/chaos.py scoop --plan             runs of a recorded plan: a path, repaired masks, training

Faults: kill -9 of one worker, of one in the middle of a job, of all at once, of the search, of the search in the middle of a job,
of what the user started; a stopped worker; SIGTERM; Ctrl-C; both twice; and, once the search has ended, a changed byte in its
newest checkpoint. A run that ends before its fault is run again: every row was hit. Prints a row a run and writes
results/chaos/ENGINE.csv, or plan-ENGINE.csv. Exits 1 if any result differs from the undisturbed run's, any run hangs, or any
process is left running.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from processes_of import kill, origin, running, tree, workers  # noqa: E402

COMMAND = [sys.executable, "-m", "evoprune.main"]
DATA = ["--train-epochs", "1", "--search-images", "100", "--train-images", "200", "--test-images", "100", "--threads", "1"]
SMALL = [*DATA, "--population", "8", "--generations", "12", "--finetune-epochs", "1", "--front", "3"]
MINUTES = "0.4"  # of the run whose plan others repeat
HANG = 240  # seconds that one start of a search may take; undisturbed ones take about 5
TRIES = 10  # that a run has to be hit
ON_WORKERS = ("worker", "worker in a job", "all workers", "stop worker")
ON_SEARCH = ("search", "search in a job", "launcher", "SIGTERM", "Ctrl-C", "SIGTERM twice", "Ctrl-C twice")
WORKS = re.compile(r"s a mask|generation \d|training|measuring")  # what a search says once jobs run


def strike(fault: str, process: subprocess.Popen[bytes], chance: random.Random, words: Callable[[], str]) -> bool:
    """Do it; return False if there was nothing to do it to. `words` returns what the search has said since its start."""
    if fault.endswith(" in a job"):
        fault = fault.removesuffix(" in a job")
        while process.poll() is None and not WORKS.search(words()):
            time.sleep(0.01)
    there = workers(process.pid)
    if fault in ON_WORKERS:
        chosen = there if fault == "all workers" else chance.sample(at_work(there), min(1, len(there)))
        for pid in chosen:
            if fault == "stop worker" and running([pid]):
                os.kill(pid, signal.SIGSTOP)
        if fault != "stop worker":
            kill(chosen)
        return bool(chosen)
    if process.poll() is not None:
        return False
    if fault.startswith(("Ctrl-C", "SIGTERM")):
        for _ in range(1 + fault.endswith("twice")):
            with suppress(ProcessLookupError):
                (os.killpg if fault.startswith("Ctrl-C") else os.kill)(
                    process.pid, signal.SIGINT if fault.startswith("Ctrl-C") else signal.SIGTERM)
            time.sleep(0.05 * chance.random())
    else:
        kill([origin(process.pid) if fault == "search" else process.pid])
    return True


def at_work(pids: list[int]) -> list[int]:
    """Return those that run just now, all if none does."""
    def state(pid: int) -> str:
        with suppress(OSError, IndexError):
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        return ""

    return [pid for pid in pids if state(pid) == "R"] or pids


def damage(run: Path, chance: random.Random) -> bool:
    """Change one byte of the newest checkpoint, where there is an older one."""
    saved = sorted((run / "checkpoint").glob("[0-9]*.npz"))
    if len(saved) < 2:
        return False
    content = bytearray(saved[-1].read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    saved[-1].write_bytes(content)
    return True


def result(run: Path) -> tuple[bytes, ...]:
    """Return what has to be the same: the front, its masks, and how much was measured and trained."""
    return tuple((run / name).read_bytes() for name in ("front.csv", "masks.npz"))


def go(arguments: list[str], faults: list[tuple[float, str]], chance: random.Random, said: Path) -> tuple[list[str], str]:
    """Run a search once, what it says appended to a file; return the faults that struck and what went wrong."""
    with open(said, "a") as file:
        before = file.tell()
        process = subprocess.Popen([*COMMAND, *arguments], stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
    begun, struck, seen = time.monotonic(), [], set()
    while process.poll() is None and time.monotonic() - begun < HANG:
        seen |= set(tree(process.pid))
        if faults and time.monotonic() - begun > faults[0][0]:
            fault = faults.pop(0)[1]
            struck += [fault] * strike(fault, process, chance, lambda: said.read_text()[before:])
        time.sleep(0.02)
    problem = "hang" if process.poll() is None else ""
    if problem:
        kill(tree(process.pid))
    process.wait()
    end = time.monotonic() + 15
    while (left := running(seen)) and time.monotonic() < end:
        time.sleep(0.1)
    kill(left)
    return struck, problem or ("orphan" if left else "")


def disturbed(engine: str, search: list[str], run: Path, seconds: float, chance: random.Random) -> dict[str, object]:
    """Run one search to its end through faults; return a row of the table, all but whether the result is right."""
    possible = ON_SEARCH if engine == "local" else ON_WORKERS + ON_SEARCH
    begun, struck, problems, starts = time.monotonic(), [], [], 0
    while starts < 2 * TRIES and "hang" not in problems and not ((run / "done.json").exists() and (struck or starts >= TRIES)):
        if (run / "done.json").exists():  # it was never hit, or only while it started or ended
            shutil.rmtree(run)
            seconds *= 0.7
        faults = sorted((chance.uniform(0, seconds), chance.choice(possible)) for _ in range(chance.choice((1, 1, 2))))
        count = [] if engine == "local" else ["--workers", str(chance.randint(1, 3)), "--job-timeout", "10"]
        resume = (run / "config.json").exists()
        where = ["--resume", str(run)] if resume else [*search, "--out", str(run)]
        arguments = [*where, "--engine", engine, *count]
        hit, problem = go(arguments, faults if len(struck) < 3 else [], chance, run.with_suffix(".txt"))
        struck += hit
        problems += [problem] * bool(problem)
        starts += 1
        if not (run / "done.json").exists() and chance.random() < 0.3:
            struck += ["changed byte"] * damage(run, chance)
    return {"engine": engine, "faults": "; ".join(struck), "starts": starts, "seconds": round(time.monotonic() - begun, 1),
            "hangs": problems.count("hang"), "orphans": problems.count("orphan")}


def write(table: Path, rows: list[dict[str, object]]) -> None:
    """Write the table as far as it goes."""
    table.parent.mkdir(parents=True, exist_ok=True)
    with open(table, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read(table: Path) -> list[dict[str, object]]:
    """Return the rows of an earlier table."""
    with open(table, newline="") as file:
        return list(csv.DictReader(file))


def wrong(row: dict[str, object]) -> bool:
    """Return whether a run lost anything, hung or left a process, or was never hit."""
    return not row["faults"] or (str(row["same_bytes"]), str(row["hangs"]), str(row["orphans"])) != ("1", "0", "0")


def main() -> int:
    """Run them all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("engine", choices=("local", "processes", "scoop", "dask"))
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "chaos")
    parser.add_argument("--plan", action="store_true", help="repeat a plan that was made by the clock")
    parser.add_argument("--go-on", action="store_true", help="keep the runs that the table already has")
    given = parser.parse_args()
    table = given.out / f"{'plan-' * given.plan}{given.engine}.csv"
    rows = read(table) if given.go_on else []
    with tempfile.TemporaryDirectory() as folder:
        search = SMALL
        if given.plan:
            planned, search = [*DATA, "--minutes", MINUTES, "--out", f"{folder}/planned"], [*DATA, "--plan", f"{folder}/planned"]
            go(planned, [], random.Random(), Path(folder, "planned.txt"))
        for engine in ("local",) if given.engine == "local" else ("local", given.engine):
            begun = time.monotonic()
            go([*search, "--out", f"{folder}/{engine}", "--engine", engine], [], random.Random(), Path(folder, f"{engine}.txt"))
            seconds = time.monotonic() - begun
        for i in range(len(rows), given.runs):
            run = Path(folder, f"run{i}")
            row = disturbed(given.engine, search, run, seconds, random.Random(f"{given.seed} {given.engine} {i}"))
            same = (run / "done.json").exists() and result(run) == result(Path(folder, "local"))
            rows.append({"run": i, **row, "same_bytes": int(same)})
            print(json.dumps(rows[-1]), flush=True)
            write(table, rows)
            if wrong(rows[-1]):
                print(run.with_suffix(".txt").read_text(), flush=True)
    count = sum(wrong(row) for row in rows)
    print(f"{given.engine}: {len(rows)} runs, {sum(bool(row['faults']) for row in rows)} of them hit, {count} wrong")
    return int(count > 0)


if __name__ == "__main__":
    sys.exit(main())
