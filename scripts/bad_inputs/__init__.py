"""The cases of scripts/bad_input.py, by what is wrong; importing a module adds its groups."""

from . import files, flags, misuse, runs, theirs  # noqa: F401  # each adds its groups to `case.GROUPS`
