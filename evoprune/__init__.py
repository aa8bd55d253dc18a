"""evoprune: one run gives the whole accuracy-sparsity Pareto front of pruned models of any PyTorch network.

Its names are imported when they are used: whoever only looks at a front waits for no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import Config
    from .errors import EvopruneError
    from .evaluation.accuracy import accuracy
    from .inputs.splits import Data
    from .inputs.tasks import Task
    from .pruning import prune
    from .results.export import load_packed
    from .results.front import Front, Point, load_front

HOMES = {"Config": "config", "EvopruneError": "errors", "accuracy": "evaluation.accuracy", "Data": "inputs.splits",
         "Task": "inputs.tasks", "prune": "pruning", "Front": "results.front", "Point": "results.front",
         "load_front": "results.front", "load_packed": "results.export"}
__all__ = ["Config", "Data", "EvopruneError", "Front", "Point", "Task", "accuracy", "load_front", "load_packed", "prune"]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used (PEP 562), or the wing that has `evoprune.evolution.default_toolbox`."""
    if name == "evolution":
        return import_module(f"{__name__}.{name}")
    if name in HOMES:
        return getattr(import_module(f"{__name__}.{HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
