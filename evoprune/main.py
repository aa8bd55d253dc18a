"""The command line: the fields of `Config` become flags, `prune` does the work, this file adds nothing to it.

SCOOP runs it as a file, so its imports are absolute; what needs torch is imported once the flags are known to be right.
"""

from __future__ import annotations

import argparse
import logging
import math
import shlex
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evoprune.interrupts import end_at_once, signals

if __name__ == "__main__":
    end_at_once()

from evoprune.commands import COMMANDS, Parser, shown_on
from evoprune.commands import run as run_command
from evoprune.config import PROGRAM, Config, Option, check_setting, check_used, flag_of, options
from evoprune.engines.scoop_pool import under_scoop
from evoprune.errors import EvopruneError
from evoprune.results.folder import read_to_resume
from evoprune.results.written import FRONT, FRONT_PLOT, LAYERS, LAYERS_PLOT, MASKS, PROGRESS_PLOT, REPORT

if TYPE_CHECKING:
    from evoprune.results.front import Front

log = logging.getLogger("evoprune")

SAME = {"accuracy_floor": ("--score-floor",)}  # other names of a flag
MORE = ("finetune_epochs", "minutes")  # with --resume for training that is added, whatever the run was trained by
MATTER = ("model", "data", "weights", "minutes", "out", "max_seconds")  # most, and stand first
GROUPS = {"model": "what is pruned, and on what", "start": "the search", "total_epochs": "training while searching, and rules to "
          "compare with", "layerwise": "layer by layer", "finetune_epochs": "training after the search",
          "out": "where and how"}  # of settings, each by its first
EXAMPLES = f"""commands, each with a --help of its own:
{chr(10).join(f"  {name:8} {about}" for name, (about, *_) in COMMANDS.items())}

examples:
  {PROGRAM}
  {PROGRAM} --model torchvision:resnet18 --data folder:photos --minutes 60
  {PROGRAM} --model net.py:make --weights net.pth --data npz:arrays.npz --finetune-epochs 5
  {PROGRAM} --resume results/lenet-digits
  {PROGRAM} pick results/lenet-digits --drop 0.01 --export small.onnx
"""


def parser() -> argparse.ArgumentParser:
    """Return the parser, made from the settings."""
    made = Parser(prog=PROGRAM, description="Prune a model: one run gives the whole accuracy-sparsity Pareto front.",
                  usage=f"%(prog)s [flags]\n       %(prog)s {{{','.join(COMMANDS)}}} ...", epilog=EXAMPLES,
                  argument_default=argparse.SUPPRESS, formatter_class=argparse.RawDescriptionHelpFormatter)
    first = group = made.add_argument_group("what matters first")
    first.add_argument("--resume", metavar="DIR", help="go on with the run in this folder, with its own settings")
    first.add_argument("--dry-run", action="store_true", help="say what would be done, and the plan, and leave nothing")
    first.add_argument("--quiet", action="store_true", help="say nothing but warnings and errors")
    for name, about in options().items():
        flag = flag_of(name)
        group = made.add_argument_group(GROUPS[name]) if name in GROUPS else group
        where = first if name in MATTER else group
        if about.kind is bool:
            where.add_argument(flag, dest=name, action="store_false" if about.default else "store_true",
                               help=("no " if about.default else "") + about.help)
        else:
            where.add_argument(flag, *SAME.get(name, ()), dest=name, type=about.kind, choices=about.choices, help=help_of(about),
                               metavar=about.metavar or (None if about.choices else "N" if about.kind is int else "X"))
    return made


def help_of(about: Option) -> str:
    text = about.help if about.default is None else f"{about.help} (default: {about.default})"
    return text.replace("%", "%%")


