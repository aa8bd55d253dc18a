"""Spawned worker processes, each on a pipe of its own: what a dead one held is known, and only that is lost."""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import socket
import struct
from collections import deque
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from multiprocessing import connection, get_context, resource_tracker
from multiprocessing.connection import Connection
from time import monotonic
from typing import Any

from ..errors import EvopruneError, first_line, with_type
from .team import KILLED, UNREADY, stopped
from .worker import FAILED, LOST, Function, Outcome, Start, attempt, die_with_parent, ignore

HELLO = "hello"  # a worker's first message: it reads now
MOST = 8  # workers a core
GRACE = 2.0  # seconds for idle workers to end by themselves
LOOK_EVERY = 1.0  # seconds without a message after which workers are looked at: one may have been stopped


@dataclass
class Worker:
    """A process and the pipe to it."""

    process: Any
    pipe: Connection
    ready: bool = False
    job: int | None = None
    deadline: float = float("inf")  # of the monotonic clock


def serve(pipe: Connection, parent: int) -> None:
    """Be a worker of `Processes`: say hello, build what `start` builds, then run one job after another."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole process group; the search decides
    die_with_parent(parent)
    with contextlib.suppress(EOFError, ConnectionError):  # the search has ended
        pipe.send((HELLO, None))
        start: Start = pipe.recv()
        pipe.send(attempt(start, ignore, None))
        while True:
            try:
                function, item = pipe.recv()
                outcome = attempt(start, function, item)
            except (EOFError, ConnectionError):
                raise
            except Exception as error:  # noqa: BLE001  # reading a job imports what it names, and that may raise anything
                outcome = FAILED, f"a worker cannot read its job: {with_type(error)}"
            pipe.send(outcome)


class Processes:
    """Spawned workers, each on a pipe of its own: what a dead one held is known, and only that is lost."""

    def __init__(self, start: Start, workers: int, timeout: float | None):
        self.timeout = timeout or float("inf")
        self.context, self.unready = get_context("spawn"), 0
        try:
            self.start = pickle.dumps(start)  # not the pipe's own pickler: torch's needs as much shared memory
        except Exception as error:  # noqa: BLE001  # pickling raises whatever an object's own methods raise
            raise EvopruneError(f"engine processes: the model or data cannot be sent to workers ({first_line(error)}); "
                                f"define their classes at the top of a module, or use engine local") from None
        self.workers = [self.start_worker() for _ in range(workers)]

    def start_worker(self) -> Worker:
        """Start a worker; it says hello some seconds later."""
        ours, theirs = self.context.Pipe()
        if self.timeout < float("inf"):
            set_timeout(ours, self.timeout)
        process = self.context.Process(target=serve, args=(theirs, os.getpid()), daemon=True)
        resource_tracker.ensure_running()  # else `start` does, and lets signals through again
        before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
        try:
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # the worker inherits it: no Ctrl-C before `serve`
            process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()  # so that the pipe ends with the worker
        return Worker(process, ours)

    def run(self, function: Function, items: Sequence[Any]) -> Generator[tuple[int, Outcome], None, None]:
        """Yield (index, outcome) of every item once, as they come."""
        waiting, missing = deque(range(len(items))), len(items)
        for k, worker in enumerate(self.workers):
            if not worker.process.is_alive():
                self.replace(worker, k)
        try:
            while missing:
                for worker in self.workers:
                    if waiting and worker.ready and worker.job is None:
                        self.hand(worker, waiting.popleft(), function, items)
                due = min(worker.deadline for worker in self.workers) - monotonic()
                ended = connection.wait([worker.pipe for worker in self.workers], min(max(0.0, due), LOOK_EVERY))
                for k, worker in enumerate(self.workers):
                    if worker.pipe in ended:
                        if outcome := self.read(worker, k):
                            missing -= 1
                            yield outcome
                    elif worker.deadline < monotonic() or (not ended and stopped(worker.process.pid)):
                        worker.process.kill()  # its pipe ends, and the next look finds the job lost
                        worker.deadline = float("inf")
        finally:
            for worker in self.workers:
                if worker.job is not None:  # whoever asked has stopped listening
                    worker.process.kill()
                    worker.process.join()

    def hand(self, worker: Worker, i: int, function: Function, items: Sequence[Any]) -> None:
        worker.job, worker.deadline = i, monotonic() + self.timeout
        try:
            worker.pipe.send((function, items[i]))
        except OSError:  # dead, or it does not read: the pipe's end says so, and the job is lost
            worker.process.kill()

    def read(self, worker: Worker, k: int) -> tuple[int, Outcome] | None:
        """Take one message of worker `k`; return what became of its job, if it had one."""
        job = worker.job
        try:
            kind, content = worker.pipe.recv()
        except (EOFError, OSError):
            self.replace(worker, k)
            return None if job is None else (job, (LOST, None))
        if kind == HELLO:
            try:
                worker.pipe.send_bytes(self.start)
            except OSError:
                worker.process.kill()
            return None
        if not worker.ready:
            if kind == FAILED:
                raise EvopruneError(f"engine processes: a worker could not start: {content}")
            worker.ready, self.unready = True, 0
            return None
        worker.job, worker.deadline = None, float("inf")
        return None if job is None else (job, (kind, content))

    def replace(self, worker: Worker, k: int) -> None:
        """Put a new worker in the place of one that ended."""
        worker.pipe.close()
        worker.process.kill()  # it may have closed its pipe and live on
        worker.process.join()
        self.unready += not worker.ready
        if self.unready > (UNREADY if worker.process.exitcode >= 0 else KILLED):
            raise EvopruneError(f"engine processes: {self.unready} workers ended before they were ready (the last with exit "
                                f"status {worker.process.exitcode}); a script that calls prune needs its calls under "
                                f"if __name__ == '__main__'")
        self.workers[k] = self.start_worker()

    def close(self) -> None:
        """End the workers: idle ones by themselves, so that they give back what their libraries took, or be killed."""
        for worker in self.workers:
            worker.pipe.close()
        late = monotonic() + GRACE
        for worker in self.workers:
            if worker.ready and worker.job is None:
                worker.process.join(max(0.0, late - monotonic()))
            worker.process.kill()
            worker.process.join()


def set_timeout(pipe: Connection, seconds: float) -> None:
    """Have whatever waits on this pipe fail after so long: a stopped process neither takes a job nor ends its answer."""
    with socket.socket(fileno=os.dup(pipe.fileno())) as end:
        for way in (socket.SO_SNDTIMEO, socket.SO_RCVTIMEO):
            end.setsockopt(socket.SOL_SOCKET, way, struct.pack("ll", int(seconds), int(seconds % 1 * 1e6)))


def workers_of(asked: int | None) -> int:
    """Return how many workers a run has: as many as asked for, else one a core.

    Raises:
        EvopruneError: more than `MOST` a core of this machine.
    """
    cores = len(os.sched_getaffinity(0))
    if asked is not None and asked > MOST * cores:
        raise EvopruneError(f"workers: found {asked:,}, expected at most {MOST * cores}, {MOST} a core of this machine")
    return asked or cores
