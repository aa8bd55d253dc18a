"""The command line: the fields of `Config` become flags, `prune` does the work, this file adds nothing to it.

SCOOP runs it as a file, so its imports are absolute; what needs torch is imported once the flags are known to be right.
"""

from __future__ import annotations

import argparse
import logging
import os
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from evoprune.config import Config, Option, check_setting, options
from evoprune.engines.scoop_pool import under_scoop
from evoprune.errors import EvopruneError
from evoprune.results.folder import CONFIG, FRONT, FRONT_PLOT, LAYERS, LAYERS_PLOT, MASKS, PROGRESS_PLOT
from evoprune.results.record import read_to_resume

if TYPE_CHECKING:
    from evoprune.results.front import Front


PROGRAM = "python -m evoprune.main"


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, like every other mistake."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"evoprune: {message}; see --help\n")


def parser() -> argparse.ArgumentParser:
    """Return the parser, made from the settings."""
    made = Parser(prog=PROGRAM, description="Prune a model: one run gives the whole accuracy-sparsity Pareto front.",
                  argument_default=argparse.SUPPRESS)
    made.add_argument("--resume", metavar="DIR", help="go on with the run in this folder, with its own settings")
    for name, about in options().items():
        flag = "--" + ("no-" if about.default is True else "") + name.replace("_", "-")
        if about.kind is bool:
            made.add_argument(flag, dest=name, action="store_false" if about.default else "store_true",
                              help=("no " if about.default else "") + about.help)
        else:
            made.add_argument(flag, dest=name, type=about.kind, choices=about.choices, help=help_of(about),
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
    given = vars(parser().parse_args(arguments))
    try:
        check(given)
        if under_scoop():
            given.setdefault("engine", "scoop")
        elif engine_of(given) == "scoop":
            return launch(arguments, given, toolbox)
        return run(given, toolbox, command(arguments, program))
    except EvopruneError as error:
        print(f"evoprune: {error}", file=sys.stderr)
        return 2


def check(given: dict[str, Any]) -> None:
    """Raise `EvopruneError` for flags that cannot be, before anything that takes time."""
    settings = {name: value for name, value in given.items() if name != "resume"}
    if "resume" not in given:
        Config(**settings)
    else:
        read_to_resume(Path(given["resume"], CONFIG))
    for name, value in settings.items():
        check_setting(name, value)


def run(given: dict[str, Any], toolbox: Callable[..., Any] | None, command: str) -> int:
    """Prune, say what is found, and return the exit status."""
    logging.raiseExceptions = False  # a reader that goes away (| head) does not end a run
    terminated = []

    def terminate(number: int, frame: Any) -> None:
        terminated.append(number)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, terminate)
    shown, log = logging.StreamHandler(sys.stdout), logging.getLogger("evoprune")
    log.addHandler(shown)
    log.setLevel(logging.INFO)
    try:
        from evoprune.evolution.toolbox import default_toolbox
        from evoprune.pruning import prune

        front = prune(command=command, toolbox=toolbox or default_toolbox, **given)
        log.info("\n%s\n\n%s", front, files(front))
    except KeyboardInterrupt:
        return 143 if terminated else 130
    finally:
        log.removeHandler(shown)
        flush_quietly()
        signal.signal(signal.SIGTERM, before)
    return 0


def command(arguments: Sequence[str], program: str = PROGRAM) -> str:
    """Return the command line as everyone can repeat it, however it was started."""
    return shlex.join([*program.split(), *arguments])


def flush_quietly() -> None:
    """Flush standard output; where its reader has gone (| head), let what is left go too, or Python exits with 120."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def engine_of(given: dict[str, Any]) -> str:
    """Return the engine that a command line asks for: its own, else that of the run to resume."""
    if "engine" in given or "resume" not in given:
        return str(given.get("engine", options()["engine"].default))
    return read_to_resume(Path(given["resume"], CONFIG)).config.engine


def launch(arguments: Sequence[str], given: dict[str, Any], toolbox: Callable[..., Any] | None) -> int:
    """Start this command line again under SCOOP; return its exit status."""
    from evoprune.engines.processes import workers_of
    from evoprune.engines.scoop_launch import launch

    if toolbox is not None:
        raise EvopruneError("engine: scoop starts the command line again, without the toolbox of this script; use processes")
    return launch(arguments, workers_of(given.get("workers")), given.get("listen"), given.get("hostfile"))


def files(front: Front) -> str:
    """Return where the files are and what to run next."""
    path, record = front.path, front.record
    lines = [f"{path}/{FRONT}    every point; {LAYERS} has its layers, {MASKS} its masks",
             f"{path}/{FRONT_PLOT}    the front; {LAYERS_PLOT} and {PROGRESS_PLOT} beside it"]
    if not front.finished:
        return "\n".join([*lines, f"not finished; go on with: python -m evoprune.main --resume {path}"])
    score = record.optimised[record.optimised.score].name
    wish = 0.99 * record.measured.score
    lines += ["", "a model of it, in Python:",
              f"  import evoprune; model = evoprune.load_front({str(path)!r}).best({score}={wish:.3f}).model()"]
    config = record.config
    if not (config.finetune_epochs or config.layerwise or config.total_epochs):
        again = record.command or command([])
        replaces = " --overwrite" if "--out" in again and "--overwrite" not in again else ""
        lines += ["train what is left of each point, and sparser points keep their accuracy:",
                  f"  {again} --finetune-epochs 5{replaces}"]
    return "\n".join(lines)


if __name__ == "__main__":
    status = main()
    if status or not under_scoop():  # SCOOP's own launcher takes even sys.exit(0) for a failure
        sys.exit(status)
