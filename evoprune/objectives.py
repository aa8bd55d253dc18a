"""What is optimised, declared once: what an objective is called, which way is better, its worst and best value, how it is shown
and on which images it is counted. Fitness, selection, the files of a run, its pictures and tables follow from it.

One of your own, in a file that `--objectives accuracy,sparsity,FILE.py:kept_layers` names:

    from evoprune.objectives import Objective, measures

    @measures(Objective("kept_layers", weight=-1.0, worst=4.0, best=0.0))
    def kept_layers(individual, layout):
        return sum(bits.any() for bits in individual)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import EvopruneError, with_type

Floats = npt.NDArray[np.float64]
SPARSE, DENSE = 0.005, 0.5  # the densities between which hvlog looks


@dataclass(frozen=True)
class Objective:
    """One thing that is optimised, as plain data; config.json holds it."""

    name: str  # of its column in front.csv
    weight: float  # DEAP's: 1.0 to be maximised, -1.0 to be minimised
    worst: float  # that of a mask which no worker survived measuring; from here hvlog counts
    best: float
    splits: tuple[str, ...] = ()  # of images that it is counted on; none: the mask alone has it
    percent: bool = False  # shown as one
    log_density: bool = False  # it is a share that is pruned, looked at as the logarithm of what is left
    extreme: str = ""  # its column in log.csv, the best of the archive; its name with "best_" unless given
    metric: str = ""  # what people call it, where its column has another name

    @property
    def logged(self) -> str:
        return self.extreme or f"best_{self.name}"

    @property
    def scale(self) -> float:
        """What a value is multiplied by where it is shown."""
        return 100.0 if self.percent else 1.0

    @property
    def label(self) -> str:
        """What an axis says."""
        return f"{self.title}, %" if self.percent else self.title.replace("_", " ")

    @property
    def title(self) -> str:
        """What people call it."""
        return self.metric or self.name

    def fits(self, value: float, limit: float) -> bool:
        """Return whether a value is at least as good as a limit."""
        return self.weight * value >= self.weight * limit

    def best_of(self, values: Sequence[float]) -> float:
        """Return the best of some values, the worst there can be if there is none."""
        return float(self.weight * max([self.weight * self.worst, *(self.weight * value for value in values)]))

    def share(self, value: float) -> float:
        """Return where a value is between the worst and the best, 0..1."""
        return min(1.0, max(0.0, (value - self.worst) / (self.best - self.worst)))

    def beside(self, limit: float, values: Sequence[float]) -> tuple[str, str]:
        """Return in words a limit, and what comes nearest to it, in four digits that a wish may have."""
        nearest = math.floor(1e4 * self.weight * self.best_of(values) + 1e-9) / 1e4
        return f"{self.name} {'>=' if self.weight > 0 else '<='} {limit:.6g}", f"{self.name} {self.weight * nearest:.4f}"

    def shown(self, value: float) -> str:
        """Return a value as a table shows it."""
        return f"{self.scale * value:.2f}" if self.percent else f"{value:g}"

    def within(self, value: float, low: float, high: float) -> str:
        """Return a value and its interval as a table shows them."""
        return f"{self.shown(value)} ({self.shown(low)}-{self.shown(high)})"

    def said(self, value: float) -> str:
        """Return a value as a sentence says it."""
        return self.shown(value) + " %" * self.percent


Measure = Callable[..., float]  # (individual, layout) -> value
ACCURACY = Objective("accuracy", 1.0, 0.0, 1.0, ("search", "test"), percent=True)
SPARSITY = Objective("sparsity", 1.0, 0.0, 1.0, percent=True, log_density=True, extreme="max_sparsity")
OBJECTIVES: dict[str, Objective] = {each.name: each for each in (ACCURACY, SPARSITY)}
MEASURES: dict[str, Measure] = {}  # of the objectives that the mask alone has


def measures(objective: Objective) -> Callable[[Measure], Measure]:
    """Let a function of the same name measure an objective: `function(individual, layout)` -> a finite number."""
    def register(function: Measure) -> Measure:
        if function.__name__ != objective.name:
            raise EvopruneError(f"objectives: the function {function.__name__} measures {objective.name!r}, expected one of that "
                                f"name")
        OBJECTIVES[objective.name], MEASURES[objective.name] = objective, function
        return function

    return register


class Objectives(tuple[Objective, ...]):
    """Those of one run, in the order of an individual's `fitness.values`."""

    @cached_property
    def names(self) -> list[str]:
        return [o.name for o in self]

    @cached_property
    def weights(self) -> tuple[float, ...]:
        return tuple(o.weight for o in self)

    @cached_property
    def worst(self) -> tuple[float, ...]:
        return tuple(o.worst for o in self)

    @cached_property
    def score(self) -> int:
        """The place of the one that is counted on images: what training improves and a floor bounds."""
        return next(i for i, o in enumerate(self) if o.splits)

    @cached_property
    def axis(self) -> int:
        """The place of the one that fronts are spread and drawn along."""
        return next(i for i, o in enumerate(self) if o.log_density)

    @cached_property
    def others(self) -> list[int]:
        return [i for i in range(len(self)) if i not in (self.score, self.axis)]

    def measured(self, score: float, individual: Any, layout: Any) -> tuple[float, ...]:
        """Return the values of a mask whose score is known.

        Raises:
            EvopruneError: a measure fails, or returns something else than a finite number.
        """
        return tuple(score if o.splits else measured_by(o.name, individual, layout) for o in self)

    def scored(self, values: Sequence[float], score: float) -> tuple[float, ...]:
        """Return the values with another score."""
        return tuple(score if i == self.score else value for i, value in enumerate(values))

    def reaches(self, values: Floats, floor: float) -> npt.NDArray[np.bool_]:
        """Return which of the values (n, objectives) reach a floor of the score."""
        weight = self[self.score].weight
        reached: npt.NDArray[np.bool_] = weight * values[:, self.score] >= weight * floor - 1e-12
        return reached

    def spread(self, values: Floats) -> Floats:
        """Return values with the logarithm of the density, negative, on the axis: crowding then leaves no sparsity empty."""
        found = values.copy()
        found[:, self.axis] = -np.log(np.maximum(1 - values[:, self.axis], SPARSE / 2))
        return found

    def front(self, values: Floats) -> list[int]:
        """Return the places of the values (n, objectives) that no others dominate, of equal ones the first, along the axis."""
        import moocore  # whoever only looks at a front does without

        if not len(values):
            return []
        best = np.flatnonzero(moocore.is_nondominated(values * self.weights, maximise=True))
        order = np.lexsort((values[best, self.score], values[best, self.axis]))
        return [int(i) for i in best[order]]

    def knee(self, values: Floats) -> int:
        """Return the place of the point farthest above the line between the ends of a front, all objectives scaled to 0..1; of
        equally far ones the last."""
        found = values * self.weights
        low, high = found.min(0), found.max(0)
        above = ((found - low) / np.maximum(high - low, 1e-12)).sum(1)
        return int(np.flatnonzero(above == above.max())[-1])

    @property
    def hvlog_in_words(self) -> str:
        """What `hvlog` is."""
        if self.others:
            return "hvlog: the share of all that could be, from worst to best, that the front reaches"
        score = self[self.score]
        scaled = "" if (score.worst, score.best) == (0, 1) else f", scaled from {score.worst:g}..{score.best:g} to 0..1"
        return f"hvlog: the mean {score.title} of the front over log density, from 50 to 0.5 % of the weights{scaled}"

    def hvlog(self, values: Floats) -> float:
        """Return the share of the space from the worst to the best that values (n, objectives) dominate, the axis in log density
        from 0.5 to 0.005. With accuracy and sparsity, the mean accuracy over log density: at each density that of the best
        point at or below it, 0 if there is none."""
        import moocore

        shares = np.empty_like(values)
        for i, o in enumerate(self):
            if o.log_density:
                shares[:, i] = np.log(np.clip(1 - values[:, i], SPARSE, DENSE) / DENSE) / math.log(SPARSE / DENSE)
            else:
                shares[:, i] = np.clip((values[:, i] - o.worst) / (o.best - o.worst), 0, 1)
        return float(moocore.hypervolume(shares, ref=np.zeros(len(self)), maximise=True))