def main(arguments: Sequence[str] | None = None, toolbox: Callable[..., Any] | None = None, program: str = PROGRAM) -> int:
    """Run the command line; return the exit status: 0 done, 2 bad input, 130 Ctrl-C, 143 SIGTERM.

    A script may hand in what `prune` takes as `toolbox`, and how it was called itself, for the record.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    looks = arguments[:1] and arguments[0] in COMMANDS
    given = {} if looks else vars(parser().parse_args(arguments))
    with signals() as came, warnings.catch_warnings():
        if not sys.warnoptions:
            warnings.simplefilter("ignore")  # those of libraries: what matters is told in one line
        try:
            return run_command(arguments) if looks else start(arguments, given, toolbox, program)
        except EvopruneError as error:
            print(f"evoprune: {error}", file=sys.stderr)
        except KeyboardInterrupt:
            if came:
                return 128 + came[0]
            print("evoprune: KeyboardInterrupt was raised by the model, the data or the toolbox, not by Ctrl-C", file=sys.stderr)
        return 2


def start(arguments: Sequence[str], given: dict[str, Any], toolbox: Callable[..., Any] | None, program: str) -> int:
    """Check the flags, then run here or under SCOOP; return the exit status."""
    if under_scoop():
        given.setdefault("engine", "scoop")
    check(given)
    if not under_scoop() and engine_of(given) == "scoop":
        return launch(arguments, given, toolbox)
    return run(arguments, given, toolbox, program)


def check(given: dict[str, Any]) -> None:
    """Raise `EvopruneError` for flags that cannot be, before anything that takes time."""
    settings = {name: value for name, value in given.items() if name not in ("resume", "dry_run", "quiet")}
    if "resume" not in given:
        config = Config(**settings)
    else:
        config = read_to_resume(Path(given["resume"])).config
        for name, value in settings.items():
            check_setting(name, value)
        config = replace(config, **{name: value for name, value in settings.items() if name not in MORE})
    check_used([name for name in settings if name != "train_precision" or "resume" in given], config)  # a plan may still train


def run(arguments: Sequence[str], given: dict[str, Any], toolbox: Callable[..., Any] | None, program: str) -> int:
    """Prune, say what is found, and return the exit status."""
    quiet = given.pop("quiet", False)
    with shown_on(sys.stdout, logging.WARNING if quiet else logging.INFO):
        from evoprune.evolution.toolbox import default_toolbox
        from evoprune.pruning import dry_run, prune

        if given.pop("dry_run", False):
            dry_run(**given)
            return 0
        front = prune(command=command(arguments, program), toolbox=toolbox or default_toolbox, progress=not quiet, **given)
        log.info("\n%s\n\n%s", front, files(front))
        if front.finished:
            log.info("%s", what_next(front, program))
    return 0


def command(arguments: Sequence[str], program: str = PROGRAM) -> str:
    """Return the command line as everyone can repeat it, however it was started."""
    return shlex.join([*program.split(), *arguments])


def engine_of(given: dict[str, Any]) -> str:
    """Return the engine that a command line asks for: its own, else that of the run to resume."""
    if "engine" in given or "resume" not in given:
        return str(given.get("engine", options()["engine"].default))
    return read_to_resume(Path(given["resume"])).config.engine


def launch(arguments: Sequence[str], given: dict[str, Any], toolbox: Callable[..., Any] | None) -> int:
    """Start this command line again under SCOOP; return its exit status."""
    from evoprune.engines.processes import workers_of
    from evoprune.engines.scoop_launch import launch

    if toolbox is not None:
        raise EvopruneError("engine: scoop starts the command line again, without the toolbox of this script; use processes")
    found = read_to_resume(Path(given["resume"])).config.settings() | given if "resume" in given else given
    return launch(arguments, workers_of(found.get("workers")), found.get("listen"), found.get("hostfile"))


def files(front: Front) -> str:
    """Return where the files are."""
    path = front.path
    lines = [f"{path}/{FRONT}    every point; {LAYERS} has its layers, {MASKS} its masks",
             f"{path}/{REPORT}    all of it for a browser; {FRONT_PLOT}, {LAYERS_PLOT} and {PROGRESS_PLOT} beside it"]
    if not front.finished:
        lines.append(f"not finished; go on with: {command(['--resume', str(path)])}")
    return "\n".join(lines)


def what_next(front: Front, program: str) -> str:
    """Return how to get a model, and what may be worth running next; no word of it comes from the folder."""
    record, lines = front.record, []
    score, wish = record.optimised[record.optimised.score].name, math.floor(990 * record.measured.score) / 1000
    if pruned := [point.score for point in front if point.kept < point.weights]:
        best = math.floor(1000 * max(pruned)) / 1000
        remark = f"  # nothing pruned has {wish:.3f}" if best < wish else ""
        wish = min(wish, best)
        lines += ["", f"choose a model of it, here or in Python:{remark}",
                  f"  {command(['pick', str(front.path), '--' + score, f'{wish:.3f}'])}",
                  f"  import evoprune; model = evoprune.load_front({str(front.path)!r}).best({score}={wish:.3f}).model()"]
    if not record.config.trains_points and record.splits["train"]:
        lines += ["train them; what is better by more than chance joins them, and sparser points keep their accuracy:",
                  f"  {command(['--resume', str(front.path), '--finetune-epochs', '5'], program)}"]
    return "\n".join(lines)


if __name__ == "__main__":
    status = main()
    if status or not under_scoop():  # SCOOP's own launcher takes even sys.exit(0) for a failure
        sys.exit(status)
