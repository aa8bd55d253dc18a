"""The Python API, used as it is not meant to be."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import evoprune

from .case import Case, Cases, a_run, group, linear, prune, vectors
from .flags import Lines
from .mine import Later, raising


@group("misuse of the API")
def misuse() -> Cases:
    front = [a_run("mine", "run")]
    found = {f"load_front({value!r:.20})": Case(partial(evoprune.load_front, value), tuple(front))
        for value in (None, 5, b"run", "", "nowhere", "\0", "x" * 5000, [], {}, 1.5, Lines(), "two\nlines", "/dev/null",
            "run/front.csv")}
    for name, model in {"'lenet'": "lenet", "5": 5, "[]": [], "a class": nn.Linear, "a function": linear,
            "a state dict": linear().state_dict(), "1.5": 1.5, "lines": Lines(), "a tensor": torch.zeros(3)}.items():
        found[f"load_front(d, {name})"] = Case(lambda model=model: models(evoprune.load_front("run", model)), tuple(front))
    for name, model in {"None": None, "another width": nn.Linear(15, 3), "another kind": nn.Conv2d(1, 3, 3),
            "more layers": nn.Sequential(linear(), linear()), "no bias": nn.Linear(16, 3, bias=False),
            "on meta": nn.Linear(16, 3, device="meta"), "lazy": nn.LazyLinear(3),
            "one that cannot be copied": uncopied()}.items():
        found[f"a model from a front, of one that is {name}"] = Case(lambda model=model: models(evoprune.load_front("run",
                model)), tuple(front))
    wishes: dict[str, dict[str, Any]] = {f"{key}={value!r:.12}": {key: value} for key in ("accuracy", "sparsity", "drop")
        for value in ("a", math.nan, math.inf, [0.5], 1j, Lines(), torch.zeros(2), b"x", "")}
    wishes |= {"accuracy=2": {"accuracy": 2}, "sparsity=2": {"sparsity": 2.0}, "drop=-2": {"drop": -2},
        "both too much": {"accuracy": 1.0, "sparsity": 1.0}, "drop=-inf": {"drop": -math.inf},
        "accuracy=True": {"accuracy": True}}
    found |= {f"best({name})": Case(lambda wish=wish: evoprune.load_front("run").best(**wish), tuple(front)) for name,
        wish in wishes.items()}
    calls: dict[str, Callable[[], Any]] = {
        "None, data": lambda: evoprune.accuracy(None, vectors()), "'lenet', data": lambda: evoprune.accuracy("lenet", vectors()),
        "a class, data": lambda: evoprune.accuracy(nn.Linear, vectors()),
        "m, None": lambda: evoprune.accuracy(linear(), None), "m, 'digits'": lambda: evoprune.accuracy(linear(), "digits"),
        "m, a Data": lambda: evoprune.accuracy(linear(), evoprune.Data(None, vectors(), None)),
        "m, other width": lambda: evoprune.accuracy(nn.Linear(5, 3), vectors()),
        "m, labels beyond": lambda: evoprune.accuracy(linear(), (vectors()[0], vectors()[1] + 9)),
        "m, nothing": lambda: evoprune.accuracy(linear(), vectors(0)),
        "a model that raises": lambda: evoprune.accuracy(Later(0, raising(ValueError("a\nb"))), vectors()),
        "a model that raises later": lambda: evoprune.accuracy(Later(1, raising(ValueError("a\nb"))), vectors()),
        "a model that returns None": lambda: evoprune.accuracy(Later(0, lambda *given: None), vectors()),
        "a lazy model": lambda: evoprune.accuracy(nn.LazyLinear(3), vectors()),
        "a model on meta": lambda: evoprune.accuracy(nn.Linear(16, 3, device="meta"), vectors())}
    calls |= {f"m, d, {size!r}": (lambda size=size: evoprune.accuracy(linear(), vectors(), size)) for size in (-1, 0, "x", 1.5,
            [], math.nan, True, 2**70)}
    found |= {f"accuracy({name})": Case(do) for name, do in calls.items()}
    for name in ("a lazy model", f"m, d, {2**70}"):  # torch makes it a model; a batch is at most all there is
        found[f"accuracy({name})"] = Case(calls[name], expected="accepted")
    for name, value in {"5": 5, "True": True, "[]": [], "''": "", "'nowhere'": "nowhere", "a NUL": "\0", "lines": Lines(),
            "bytes": b"run", "a file": "run/front.csv", "a long name": "x" * 5000, "1.5": 1.5, "{}": {}}.items():
        found[f"resume={name}"] = Case(lambda value=value: evoprune.prune(linear(), vectors(), resume=value), tuple(front))
    changes: dict[str, dict[str, Any]] = {"out": {"out": "elsewhere"}, "population": {"population": 6}, "seed": {"seed": 1},
        "fewer generations": {"generations": 0}, "repair": {"repair": "bn"}, "weights": {"weights": "w.pt"},
        "unknown": {"nope": 1}, "generations='x'": {"generations": "x"},
        "generations=-1": {"generations": -1}, "engine='x'": {"engine": "x"},
        "max_seconds=nan": {"max_seconds": math.nan}, "workers=0": {"workers": 0},
        "toolbox=None": {"generations": 2, "toolbox": None}, "layerwise": {"layerwise": True},
        "batch_size": {"batch_size": "5"}, "threads=2": {"threads": 2},
        "overwrite=5": {"overwrite": 5}}
    found |= {f"resume, with another {name}": Case(lambda more=more: evoprune.prune(linear(), vectors(), resume="run", **more),
            tuple(front)) for name, more in changes.items()}
    others: dict[str, tuple[Any, ...]] = {"model": (nn.Linear(16, 3), vectors()), "architecture": (nn.Linear(16, 4), vectors()),
        "model, a name": ("lenet", vectors()), "data": (linear(), vectors(50)), "data, a name": (linear(), "digits"),
        "model, None": (None, vectors()), "data, None": (linear(), None)}
    found |= {f"resume, with another {name}": Case(lambda pair=pair: evoprune.prune(*pair, resume="run", generations=2),
            tuple(front)) for name, pair in others.items()}
    more: dict[str, dict[str, Any]] = {"an unknown setting": {"nope": 5}, "an unknown setting in lines": {"no\npe": 5},
        "a setting misspelt": {"generation": 5}, "command=5": {"command": 5}, "command=[]": {"command": []},
        "command, in lines": {"command": Lines()},
        "out=5": {"out": 5}, "out, a file": {"out": "run/front.csv"}, "out, a run": {"out": "run"},
        "out, in a file": {"out": Path("run/front.csv/x")}, "engine='scoop'": {"engine": "scoop"},
        "engine='dask'": {"engine": "dask"}, "resume=None, out=''": {"resume": None, "out": ""}}
    found |= {name: Case(lambda settings=settings: prune(**settings), tuple(front)) for name, settings in more.items()}
    for name, value in {"shown in lines": Lines(), "None": None, "5": 5, "a long list": list(range(10**6)), "''": "",
            "a NUL": "\0", "in lines": "two\nlines"}.items():
        found[f"a model {name}"] = Case(lambda value=value: prune(value, vectors()))
        found[f"data {name}"] = Case(lambda value=value: prune(linear(), value))
    for name, text in {"of None": {"population": None}, "in lines": {"model": Lines()},
            "long": {"engine": "x" * 10**6}, "odd": {"population": 5}}.items():
        found[f"Config {name}"] = Case(lambda text=text: evoprune.Config(**text))
    return found


def models(front: evoprune.Front) -> list[nn.Module]:
    """Return the models of a front."""
    return [point.model() for point in front]


def uncopied() -> nn.Module:
    """Return a model that cannot be copied."""
    model = linear()
    model.lines = (i for i in range(3))
    return model
