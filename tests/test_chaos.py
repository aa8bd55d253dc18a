import csv
import subprocess
import sys

import pytest
from conftest import ROOT


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["local", "processes"])
def test_a_few_runs_of_chaos_lose_nothing(engine, tmp_path):
    command = [sys.executable, ROOT / "scripts" / "chaos.py", engine, "--runs", "1", "--seed", "3", "--out", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    with open(tmp_path / f"{engine}.csv", newline="") as file:
        row, = csv.DictReader(file)
    assert done.returncode == 0 and row["faults"] and (row["same_bytes"], row["hangs"], row["orphans"]) == ("1", "0", "0")
