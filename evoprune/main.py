"""The command line: the fields of `Config` become flags, `prune` does the work, this file adds nothing to it."""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from evoprune import EvopruneError, Front, prune
from evoprune.config import Option, options
from evoprune.engines import under_scoop
from evoprune.processes import workers_of


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, like every other mistake."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"evoprune: {message}; see --help\n")


def parser() -> argparse.ArgumentParser:
    """Return the parser, made from the settings."""
    made = Parser(prog="python -m evoprune.main", description="Prune a model: one run gives the whole "
                                   "accuracy-sparsity Pareto front.", argument_default=argparse.SUPPRESS)
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


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status: 0 done, 2 bad input, 130 Ctrl-C, 143 SIGTERM."""
    given = vars(parser().parse_args(arguments))
    if under_scoop():
        given.setdefault("engine", "scoop")
    elif engine_of(given) == "scoop":
        return launch(sys.argv[1:] if arguments is None else arguments, given)
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
        front = prune(**given)
        log.info("\n%s\n\n%s", front, files(front))
    except EvopruneError as error:
        print(f"evoprune: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 143 if terminated else 130
    finally:
        log.removeHandler(shown)
        flush_quietly()
        signal.signal(signal.SIGTERM, before)
    return 0


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
    try:
        return str(json.loads(Path(given["resume"], "config.json").read_text())["settings"]["engine"])
    except (OSError, ValueError, KeyError, TypeError):  # no run there: `prune` says so
        return str(options()["engine"].default)


def launch(arguments: Sequence[str], given: dict[str, Any]) -> int:
    """Start this command line again under SCOOP; return its exit status."""
    from evoprune.scoop_launch import launch

    try:
        return launch(arguments, workers_of(given.get("workers")), given.get("listen"), given.get("hostfile"))
    except EvopruneError as error:
        print(f"evoprune: {error}", file=sys.stderr)
        return 2


def files(front: Front) -> str:
    """Return where the files are and what to run next."""
    path = front.path
    lines = [f"{path}/front.csv    every point; layers.csv has its layers, masks.npz its masks",
             f"{path}/front.png    the front; layers.png and progress.png beside it"]
    if not front.finished:
        return "\n".join([*lines, f"not finished; go on with: python -m evoprune.main --resume {path}"])
    wish = 0.99 * front.config["dense"]["accuracy"]
    lines += ["", "a model of it, in Python:",
              f"  import evoprune; model = evoprune.load_front({str(path)!r}).best(accuracy={wish:.3f}).model()"]
    settings = front.config["settings"]
    if not (settings["finetune_epochs"] or settings["layerwise"] or settings["total_epochs"]):
        command = front.config["command"] or "python -m evoprune.main"
        again = " --overwrite" if "--out" in command and "--overwrite" not in command else ""
        lines += ["train what is left of each point, and sparser points keep their accuracy:",
                  f"  {command} --finetune-epochs 5{again}"]
    return "\n".join(lines)


if __name__ == "__main__":
    status = main()
    if status or not under_scoop():  # SCOOP's own launcher takes even sys.exit(0) for a failure
        sys.exit(status)
