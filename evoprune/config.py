"""Every setting of a run, once: its name, default, help and limits, and what goes together.

The command line, the README's table and a run's config.json are made from the fields of `Config`.
"""

from __future__ import annotations

import re
import typing
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from typing import Any

from .errors import EvopruneError, shown
from .objectives import USUAL, split_objectives
from .rules import KNOWLEDGE, SURGEON, TASKS, check_rules, read_method, read_units, round_caps, target_sparsities

ENGINES = ("local", "processes", "scoop", "dask")
PROGRAM = "python -m evoprune.main"  # as everyone can start it
LONGEST = 4096  # characters of a setting
AUTO = "auto"


def option(default: Any, help: str, *, low: float | None = None, high: float | None = None,
           choices: tuple[str, ...] | None = None, metavar: str | None = None) -> Any:
    """Declare a setting: a dataclass field with what the parser, the README and the checks need."""
    # 6 arguments: the columns of the table of settings
    metadata = {"help": help, "low": low, "high": high, "choices": choices, "metavar": metavar}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Config:
    """The settings of one run; `Config(population=7)` raises `EvopruneError`."""

    # what is pruned, and on what
    model: str = option("lenet", "lenet, lenet5, resnet18, torchvision:NAME, timm:NAME, hf:DIR, package.module:function or "
                        "FILE.py:function", metavar="MODEL")
    weights: str | None = option(None, "a state dict to start from: .safetensors, alone or sharded, or what torch.save wrote "
                                 "(.pt, .pth, .ckpt, .bin)", metavar="FILE")
    train_epochs: int | None = option(None, "train the dense model first, gently from --weights (digits without: 30)", low=0,
                                      high=100_000)
    data: str = option("digits", "digits, mnist, cifar10, folder:DIR, npz:FILE, package.module:function "
                       "or FILE.py:function", metavar="DATA")
    data_dir: str = option("data", "where mnist and cifar10 lie, as torchvision lays them out", metavar="DIR")
    mean: str | None = option(None, "mean of the images in 0..1, a number a channel: 0.49,0.48,0.45", metavar="M,M,M")
    std: str | None = option(None, "standard deviation, like --mean", metavar="S,S,S")
    image_size: int | None = option(None, "resize the shorter side to this, then crop the centre", low=1, high=8192)
    search_images: int | None = option(None, "images held out of training for every decision of the search "
                                       "(5,000, or a fifth of the training images if that is less)", low=1)
    train_images: int | None = option(None, "train on this many of the others (all)", low=1)
    test_images: int | None = option(None, "report on this many test images (all)", low=1)
    split_seed: int = option(0, "seed of the cut into train, search and test", low=0, high=2**32 - 1)
    layer: str | None = option(None, "search only these: comma-separated modules or parameters", metavar="NAME")
    skip: str | None = option(None, "leave out what matches: comma-separated patterns like 'classifier.*'",
                              metavar="PATTERN")
    include: str | None = option(None, "prune matching parameters that are left alone otherwise "
                                 "(embeddings, norms, biases)", metavar="PATTERN")
    unit: str = option("weight", "what the search decides on: weight, or filter (all weights of one output, in a linear layer a "
                       "row), or by name: 'conv*=filter,fc*=weight'", metavar="UNIT")
    objectives: str = option(",".join(USUAL.names), "what is optimised; more of your own: FILE.py:function", metavar="NAMES")
    task: str | None = option(None, "what the model is for: " + ", ".join(TASKS) + ", or a function that returns an "
                              "evoprune.Task: FILE.py:function (guessed from the targets)", metavar="TASK")
    # the search
    start: str = option("auto", "rules that make the first masks, comma-separated: random, narrow, magnitude, erk, lamp, fisher, "
                        "multishot; auto takes the best that --knowledge allows", metavar="RULES")
    knowledge: str = option("data", "what starts and operators may look at: nothing, the weights, or training data too",
                            choices=KNOWLEDGE)
    repair: str | None = option(None, "what is made good in each masked model before it is measured, and in the result: "
                                "batch-norm statistics, or all values layer by layer (bn with batch norms, else none)",
                                choices=("none", "bn", "least-squares"))
    shots: int = option(160, "steps of the multi-shot path, which prunes and repairs little by little", low=1, high=10_000)
    choice_images: int | None = option(None, "training images kept back from repair and training, on which points are compared "
                                       "in the end: few search images are a lottery (a plan's, else 0)", low=0, high=1_000_000)
    population: int = option(64, "individuals kept each generation; even", low=4, high=1_000_000)
    generations: int = option(100, "generations after the first masks", low=0, high=10_000_000)
    seed: int = option(0, "seed of the search and of training", low=0, high=2**32 - 1)
    accuracy_floor: float = option(0.0, "points below this accuracy or other score (0..1, search split) are not wanted; "
                                   "--score-floor is the same", low=0, high=1)
    minutes: float | None = option(None, "plan search and training for so long, by a clock (1 for a small model, else 10, unless "
                                   "settings say how to search or train)", low=0.1, high=1e5)
    plan: str | None = option(None, "auto: plan by a clock; the folder of a run: search and train as that did, without a clock",
                              metavar="RUN")
    max_seconds: float | None = option(None, "stop the search or training after so many seconds, save, say how to resume", low=0)
    # tuned runs, and the rules to compare with
    total_epochs: float | None = option(None, "train while searching: children inherit their parent's values and train on; all "
                                        "training together takes so many epochs", low=1e-6, high=1e6)
    refine_epochs: float | None = option(None, "after the search, train what it found at --targets, children of the dense model, "
                                         "and children that inherit; all training together takes so many epochs",
                                         low=1e-6, high=1e6)
    method: str = option("evolve", "evolve, or a rule to compare with, on --targets: oneshot:RULE, multishot:RULE or "
                         "gradual:RULE", metavar="METHOD")
    targets: str = option("8", "sparsities that training and rules aim at: a list like 0.9,0.95,0.99, or how many of them, "
                          "spread evenly in log density from 0.9 to 0.995", metavar="S,S")
    # layer by layer
    layerwise: bool = option(False, "search one layer after the other, apply the chosen mask, train, go on")
    layer_rule: str = option("knee", "which mask of a layer is applied: at the knee of its front, or the sparsest above "
                             "--accuracy-floor", choices=("knee", "floor"))
    rounds: int = option(1, "times that --layerwise goes through the layers", low=1, high=1000)
    caps: str = option("1.0", "highest sparsity of a layer in each round: 0.6,1.0", metavar="S,S")
    # training after the search
    finetune_epochs: int = option(0, "train the front's points this long, their zeros held at zero", low=0, high=100_000)
    front: int = option(16, "train at most this many points, spread evenly in log density", low=1)
    more_epochs: int | None = option(None, "--resume: train the points of a finished run so many epochs more; those that get "
                                     "better by more than chance join them (--finetune-epochs, where it had none, and --minutes "
                                     "say the same)", low=0, high=100_000)
    learning_rate: float | None = option(None, "peak learning rate of all training "
                                         "(0.01 with Adam below a million weights, 0.05 with SGD above)", low=1e-9, high=1e3)
    train_precision: str = option("fp32", "of all training; with bf16 values stay fp32; auto times a step of each and takes the "
                                  "faster", choices=("fp32", "bf16", AUTO))
    augment: bool = option(True, "random crops and flips when training on colour images of classes")
    # where and how
    out: str | None = option(None, "folder of the run (results/MODEL-DATA, numbered if it is taken)", metavar="DIR")
    overwrite: bool = option(False, "replace the run that --out holds")
    device: str = option("auto", "where masks are evaluated", choices=("auto", "cpu", "cuda"))
    threads: int | None = option(None, "torch threads (torch's own choice; 1 for lenet, too small for more); recorded", low=1,
                                 high=1024)
    batch_size: str | None = option(None, "images a forward pass, or auto to time a few "
                                    "(a power of two, largest activation about 16 MB on a CPU)", metavar="N")
    precision: str = option("fp32", "of the search; whatever is written to front.csv is fp32", choices=("fp32", "bf16"))
    latency_batch: int = option(1, "examples at a time for which point.model(sparse=True) takes the faster of dense and sparse "
                                "layers, and an exported point is timed", low=1, high=4096)
    cache_mb: int = option(1024, "memory for values that no mask changes: normalised images, or what enters the first "
                           "searched layer", low=0)
    engine: str = option("local", "where masks are evaluated and points repaired and trained: in this process, in others, "
                         "under SCOOP or on Dask", choices=ENGINES)
    workers: int | None = option(None, "processes of the engine (one a core)", low=1)
    job_timeout: float | None = option(None, "seconds that a mask or the last repair or training of a point may take in a worker "
                                       "before it counts as hanging and runs again", low=0.01, high=1e7, metavar="SECONDS")
    scheduler: str | None = option(None, "address of a running Dask scheduler (a cluster on this machine)", metavar="ADDRESS")
    listen: str | None = option(None, "address at which SCOOP waits for workers of other machines; whoever reaches it can run "
                                "code as you (127.0.0.1)", metavar="ADDRESS")
    hostfile: str | None = option(None, "machines on which SCOOP starts workers, over ssh: lines of NAME WORKERS", metavar="FILE")

    def __post_init__(self) -> None:
        for f in fields(self):
            check_setting(f.name, getattr(self, f.name))
            if "\0" in str(getattr(self, f.name)):
                raise EvopruneError(f"{f.name}: found a NUL character, expected none")
        for name in ("layer", "skip", "include"):
            if not (getattr(self, name) or "all").strip(", "):
                raise EvopruneError(f"{name}: found {getattr(self, name)!r}, expected names with commas between")
        if self.population % 2:
            raise EvopruneError(f"population: found {self.population}, expected an even number of at least 4; "
                                f"try {self.population + 1}")
        if self.batch_size not in (None, "auto") and not (str(self.batch_size).isdecimal() and int(self.batch_size or 0)):
            raise EvopruneError(f"batch_size: found {self.batch_size!r}, expected a whole number of at least 1, or auto")
        target_sparsities(self.targets)
        read_units(self.unit)
        split_objectives(self.objectives)
        if self.task is not None and self.task not in TASKS and ":" not in self.task:
            raise EvopruneError(f"task: found {self.task!r}, expected {', '.join(TASKS)}, FILE.py:function or "
                                f"package.module:function")
        if (self.minutes is not None or self.plan == AUTO) and self.trains_otherwise and self.more_epochs is None:
            found = f"plan: found {self.plan}" if self.minutes is None else f"minutes: found {self.minutes:g}"
            raise EvopruneError(f"{found} with --total-epochs, --finetune-epochs, --method or "
                                f"--layerwise, which say how to search and train; expected one of them")
        self.check_method()
        if self.layerwise:
            round_caps(self.caps, self.rounds)
            if self.repair not in (None, "none"):
                raise EvopruneError(f"repair: found {self.repair!r} with --layerwise, whose stages train instead; expected none")
            if self.layer_rule == "floor" and not self.accuracy_floor:
                raise EvopruneError("layer_rule: found 'floor' without a floor; give --accuracy-floor")

    def check_method(self) -> None:
        """Raise `EvopruneError` for a method that does not exist or whose settings do not go together."""
        kind = read_method(self.method).kind
        if kind == "gradual" and self.total_epochs is None:
            raise EvopruneError(f"method: found {self.method!r} without training; give --total-epochs")
        if self.total_epochs is not None and self.finetune_epochs:
            raise EvopruneError(f"finetune_epochs: found {self.finetune_epochs} with --total-epochs, whose points are trained "
                                f"already; expected one of them")
        if self.refine_epochs is not None and (self.total_epochs is not None or self.finetune_epochs or self.layerwise):
            raise EvopruneError(f"refine_epochs: found {self.refine_epochs:g} with --total-epochs, --finetune-epochs or "
                                f"--layerwise, which train in another way; expected one of them")
        if self.layerwise and (self.total_epochs is not None or kind != "evolve"):
            raise EvopruneError("layerwise: found with --total-epochs or --method, expected it alone")
        check_rules(self.start, self.method, self.knowledge, self.repair)

    @property
    def trains_otherwise(self) -> bool:
        """Whether a plan has no say in how to search and train."""
        return bool(self.total_epochs or self.finetune_epochs or self.layerwise or read_method(self.method).kind != "evolve")

    @property
    def trains(self) -> bool:
        """Whether the run needs training images with labels."""
        return bool(self.train_epochs or self.finetune_epochs or self.total_epochs or self.refine_epochs
                    or self.more_epochs is not None)

    @property
    def trains_points(self) -> bool:
        """Whether pruned models get values of their own by training."""
        return bool(self.finetune_epochs or self.total_epochs or self.refine_epochs or self.layerwise
                    or self.more_epochs is not None)

    @property
    def keeps_first(self) -> bool:
        """Whether the first masks stay to the end, where what is better by chance alone is told."""
        return self.refine_epochs is not None or bool(self.choice_images)

    @property
    def worth(self) -> str | None:
        """The saliency of what is left that --repair and --knowledge let starts and operators go by, None if there is none."""
        if self.repair != "least-squares" or self.knowledge == "none":
            return None
        return SURGEON if self.knowledge == "data" else "lamp"

    def settings(self) -> dict[str, Any]:
        """Return the settings as plain data for config.json."""
        return asdict(self)


