"""The best point of a front at or above each sparsity, chosen on the search split, with its test accuracy.

    python scripts/at_sparsity.py results/NAME 90 95 98
"""

from __future__ import annotations

import sys

import evoprune


def main() -> None:
    """Print a row a sparsity, and on what it was measured."""
    front = evoprune.load_front(sys.argv[1])
    print(f"{'at least':>8}  {'sparsity':>8}  {'search':>7}  test accuracy (95 % interval)")
    for wish in map(float, sys.argv[2:]):
        try:
            point = front.best(sparsity=wish / 100)
        except evoprune.EvopruneError:
            print(f"{wish:8.2f}  none")
            continue
        print(f"{wish:8.2f}  {100 * point.sparsity:8.2f}  {100 * point.accuracy:7.2f}  {100 * point.test_accuracy:.2f} "
              f"({100 * point.test_low:.2f}-{100 * point.test_high:.2f})")
    record = front.record
    print(f"seed {record.config.seed}, {record.device}, {record.threads} threads, "
          + ", ".join(f"{k} {v}" for k, v in record.versions.items()))


if __name__ == "__main__":
    main()
