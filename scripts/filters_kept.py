"""Filters that a run's points keep in each layer, for those that the search split chooses at or above each sparsity.

    python scripts/filters_kept.py results/NAME 50 70 90
"""

from __future__ import annotations

import sys

from rules_table import rows

import evoprune


def main() -> None:
    """Print a row a sparsity."""
    front = evoprune.load_front(sys.argv[1])
    a_gene = {layer.name: layer.weights_a_gene for layer in front.layout}
    table = rows(front.path / "layers.csv")
    print(f"of {sum(layer.genes for layer in front.layout)} filters, {', '.join(str(layer.genes) for layer in front.layout)}")
    for wish in map(float, sys.argv[2:]):
        point = front.best(sparsity=wish / 100)
        kept = [int(row["kept"]) // a_gene[row["layer"]] for row in table if row["id"] == point.id]
        print(f"{100 * point.sparsity:6.2f} % sparsity: {sum(kept):4d} filters ({', '.join(map(str, kept))}), "
              f"{100 * point.test_accuracy:.2f} % of test images right")


if __name__ == "__main__":
    main()
