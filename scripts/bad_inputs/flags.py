"""Wrong flags, and the same settings from Python: most follow from the table of settings."""

from __future__ import annotations

from typing import Any

from evoprune.config import Option, flag_of, options

from .case import Case, Cases, group, mine, prune, tiny

HARMLESS = {"cache_mb", "front"}  # may be as large as they like: they only limit
FOLDERS = {"out", "data_dir"}  # may be called anything that the file system takes

STRINGS = {  # texts that a setting cannot be
    "model": ("nope", "torchvision:", "torchvision:nope", ":", "a:", ":b", "..:f", "os:nope", "x.py:f", "nope.mod:f", "lenet:"),
    "data": ("nope", "folder:", "npz:", "folder:nowhere", "npz:nowhere", ":", "x.py:f", "os:nope", "os:getcwd"),
    "weights": ("nowhere.pt", "/", "/dev/null"),
    "mean": ("a", "0.5,", "nan", "inf", "0.5;0.5"), "std": ("a", "0", "-1", "nan"),
    "layer": ("nope", ",", "conv1,nope"), "skip": ("nope", "*", "["), "include": ("nope", ","),
    "unit": ("weights", "=filter", "conv1=", "conv1=rows", ",", "nope=filter", "filter,weight"),
    "objectives": ("accuracy", "accuracy,accuracy", "nope", "accuracy,sparsity,nope.py:f", "accuracy,sparsity,",
        "sparsity,os:getcwd"),
    "start": ("nope", "random,", ",", "auto,random", "RANDOM"),
    "method": ("oneshot", "oneshot:", "oneshot:nope", "gradual:lamp", "multishot:obs", "evolve:lamp", "nope:lamp"),
    "targets": ("0", "1.0", "nan", "0.9,,0.8", "1001", "-1", "0.5;0.6", "0.9,2", "inf", "9" * 5000),
    "batch_size": ("0", "-1", "x", "1e3", "1.5", "²", "9" * 5000)}


def wrong_texts(name: str, about: Option) -> list[str]:
    """Return texts that a flag cannot take."""
    below = [] if about.low is None else [f"{about.low - 1:g}"]
    above = [] if about.high is None else [f"{int(about.high) + 1}"]
    if about.kind is int:
        return ["x", "1.5", "nan", *below, *above, "9" * 5000]
    if about.kind is float:
        return ["x", "nan", *below, *above, *(["inf"] if about.high else []), "-inf"]
    if about.choices:
        return ["x", about.choices[0].upper(), f"{about.choices[0]}\x1b[31m"]
    return ["", *STRINGS.get(name, ())]


@group("flags: wrong values")
def values() -> Cases:
    found = {}
    for name, about in options().items():
        flag = flag_of(name)
        if about.kind is bool:
            found[f"{flag}=x"] = Case((f"{flag}=x",))
            continue
        for text in wrong_texts(name, about):
            found[f"{flag} {text[:20]!r}"] = Case(tiny(f"{flag}={text}"))
        found[f"{flag} without a value"] = Case((flag,))
    return found


