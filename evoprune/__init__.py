"""evoprune: one run gives the whole accuracy-sparsity Pareto front of pruned models of any PyTorch network."""

from .config import Config, EvopruneError
from .evaluation import accuracy
from .front import Front, Point, load_front
from .pruning import prune
from .splits import Data

__all__ = ["Config", "Data", "EvopruneError", "Front", "Point", "accuracy", "load_front", "prune"]
