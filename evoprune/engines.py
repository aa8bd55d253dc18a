"""Where jobs run, behind one call: `engine.map(function, items)` returns a list of results, in order.

A job is a picklable function and a small item; what is heavy is built once a process by `start`. A worker may die or hang at
any moment: its job comes back as lost, runs again alone, and is given up (None) when that kills three workers running.
"""

from __future__ import annotations

import itertools
import logging
import os
import pickle
import sys
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import closing
from importlib import import_module
from importlib.util import find_spec
from queue import Empty, SimpleQueue
from typing import Any, Protocol

from .config import Config, EvopruneError, first_line, with_type
from .processes import Processes, workers_of
from .team import Team
from .worker import DONE, FAILED, LOST, PARENT, Function, Outcome, Start, attempt, nothing

TRIES = 3  # times that a job may kill its worker when nothing else runs
OURS = "evoprune"  # in scoop.CONFIGURATION: started by our own launcher
LOOPBACK = "127.0.0.1"
CONNECT = "10s"  # how long a Dask scheduler may take to answer
LOOK_EVERY = 0.2  # seconds between looks for workers that have ended
QUIET = {"distributed.worker.profile.enabled": False, "distributed.admin.tick.interval": "1s"}  # costs 1 % of each core
WINDOW = 256  # jobs in SCOOP at once: it looks each result up in the list of all
log = logging.getLogger("evoprune")


def local(function: Function, items: Iterable[Any]) -> list[Any]:
    """Run in this process; a function that has `.many` takes all items at once."""
    many = getattr(getattr(function, "func", function), "many", None)  # DEAP's register wraps in a partial
    return list(many(items) if many else map(function, items))


class Local:
    """This process, one job after another."""

    def map(self, function: Function, items: Iterable[Any], arrived: Callable[[int, Any], None] = nothing,
            progress: Callable[[int, int], None] = nothing) -> list[Any]:
        """Return the results in order, or hand each to `arrived(i, result)` as it comes and keep none."""
        if arrived is nothing:
            return local(function, items)
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

    def map(self, function: Function, items: Iterable[Any], arrived: Callable[[int, Any], None] = nothing,
            progress: Callable[[int, int], None] = nothing) -> list[Any]:
        """Return the results in order, None for a job that was given up, or hand each to `arrived(i, result)` as it comes, in
        any order, and keep none: they may be large. Calls `progress(done, of)` as results come.

        Raises:
            EvopruneError: a job raised in its worker, or cannot be sent to one.
        """
        items = list(items)
        self.check_travels(function, items[:1])
        results: list[Any] = [None] * len(items) if arrived is nothing else []
        lost, done = [], itertools.count(1)

        def keep(i: int, outcome: Outcome) -> None:
            kind, result = outcome
            if kind == FAILED:
                raise EvopruneError(f"engine {self.name}: {result}")
            if arrived is nothing:
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


# --------------------------------------------------------------------------------------------------------------- scoop


class Scoop:
    """The SCOOP pool that this program was started in."""

    def __init__(self, config: Config, start: Start):
        import scoop

        check_runs(config)
        if not scoop.CONFIGURATION.get(OURS):
            log.warning("warning: python -m scoop cannot promise an end when a worker dies, a true exit status, that a job "
                        "runs once, or closed ports: prefer python -m evoprune.main --engine scoop --workers N")
        self.start, self.timeout = start, config.job_timeout

    def run(self, function: Function, items: Sequence[Any]) -> Generator[tuple[int, Outcome], None, None]:
        """Yield (index, outcome) of every item once, as they come."""
        from scoop import futures

        for first in range(0, len(items), WINDOW):
            jobs = {futures.submit(attempt, self.start, function, items[i], self.timeout): i
                    for i in range(first, min(len(items), first + WINDOW))}
            for future in futures.as_completed(list(jobs)):
                yield jobs[future], future.result()

    def close(self) -> None:
        """Nothing to end: the launcher does."""


# ---------------------------------------------------------------------------------------------------------------- dask


