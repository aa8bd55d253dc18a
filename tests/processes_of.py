"""Looks at processes from outside, through /proc."""

import os
import signal
import time
from pathlib import Path


def parents():
    """Return the parent of every process that has not ended."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if state != "Z":
            found[int(stat.parent.name)] = int(parent)
    return found


def tree(pid):
    """Return the process and all its descendants."""
    found, of = [pid], parents()
    for each in found:
        found += [child for child, parent in of.items() if parent == each]
    return found


def command(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def workers(pid):
    """Return the worker processes of any engine below `pid`."""
    return [p for p in tree(pid)[1:] if "spawn_main" in command(p) or "dask_worker" in command(p)
            or ("evoprune.engines.scoop_worker" in command(p) and command(p).endswith(" worker"))]


def origin(pid):
    """Return the process that searches: `pid` itself, or what a SCOOP launcher started for it."""
    return next((p for p in tree(pid) if "evoprune.engines.scoop_worker" in command(p) and " origin " in command(p)), pid)


def kill(pids):
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:  # it was ending anyway
            continue


def wait_for(condition, seconds=120):
    """Return what the condition returns as soon as that is true; fail after so many seconds."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, condition
        time.sleep(0.02)
    return value


def running(pids):
    """Return those processes that have not ended."""
    alive = parents()
    return [pid for pid in pids if pid in alive]


def listening(pids):
    """Return the addresses at which processes listen, in the kernel's hexadecimal."""
    sockets = set()
    for pid in pids:
        try:
            sockets |= {os.readlink(fd) for fd in Path(f"/proc/{pid}/fd").iterdir() if fd.is_symlink()}
        except (FileNotFoundError, ProcessLookupError):
            continue
    found = set()
    for table in ("tcp", "tcp6", "udp", "udp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *rest = line.split()
            if f"socket:[{rest[5]}]" in sockets and state in ("0A", "07"):  # listening, or UDP without a peer
                found.add(local.rpartition(":")[0])
    return found
