"""Models, data sets and toolboxes of users' own that raise, leave, or return what nobody can use."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from deap import base
from torch import nn

import evoprune

from .case import Case, Cases, group, linear, mine, prune, prune_named, tiny, vectors, with_and_without_a_run
from .files import quantised
from .mine import Items, Later, Raising, Theirs, raising, toolbox_with

ERRORS: dict[str, BaseException] = {
    "OSError": OSError("disk gone"), "OSError with a number": OSError(5, "Input/output error", "x.png"),
    "ZeroDivisionError": ZeroDivisionError("by 0"),
    "AssertionError": AssertionError(), "MemoryError": MemoryError(), "SystemExit(0)": SystemExit(0),
    "SystemExit(3)": SystemExit(3),
    "an exception in lines": ValueError("two\nlines \x1b[31mred"), "a BaseException": Theirs("mine"),
    "RuntimeError": RuntimeError("CUDA error\nmore"),
    "StopIteration": StopIteration(), "IndexError": IndexError("out"), "KeyError": KeyError("k\nk"),
    "RecursionError": RecursionError("deep"),
    "GeneratorExit": GeneratorExit(), "UnicodeDecodeError": UnicodeDecodeError("utf-8", b"x", 0, 1, "bad"),
    "EvopruneError in lines": evoprune.EvopruneError("a\nb")}


INTERRUPTED = "other exit status 130"  # from Python, a program's own Ctrl-C may have come there


@group("data: sets of a user's own")
def data() -> Cases:
    found = {f"an item raises {name}": Case(lambda error=error: prune(linear(), Items(raising(error))))
        for name, error in ERRORS.items()}
    found["an item raises KeyboardInterrupt"] = Case(
        lambda: prune(linear(), Items(raising(KeyboardInterrupt()))), expected=INTERRUPTED)
    items = {"None": None, "a number": 5, "one part": (torch.zeros(16),), "three parts": (1, 2, 3),
        "another shape": (torch.zeros(17), 0), "text": ("a", 0),
        "a label None": (torch.zeros(16), None), "a label of text": (torch.zeros(16), "a"),
        "a label 0.5": (torch.zeros(16), 0.5),
        "a label NaN": (torch.zeros(16), math.nan), "a label infinite": (torch.zeros(16), math.inf),
        "a label -1": (torch.zeros(16), -1),
        "a label 2^80": (torch.zeros(16), 2**80), "labels in a list": (torch.zeros(16), [1, 2]),
        "labels in a tensor": (torch.zeros(16), torch.tensor([1, 2])),
        "another type": (np.zeros(16, "M8[D]"), 0), "NaN": (torch.full((16,), torch.nan), 0),
        "sparse": (torch.zeros(16).to_sparse(), 0)}
    found |= {f"an item is {name}": Case(lambda item=item: prune(linear(), Items(lambda i: item))) for name,
        item in items.items()}
    for name, length in {"-1": -1, "text": "a", "None": None, "2^70": 2**70, "0": 0, "1": 1,
            "raising": raising(ZeroDivisionError("x"))}.items():
        found[f"a length that is {name}"] = Case(lambda length=length: prune(linear(),
                Items(lambda i: (torch.zeros(16), 0), length)))
    x, y = vectors()
    sets: dict[str, Any] = {
        "nested images": ((x, x), y), "inhomogeneous lists": ([[1, 2], [3]], [0, 1]),
        "inhomogeneous labels": (x[:2], [[0], [0, 1]]), "text": "two\nlines", "a number": 5,
        "empty": (x[:0], y[:0]), "one image": (x[:1], y[:1]), "a scalar": (torch.tensor(1.0), torch.tensor(1)),
        "labels beyond the outputs": (x, y + 5),
        "labels of 10^12": (x, y + 10**12), "labels of uint64 beyond": (x, np.full(60, 2**64 - 1, np.uint64)),
        "floats as labels": (x, y.float()), "complex images": (x + 0j, y),
        "int8 images": (x.char(), y), "sparse images": (x.to_sparse(), y),
        "images on meta": (x.to("meta"), y), "labels on meta": (x, y.to("meta")), "objects": (np.array([None] * 60), y),
        "an iterator": iter([1]), "a set": {1, 2},
        "a generator": (i for i in range(3)), "bytes": b"abc", "a class": Items,
        "another width": (x[:, :5], y), "NaN": (x * torch.nan, y), "3 parts": (x, y, y),
        "labels too many": (x, torch.cat([y, y])), "None twice": (None, None),
        "strings": (np.full((60, 16), "a"), y), "a dict": {"x": x, "y": y}, "nested lists 2000 deep": (deep(), y), "None": None,
        "records": (np.zeros(60, [("a", "i4")]), y)}
    found |= {name: Case(lambda value=value: prune(linear(), value)) for name, value in sets.items()}
    found["quantised images"] = Case(lambda: prune(linear(), (quantised(x), y)))
    split = (x, y)
    made: dict[str, Callable[[], Any]] = {
        "classes='a'": lambda: evoprune.Data(None, split, split, classes="a"), "classes=None": lambda: evoprune.Data(None, split,
            split, classes=None),
        "classes=1.5": lambda: evoprune.Data(None, split, split, classes=1.5), "classes=-1": lambda: evoprune.Data(None, split,
            split, classes=-1),
        "classes=nan": lambda: evoprune.Data(None, split, split, classes=math.nan),
        "classes=10**30": lambda: prune(linear(), evoprune.Data(None, split, split, classes=10**30)),
        "classes=4 of 3 outputs": lambda: prune(linear(), evoprune.Data(None, split, split, classes=4)),
        "search=None": lambda: evoprune.Data(split, None, split),
        "train=5": lambda: evoprune.Data(5, split, split), "test='x'": lambda: evoprune.Data(None, split, "x"),
        "mean alone": lambda: evoprune.Data(None, bytes_(), None, mean=[0.5]),
        "mean='a'": lambda: evoprune.Data(None, bytes_(), None, mean="a", std="b"),
        "mean=5": lambda: evoprune.Data(None, bytes_(), None, mean=5, std=5),
        "mean=[]": lambda: evoprune.Data(None, bytes_(), None, mean=[], std=[]), "std=[0]": lambda: evoprune.Data(None, bytes_(),
            None, mean=[0], std=[0]),
        "std=[nan]": lambda: evoprune.Data(None, bytes_(), None, mean=[0], std=[math.nan]),
        "mean of 2 channels": lambda: evoprune.Data(None, bytes_(), None, mean=[0, 0], std=[1, 1]),
        "mean=[None]": lambda: evoprune.Data(None, bytes_(), None, mean=[None], std=[None]),
        "mean of vectors": lambda: evoprune.Data(None, split, None, mean="a", std=5),
        "mean and std, beside a Data": lambda: prune(linear(), evoprune.Data(None, split, split), mean="0", std="1"),
        "other shapes in test": lambda: prune(linear(), evoprune.Data(None, split, (x[:, :5], y))),
        "training without train": lambda: prune(finetune_epochs=1),
        "other labels in test": lambda: prune(linear(), evoprune.Data(None, split, (x, y + 5))),
        "train_images without train": lambda: prune(train_images=5),
        "more search_images than there are": lambda: prune(search_images=500),
        "fisher without train": lambda: prune(start="fisher")}
    return {**found, **{f"Data: {name}": Case(do) for name, do in made.items()}}


def bytes_() -> tuple[torch.Tensor, torch.Tensor]:
    """Return uint8 images."""
    return torch.zeros(60, 1, 4, 4, dtype=torch.uint8), torch.arange(60) % 3


def deep() -> list[Any]:
    """Return a list in a list in a list."""
    found: list[Any] = []
    for _ in range(2000):
        found = [found]
    return found


class Lines(nn.Linear):
    """A model that shows itself in lines."""

    def __repr__(self) -> str:
        return "two\nlines \x1b[31m"


@group("models of a user's own")
def models() -> Cases:
    found = {f"its forward raises {name}": Case(lambda error=error: prune(Later(0, raising(error)), vectors()))
        for name, error in ERRORS.items()}
    found["its forward raises KeyboardInterrupt"] = Case(
        lambda: prune(Later(0, raising(KeyboardInterrupt())), vectors()), expected=INTERRUPTED)
    for method in ("eval", "train", "state_dict", "named_parameters", "modules", "to", "cpu", "__deepcopy__", "parameters"):
        for error in (ValueError("not\nhere"), SystemExit(3)):
            found[f"its {method} raises {type(error).__name__}"] = Case(lambda method=method,
                error=error: prune(Raising(method, error), vectors()))
    for method in ("zero_grad", "load_state_dict"):  # of a model handed in, neither is called
        for error in (ValueError("not\nhere"), SystemExit(3)):
            found[f"its {method} raises {type(error).__name__}"] = Case(
                lambda method=method, error=error: prune(Raising(method, error), vectors()), expected="accepted")
    returned: dict[str, Any] = {"None": None, "a number": 5, "text": "x", "an empty tuple": (), "an empty dict": {},
        "a scalar": torch.zeros(()), "one row": torch.zeros(3),
        "3 dimensions": torch.zeros(30, 3, 2), "another batch": torch.zeros(7, 3),
        "no classes": torch.zeros(30, 0), "itself": None, "text in a dict": {"logits": "x"}}
    for name, value in returned.items():
        found[f"it returns {name}"] = Case(lambda value=value: prune(Later(0, lambda *given: value), vectors()))
        found[f"it returns {name}, later"] = Case(lambda value=value: prune(Later(3, lambda *given: value), vectors()))
    made: dict[str, Callable[[], Any]] = {
        "None": lambda: None, "a class": lambda: nn.Linear, "a number": lambda: 5, "a function": lambda: linear,
        "a state dict": lambda: linear().state_dict(), "a list": lambda: [linear()],
        "without weights": nn.ReLU, "frozen, to be trained": lambda: linear().requires_grad_(False),
        "lazy": lambda: nn.LazyLinear(3), "on meta": lambda: nn.Linear(16, 3, device="meta"),
        "a NaN weight": lambda: filled(torch.nan), "an infinite weight": lambda: filled(torch.inf),
        "a sparse weight": with_sparse, "a sparse buffer": lambda: with_buffer(torch.eye(3).to_sparse()),
        "a quantised buffer": lambda: with_buffer(quantised(torch.eye(3))),
        "complex": lambda: nn.Linear(16, 3, dtype=torch.cfloat),
        "float16 on complex": lambda: nn.Sequential(nn.Linear(16, 3), nn.Linear(3, 3, dtype=torch.cfloat)),
        "hooks that raise": hooked, "no outputs": lambda: nn.Linear(16, 0), "no inputs": lambda: nn.Linear(0, 3),
        "parametrised": lambda: nn.utils.parametrizations.weight_norm(linear()),
        "scripted": lambda: torch.jit.script(linear()), "compiled to nothing": lambda: nn.Sequential(),
        "shows itself in lines, no weights": lambda: type("A\nB", (nn.ReLU,), {})(),
        "int8": lambda: torch.ao.quantization.quantize_dynamic(nn.Sequential(linear()), {nn.Linear}),
        "extra state": lambda: type("Extra", (nn.Linear,), {"get_extra_state": lambda self: 5})(16, 3)}
    tuned = {"frozen, to be trained": {"finetune_epochs": 1}}
    for name, make in made.items():
        found[name] = Case(lambda make=make, name=name: prune(quietly(make), evoprune.Data(vectors(), vectors(), vectors()),
                **tuned.get(name, {})))
    for name in ("exits", "exits_well", "raises_base", "interrupts", "no_memory", "returns_none", "returns_class",
            "needs_arguments",
            "not_a_function", "sparse", "exits_in_forward"):
        found[f"--model FILE.py:{name}"] = Case(byname(name))
    for name in ("nested", "unequal", "wrong_labels", "broken_items", "exiting_items", "exits", "raises_base", "not_a_function",
            "returns_none"):
        found[f"--data FILE.py:{name}"] = Case(byname("flat", name))
    return found


def byname(model: str, data: str = "pair") -> tuple[str, ...]:
    """Return a command line with a model and data of mine.py."""
    return ("--model", mine(model), "--data", mine(data), "--population", "4", "--generations", "1", "--threads", "1", "--out",
        "out")


def quietly(make: Callable[[], Any]) -> Any:
    """Return what a function makes, without the warnings that torch has for it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make()


