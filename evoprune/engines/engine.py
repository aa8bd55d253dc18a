"""Where jobs run, behind one call: `engine.map(function, items)` returns a list of results, in order.

A job is a picklable function and a small item; what is heavy is built once a process by `start`. A worker may die or hang at
any moment: its job comes back as lost, runs again alone, and is given up (None) when that kills three workers running.
"""

from __future__ import annotations

import itertools
import logging
import pickle
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import closing
from functools import partial
from importlib.util import find_spec
from typing import Any, Protocol, runtime_checkable

from ..config import Config
from ..errors import EvopruneError, first_line
from .dask_pool import Dask, connected
from .processes import Processes, workers_of
from .scoop_pool import Scoop, under_scoop
from .worker import DONE, FAILED, LOST, Function, Outcome, Start, ignore

TRIES = 3  # times that a job may kill its worker when nothing else runs
log = logging.getLogger("evoprune")


@runtime_checkable
class Batched(Protocol):
    """A function that also takes all items at once, and calls `progress(done, of)` after each."""

    def many(self, items: Iterable[Any], progress: Callable[[int, int], None]) -> list[Any]:
        """Return the results in order."""


def local(function: Function, items: Iterable[Any], progress: Callable[[int, int], None] = ignore) -> list[Any]:
    """Run in this process; a `Batched` function takes all items at once."""
    plain: object = function.func if isinstance(function, partial) else function  # DEAP's register wraps in a partial
    if isinstance(plain, Batched):
        return plain.many(items, progress)
    items, results = list(items), []
    for item in items:
        results.append(function(item))
        progress(len(results), len(items))
    return results


class Local:
    """This process, one job after another."""

    def map(self, function: Function, items: Iterable[Any], arrived: Callable[[int, Any], None] = ignore,
            progress: Callable[[int, int], None] = ignore) -> list[Any]:
        """Return the results in order, or hand each to `arrived(i, result)` as it comes and keep none."""
        if arrived is ignore:
            return local(function, items, progress)
        for i, item in enumerate(items):
            arrived(i, function(item))
        return []

    def close(self) -> None:
        """Nothing to end."""


class Pool(Protocol):
    """What an engine of worker processes provides."""

    def run(self, function: Function, items: Sequence[Any]) -> Generator[tuple[int, Outcome], None, None]:
        """Yield (index, outcome) of every item once, as they come."""

    def close(self) -> None:
        """End the workers."""


class Engine:
    """`map` over a pool of workers that may die."""

    def __init__(self, name: str, pool: Pool):
        self.name, self.pool = name, pool

    def map(self, function: Function, items: Iterable[Any], arrived: Callable[[int, Any], None] = ignore,
            progress: Callable[[int, int], None] = ignore) -> list[Any]:
        """Return the results in order, None for a job that was given up, or hand each to `arrived(i, result)` as it comes, in
        any order, and keep none: they may be large. Calls `progress(done, of)` as results come.

        Raises:
            EvopruneError: a job raised in its worker, or cannot be sent to one.
        """
        items = list(items)
        self.check_travels(function, items[:1])
        results: list[Any] = [None] * len(items) if arrived is ignore else []
        lost, done = [], itertools.count(1)

        def keep(i: int, outcome: Outcome) -> None:
            kind, result = outcome
            if kind == FAILED:
                raise EvopruneError(f"engine {self.name}: {result}")
            if arrived is ignore:
                results[i] = result
            else:
                arrived(i, result)
            progress(next(done), len(items))

        with closing(self.pool.run(function, items)) as outcomes:  # now, not when an exception lets go of it
            for i, outcome in outcomes:
                if outcome[0] == LOST:
                    lost.append(i)
                else:
                    keep(i, outcome)
        for i in lost:
            keep(i, self.alone(function, items[i]))
        return results

    def alone(self, function: Function, item: Any) -> Outcome:
        """Run a job whose worker died while nothing else runs, so that nothing else can be to blame."""
        log.warning("a worker died or hung; its job runs again, alone")
        for _ in range(TRIES):
            for _, outcome in self.pool.run(function, [item]):
                if outcome[0] != LOST:
                    return outcome
        log.warning("a job killed its worker %d times running alone: given up", TRIES)
        return DONE, None

    def check_travels(self, *parts: Any) -> None:
        try:
            pickle.dumps(parts)
        except Exception as error:  # noqa: BLE001  # pickling raises whatever an object's own methods raise
            raise EvopruneError(f"engine {self.name}: evaluate cannot be sent to worker processes ({first_line(error)}); "
                                f"make it a function or a class of a module, or use engine local") from None

    def close(self) -> None:
        """End the workers."""
        self.pool.close()


def check_runs(config: Config, named: bool = True) -> None:
    """Raise `EvopruneError` if the engine cannot run here, or not with a model or data that were handed in, not named."""
    if config.engine != "local":
        workers_of(config.workers)
    if config.engine == "scoop" and not under_scoop():
        raise EvopruneError("engine: scoop runs programs that were started under it, and this one was not; python -m "
                            "evoprune.main starts itself under it, a program of your own has engine processes")
    if config.engine == "dask" and find_spec("distributed") is None:
        raise EvopruneError("engine: dask is not installed; pip install 'evoprune[dask]'")
    if config.engine == "dask" and config.scheduler is not None:  # now, and not once the dense model is trained
        connected(config.scheduler).close()
    if config.engine in ("scoop", "dask") and not named:
        raise EvopruneError(f"engine: {config.engine} needs a model and data that its workers can import or read, found some "
                            f"handed in; name them (package.module:function, files), or use engine processes")


def open_engine(config: Config, start: Start) -> Local | Engine:
    """Return the engine that the settings name; close it when done.

    Raises:
        EvopruneError: it is not installed, not running, or its workers cannot build what they need.
    """
    check_runs(config)
    workers, timeout = workers_of(config.workers), config.job_timeout
    match config.engine:
        case "processes":
            return Engine("processes", Processes(start, workers, timeout))
        case "scoop":
            return Engine("scoop", Scoop(start, timeout))
        case "dask":
            return Engine("dask", Dask(start, workers, timeout, config.scheduler))
        case "local":
            return Local()
    raise AssertionError(config.engine)
