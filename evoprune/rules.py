"""What --method, --start, --knowledge, --unit, --targets and --caps say, read once."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from .errors import EvopruneError

KNOWLEDGE = ("none", "weights", "data")  # each allows what the one before it does
NEEDS = {"random": "none", "narrow": "none", "magnitude": "weights", "erk": "weights", "lamp": "weights", "fisher": "data",
         "multishot": "weights"}  # rules, and the knowledge that each needs; the repair of multishot's path needs data
SCORES = ("magnitude", "lamp", "fisher")  # rules that can also prune step by step
TASKS = ("classification", "binary", "multilabel", "regression", "segmentation", "tokens")
UNITS = ("weight", "filter")  # what a gene may decide on
SURGEON = "obs"  # optimal brain surgeon, a rule for multishot alone: saliency of what least squares knows
METHODS = ("oneshot", "multishot", "gradual")
SPREAD_TARGETS = 0.9, 0.995  # sparsities that so many --targets spread between
ZOOS = ("torchvision", "timm", "hf")  # libraries of models, by the word before the colon


def function_named(spec: str) -> str | None:
    """Return in words which function a model, data or a task are what is returned by; None if they are named in another way."""
    where, colon, name = spec.rpartition(":")
    if not colon or spec.partition(":")[0] in (*ZOOS, "folder", "npz"):
        return None
    return f"{name} of the {f'file {Path(where).resolve()}' if where.endswith('.py') else f'module {where}'}"


@dataclass(frozen=True)
class Method:
    """What --method says: how masks are made, and by which rule."""

    kind: str  # "evolve" or one of `METHODS`
    rule: str = ""


def read_method(text: str) -> Method:
    """Return what --method says; nothing else reads it."""
    if text == "evolve":
        return Method(text)
    kind, colon, rule = text.partition(":")
    if kind not in METHODS or not colon:
        raise EvopruneError(f"method: found {text!r}, expected evolve, oneshot:RULE, multishot:RULE or gradual:RULE")
    return Method(kind, rule)


def read_units(text: str) -> list[tuple[str, str]]:
    """Return the (pattern, unit) of --unit, of which the first that fits a layer counts."""
    parts = [part.rpartition("=") for part in ([f"*={text}"] if text in UNITS else text.split(","))]
    pairs = [(pattern.strip(), unit.strip()) for pattern, _, unit in parts]
    if not all(unit in UNITS and pattern for pattern, unit in pairs):
        raise EvopruneError(f"unit: found {text!r}, expected {' or '.join(UNITS)}, or PATTERN=UNIT with commas between, like "
                            f"'conv*=filter,fc*=weight'")
    return pairs


def rule_names(start: str) -> list[str]:
    """Return the rules that --start names; raise `EvopruneError` for one that does not exist."""
    names = [name.strip() for name in start.split(",")]
    for name in names:
        if name not in NEEDS:
            raise EvopruneError(f"start: found {name!r}, expected {', '.join(NEEDS)}, with commas between, or auto")
    return names


def check_rules(start: str, how: str, knowledge: str, repair: str | None) -> None:
    """Raise `EvopruneError` unless the rules of --start and --method exist and --knowledge allows them."""
    for name in rule_names(start) if start != "auto" else []:
        check_knowledge("start", name, NEEDS, knowledge)
    method = read_method(how)
    if method.kind == "oneshot":
        check_knowledge("method", method.rule, {n: needed for n, needed in NEEDS.items() if n != "multishot"}, knowledge)
    elif method.kind != "evolve":
        own = {SURGEON: "data"} if method.kind == "multishot" else {}
        check_knowledge("method", method.rule, {name: NEEDS[name] for name in SCORES} | own, knowledge)
        if method.rule == SURGEON and repair != "least-squares":
            raise EvopruneError(f"method: found {how!r}, which asks least squares what weights are worth; give "
                                f"--repair least-squares")


def check_knowledge(setting: str, rule: str, needs: dict[str, str], knowledge: str) -> None:
    allowed = [name for name, needed in needs.items() if KNOWLEDGE.index(needed) <= KNOWLEDGE.index(knowledge)]
    if rule not in needs:
        raise EvopruneError(f"{setting}: found the rule {rule!r}, expected one of {', '.join(allowed)}")
    if rule not in allowed:
        raise EvopruneError(f"{setting}: found {rule!r}, which needs --knowledge {needs[rule]}, with --knowledge {knowledge}; "
                            f"expected {', '.join(allowed) or 'more knowledge'}")


def round_caps(text: str, rounds: int) -> list[float]:
    """Return the highest sparsity of a layer for each round of --layerwise."""
    try:
        caps = [float(cap) for cap in text.split(",")]
    except ValueError:
        caps = []
    if len(caps) != rounds or not all(0 < cap <= 1 for cap in caps):
        raise EvopruneError(f"caps: found {text!r}, expected {rounds} number{'s' * (rounds > 1)} above 0 "
                            f"and up to 1, one a round")
    return caps


def target_sparsities(text: str) -> list[float]:
    """Return the sparsities of --targets, rising."""
    if text.strip().isdecimal() and 1 <= int(text) <= 1000:
        low, high = (math.log(1 - s) for s in SPREAD_TARGETS)
        count = int(text)
        return [1 - math.exp(low + (high - low) * i / max(1, count - 1)) for i in range(count)]
    try:
        sparsities = sorted({float(part) for part in text.split(",")})
    except ValueError:
        sparsities = []
    if not sparsities or not all(0 < s < 1 for s in sparsities):
        raise EvopruneError(f"targets: found {text!r}, expected sparsities between 0 and 1 like 0.9,0.95,0.99, or how many")
    return sparsities