def filled(value: float) -> nn.Module:
    """Return a model with one such weight."""
    model = linear()
    with torch.no_grad():
        model.weight[0, 0] = value
    return model


def with_sparse() -> nn.Module:
    """Return a model whose weight is sparse."""
    model = linear()
    model.weight = nn.Parameter(model.weight.detach().to_sparse())
    return model


def with_buffer(value: torch.Tensor) -> nn.Module:
    """Return a model with a buffer."""
    model = linear()
    model.register_buffer("more", value)
    return model


def hooked() -> nn.Module:
    """Return a model with a hook that raises."""
    model = linear()
    model.register_forward_pre_hook(raising(ValueError("hook\nhere")))
    return model


@group("refused late, with and without a run to lose")
def late() -> Cases:
    lines = {"--total-epochs 0.00001": tiny("--total-epochs", "0.00001"), "--targets 0.99999": tiny("--method", "oneshot:lamp",
            "--targets", "0.99999"),
        "--total-epochs of no step a child": tiny("--method", "oneshot:lamp", "--total-epochs", "0.1"),
        "dask that is not there": tiny("--engine", "dask", "--scheduler", "tcp://127.0.0.1:1"),
        "a scheduler that is no address": tiny("--engine", "dask", "--scheduler", "nope://x y"),
        "--job-timeout 1e300": tiny("--engine", "processes", "--workers", "1", "--job-timeout", "1e300"),
        "a model that raises later": byname("later"), "a model that exits later": byname("exits_later"),
        "a model that returns something else later": byname("changes_its_shape"),
        "--skip everything": tiny("--skip", "*"), "--unit that fits nothing": tiny("--unit", "nope=filter"),
        "--device cuda": tiny("--device", "cuda"),
        "--search-images too many": tiny("--search-images", "5000"),
        "--threads 1024 with a model that raises": (*byname("later"), "--threads", "4"),
        "objectives that measure nothing": tiny("--objectives", f"accuracy,sparsity,{mine('flat')}"),
        "a model that raises in a worker": (*byname("later"), "--engine", "processes", "--workers", "1"),
        "a model that exits in a worker": (*byname("exits_in_forward"), "--engine", "processes", "--workers", "1")}
    cases = [(name, Case(do)) for name, do in lines.items()]
    for passes in (1, 4, 6):
        for name, error in {"ValueError": ValueError("two\nlines"), "SystemExit": SystemExit(0), "MemoryError": MemoryError(),
                "OSError": OSError("x")}.items():
            cases.append((f"pass {passes} raises {name}", Case(lambda passes=passes,
                    error=error: over(Later(passes, raising(error)), vectors()))))
    cases.append(("the last pass raises", Case(lambda: over(Later(11, raising(ValueError("two\nlines"))), vectors()),
            expected="resumable run")))  # the search has ended by then
    cases += [(name, Case(lambda change=change: over(toolbox=change))) for name, change in TOOLBOXES.items()]
    cases += [(f"toolbox: {name}", Case(lambda box=box: over(toolbox=toolbox_with(**box)))) for name, box in FIRST.items()]
    cases += [(f"toolbox: {name}", Case(lambda box=box: over(toolbox=toolbox_with(**box)), expected="resumable run")) for name,
        box in SECOND.items()]
    childless = toolbox_with(select=lambda *given, **more: [])
    cases.append(("toolbox: select returns nothing", Case(lambda: over(toolbox=childless), expected="accepted")))  # no children
    cases.append(("max_seconds=0", Case(lambda: over(max_seconds=0), expected="accepted")))  # there is a generation to go on with
    cases += [(f"settings: {name}", Case(lambda more=more: prune_named(overwrite=True, **more))) for name, more in LATE.items()]
    return with_and_without_a_run(cases)


