"""Every kind of network through every way to prune it, a row each, in results/any_network/table.csv: what works, and what does
not in one line. The weights are random: nothing is said of speed or accuracy.

    python scripts/any_network.py [NAME...]       all, or these; rows that are there stay, so it goes on where it stopped

A network has 5 minutes and 4 GiB, in a process of its own; timm and transformers need pip install 'evoprune[zoo]'.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import logging
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from any_networks.own import OWN
from any_networks.zoo import ZOO

import evoprune
from evoprune.inputs.nested import taken

NETS = {**OWN, **ZOO}
OUT = Path(__file__).resolve().parent.parent / "results" / "any_network" / "table.csv"
SECONDS, MEBIBYTES = 300, 4096
TINY: dict[str, Any] = {"population": 4, "generations": 1, "threads": 1, "start": "random"}
WAYS: dict[str, dict[str, Any]] = {
    "search": {}, "finetune": {"finetune_epochs": 1, "front": 2}, "bn": {"repair": "bn"},
    "layerwise": {"layerwise": True, "generations": 0}, "total_epochs": {"total_epochs": 10, "targets": "0.1,0.2"},
    "least_squares": {"repair": "least-squares", "knowledge": "weights", "generations": 0}}
COLUMNS = ("network", "parameters", "layers", "not_searched_percent", "reload", *WAYS, "left_by_least_squares_percent", "seconds",
           "mebibytes")


def one(name: str, told: Callable[[dict[str, Any]], None] = lambda row: None) -> dict[str, Any]:
    """Return the row of a network; `told` gets it after each way."""
    started = time.perf_counter()
    torch.manual_seed(0)
    model, inputs, outputs = NETS[name]()
    model.eval()
    x, labels = inputs(36), torch.arange(36) % outputs
    data = evoprune.Data(*((taken(x, slice(i, i + 12)), labels[i:i + 12]) for i in (0, 12, 24)))
    row: dict[str, Any] = {"network": name, "parameters": sum(p.numel() for p in model.parameters())}
    lines = io.StringIO()
    logging.getLogger("evoprune").addHandler(logging.StreamHandler(lines))
    logging.getLogger("evoprune").setLevel(logging.INFO)
    with tempfile.TemporaryDirectory() as folder:
        for way, options in WAYS.items():
            lines.truncate(0)
            try:
                front = evoprune.prune(model, data, out=Path(folder) / way, **{**TINY, **options})
                row[way] = "yes"
            except evoprune.EvopruneError as error:
                row[way] = str(error)
                continue
            finally:
                row["seconds"] = round(time.perf_counter() - started)
                row["mebibytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
                told(row)
            if way == "search":
                row["layers"] = len(front.layout)
                row["not_searched_percent"] = not_searched(front, row["parameters"], lines.getvalue())
                torch.save((x, labels), Path(folder) / "data.pt")
                row["reload"] = reloaded(name, Path(folder))
            if way == "least_squares":
                left = [line for line in lines.getvalue().splitlines() if line.startswith("least squares leaves")]
                row["left_by_least_squares_percent"] = left[0].split()[3] if left else "0.00"
    return row


def not_searched(front: evoprune.Front, parameters: int, lines: str) -> str:
    """Return the share that the run said, which is that of the parameters."""
    said = [line.split()[2] for line in lines.splitlines() if line.startswith("not searched: ")]
    share = f"{100 * (1 - front.layout.weights / parameters):.2f}"
    assert (said or ["0.00"]) == [share], (said, share)
    return share


def reloaded(name: str, folder: Path) -> str:
    """Return whether a fresh process finds the numbers of front.csv."""
    done = subprocess.run([sys.executable, __file__, "--reload", name, str(folder)], capture_output=True, text=True)
    return done.stdout.strip() or done.stderr.strip().splitlines()[-1]


def reload(name: str, folder: Path) -> str:
    """Measure each point of a finished run again."""
    model, _, _ = NETS[name]()
    front = evoprune.load_front(folder / "search", model=model)
    x, labels = torch.load(folder / "data.pt", weights_only=True)
    torch.set_num_threads(1)
    for point in front:
        found = evoprune.accuracy(point.model(), (taken(x, slice(24, 36)), labels[24:]))
        if found != point.test_accuracy:
            return f"point {point.id}: {found} instead of {point.test_accuracy}"
    return "yes"


def row_of(name: str) -> dict[str, Any]:
    """Return the row that a process of its own makes, stopped where it takes too much."""
    end, stopped = time.monotonic() + SECONDS, ""
    with tempfile.TemporaryFile("w+") as said, tempfile.TemporaryFile("w+") as complained:
        process = subprocess.Popen([sys.executable, __file__, "--one", name], stdout=said, stderr=complained)
        while process.poll() is None and not stopped:
            time.sleep(0.1)
            if time.monotonic() > end:
                stopped = f"stopped after {SECONDS} s"
            elif mebibytes(process.pid) > MEBIBYTES:
                stopped = f"stopped above {MEBIBYTES} MiB"
        process.kill()
        said.seek(0), complained.seek(0)
        rows, lines = list(csv.DictReader(said, COLUMNS)), complained.read().strip().splitlines()
    row = {"network": name, **(rows[-1] if rows else {})}  # each has one way more than the one before
    if missing := [way for way in WAYS if not row.get(way)]:
        row[missing[0]] = stopped or (lines or ["ended"])[-1]
    return row


def mebibytes(pid: int) -> int:
    """Return the memory of a process, 0 where it has ended."""
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize() >> 20
    return 0


def main() -> int:
    """Write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NETS)}")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--reload", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=OUT)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    if given.reload:
        print(reload(given.reload[0], Path(given.reload[1])))
        return 0
    if given.one:
        writer = csv.DictWriter(sys.stdout, COLUMNS)
        with contextlib.redirect_stdout(sys.stderr):
            writer.writerow(one(given.one, lambda row: (writer.writerow(row), sys.__stdout__.flush())))
        return 0
    given.out.parent.mkdir(parents=True, exist_ok=True)
    there = {row["network"] for row in csv.DictReader(given.out.open())} if given.out.exists() else set()
    if not there:
        given.out.write_text(",".join(COLUMNS) + "\n")
    for name in given.names or NETS:
        if name not in there:
            row = row_of(name)
            with given.out.open("a", newline="") as file:
                csv.DictWriter(file, COLUMNS, lineterminator="\n").writerow(row)
            print({column: value for column, value in row.items() if value != "yes"}, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