USED: dict[str, tuple[str, Callable[[Config], bool]]] = {  # settings that only some others give something to do, and which
    **dict.fromkeys(("rounds", "caps", "layer_rule"), ("--layerwise", lambda config: config.layerwise)),
    "scheduler": ("--engine dask", lambda config: config.engine == "dask"),
    **dict.fromkeys(("listen", "hostfile"), ("--engine scoop", lambda config: config.engine == "scoop")),
    "choice_images": ("all layers searched together", lambda config: not config.layerwise),
    "train_precision": ("training", lambda config: config.trains or config.plan is not None),
    "workers": ("--engine processes, scoop or dask", lambda config: config.engine != "local" or config.workers == 1),
    "job_timeout": ("--engine processes, scoop or dask", lambda config: config.engine != "local")}


def check_used(given: Collection[str], config: Config) -> None:
    """Raise `EvopruneError` for a setting that was given and does nothing where it stands."""
    for name, (needed, used) in USED.items():
        if name in given and getattr(config, name) != options()[name].default and not used(config):
            raise EvopruneError(f"{name}: found {shown(getattr(config, name))}, which does nothing without {needed}; leave it "
                                f"out, or give that too")


DECIDES = ("repair", "shots", "population", "generations", "refine_epochs", "targets")  # what a plan alone decides
PLANNED = (*DECIDES, "choice_images")  # what it says; the last may be given beside it
DECIDED = (*DECIDES, "total_epochs", "finetune_epochs", "method", "start", "layerwise", "knowledge")  # no plan without `minutes`
RESUMABLE = ("engine", "max_seconds", "generations", "workers", "job_timeout", "scheduler", "listen", "hostfile",
             "more_epochs")  # what --resume may change: no result but by what it adds; generations only without tuning


