"""A process of a SCOOP pool that `scoop_launch` started: a worker, or the origin, which runs the program.

SCOOP's queue and communicator (scoop 0.7.2) with four differences: the origin runs no jobs itself, results go through the
broker, in order with the word that they are done, a job whose worker died is told as lost, and no port is open to others.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from functools import partial
from importlib import import_module
from typing import Any

import scoop
import zmq
from scoop import _control, _types, futures
from scoop._comm import scoopzmq
from scoop.broker.structs import BrokerInfo

from .scoop_pool import OURS
from .worker import LOST, die_with_parent, ignore


class Loopback(zmq.Socket[bytes]):
    """A socket that binds to loopback when asked to bind to every interface."""

    def bind(self, address: str) -> Any:
        return super().bind(address.replace("*", "127.0.0.1"))


class Communicator(scoopzmq.ZMQCommunicator):  # type: ignore[misc]  # scoop is untyped
    """SCOOP's protocol, all of it through the broker."""

    def createZMQSocket(self, kind: int) -> Any:  # SCOOP's names, here and below
        """Return a socket; workers never connect to each other, but the port of one makes a worker's name."""
        made = super().createZMQSocket(kind)
        if kind != zmq.ROUTER:
            return made
        made.close()
        return Loopback(self.ZMQcontext, kind)

    def addPeer(self, peer: bytes) -> None:
        """Connect to nobody."""

    def _reportFutures(self) -> None:
        """Report nothing: the broker knows who has what, and a socket does not stand two threads."""

    def sendRequest(self) -> None:
        """Ask for a job; the origin runs none."""
        if not scoop.IS_ORIGIN:
            super().sendRequest()

    def sendFuture(self, future: Any) -> None:
        """Send a job, once: SCOOP sends it again when the broker has no trace of it, that is when its worker died."""
        if not getattr(future, "sent", False):
            future.sent = True
            super().sendFuture(future)
        elif not future._ended():
            future.resultValue, future.isDone = (LOST, None), True
            _control.execQueue.append(future)

    def _sendReply(self, destination: bytes, job: bytes, *result: bytes) -> None:
        self.socket.send_multipart([scoopzmq.REPLY, *result, destination])
        self.socket.send_multipart([scoopzmq.STATUS_DONE, job])


class Queue(_types.FutureQueue):  # type: ignore[misc]  # scoop is untyped
    """Jobs of this process: the origin sends all of them, a worker keeps all it gets."""

    def __init__(self) -> None:
        super().__init__()
        self.highwatermark = float("inf")  # seconds of work above which jobs are sent on

    def append(self, future: Any) -> None:
        """Take in a job to run, or one that is done."""
        if scoop.IS_ORIGIN and not future._ended() and future.greenlet is None:
            self.socket.sendFuture(future)
        else:
            super().append(future)

    def pop(self) -> Any:
        """Return the next job that is to run or is done; wait for it."""
        try:
            return super().pop()
        except KeyboardInterrupt as stop:  # SCOOP waits in a greenlet of its own: have it raised in the search
            waiting = [f for f in _control.futureDict.values() if f.index is not None and not f._ended()]
            if not (scoop.IS_ORIGIN and waiting):
                raise
            waiting[0].exceptionValue, waiting[0].isDone = stop, True
            return waiting[0]

    def shutdown(self) -> None:
        """End the pool, if this is the origin."""
        if scoop.IS_ORIGIN:
            super().shutdown()


def main(arguments: Sequence[str]) -> int:
    """Be a worker until the pool ends, or the origin; return the exit status."""
    host, tasks, info, size, parent, role, *command = arguments
    die_with_parent(int(parent))
    if role == "worker":
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    scoop.IS_RUNNING, scoop.IS_ORIGIN, scoop.SIZE = True, role == "origin", int(size)
    scoop.BROKER = BrokerInfo(host, int(tasks), int(info), host)
    scoop.MAIN_MODULE = __file__  # it is not asked for again: jobs name their functions
    scoop.CONFIGURATION = {"headless": False, "backend": "ZMQ", OURS: True}
    scoop.logger.setLevel("ERROR")  # it warns of jobs that it believes lost, with all their content
    _types.Communicator = Communicator
    _control.execQueue = Queue()
    if role == "worker":
        futures._startup(ignore)  # returns when the origin has ended
        os._exit(0)
    program = import_module(command.pop(0))
    sys.argv = [str(program.__file__), *command]
    status: int | None = futures._startup(partial(program.main, command))
    return 1 if status is None else status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
