"""Trains a dense model with evoprune's own training and writes its state dict, to prune it more than once.

    python scripts/train_dense.py dense.safetensors --model resnet18 --data folder:cifar10 --train-epochs 40

FILE, then the flags of `python -m evoprune.main`. Prints the accuracy or other score on the search and the test split. What is
stopped, by --max-seconds too, goes on when the same is called again, from FILE.run, which is there until the model is.
"""

from __future__ import annotations

import logging
import shutil
import sys
from pathlib import Path

import evoprune
from evoprune.main import parser
from evoprune.results.record import read_record
from evoprune.results.written import CONFIG, DENSE


def main() -> int:
    """Train and write; return the exit status."""
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        print("usage: python scripts/train_dense.py FILE --model MODEL --data DATA --train-epochs N ...", file=sys.stderr)
        return 2
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    given = vars(parser().parse_args(sys.argv[2:]))
    run = Path(f"{sys.argv[1]}.run")
    again = {"resume": run, "max_seconds": given.get("max_seconds")}
    try:
        if (run / CONFIG).exists():
            there = read_record(run / CONFIG).settings
            for name in given.keys() - {"max_seconds"}:
                if given[name] != there[name]:
                    raise evoprune.EvopruneError(f"{name}: found {given[name]!r}, but {run} was begun with {there[name]!r}; "
                                                 f"expected the same, or that it is removed")
        front = evoprune.prune(**again if (run / CONFIG).exists() else {  # type: ignore[arg-type]
            **given, "method": "oneshot:magnitude", "targets": "0.5", "out": str(run)})
    except evoprune.EvopruneError as error:
        print(f"train_dense: {error}", file=sys.stderr)
        return 2
    shutil.copy(front.path / DENSE, sys.argv[1])
    shutil.rmtree(run)
    dense, score = front.record.measured, front.record.optimised[front.record.optimised.score]
    tested = f", {score.said(dense.test)} on the test split" if dense.test is not None else ""
    print(f"{sys.argv[1]}: {score.said(dense.score)} on the search split{tested}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