@dataclass(frozen=True)
class Option:
    """What is known about a setting beside its value."""

    kind: type  # int, float, bool or str
    default: Any
    help: str
    low: float | None
    high: float | None
    choices: tuple[str, ...] | None
    metavar: str | None


@cache
def options() -> dict[str, Option]:
    """Return every setting by name, in the order of `Config`."""
    hints = typing.get_type_hints(Config)
    kinds = {name: next(iter({*typing.get_args(hint)} - {type(None)}), hint) for name, hint in hints.items()}
    return {f.name: Option(kinds[f.name], f.default, **f.metadata) for f in fields(Config)}


def flag_of(name: str) -> str:
    """Return the flag of a setting."""
    return "--" + ("no-" if options()[name].default is True else "") + name.replace("_", "-")


def keywords(text: str) -> str:
    """Return advice for the command line as advice for Python: resume=DIR for --resume DIR, batch_size= for --batch-size."""
    names = {"--resume": "resume", **{flag_of(name): name for name in options()}}
    joined = re.sub(r"(--(?:resume|engine|plan|knowledge)) (?!or |and |may )([^\s,;]+)", r"\1='\2'", text)
    return re.sub(r"(--[a-z-]*[a-z])=?", lambda found: f"{names[found[1]]}=" if found[1] in names else found[0], joined)