@group("flags: that do nothing there, or do not go together")
def idle() -> Cases:
    dask, workers = ("--engine", "dask"), ("--engine", "processes")
    pair = ("--model", mine("flat"), "--data", mine("pair"), "--population", "4", "--generations", "1", "--out", "out")
    split = ("--model", mine("flat"), "--data", mine("ready"), "--population", "4", "--generations", "1", "--out", "out")
    lines: dict[str, tuple[str, ...]] = {
        "--rounds without --layerwise": tiny("--rounds", "2"), "--caps without --layerwise": tiny("--caps", "0.5"),
        "--rounds and --caps without --layerwise": tiny("--rounds", "2", "--caps", "0.5,0.6"),
        "--layer-rule without --layerwise": tiny("--layer-rule", "floor"),
        "--layer-rule and a floor without --layerwise": tiny("--layer-rule", "floor", "--accuracy-floor", "0.1"),
        "--scheduler with local": tiny("--scheduler", "tcp://127.0.0.1:1"), "--listen with local": tiny("--listen", "127.0.0.1"),
        "--hostfile with local": tiny("--hostfile", "x"), "--job-timeout with local": tiny("--job-timeout", "5"),
        "--scheduler with processes": tiny(*workers, "--scheduler", "tcp://127.0.0.1:1"),
        "--listen with processes": tiny(*workers, "--listen", "127.0.0.1"),
        "--hostfile with dask": tiny(*dask, "--hostfile", "x"), "--listen with dask": tiny(*dask, "--listen", "127.0.0.1"),
        "--train-images without a train split": (*pair, "--train-images", "5"),
        "--image-size with data of a function": (*pair, "--image-size", "8"),
        "--mean and --std with a Data of a function": (*split, "--mean", "0.5", "--std", "0.5"),
        "--mean with a Data of a function": (*split, "--mean", "0.5"), "--std with a Data of a function": (*split, "--std",
            "0.5"),
        "--image-size with a Data of a function": (*split, "--image-size", "8"),
        "--caps of the wrong number": ("--layerwise", "--caps", "0.5,0.6"), "--caps 0": ("--layerwise", "--caps", "0"),
        "--caps nan": ("--layerwise", "--caps", "nan"), "--caps ''": ("--layerwise", "--caps="),
        "--layer-rule floor without a floor": ("--layerwise", "--layer-rule", "floor"),
        "--layerwise with --repair": ("--layerwise", "--repair", "bn"),
        "--layerwise with --total-epochs": ("--layerwise", "--total-epochs", "1"),
        "--layerwise with --method": ("--layerwise", "--method", "oneshot:lamp"),
        "--finetune-epochs with --total-epochs": ("--finetune-epochs", "1", "--total-epochs", "1"),
        "an odd --population": ("--population", "5"), "a flag that does not exist": ("--nope",), "a word too many": ("nope",),
        "a word of terminal codes": ("\x1b[31mred\nline",), "--resume nothing": ("--resume",), "--resume ''": ("--resume=",),
        "--resume nowhere": ("--resume", "nowhere"), "--resume a file": ("--resume", "/dev/null"),
        "--resume a long name": ("--resume", "x" * 5000), "--knowledge none --start lamp": ("--knowledge", "none", "--start",
            "lamp"),
        "--knowledge weights --start fisher": ("--knowledge", "weights", "--start", "fisher"),
        "--knowledge none --method oneshot:lamp": ("--knowledge", "none", "--method", "oneshot:lamp"),
        "--out a file": tiny("--out", "/dev/null"), "--out in a file": tiny("--out", "/dev/null/run"),
        "--out too long": tiny("--out", "x" * 300), "--out with terminal codes in a file": tiny("--out", "/dev/null/\x1b[31m\nx"),
        "--listen with a bad address": tiny("--engine", "scoop", "--listen", "not an address"),
        "--hostfile nowhere": tiny("--engine", "scoop", "--hostfile", "nowhere"),
        "--hostfile a folder": tiny("--engine", "scoop", "--hostfile", "/")}
    return {name: Case(do) for name, do in lines.items()}


WRONG: dict[type, tuple[Any, ...]] = {
    int: ("1", 1.5, True, float("nan"), float("inf")), float: ("", True, float("nan"), float("-inf")),
    bool: (1, "yes"), str: (5, b"x", [], "", "\0", "x" * 100_000, "two\nlines")}


class Lines:
    """An object that shows itself in lines and colours."""

    def __repr__(self) -> str:
        return "\x1b[31mtwo\nlines"


@group("settings in Python")
def settings() -> Cases:
    found = {}
    for name, about in options().items():
        if name in ("model", "data"):
            continue
        low = [] if about.low is None else [about.low - 1]
        high = [about.high + 1] if about.high is not None else [10**30] if about.kind is int else []
        none = [None] if about.default is not None else []
        for value in [*WRONG[about.kind], *low, *high, *none, Lines()]:
            fine = (value == 10**30 and name in HARMLESS) or (value == "two\nlines" and name in FOLDERS)
            found[f"{name}={value!r:.20}"] = Case(lambda name=name, value=value: prune(**{name: value}),
                                                  expected="accepted" if fine else "one line")
    return found
