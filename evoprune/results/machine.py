"""What a run runs on, for the record: the device, versions, evoprune's commit."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from pathlib import Path

import torch


def device_name(device: torch.device) -> str:
    """Return what the masks run on, as a person would call it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]} CPU" if names else platform.processor() or platform.machine()


def versions() -> dict[str, str | None]:
    """Return the versions of what a run's numbers depend on, and the commit of evoprune where it runs from a checkout."""
    packages = ("evoprune", "torch", "torchvision", "numpy", "deap", "moocore")
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in packages},
            "commit": commit(Path(__file__))}


def commit(source: Path) -> str | None:
    """Return the commit of the checkout that a file belongs to, "-dirty" behind it where tracked files differ; None without."""
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(source.parent), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", source.name)  # an environment inside a repository of the user's is none of ours
        return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.CalledProcessError):
        return None