class Dask:
    """A Dask cluster on this machine, or the one whose scheduler is named.

    Workers of our own have no nanny: one gives up a worker that dies within moments of its start (distributed 2026.8).
    """

    def __init__(self, config: Config, start: Start):
        check_runs(config)
        dask, distributed = import_module("dask"), import_module("distributed")
        self.start, self.timeout = start, config.job_timeout
        self.cluster, self.team = None, Team([])
        self.dead, self.late = distributed.scheduler.KilledWorker, distributed.TimeoutError
        address = config.scheduler
        if address is None:
            listen = {"protocol": ["tcp", "inproc"], "host": [LOOPBACK, ""], "port": [0, None]}  # this process needs no socket
            with dask.config.set({"distributed.scheduler.allowed-failures": 0,  # whose worker dies is told, not repeated
                                  "distributed.scheduler.worker-ttl": "30s", **QUIET}):
                self.cluster = distributed.LocalCluster(n_workers=0, scheduler_kwargs=listen, silence_logs=logging.CRITICAL,
                                                        dashboard_address=f"{LOOPBACK}:0")
            workers_at, address = (listener.contact_address for listener in self.cluster.scheduler.listeners)
            command = [sys.executable, "-m", "distributed.cli.dask_worker", workers_at, "--nthreads", "1", "--no-nanny", "--host",
                       LOOPBACK, "--dashboard-address", f"{LOOPBACK}:0", "--memory-limit", "0", "--preload", "evoprune.worker",
                       "--death-timeout", "60"]
            quiet = {f"DASK_{name.upper().replace('.', '__')}": str(value) for name, value in QUIET.items()}
            self.team = Team([command] * workers_of(config.workers),
                             {**quiet, "DASK_LOGGING__DISTRIBUTED": "critical", PARENT: str(os.getpid()),
                              "PYTHONPATH": os.pathsep.join(filter(None, sys.path))})
        try:
            self.client = distributed.Client(address, timeout=CONNECT)
        except (OSError, ValueError) as error:
            raise EvopruneError(f"scheduler: {address}: {first_line(error)}; expected the address of a Dask scheduler, like "
                                f"tcp://127.0.0.1:8786") from None

    def run(self, function: Function, items: Sequence[Any]) -> Generator[tuple[int, Outcome], None, None]:
        """Yield (index, outcome) of every item once, as they come."""
        jobs = {self.client.submit(attempt, self.start, function, item, self.timeout, pure=False): i  # pure: equal jobs once
                for i, item in enumerate(items)}
        ended: SimpleQueue[Any] = SimpleQueue()
        for future in jobs:
            future.add_done_callback(ended.put)
        try:
            while jobs:
                self.team.look()
                try:
                    future = ended.get(timeout=LOOK_EVERY)
                except Empty:
                    continue
                yield jobs.pop(future), self.outcome_of(future)
        finally:
            self.client.cancel(list(jobs))

    def outcome_of(self, future: Any) -> Outcome:
        """Return what became of a job that ended; if its result went with its worker, Dask runs it again, on a new one."""
        while True:
            try:
                outcome: Outcome = future.result(timeout=LOOK_EVERY)
                return outcome
            except self.late:
                self.team.look()
            except self.dead:
                return LOST, None
            except Exception as error:  # noqa: BLE001  # whatever Dask raises
                raise EvopruneError(f"engine dask: {with_type(error)}") from None

    def close(self) -> None:
        """End a cluster of our own; leave one that was there before."""
        self.client.close()
        self.team.end()
        if self.cluster is not None:
            self.cluster.close()


def under_scoop() -> bool:
    """Return whether SCOOP runs this program; without importing it, since SCOOP itself would have."""
    return "scoop" in sys.modules and bool(sys.modules["scoop"].IS_RUNNING)


def check_runs(config: Config, named: bool = True) -> None:
    """Raise `EvopruneError` if the engine cannot run here, or not with a model or data that were handed in, not named."""
    if config.engine == "scoop" and not under_scoop():
        raise EvopruneError("engine: scoop runs programs that were started under it, and this one was not; use "
                            "python -m evoprune.main --engine scoop, or engine processes from Python")
    if config.engine == "dask" and find_spec("distributed") is None:
        raise EvopruneError("engine: dask is not installed; pip install 'evoprune[dask]'")
    if config.engine in ("scoop", "dask") and not named:
        raise EvopruneError(f"engine: {config.engine} needs a model and data that its workers can import or read, found some "
                            f"handed in; name them (package.module:function, files), or use engine processes")


def open_engine(config: Config, start: Start) -> Local | Engine:
    """Return the engine that the settings name; close it when done.

    Raises:
        EvopruneError: it is not installed, not running, or its workers cannot build what they need.
    """
    pool = ENGINES[config.engine]
    return Local() if pool is None else Engine(config.engine, pool(config, start))


ENGINES: dict[str, Callable[[Config, Start], Pool] | None] = {
    "local": None, "processes": Processes, "scoop": Scoop, "dask": Dask}
