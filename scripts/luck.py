"""How lucky the points of fronts are: by how much the score that they are chosen by is more than that on the test split.

    python scripts/luck.py results/search_images/digits

FOLDER/METHOD/seed-N/ as for rules_table.py. The mean over sparsities from 50 to 99.5 %, evenly in log density, of the point that
is chosen there, in percent. The multi-shot path looks at no search image: what it has is no luck but how the splits differ.
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

import numpy as np
from rules_table import at_or_above, ranked, rows, tested

DENSITIES = np.geomspace(0.5, 0.005, 101)


def luck(run: Path) -> float:
    """Return the mean difference of a run's points, in percent."""
    front = rows(run / "front.csv")
    chosen = [row for density in DENSITIES if (row := at_or_above(front, 1 - density)) is not None]
    return statistics.mean(100 * ranked(row) - tested(row) for row in chosen)


def main(folder: Path) -> None:
    """Print a line a method."""
    print("\nscore that points are chosen by less test score, %, mean of sparsities, of each seed")
    for method in sorted({run.parent.parent for run in folder.glob("*/seed-*/done.json")}):
        found = [luck(run.parent) for run in sorted(method.glob("seed-*/done.json"))]
        print(f"{method.name:42s}" + "".join(f"{each:9.2f}" for each in found) + f"   median {statistics.median(found):.2f}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
