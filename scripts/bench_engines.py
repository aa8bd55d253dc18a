"""What an engine costs: throughput of 1 and 2 workers against `local` with the same threads, and the CPU time beside it.

    python scripts/bench_engines.py [--data-dir DIR --weights FILE]

Jobs: 50 ms of CPU with payloads of 8 KB and 1.4 MB; and, with MNIST and a trained LeNet-5, masks of it on 5,000 images.
Efficiency is throughput over that of as many separate `local` processes at once, measured just before: what two workers
could do on this machine at that moment. Prints a row a case and writes results/bench_engines/table.csv as it goes.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from evoprune.config import Config
from evoprune.engines.engine import open_engine
from evoprune.engines.worker import ignore

ROOT = Path(__file__).resolve().parent.parent
JOB = 0.05  # seconds of CPU
PAYLOADS = {"8 KB": 8_000, "1.4 MB": 1_400_000}
JOBS = 60
ENGINES = ("processes", "scoop", "dask")


def burn(payload: np.ndarray) -> float:
    """Take 50 ms of CPU time, whatever else runs."""
    end = time.process_time() + JOB
    while time.process_time() < end:
        np.bitwise_count(payload[:8000]).sum()
    return float(payload[0])


def main(arguments: Sequence[str]) -> int:
    """Measure the 50 ms jobs on one engine, in this process, which SCOOP's launcher may have started."""
    name, workers = arguments
    torch.set_num_threads(1)
    broker = os.getppid() if name == "scoop" else None
    engine = open_engine(Config(engine=name, workers=int(workers)), ignore)
    for label, size in PAYLOADS.items():
        payload = [np.full(size, i, np.uint8) for i in range(JOBS)]
        engine.map(burn, payload[:8])  # the workers are up
        begun, own, other = time.perf_counter(), time.process_time(), cpu(broker)
        assert engine.map(burn, payload) == [float(i) for i in range(JOBS)]
        took = time.perf_counter() - begun
        row = {"job": "50 ms of CPU", "payload": label, "engine": name, "workers": int(workers), "jobs_a_second": JOBS / took,
               "origin_cpu_ms_a_job": 1000 * (time.process_time() - own) / JOBS if name != "local" else None,
               "broker_cpu_ms_a_job": 1000 * (cpu(broker) - other) / JOBS if broker else None}
        print("ROW" + json.dumps(row), flush=True)
    engine.close()
    return 0


def cpu(pid: int | None) -> float:
    """Return the CPU seconds that a process has taken."""
    if pid is None:
        return 0.0
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def burning(name: str, workers: int) -> dict[str, dict[str, Any]]:
    """Run `main` in a process of its own, `local` in as many as there are workers; return a row a payload.

    SCOOP's origin has the program's name from the launcher.
    """
    start = f"import sys; from evoprune.engines.scoop_launch import launch; " \
            f"sys.exit(launch({[name, str(workers)]}, {workers}, None, None, 'bench_engines'))"
    command = ["-c", start] if name == "scoop" else [__file__, "--one", name, str(workers)]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'scripts'}:{ROOT}", "OMP_NUM_THREADS": "1"}
    count = workers if name == "local" else 1
    processes = [subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, text=True, env=environment)
                 for _ in range(count)]
    found: dict[str, dict[str, Any]] = {}
    for process in processes:
        for line in process.communicate()[0].splitlines():
            if line.startswith("ROW"):
                row = json.loads(line[3:])
                row["jobs_a_second"] += found.get(row["payload"], {"jobs_a_second": 0})["jobs_a_second"]
                found[row["payload"]] = row
        assert process.returncode == 0
    return found


def masks(name: str, workers: int, flags: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Measure masks of LeNet-5 on MNIST, from the log of a small search, its first generation left out: workers start in it."""
    rate, count = 0.0, workers if name == "local" else 1
    with tempfile.TemporaryDirectory() as folder:
        searches = [subprocess.Popen([sys.executable, "-m", "evoprune.main", "--model", "lenet5", "--data", "mnist", *flags,
                                      "--population", "16", "--generations", "4", "--threads", "1", "--test-images", "100",
                                      "--engine", name, "--workers", str(workers), "--out", f"{folder}/{i}"],
                                     stdout=subprocess.DEVNULL) for i in range(count)]
        for i, search in enumerate(searches):
            assert search.wait() == 0
            with open(f"{folder}/{i}/log.csv", newline="") as file:
                first, *_, last = csv.DictReader(file)
            rate += (int(last["evaluations"]) - int(first["evaluations"])) / (float(last["seconds"]) - float(first["seconds"]))
    return {"8 KB": {"job": "LeNet-5 mask, 5,000 images", "payload": "8 KB", "engine": name, "workers": workers,
                     "jobs_a_second": rate, "origin_cpu_ms_a_job": None, "broker_cpu_ms_a_job": None}}


def write(rows: list[dict[str, Any]]) -> None:
    """Write the table as far as it goes."""
    out = ROOT / "results" / "bench_engines"
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "table.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def everything(flags: Sequence[str]) -> None:
    """Measure every engine with 1 and 2 workers, and local before each."""
    rows: list[dict[str, Any]] = []
    for name in ENGINES:
        for workers in (1, 2):
            for measure in (burning, *([lambda *case: masks(*case, flags)] if flags else [])):
                base = measure("local", workers)
                for payload, row in measure(name, workers).items():
                    local = base[payload]["jobs_a_second"]
                    row |= {"local_jobs_a_second": local, "efficiency": row["jobs_a_second"] / local,
                            "load": os.getloadavg()[0]}
                    rows.append(row)
                    write(rows)
                    print("  ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), flush=True)


def run() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--one", nargs=2, metavar=("ENGINE", "WORKERS"))
    parser.add_argument("--data-dir")
    parser.add_argument("--weights")
    given = parser.parse_args()
    if given.one:
        sys.exit(main(given.one))
    flags = ["--data-dir", given.data_dir or "data", "--weights", given.weights] if given.weights else []
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, "
          f"torch {torch.__version__}")
    everything(flags)


if __name__ == "__main__":
    run()
