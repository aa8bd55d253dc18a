import csv
import subprocess
import sys

import pytest
from conftest import ROOT


@pytest.mark.parametrize(("engines", "runs"), [
    (("local", "processes"), 1), pytest.param(("scoop",), 2, marks=pytest.mark.slow),
    pytest.param(("dask",), 2, marks=pytest.mark.slow)])
def test_a_few_runs_of_chaos_lose_nothing(engines, runs, tmp_path):
    command = [sys.executable, ROOT / "scripts" / "chaos.py", "--runs", str(runs), "--seed", "3", "--out", tmp_path]
    searches = [subprocess.Popen([*command, engine], stdout=subprocess.PIPE, text=True) for engine in engines]  # at once
    for engine, search in zip(engines, searches):
        said, _ = search.communicate(timeout=900)
        with open(tmp_path / f"{engine}.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        assert search.returncode == 0 and len(rows) == runs and any(row["faults"] for row in rows), said
        assert {(row["same_bytes"], row["hangs"], row["orphans"]) for row in rows} == {("1", "0", "0")}, said