def measured_by(name: str, individual: Any, layout: Any) -> float:
    """Return what an objective's measure says of a mask."""
    try:
        value = float(MEASURES[name](individual, layout))
    except Exception as error:  # noqa: BLE001  # it may be the user's
        raise EvopruneError(f"objectives: {name} failed on a mask: {with_type(error)}") from None
    if not math.isfinite(value):
        raise EvopruneError(f"objectives: {name} of a mask is {value}, expected a finite number")
    return value


USUAL = Objectives((ACCURACY, SPARSITY))


def split_objectives(text: str) -> list[str]:
    """Return what --objectives names: names, or FILE.py:function and the like; what those name may be read later.

    Raises:
        EvopruneError: a name that is none, or one of the usual two is missing.
    """
    names = [name.strip() for name in text.split(",")]
    missing = [name for name in USUAL.names if name not in names]
    if missing or len(set(names)) < len(names):
        raise EvopruneError(f"objectives: found {text!r}, expected {','.join(USUAL.names)}, and more after a comma, each once")
    for name in names:
        if ":" not in name and name not in OBJECTIVES:
            raise EvopruneError(f"objectives: found {name!r}, expected {', '.join(OBJECTIVES)}, FILE.py:function or "
                                f"package.module:function")
    return names


def objectives_of(text: str) -> Objectives:
    """Return the objectives of a run whose --objectives have been read."""
    return Objectives(tuple(OBJECTIVES[name.rpartition(":")[2]] for name in split_objectives(text)))
