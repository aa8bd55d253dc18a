"""What one gene decides on. Genes have the shape of a layer's parameter with some dimensions collapsed to 1: a mask is broadcast.

    weight   nothing is collapsed: (out, in, h, w)
    filter   all but the dimension of the outputs: (out, 1, 1, 1), a row of a linear layer
"""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase


def collapsed(unit: str, dimensions: int, output: int) -> tuple[int, ...]:
    """Return the dimensions of a parameter that its genes lack; `output` is that of the outputs."""
    return () if unit == "weight" else tuple(d for d in range(dimensions) if d != output)


def names_of(parameter: str) -> list[str]:
    """Return what a pattern may call a parameter: its own name, and the modules above it."""
    return [parameter, *(parameter[:i] for i, c in enumerate(parameter) if c == ".")]


def unit_of(parameter: str, patterns: Sequence[tuple[str, str]]) -> str:
    """Return the unit of the first of the (pattern, unit) that fits a parameter, "weight" if none does."""
    return next((unit for pattern, unit in patterns if any(fnmatchcase(name, pattern) for name in names_of(parameter))), "weight")
