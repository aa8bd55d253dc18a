"""Bad input is one line and costs nothing: some 2,000 mistakes, on the command line and in Python, and what became of each.

    nice python scripts/bad_input.py --only weights

Each case has a fresh folder, a process of its own and 60 seconds. Prints a table, group x outcome, and each case that did not end
as it should; writes results/bad_input/table.csv. Exits 1 if there was one. What the cases hand in stands in scripts/bad_inputs/.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import logging
import multiprocessing
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import islice
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(Path(__file__).resolve().parent))

from bad_inputs.case import CODE_RAN, GROUPS, TEMPLATES, make_templates  # noqa: E402

COMMAND = [sys.executable, "-m", "evoprune.main"]
LIMIT, MEMORY = 60, 12 << 30  # seconds and bytes that a case may take
COLUMNS = ("group", "case", "how", "outcome", "said")
IGNORED = {"lock", "__pycache__"}  # names of files that may come and go
FORKS = multiprocessing.get_context("forkserver")  # its server imports torch once; each case is a fork of it
PRELOADED = ["torch", "sklearn.datasets", "PIL.Image", "safetensors.torch", "evoprune.pruning", "bad_inputs.case"]
Row = dict[str, str]


def run(groups: Sequence[str], each: Callable[[Row], None] = lambda row: None, every: int = 1) -> list[Row]:
    """Run the cases of some groups; return a row a case, of `COLUMNS` and what was `expected`."""
    os.environ.update(OMP_NUM_THREADS="1", PYTHONDONTWRITEBYTECODE="1")
    FORKS.set_forkserver_preload(PRELOADED)
    rows = []
    with tempfile.TemporaryDirectory(prefix="bad_input_") as folder:
        if problem := apart(made, folder)[1]:
            raise RuntimeError(f"no runs to damage: {problem}")
        for group in groups:
            for name, case in islice(GROUPS[group]().items(), every // 2, None, every):
                here = Path(folder, "case")
                here.mkdir()
                outcome, said = apart(tried, group, name, folder)
                rows.append({"group": group, "case": name, "how": "api" if callable(case.do) else "cli", "outcome": outcome,
                             "said": short(said.replace(str(here), "DIR").replace(folder, "DIR").replace(str(ROOT), ".")),
                             "expected": case.expected})
                each(rows[-1])
                shutil.rmtree(here)
    return rows


def apart(function: Callable[..., tuple[str, str]], *arguments: str) -> tuple[str, str]:
    """Return (outcome, said) of a function, in a process of its own that may die or hang."""
    ours, theirs = FORKS.Pipe()
    process = FORKS.Process(target=answer, args=(theirs, function, *arguments))
    process.start()
    theirs.close()
    try:
        return ours.recv() if ours.poll(LIMIT + 30) else ("hang", "")
    except EOFError:
        process.join(5)
        return f"other exit status {process.exitcode}", ""
    finally:
        if process.is_alive() and process.pid:
            kill_group(process.pid)
        process.join()


def kill_group(pid: int) -> None:
    """End a case and what it started; it leads a session of its own."""
    with suppress(ProcessLookupError):  # it has just ended, or not begun
        os.killpg(pid, 9)


def answer(to: Connection, function: Callable[..., tuple[str, str]], *arguments: str) -> None:
    """Send what a function returns."""
    os.setsid()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    try:
        to.send(function(*arguments))
    except BaseException:  # noqa: BLE001  # whatever a case raises while it is prepared
        to.send(("not prepared", traceback.format_exc()))


def made(folder: str) -> tuple[str, str]:
    """Make the runs that cases start from."""
    os.chdir(folder)
    logging.getLogger("evoprune").addHandler(logging.NullHandler())
    make_templates(Path(folder))
    return "made", ""


def tried(group: str, name: str, folder: str) -> tuple[str, str]:
    """Prepare a case, do it, and return what became of it."""
    case = GROUPS[group]()[name]
    TEMPLATES.append(Path(folder))
    os.chdir(Path(folder, "case"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch has some for sparse, quantised and scripted things
        for prepare in case.prepare:
            prepare()
    before = snapshot()
    outcome, said = called(case.do) if callable(case.do) else commanded([each.replace("TEMPLATES", folder) for each in case.do])
    changed = sorted(str(path) for path, _ in before.items() ^ snapshot().items())
    if Path(CODE_RAN).exists():
        return "code ran", said
    if outcome == "accepted" or not changed:
        return outcome, said
    if outcome == "one line":
        outcome = "resumable run" if resumable(changed) else "lost files"
    return outcome, f"{said} [files: {', '.join(sorted(set(changed))[:4])}]"


def commanded(arguments: Sequence[str]) -> tuple[str, str]:
    """Return what became of a command line."""
    try:
        done = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, errors="replace", timeout=LIMIT,
                              stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired as late:
        return "hang", str(late.stdout or "")[-200:]
    lines = done.stderr.splitlines()
    if any(line.startswith("Traceback (most recent call last)") for line in lines):
        return "traceback", lines[-1]
    if done.returncode == 0:
        return "accepted", lines[-1] if lines else ""
    if done.returncode != 2:
        return f"other exit status {done.returncode}", " / ".join(lines)
    if len(lines) == 1 and lines[0].startswith("evoprune: ") and lines[0].isprintable():
        return "one line", lines[0]
    return "many lines", " / ".join(lines)


def called(do: Callable[[], Any]) -> tuple[str, str]:
    """Return what became of a call of the Python API."""
    from evoprune import EvopruneError

    logging.getLogger("evoprune").addHandler(logging.NullHandler())  # a program listens to its log, or not
    with tempfile.TemporaryFile("w+") as errors:
        os.dup2(errors.fileno(), 2)
        try:
            do()
            outcome, said = "accepted", ""
        except EvopruneError as error:
            outcome, said = "one line" if str(error) and str(error).isprintable() else "many lines", str(error)
        except SystemExit as left:
            outcome, said = f"other exit status {left.code}", "SystemExit"
        except KeyboardInterrupt:
            outcome, said = "other exit status 130", "KeyboardInterrupt"
        except BaseException as error:  # noqa: BLE001  # the point of it all
            where = [frame for frame in traceback.extract_tb(error.__traceback__) if "/evoprune/" in frame.filename]
            place = f"{Path(where[-1].filename).name}:{where[-1].lineno}: " if where else ""
            outcome, said = "traceback", f"{place}{type(error).__name__}: {error}"
        sys.stderr.flush()
        errors.seek(0)
        warned = errors.read()
    return ("many lines", f"{warned} / {said}") if warned and outcome == "one line" else (outcome, said)


def snapshot() -> dict[Path, str]:
    """Return what lies in the present folder: the hash of each file, by path."""
    found = {}
    for path in Path().rglob("*"):
        if not IGNORED & set(path.parts) and path.name != CODE_RAN:
            plain = path.is_file() and not path.is_symlink()
            found[path] = hashlib.sha256(path.read_bytes()).hexdigest() if plain else "folder or link"
    return found


def resumable(changed: Sequence[str]) -> bool:
    """Return whether a refused run left one that goes on: with a checkpoint."""
    runs = {path.split("/")[0] for path in changed}
    return all(Path(name, "config.json").exists() and [*Path(name, "checkpoint").glob("[0-9]*.npz")] for name in runs)


def short(said: str) -> str:
    """Return what was said in a line of a table."""
    line = re.sub(r"\s*\n\s*", " / ", said.strip())
    return line if len(line) <= 300 else f"{line[:200]} ... {line[-95:]}"


def write(rows: Sequence[Row], out: Path) -> None:
    """Write the table."""
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "table.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def summary(rows: Sequence[Row]) -> str:
    """Return a table of groups x outcomes."""
    outcomes = [outcome for outcome, _ in Counter(row["outcome"] for row in rows).most_common()]
    lines = [["group", *outcomes, "cases"]]
    for group in [*dict.fromkeys(row["group"] for row in rows), "all"]:
        own = [row["outcome"] for row in rows if group in (row["group"], "all")]
        lines.append([group, *(str(own.count(outcome) or "") for outcome in outcomes), str(len(own))])
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in lines)


def told(row: Row) -> str:
    """Return what became of a case, in a line."""
    return f"{row['group']} | {row['case']} ({row['how']}): {row['outcome']}, expected {row['expected']}: {row['said']}"


def wrong(row: Row) -> bool:
    """Return whether a case did not end as it should."""
    return row["outcome"] != row["expected"]


def main() -> int:
    """Run them all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "bad_input")
    parser.add_argument("--only", default="", metavar="GROUP", help="groups with this in their name")
    parser.add_argument("--list", action="store_true", help="only say which cases there are")
    given = parser.parse_args()
    groups = [group for group in GROUPS if given.only in group]
    if given.list:
        print("\n".join(f"{group} | {name}" for group in groups for name in GROUPS[group]()))
        return 0
    rows = run(groups, lambda row: print(told(row), flush=True) if wrong(row) else None)
    write(rows, given.out)
    count = sum(map(wrong, rows))
    print(f"\n{summary(rows)}\n\n{len(rows)} cases, {sum(row['how'] == 'cli' for row in rows)} of them on the command line; "
          f"{count} did not end as they should")
    return int(count > 0)


if __name__ == "__main__":
    sys.exit(main())
