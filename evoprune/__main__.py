"""`python -m evoprune`, and the command `evoprune`, are `python -m evoprune.main`."""

import os
import sys

from evoprune.interrupts import end_at_once


def start() -> int:
    """Run the command line; return its exit status."""
    end_at_once()
    if not {"", os.getcwd()}.intersection(sys.path):  # last: models of the user's lie there, as for `python -m`
        sys.path.append(os.getcwd())
    from evoprune.main import main

    return main()


if __name__ == "__main__":
    sys.exit(start())