def flags(given: dict[str, Any]) -> list[str]:
    """Return settings as the flags that give them."""
    found = []
    for name, value in given.items():
        is_bool, default = options()[name].kind is bool, options()[name].default
        if not is_bool or value != default:
            found += [flag_of(name), *([] if is_bool else [str(value)])]
    return found


def check_setting(name: str, value: Any) -> None:
    """Raise `EvopruneError` unless `value` is one that the setting `name` can take."""
    about = options()[name]
    if value is None and about.default is None:
        return
    kinds = (int, float) if about.kind is float else (about.kind,)
    if type(value) not in kinds:
        kind = "a number" if about.kind is float else about.kind.__name__
        raise EvopruneError(f"{name}: found {shown(value)}, expected {kind}")
    if isinstance(value, str) and not 0 < len(value) <= LONGEST:
        raise EvopruneError(f"{name}: found {len(value):,} characters, expected 1 to {LONGEST:,}")
    if about.choices and value not in about.choices:
        raise EvopruneError(f"{name}: found {shown(value)}, expected one of {', '.join(about.choices)}")
    low, high = about.low, about.high
    if (low is not None and not value >= low) or (high is not None and not value <= high):
        expected = f"at least {low}" if high is None else f"{low} to {high}"
        raise EvopruneError(f"{name}: found {value}, expected {expected}")
