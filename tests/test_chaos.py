import csv
import subprocess
import sys

import pytest
from conftest import ROOT


@pytest.mark.parametrize("engine", [
    "local", *(pytest.param(engine, marks=pytest.mark.slow) for engine in ("processes", "scoop", "dask"))])
def test_a_few_runs_of_chaos_lose_nothing(engine, tmp_path):
    runs = 1 if engine == "local" else 2
    command = [sys.executable, ROOT / "scripts" / "chaos.py", "--runs", str(runs), "--seed", "3", "--out", tmp_path, engine]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    with open(tmp_path / f"{engine}.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert done.returncode == 0 and len(rows) == runs and all(row["faults"] for row in rows), done.stdout
    assert {(row["same_bytes"], row["hangs"], row["orphans"]) for row in rows} == {("1", "0", "0")}, done.stdout
