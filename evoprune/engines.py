"""The same call wherever individuals are evaluated: `engine(function, items)` returns a list of results, in order."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any


def local(function: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
    """Evaluate in this process; a function that has `.many` takes all items at once."""
    many = getattr(getattr(function, "func", function), "many", None)  # DEAP's register wraps in a partial
    return list(many(items) if many else map(function, items))


ENGINES: dict[str, Callable[[Callable[[Any], Any], Iterable[Any]], list[Any]]] = {"local": local}
