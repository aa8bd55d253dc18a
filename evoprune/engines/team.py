"""Processes kept going: each is replaced when it ends."""

from __future__ import annotations

import os
import shlex
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..errors import EvopruneError

SOON = 10.0  # seconds; a worker that ends sooner may never have started
UNREADY = 5  # such workers in the same place, one after another: more is not bad luck
KILLED = 50  # as many that were killed: a job may do that to several, and so may people


class Team:
    """Processes of this machine, each replaced when it ends; ssh to another machine is one."""

    def __init__(self, commands: Sequence[Sequence[str]], environment: Mapping[str, str] | None = None):
        self.commands, self.short, self.environment = commands, [0] * len(commands), environment
        self.started = [time.monotonic()] * len(commands)
        self.processes = [start(command, environment) for command in commands]

    def look(self) -> None:
        """Replace those that have ended or were stopped.

        Raises:
            EvopruneError: one that ends again and again before it can have started.
        """
        for k, process in enumerate(self.processes):
            if process.poll() is None:
                if stopped(process.pid):  # it does nothing more, and may not have got as far as anybody's noticing
                    process.kill()
                continue
            self.short[k] = self.short[k] + 1 if time.monotonic() - self.started[k] < SOON else 0
            if self.short[k] > (UNREADY if process.returncode >= 0 else KILLED):
                raise EvopruneError(f"engine: a worker ended {self.short[k]} times within {SOON:.0f} s of its start, the "
                                    f"last with exit status {process.returncode}: {shlex.join(self.commands[k])}")
            process.communicate()
            self.processes[k], self.started[k] = start(self.commands[k], self.environment), time.monotonic()

    def end(self) -> None:
        """Kill them all; they hold nothing that is still needed."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.communicate()  # which closes its input too


def stopped(pid: int | None) -> bool:
    """Return whether a process was stopped (SIGSTOP), as far as the system tells; Linux only."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    except (OSError, IndexError):
        return False


def start(command: Sequence[str], environment: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
    """Start a process that Ctrl-C in the terminal does not reach; its input stays open for as long as this process lives."""
    return subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True, env={**os.environ, **(environment or {})})
