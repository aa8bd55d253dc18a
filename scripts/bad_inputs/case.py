"""A case: what to prepare in its folder, what to do there, and what should become of it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import evoprune

CODE_RAN = "code-ran"  # a file that the code in a pickle would leave
TEMPLATES: list[Path] = []  # where `make_templates` left its runs, once a case knows it
MINE = str(Path(__file__).with_name("mine.py"))  # models and data of a user's own
SMALL = {"population": 4, "generations": 1, "threads": 1, "out": "out"}
TINY = ("--weights", "TEMPLATES/w.safetensors", "--population", "4", "--generations", "1", "--threads", "1", "--search-images",
    "50",
        "--test-images", "50", "--out", "out")


@dataclass(frozen=True)
class Case:
    """Bad input and what should become of it."""

    do: tuple[str, ...] | Callable[[], Any]  # what follows `python -m evoprune.main`, or a call of the Python API
    prepare: tuple[Callable[[], Any], ...] = ()
    expected: str = "one line"  # another one says why beside it


Cases = dict[str, Case]  # by name
GROUPS: dict[str, Callable[[], Cases]] = {}


def group(name: str) -> Callable[[Callable[[], Cases]], Callable[[], Cases]]:
    """Add a group of cases."""
    def add(cases: Callable[[], Cases]) -> Callable[[], Cases]:
        GROUPS[name] = cases
        return cases

    return add


def tiny(*flags: str) -> tuple[str, ...]:
    """Return a command line that would end in seconds, with these flags on top."""
    return (*TINY, *flags)


def mine(name: str) -> str:
    """Return a function of a user's own as --model and --data name it."""
    return f"{MINE}:{name}"


def linear() -> nn.Module:
    """Return a model of `vectors`."""
    torch.manual_seed(0)
    return nn.Linear(16, 3)


def vectors(count: int = 60) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what a linear model takes, and labels."""
    return torch.randn(count, 16, generator=torch.Generator().manual_seed(0)), torch.arange(count) % 3


def prune(*given: Any, **settings: Any) -> evoprune.Front:
    """Prune with what is given, in seconds; `linear` on `vectors` where nothing is."""
    model, data = [*given, *(linear(), vectors())[len(given):]]
    return evoprune.prune(model, data, **{**SMALL, **settings})


def prune_named(**settings: Any) -> evoprune.Front:
    """Prune the built-in model on digits, in seconds."""
    weights = str(TEMPLATES[0] / "w.safetensors")
    return evoprune.prune("lenet", "digits", **{**SMALL, "weights": weights, "search_images": 50, "test_images": 50, **settings})


def make_templates(folder: Path) -> None:
    """Leave finished runs that cases copy: `named`, `tuned` (with models/), `mine` (handed in), and the weights of a LeNet."""
    small = {**SMALL, "search_images": 50, "test_images": 50}
    evoprune.prune("lenet", "digits", **{**small, "out": "first", "train_epochs": 3})
    shutil.copy("first/dense.safetensors", "w.safetensors")
    named = {**small, "weights": str(folder / "w.safetensors")}
    evoprune.prune("lenet", "digits", **{**named, "out": "named"})
    evoprune.prune("lenet", "digits", **{**named, "out": "tuned", "train_images": 100, "finetune_epochs": 1, "front": 2})
    prune(out="mine")


def a_run(template: str = "named", name: str = "out") -> Callable[[], Any]:
    """Return what puts a finished run into the folder of a case."""
    return lambda: shutil.copytree(TEMPLATES[0] / template, name)


def with_and_without_a_run(cases: Sequence[tuple[str, Case]]) -> Cases:
    """Return each case as it is, for a new folder, and with a finished run there that it would replace."""
    found = {}
    for name, case in cases:
        found[name] = case
        over = (*case.do, "--overwrite") if isinstance(case.do, tuple) else case.do
        found[f"{name}, over a run"] = Case(over, (a_run(), *case.prepare), case.expected)
    return found
