"""Models, data and toolboxes of users' own that do what they should not."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import evoprune
from evoprune.evolution.toolbox import default_toolbox

PASSES = [0]  # forward passes of `Later`: copies of a model share it


class Theirs(BaseException):
    """An exception that `except Exception` lets through."""


def raising(error: BaseException) -> Callable[..., Any]:
    """Return a function that raises."""
    def function(*given: Any, **named: Any) -> Any:
        raise error

    return function


class Later(nn.Module):
    """A linear model that goes well for so many forward passes, then does something else; torch.fx cannot trace it."""

    def __init__(self, passes: int, then: Callable[..., Any], inputs: int = 16, outputs: int = 3):
        super().__init__()
        self.passes, self.then, self.fc = passes, then, nn.Linear(inputs, outputs)

    def forward(self, x):  # type: ignore[no-untyped-def]
        if float(x.sum()) > -1e30:  # depends on data
            PASSES[0] += 1
        if PASSES[0] > self.passes:
            return self.then(self, x)
        return self.fc(x.flatten(1))


class Raising(nn.Linear):
    """A linear model, one of whose methods raises."""

    def __init__(self, method: str, error: BaseException):
        super().__init__(16, 3)
        self.ready = True
        setattr(type(self), method, raising(error))


class Items(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """A data set of vectors, item 7 of which is what a function returns."""

    def __init__(self, item: Callable[..., Any], length: Any = 60):
        self.item, self.length = item, length

    def __len__(self) -> Any:
        return self.length() if callable(self.length) else self.length

    def __getitem__(self, i: int) -> Any:
        return self.item(i) if i == 7 else (torch.zeros(16), i % 3)


def toolbox_with(**registered: Any) -> Callable[..., Any]:
    """Return a toolbox= in whose toolbox some functions are others."""
    def make(evaluate: Any, layout: Any, config: Any) -> Any:
        box = default_toolbox(evaluate, layout, config)
        for name, function in registered.items():
            box.register(name, function)
        return box

    return make


# by name, for the command line: models of 8x8 images


def later() -> nn.Module:
    return Later(6, raising(ValueError("not today\nnor tomorrow")), 64, 10)


def exits_later() -> nn.Module:
    return Later(6, lambda *given: sys.exit(3), 64, 10)


def exits_in_forward() -> nn.Module:
    return Later(0, lambda *given: sys.exit(0), 64, 10)


def changes_its_shape() -> nn.Module:
    return Later(6, lambda model, x: torch.zeros(1), 64, 10)


def flat() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))


def colour() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 2))


def vector_model() -> nn.Module:
    return nn.Linear(16, 3)


def sparse() -> nn.Module:
    model = flat()
    model.register_buffer("more", torch.eye(3).to_sparse())
    return model


def exits() -> nn.Module:
    sys.exit(3)


def exits_well() -> nn.Module:
    sys.exit(0)


def raises_base() -> nn.Module:
    raise Theirs("two\nlines")


def interrupts() -> nn.Module:
    raise KeyboardInterrupt


def no_memory() -> nn.Module:
    raise MemoryError


def returns_none() -> None:
    return None


def returns_class() -> type:
    return nn.Linear


def needs_arguments(a: int) -> nn.Module:
    return flat()


not_a_function = 5


# by name: data


def ready() -> evoprune.Data:
    images = torch.randint(255, (60, 1, 8, 8), dtype=torch.uint8)
    split = (images, torch.arange(60) % 10)
    return evoprune.Data(split, split, split, mean=[0.5], std=[0.5])


def pair() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.rand(60, 1, 8, 8), torch.arange(60) % 10


def wrong_labels() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.rand(60, 1, 8, 8), torch.arange(60)


def nested() -> Any:
    return (pair()[0], pair()[0]), pair()[1]


def unequal() -> Any:
    return [[1, 2], [3]], [0, 1]


def broken_items() -> Items:
    return Items(raising(OSError("disk gone")))


def exiting_items() -> Items:
    return Items(raising(SystemExit(0)))
