"""A Dask cluster: one of this machine's own, or one that was there."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Generator, Sequence
from importlib import import_module
from queue import Empty, SimpleQueue
from typing import Any

from ..errors import EvopruneError, first_line, with_type
from .team import Team
from .worker import LOST, PARENT, Function, Outcome, Start, attempt

LOOPBACK = "127.0.0.1"
CONNECT = "10s"  # how long a Dask scheduler may take to answer
LOOK_EVERY = 0.2  # seconds between looks for workers that have ended
WORKER = "evoprune.engines.worker"  # the module whose `dask_setup` each worker calls
QUIET = {"distributed.worker.profile.enabled": False, "distributed.admin.tick.interval": "1s"}  # costs 1 % of each core


def connected(address: str) -> Any:
    """Return a client of the scheduler at an address.

    Raises:
        EvopruneError: there is none.
    """
    try:
        return import_module("distributed").Client(address, timeout=CONNECT)
    except (OSError, ValueError) as error:
        raise EvopruneError(f"scheduler: {address}: {first_line(error)}; expected the address of a Dask scheduler, like "
                            f"tcp://127.0.0.1:8786") from None


class Dask:
    """A Dask cluster on this machine, or the one whose scheduler is named.

    Workers of our own have no nanny: one gives up a worker that dies within moments of its start (distributed 2026.8).
    """

    def __init__(self, start: Start, workers: int, timeout: float | None, scheduler: str | None):
        dask, distributed = import_module("dask"), import_module("distributed")
        self.start, self.timeout = start, timeout
        self.cluster, self.team = None, Team([])
        self.dead, self.late = distributed.scheduler.KilledWorker, distributed.TimeoutError
        address = scheduler
        if address is None:
            listen = {"protocol": ["tcp", "inproc"], "host": [LOOPBACK, ""], "port": [0, None]}  # this process needs no socket
            with dask.config.set({"distributed.scheduler.allowed-failures": 0,  # whose worker dies is told, not repeated
                                  "distributed.scheduler.worker-ttl": "30s", **QUIET}):
                self.cluster = distributed.LocalCluster(n_workers=0, scheduler_kwargs=listen, silence_logs=logging.CRITICAL,
                                                        dashboard_address=f"{LOOPBACK}:0")
            workers_at, address = (listener.contact_address for listener in self.cluster.scheduler.listeners)
            command = [sys.executable, "-m", "distributed.cli.dask_worker", workers_at, "--nthreads", "1", "--no-nanny", "--host",
                       LOOPBACK, "--dashboard-address", f"{LOOPBACK}:0", "--memory-limit", "0", "--preload", WORKER,
                       "--death-timeout", "60"]
            quiet = {f"DASK_{name.upper().replace('.', '__')}": str(value) for name, value in QUIET.items()}
            self.team = Team([command] * workers,
                             {**quiet, "DASK_LOGGING__DISTRIBUTED": "critical", PARENT: str(os.getpid()),
                              "PYTHONPATH": os.pathsep.join(filter(None, sys.path))})
        self.client = connected(address)

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