def over(*given: Any, **settings: Any) -> Any:
    """Prune, and replace what is there."""
    return prune(*given, overwrite=True, **settings)


LATE: dict[str, dict[str, Any]] = {
    "total_epochs=1e-5": {"total_epochs": 1e-5}, "targets": {"method": "oneshot:lamp", "targets": "0.99999"},
    "job_timeout": {"engine": "processes", "workers": 1, "job_timeout": 1e300},
    "layer": {"layer": "nope"}, "train_images": {"train_images": 5000, "finetune_epochs": 1},
    "weights": {"weights": "nowhere.pt"}}
TOOLBOXES: dict[str, Any] = {
    "toolbox=None": None, "toolbox=5": 5, "toolbox='x'": "x", "a toolbox that raises": raising(ValueError("two\nlines")),
    "a toolbox that exits": raising(SystemExit(0)), "a toolbox that returns None": lambda *given: None,
    "a toolbox that returns 5": lambda *given: 5, "a toolbox that takes nothing": lambda: None,
    "a toolbox without tools": lambda *given: base.Toolbox()}
FIRST: dict[str, dict[str, Any]] = {  # noticed before there is a generation
    **{f"evaluate returns {name}": {"evaluate": lambda individual, value=value: value} for name, value in {
        "no values": (), "one value": (0.5,), "three values": (0.5, 0.5, 0.5), "NaN": (math.nan, math.nan),
        "infinity": (math.inf, 0.5), "texts": ("a", "b"), "a number": 0.5, "a text": "xy", "a dict": {"a": 1, "b": 2},
        "accuracy 7": (7.0, 0.5), "None twice": (None, None), "an array in two rows": np.zeros((2, 2)),
        "complex": (1j, 0.5)}.items()},
    "evaluate raises": {"evaluate": raising(ValueError("two\nlines"))}, "evaluate exits": {"evaluate": raising(SystemExit(0))},
    "evaluate takes nothing": {"evaluate": lambda: (0.5, 0.5)},
    "map returns too few": {"map": lambda function, items, **more: []}, "map returns None": {"map": lambda function, items,
        **more: None}, "measure returns None": {"measure": lambda *given, **more: None},
    "simplify raises": {"simplify": raising(ValueError("x"))}}
SECOND: dict[str, dict[str, Any]] = {  # only used once a generation is there to go on from
    **{f"{name} raises": {name: raising(ValueError("two\nlines"))} for name in ("mate", "mutate", "select", "clone", "breed",
        "survive")},
    "select returns texts": {"select": lambda *given, **more: ["x"] * 4}, "clone returns None": {"clone": lambda each: None},
    "survive returns None": {"survive": lambda *given, **more: None},
    "survive returns nothing": {"survive": lambda *given, **more: []}, "breed returns None": {"breed": lambda *given,
        **more: None}, "mutate empties": {"mutate": lambda each, **more: each.clear()},
    "mutate shortens": {"mutate": lambda each, **more: each.__setitem__(0, each[0][:1])},
    "mutate makes floats": {"mutate": lambda each, **more: each.__setitem__(0, each[0].astype(float))}}
