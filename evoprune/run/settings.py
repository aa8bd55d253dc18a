"""The settings of a run, settled: defaults that depend on others, the model or the machine, and what resuming may change."""

from __future__ import annotations

import logging
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ..config import AUTO, DECIDED, DECIDES, PLANNED, RESUMABLE, Config, check_used, options
from ..engines.engine import check_runs
from ..engines.processes import workers_of
from ..errors import EvopruneError, shown
from ..evaluation.prepared import fastest_batch_size
from ..evolution.budget import FIRST_SHARE, children_of, seeded_budget
from ..inputs.models import MODELS
from ..inputs.sources import check_prepared
from ..inputs.splits import Data
from ..masks.layout import Layout
from ..results.folder import read_to_resume
from ..results.record import Record
from ..results.written import CONFIG, home_of, read_done
from ..rules import read_method, target_sparsities
from ..values.norms import norms_of

TUNED_POPULATION, CHILD_EPOCHS = 16, 3.0  # of a tuned run, unless given
BY_CLOCK = 0  # epochs to add, until they are planned
log = logging.getLogger("evoprune")


def settle(model: nn.Module | str, data: Any, resume: str | Path | None, given: dict[str, Any], plans: bool = True) -> Config:
    """Return the settings of a run with all choices made; when resuming, the recorded ones with the allowed changes. Unless they
    say how to search or train, a plan is still to be made, if this call `plans`.

    Raises:
        EvopruneError: a setting that does not exist or cannot be, or one that resuming may not change.
    """
    if "score_floor" in given:
        given = {"accuracy_floor" if name == "score_floor" else name: value for name, value in given.items()}
    for name in given:
        if name not in options():
            raise EvopruneError(f"{name}: no such setting, expected one of {', '.join(options())}")
    if not isinstance(model, (str, nn.Module)):
        raise EvopruneError(f"model: found {shown(model)}, expected an nn.Module or a name as for --model")
    if not isinstance(resume, (str, Path, type(None))):
        raise EvopruneError(f"resume: found {shown(resume)}, expected the folder of a run")
    given = {name: plain(value) for name, value in given.items()}
    names: dict[str, Any] = {"model": model if isinstance(model, str) else type(model).__name__,
             "data": data if isinstance(data, str) else type(data).__name__}
    named = isinstance(model, str) and isinstance(data, str)
    if resume is not None:
        config = settle_resumed(Path(resume), {"model": model, "data": data}, {**given, **names})
        check_used(given, config)
        check_runs(config, named)
        return with_a_device(config)
    config = with_plan(Config(**names, **given), given, plans)
    check_runs(config, named)
    if config.train_epochs is None:
        own = isinstance(model, str) and config.model in MODELS and config.data == "digits" and config.weights is None
        config = replace(config, train_epochs=30 if own else 0)
    check_used(given, config)
    if not isinstance(data, str):
        check_prepared(data, config)
    if read_method(config.method).kind != "evolve":
        config = replace(config, generations=0)
    elif config.total_epochs is not None:
        config = with_tuned_sizes(config, given)
    cores = 1 if config.model == "lenet" else torch.get_num_threads()  # 2.5 times as long with 2 on a busy machine
    threads = cores if config.engine == "local" else max(1, cores // workers_of(config.workers))
    return with_a_device(replace(config, threads=config.threads or threads, out=config.out or free_folder(config)))


def with_plan(config: Config, given: dict[str, Any], plans: bool) -> Config:
    """Return the settings with the plan of the run that --plan names, or that says that one is to be made."""
    if config.more_epochs is not None:
        raise EvopruneError(f"more_epochs: found {config.more_epochs} without a finished run to --resume; expected both")
    if config.plan is not None and config.plan != AUTO:
        if twice := [name for name in (*DECIDED, "minutes") if name in given]:
            raise EvopruneError(f"{twice[0]}: found with --plan {config.plan}, which says it; expected one of them")
        if not home_of(Path(config.plan)).joinpath(CONFIG).exists():
            raise EvopruneError(f"plan: found {config.plan!r}, expected the folder of a run, or {AUTO}")
        record = read_to_resume(Path(config.plan))
        theirs = record.config
        if theirs.plan == AUTO and record.dense is None:
            raise EvopruneError(f"plan: found {config.plan}, whose run was stopped before it had a plan; --resume it first")
        if theirs.trains_otherwise:
            raise EvopruneError(f"plan: found {config.plan}, whose run has --total-epochs, --finetune-epochs, --method or "
                                f"--layerwise; repeat its command instead")
        names = [name for name in ("start", "knowledge", *PLANNED) if name not in given]
        return replace(config, plan=None, **{name: theirs.settings()[name] for name in names})
    if config.plan is None and config.minutes is None and (not plans or any(name in given for name in DECIDED)):
        return config
    if fixed := [name for name in DECIDES if name in given]:
        raise EvopruneError(f"{fixed[0]}: found {shown(given[fixed[0]])} with --minutes or --plan auto, which decide it; "
                            f"expected one of them")
    return replace(config, plan=AUTO)


def with_tuned_sizes(config: Config, given: dict[str, Any]) -> Config:
    """Return the settings of a tuned run with a population and generations, unless they were given, that let each child
    of a parent train for `CHILD_EPOCHS`; after a line there are fewer."""
    population, epochs = int(given.get("population", TUNED_POPULATION)), config.total_epochs or 0.0
    config = replace(config, population=population)
    later = round((1 - FIRST_SHARE) * epochs / CHILD_EPOCHS / children_of(config))
    return replace(config, generations=int(given.get("generations", 1 + later)))


def training_config(config: Config, images: int, batch_size: int) -> Config:
    """Return the settings of the training that follows a search: those of a tuned run that starts from what was found."""
    population = max(TUNED_POPULATION, 2 * len(target_sparsities(config.targets)))
    config = replace(config, total_epochs=config.refine_epochs, refine_epochs=None, population=population,
                     minutes=None, plan=None)
    budget = seeded_budget(config, images, batch_size)
    return replace(config, generations=budget.generations)


def plain(value: Any) -> Any:
    """Return paths and numpy numbers as what JSON has for them."""
    return str(value) if isinstance(value, Path) else value.item() if isinstance(value, np.generic) else value


def with_a_device(config: Config) -> Config:
    """Return the settings with the device that there is."""
    if config.device == "cuda" and not torch.cuda.is_available():
        raise EvopruneError("device: found 'cuda', but torch sees no CUDA device; expected cpu or auto")
    if config.device != "auto":
        return config
    return replace(config, device="cuda" if torch.cuda.is_available() else "cpu")


def settle_resumed(path: Path, handed: dict[str, Any], asked: dict[str, Any]) -> Config:
    """Return the settings that the folder records, with those changed that may change."""
    record = read_to_resume(path)
    config = replace(record.config, out=str(path), overwrite=False, threads=record.threads)
    for name, named in (("model", record.rebuildable), ("data", record.named_data)):
        if not named and isinstance(handed[name], str):
            raise EvopruneError(f"{name}: the run in {path} was started with one handed in ({getattr(config, name)}); resume "
                                f"with evoprune.prune(model, data, resume={str(path)!r})")
    config, asked = with_more(config, asked, read_done(home_of(path)) is not None)
    for name, value in asked.items():
        if (name in ("model", "data") and value == options()[name].default) or getattr(config, name) == value:
            continue
        if name == "out":
            raise EvopruneError(f"out: found {value!r} together with --resume {path}; a run goes on in its own folder")
        later = config.trains_points or read_method(config.method).kind != "evolve" or record.config.more_epochs is not None
        if name not in RESUMABLE or (name == "generations" and later):
            raise EvopruneError(f"{name}: found {value!r}, but the run in {path} has {getattr(config, name)!r}; --resume "
                                f"may change {', '.join(RESUMABLE)} (generations only of a search of masks, without training)")
        config = replace(config, **{name: value})
    return replace(config, max_seconds=asked.get("max_seconds"))


def with_more(config: Config, asked: dict[str, Any], finished: bool) -> tuple[Config, dict[str, Any]]:
    """Return the settings with the training that is to be added to a finished run, and what else is asked: --more-epochs, or
    --finetune-epochs where it has had none, or --minutes, for which no number of epochs stands yet."""
    if not finished:
        if asked.get("more_epochs") not in (None, config.more_epochs):
            raise EvopruneError(f"more_epochs: found {asked['more_epochs']}, but the run in {config.out} is not finished; "
                                f"resume it without, then add training")
        return config, asked
    config, rest = replace(config, more_epochs=None), dict(asked)
    epochs = rest.pop("more_epochs", None)
    if epochs is None and not config.finetune_epochs:
        epochs = rest.pop("finetune_epochs", None) or None  # none, or 0
    minutes = rest.pop("minutes", None)
    if epochs == BY_CLOCK:
        raise EvopruneError("more_epochs: found 0, expected at least 1")
    if epochs is not None and minutes is not None:
        raise EvopruneError(f"minutes: found {minutes} with {epochs} epochs to add; expected one of them")
    if epochs is not None or minutes is not None:
        config = replace(config, more_epochs=BY_CLOCK if epochs is None else epochs, minutes=minutes or config.minutes)
    return config, rest


def free_folder(config: Config) -> str:
    """Return results/MODEL-DATA, numbered from 2 if it is taken."""
    def short(spec: str) -> str:
        kind, _, rest = spec.rpartition(":")
        word = Path(rest).resolve().stem if kind in ("folder", "npz", "hf") else rest
        return re.sub(r"[^a-z0-9_.]+", "-", word.lower()).strip("-.") or "run"

    path = name = f"results/{short(config.model)}-{short(config.data)}"
    number = 1
    while Path(path).exists():
        number += 1
        path = f"{name}-{number}"
    return path


def settle_for_model(config: Config, model: nn.Module) -> Config:
    """Return the settings with the repair and the first masks that a model wants, unless they were given."""
    repair = config.repair or default_repair(model, config)
    return replace(config, repair=repair,
                   start=default_start(config.knowledge, repair) if config.start == "auto" else config.start)


def default_repair(model: nn.Module, config: Config) -> str:
    """Return the repair that a model cannot do without: a masked net with stale batch-norm statistics always looks dead."""
    return "bn" if norms_of(model) and not config.layerwise else "none"


def default_start(knowledge: str, repair: str) -> str:
    """Return the rules that make the best first masks of what is known."""
    if knowledge == "none":
        return "narrow"
    return "multishot" if knowledge == "data" and repair == "least-squares" else "random,magnitude,erk,lamp"


def search_batch_size(config: Config, net: nn.Module, layout: Layout, splits: Data, usual: int,
                      old: Record | None) -> int:
    """Return the batch size of the search: recorded, given, timed, or the usual one."""
    # 6 arguments: what the choice is timed with
    if old and old.search_batch_size:
        return old.search_batch_size  # timing again might choose another
    if config.batch_size == "auto":
        fastest = fastest_batch_size(net, splits.search, usual, [layer.name for layer in layout])
        log.info("fastest batch size: %d", fastest)
        return fastest
    return usual if config.batch_size is None else int(config.batch_size)
