"""NSGA-II as a generator over resumable states: selection, operators, starts, what differs in the toolbox."""

from .toolbox import default_toolbox

__all__ = ["default_toolbox"]
