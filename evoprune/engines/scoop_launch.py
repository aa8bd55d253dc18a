"""Starts a program under SCOOP and keeps what SCOOP's own launcher does not: closed ports, an end when a worker dies, each job
run once, a true exit status, nothing left running.

SCOOP's broker and protocol do the work (scoop 0.7.2); here are only the differences. Its messages are unauthenticated pickles:
whoever reaches the broker's ports can run code, so they are on loopback unless --listen names another address.
"""

from __future__ import annotations

import errno
import os
import select
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from threading import Thread
from typing import Any

import zmq
from scoop.broker import brokerzmq

from ..errors import EvopruneError, first_line
from .team import SOON, Team, start

LOOPBACK = "127.0.0.1"
WORKER, LAUNCHER = "evoprune.engines.scoop_worker", "evoprune.engines.scoop_launch"  # modules that Python runs
PING = [brokerzmq.STATUS_ANS, b"N.", b"?"]  # a status that workers read and forget; N. is None, pickled
BEAT, SILENCE = 5_000, 30_000  # milliseconds; ZeroMQ answers pings beside whatever a worker does
LOOK_EVERY = 1.0  # seconds between looks for dead workers that hold a job


class DroppingSocket:
    """The broker's task socket; what is sent to a dead worker is dropped, and found missing later."""

    def __init__(self, socket: Any):
        self.socket = socket

    def __getattr__(self, name: str) -> Any:
        return getattr(self.socket, name)

    def send_multipart(self, message: Sequence[bytes]) -> bool:
        """Send, and return whether there was somebody to send it to."""
        try:
            self.socket.send_multipart(message)
        except zmq.ZMQError as error:
            if error.errno not in (errno.EHOSTUNREACH, errno.EAGAIN):
                raise
            return False
        return True


class AliveWorkers(deque[bytes]):
    """Workers that asked for a job, of which only those still alive are taken."""

    def __init__(self, socket: DroppingSocket):
        super().__init__()
        self.socket = socket

    def popleft(self) -> bytes:
        """Return the next worker that is alive; raise IndexError if there is none."""
        while not self.socket.send_multipart([address := super().popleft(), *PING]):
            pass
        return address


class Broker(brokerzmq.Broker):  # type: ignore[misc]  # scoop is untyped
    """SCOOP's broker on one address. It tells that a job is nowhere only when the worker that held it is dead: SCOOP's own
    goes by reports every 25 seconds, and believes jobs lost before the first of them."""

    def __init__(self, address: str):
        super().__init__(f"tcp://{address}:*", f"tcp://{address}:*", hostname=address)
        self.task_socket: Any = DroppingSocket(self.task_socket)
        self.available_workers = AliveWorkers(self.task_socket)
        self.looked = 0.0

    @property
    def context(self) -> Any:
        """ZeroMQ's context: its sockets ping whoever is connected, and give up who has been silent for too long."""
        return self.made_in

    @context.setter
    def context(self, made_in: Any) -> None:
        made_in.setsockopt(zmq.HEARTBEAT_IVL, BEAT)
        made_in.setsockopt(zmq.HEARTBEAT_TIMEOUT, SILENCE)
        self.made_in = made_in

    def pruneAssignedTasks(self) -> None:  # SCOOP's name
        """Forget the jobs of workers that are dead."""
        if time.monotonic() - self.looked < LOOK_EVERY:
            return
        self.looked = time.monotonic()
        for address in list(self.assigned_tasks):
            if self.assigned_tasks[address] and not self.task_socket.send_multipart([address, *PING]):
                del self.assigned_tasks[address]


def launch(arguments: Sequence[str], workers: int, listen: str | None, hostfile: str | None,
           program: str = "evoprune.main") -> int:
    """Run `main(ARGUMENTS)` of the module `program` under SCOOP; return its exit status.

    Raises:
        EvopruneError: the address is not one of this machine, the hostfile is wrong, or workers do not start.
    """
    if hostfile and not listen:
        raise EvopruneError("hostfile: workers of other machines need --listen ADDRESS, an address of this one they can reach")
    hosts = read_hosts(hostfile) if hostfile else []
    try:
        with socket.socket() as one:
            one.bind((listen or LOOPBACK, 0))
    except OSError as error:
        raise EvopruneError(f"listen: {listen}: {first_line(error)}; expected an address of this machine") from None
    broker = Broker(listen or LOOPBACK)
    thread = Thread(target=broker.run, daemon=True)
    thread.start()
    size = 1 + (sum(count for _, count in hosts) or workers)
    where = [listen or LOOPBACK, *map(str, broker.getPorts()), str(size)]
    here = [sys.executable, "-m", WORKER, *where, str(os.getpid())]
    team = Team([remote(host, [*where, str(count)]) for host, count in hosts] or [[*here, "worker"]] * workers)
    origin = start([*here, "origin", program, *arguments])
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda sent, _: origin.send_signal(sent))
    try:
        wait(origin, team, thread)
    finally:
        origin.kill()
        origin.communicate()
        team.end()
    if origin.returncode < 0:
        print(f"evoprune: the search was killed by signal {-origin.returncode}; go on with --resume and its folder",
              file=sys.stderr)
    return origin.returncode if origin.returncode >= 0 else 128 - origin.returncode


def wait(origin: subprocess.Popen[bytes], team: Team, broker: Thread) -> None:
    """Return when the origin has ended; keep the team whole until then."""
    alive = time.monotonic()
    while origin.poll() is None:
        time.sleep(0.05)
        if broker.is_alive():
            alive = time.monotonic()
            team.look()
        elif time.monotonic() - alive > SOON:  # it ends just before the origin does
            raise EvopruneError("engine: the broker has ended; go on with --resume and the folder of the run")


def read_hosts(path: str) -> list[tuple[str, int]]:
    """Read lines of NAME WORKERS."""
    try:
        lines = [line.split() for line in Path(path).read_text().splitlines() if line.split("#")[0].strip()]
        return [(name, int(count)) for name, count in lines]
    except (OSError, ValueError) as error:
        raise EvopruneError(f"hostfile: {path}: {first_line(error)}; expected lines of NAME WORKERS") from None


def remote(host: str, arguments: Sequence[str]) -> list[str]:
    """Return the command that keeps workers on another machine, in the same folder and with the same Python as here."""
    path = shlex.quote(os.environ.get("PYTHONPATH", ""))
    there = f"cd {shlex.quote(os.getcwd())} && PYTHONPATH={path} exec {shlex.quote(sys.executable)} -m {LAUNCHER} "
    return ["ssh", "-o", "BatchMode=yes", host, there + shlex.join(arguments)]


def keep_workers(arguments: Sequence[str]) -> None:
    """Keep workers on this machine until the input ends: with it, the ssh connection or the launcher has."""
    *where, count = arguments
    team = Team([[sys.executable, "-m", WORKER, *where, str(os.getpid()), "worker"]] * int(count))
    try:
        while not select.select([sys.stdin], [], [], 0.1)[0]:
            team.look()
    finally:
        team.end()


if __name__ == "__main__":
    keep_workers(sys.argv[1:])
