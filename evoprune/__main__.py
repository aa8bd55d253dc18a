"""`python -m evoprune` is `python -m evoprune.main`."""

import sys

from evoprune.main import main

if __name__ == "__main__":
    sys.exit(main())
