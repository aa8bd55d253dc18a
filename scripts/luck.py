"""How lucky the points of fronts are: by how much they score more on the search split than on the test split.

    python scripts/luck.py results/search_images/digits

FOLDER/METHOD/seed-N/ as for rules_table.py. Of the points from 50 to 99.5 % sparsity the mean difference, in percent, less
what the dense model scores more. The multi-shot path looks at no search image: what it has is no luck but how the splits differ.
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

from rules_table import rows, score_of

from evoprune.results.record import read_record

SPARSITIES = 0.5, 0.9955  # a mask for 99.5 % has a weight or two less than that leaves


def luck(run: Path) -> float:
    """Return the mean difference of a run's points, in percent."""
    front, dense = rows(run / "front.csv"), read_record(run / "config.json").measured
    score, (low, high) = score_of(front), SPARSITIES
    assert dense.test is not None
    return 100 * (statistics.mean(float(row[score]) - float(row[f"test_{score}"]) for row in front
                                  if low <= float(row["sparsity"]) <= high) - dense.score + dense.test)


def main(folder: Path) -> None:
    """Print a line a method."""
    print("\nsearch less test score, %, less the dense model's, mean of the points of each seed")
    for method in sorted({run.parent.parent for run in folder.glob("*/seed-*/done.json")}):
        found = [luck(run.parent) for run in sorted(method.glob("seed-*/done.json"))]
        print(f"{method.name:42s}" + "".join(f"{each:9.2f}" for each in found) + f"   median {statistics.median(found):.2f}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
