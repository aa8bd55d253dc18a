"""Trains a dense model with evoprune's own training and writes its state dict, to prune it more than once.

    python scripts/train_dense.py dense.safetensors --model resnet18 --data folder:cifar10 --train-epochs 40

FILE, then the flags of `python -m evoprune.main`. Prints the accuracy or other score on the search and the test split.
"""

from __future__ import annotations

import logging
import shutil
import sys
import tempfile

import evoprune
from evoprune.main import parser
from evoprune.results.written import DENSE


def main() -> int:
    """Train and write; return the exit status."""
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        print("usage: python scripts/train_dense.py FILE --model MODEL --data DATA --train-epochs N ...", file=sys.stderr)
        return 2
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    given = vars(parser().parse_args(sys.argv[2:]))
    with tempfile.TemporaryDirectory() as folder:
        try:
            front = evoprune.prune(**{**given, "method": "oneshot:magnitude", "targets": "0.5", "out": f"{folder}/run"})
        except evoprune.EvopruneError as error:
            print(f"train_dense: {error}", file=sys.stderr)
            return 2
        shutil.copy(front.path / DENSE, sys.argv[1])
    dense, score = front.record.measured, front.record.optimised[front.record.optimised.score]
    tested = f", {score.said(dense.test)} on the test split" if dense.test is not None else ""
    print(f"{sys.argv[1]}: {score.said(dense.score)} on the search split{tested}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
