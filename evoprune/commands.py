"""The commands that look at finished runs: pick, compare, report. What only reads their tables imports no torch."""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn, TextIO

from .config import PROGRAM
from .errors import EvopruneError, printable
from .results.front import load_front
from .results.written import REPORT, free_file, write_file
from .views.pick import Wish, bytes_of, described, in_words, next_step, picked, seconds_of


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, like every other mistake."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"evoprune: {EvopruneError(message)}; see --help\n")


class Printable(logging.Formatter):
    """Lets nothing through that a terminal would obey: a folder or an error may be of anyone's making."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


class Lines(logging.StreamHandler[TextIO]):
    """Prints above a bar, where there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        if "tqdm" not in sys.modules:
            super().emit(record)
            return
        with sys.modules["tqdm"].tqdm.external_write_mode(file=self.stream):
            super().emit(record)


@contextmanager
def shown_on(stream: TextIO, level: int = logging.INFO) -> Iterator[None]:
    """Print messages of evoprune for a while."""
    logging.raiseExceptions = False  # a reader that goes away (| head) does not end a run
    handler, log = Lines(stream), logging.getLogger("evoprune")
    handler.setFormatter(Printable())
    log.addHandler(handler)
    log.setLevel(level)
    try:
        yield
    finally:
        log.removeHandler(handler)
        flush_quietly()


def flush_quietly() -> None:
    """Flush standard output; where its reader has gone (| head), let what is left go too, or Python exits with 120."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def say(text: str) -> None:
    """Print to standard output, quietly where nobody reads any more."""
    try:
        print(text)
    except BrokenPipeError:
        flush_quietly()


def measure(name: str, read: Callable[[str], float], like: str) -> Callable[[str], float]:
    """Return what reads a flag's value, and says what it expects."""
    def value(text: str) -> float:
        try:
            return read(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"found {text!r}, expected {like}") from None

    value.__name__ = name
    return value


def bits_of(text: str) -> int:
    """Return 32, 16 or 8; raise ValueError for anything else."""
    if text not in ("32", "16", "8"):
        raise ValueError
    return int(text)


def pick_flags(parser: Parser) -> None:
    """Add the flags of pick."""
    parser.add_argument("run", metavar="RUN", help="the folder of a run")
    wish = parser.add_argument_group("the wish, exactly one").add_mutually_exclusive_group(required=True)
    number = measure("number", float, "a number")
    wish.add_argument("--drop", metavar="X", type=number, help="the sparsest that loses at most X of the score: 0.01")
    wish.add_argument("--accuracy", "--score", dest="score", metavar="X", type=number, help="the sparsest with at least X: 0.98")
    wish.add_argument("--sparsity", dest="axis", metavar="X", type=number, help="the most accurate with at least X: 0.95")
    wish.add_argument("--bytes", metavar="N", type=measure("bytes", bytes_of, "bytes like 20k or 1.5M"),
                      help="the most accurate whose packed file has at most N: 20k, 1.5M")
    wish.add_argument("--latency", metavar="T", type=measure("latency", seconds_of, "a time like 5ms, 300us or 0.1s"),
                      help="the most accurate that takes at most T an example, here, on one thread: 5ms")
    wish.add_argument("--knee", action="store_true", help="the point farthest above the line between the ends of the front")
    wish.add_argument("--id", metavar="N", help="the point of that name: 017")
    take = parser.add_argument_group("take it away")
    take.add_argument("--export", metavar="FILE", help="write it: .safetensors, .packed.safetensors, .pt, .pt2 or .onnx; it is "
                      "opened again in a fresh process, and what it scores there is said")
    take.add_argument("--slim", action="store_true", help="cut out channels that nothing needs (.pt2, .onnx, --latency)")
    take.add_argument("--bits", type=measure("bits", bits_of, "32, 16 or 8"), default=32, metavar="N",
                      help="bits a value: 32, 16 or 8 (.packed.safetensors, --bytes)")
    take.add_argument("--overwrite", action="store_true", help="replace FILE")


def pick(given: argparse.Namespace) -> Any:
    """Choose a point, say what it is, and write it if asked."""
    wish = Wish(**{name: getattr(given, name) for name in Wish.__dataclass_fields__})
    if given.export is None:
        nothing = {"overwrite": given.overwrite, "bits": given.bits != 32 and wish.bytes is None,
                   "slim": given.slim and wish.latency is None}
        refuse_idle([f"--{name}" for name, idle in nothing.items() if idle], "--export")
    else:
        from .results.export import checked

        checked(given.export, given.bits, given.slim, given.overwrite)
    point = picked(load_front(given.run), wish, given.bits, given.slim)
    if not given.json:
        say(in_words(point))
    found = described(point)
    if given.export is None:
        if not given.json:
            say(f"take it away: {next_step(point, wish, given.bits, given.slim)}")
        return found
    path = point.export(given.export, bits=given.bits, slim=given.slim, overwrite=given.overwrite)
    return {**found, "export": {"path": str(path), "bytes": path.stat().st_size}}


def compare_flags(parser: Parser) -> None:
    """Add the flags of compare."""
    parser.add_argument("runs", metavar="RUN", nargs="+", help="the folders of runs; each is held against the first")
    parser.add_argument("--at", metavar="S,S", type=sparsities, help="sparsities to compare at (from 0.5 to 0.995)")
    keep = parser.add_argument_group("keep it")
    keep.add_argument("--csv", metavar="FILE", help="write the table, a row a run and sparsity")
    keep.add_argument("--plot", metavar="FILE.png", help="write a picture of the fronts")
    keep.add_argument("--overwrite", action="store_true", help="replace these files")


def sparsities(text: str) -> list[float]:
    """Return sparsities from text like 0.9,0.95."""
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(0 <= each <= 1 for each in found):
        raise argparse.ArgumentTypeError(f"found {text!r}, expected sparsities like 0.9,0.95")
    return found


def compare(given: argparse.Namespace) -> Any:
    """Hold runs against each other."""
    from .results.plots import png
    from .views.compare import compare as compared

    suffixes = {"csv": (".csv",), "plot": (".png",)}
    kept = {name: free_file(name, getattr(given, name), ends, given.overwrite) for name, ends in suffixes.items()
            if getattr(given, name) is not None}
    refuse_idle(["--overwrite"] * (given.overwrite and not kept), "--csv or --plot")
    found = compared(given.runs, given.at)
    if not given.json:
        say(printable(str(found)))
    if "csv" in kept:
        write_file(kept["csv"], found.csv())
    if "plot" in kept:
        write_file(kept["plot"], png(found.figure()))
    return found.to_dict()


def refuse_idle(idle: Sequence[str], without: str) -> None:
    """Raise `EvopruneError` for flags that do nothing."""
    if idle:
        raise EvopruneError(f"{', '.join(idle)}: does nothing without {without}; leave it out, or give that too")


def report_flags(parser: Parser) -> None:
    """Add the flags of report."""
    parser.add_argument("run", metavar="RUN", help="the folder of a run")
    parser.add_argument("--out", metavar="FILE.html", help=f"where it goes (RUN/{REPORT}, unless that is there)")
    parser.add_argument("--overwrite", action="store_true", help="replace FILE.html")


def report(given: argparse.Namespace) -> Any:
    """Write the report of a run, or say where it is."""
    from .views.report import report as reported

    refuse_idle(["--overwrite"] * (given.overwrite and given.out is None), "--out")
    front = load_front(given.run)
    if given.out is None and front.written.has(REPORT):
        path = front.written.file(REPORT)
    else:
        path = front.path / REPORT if given.out is None else free_file("out", given.out, (".html",), given.overwrite)
        write_file(path, reported(front))
    if not given.json:
        say(f"{printable(str(path))}    open it in a browser; it needs no network")
    return {"run": str(front.path), "report": str(path), "bytes": path.stat().st_size}


COMMANDS: dict[str, tuple[str, str, Callable[[Parser], None], Callable[[argparse.Namespace], Any]]] = {
    "pick": ("choose one point of a run, say what it is, take it away",
             "pick results/lenet-digits --drop 0.02\npick results/lenet-digits --sparsity 0.9 --export small.onnx --slim",
             pick_flags, pick),
    "compare": ("hold runs against each other on the same test images",
                "compare results/lenet-digits results/lenet-digits-2 --csv table.csv --plot fronts.png",
                compare_flags, compare),
    "report": ("the report of a run, one page for a browser",
               "report results/lenet-digits", report_flags, report)}


def parser_of(name: str, program: str = PROGRAM) -> Parser:
    """Return the parser of a command."""
    about, examples, add, _ = COMMANDS[name]
    lines = "\n".join(f"  {PROGRAM} {line}" for line in examples.splitlines())
    made = Parser(prog=f"{program} {name}", description=f"{about[0].upper()}{about[1:]}.", epilog=f"examples:\n{lines}",
                  formatter_class=argparse.RawDescriptionHelpFormatter)
    add(made)
    made.add_argument("--json", action="store_true", help="print what was found as JSON, and nothing else to standard output")
    return made


def run(arguments: Sequence[str]) -> int:
    """Run a command line whose first word is a command; return the exit status.

    Raises:
        EvopruneError: bad input.
    """
    given = parser_of(arguments[0]).parse_args(arguments[1:])
    with shown_on(sys.stderr if given.json else sys.stdout):
        try:
            found = COMMANDS[arguments[0]][-1](given)
        except EvopruneError as error:
            error.args = (as_flags(error.args[0]),)
            raise
        if given.json:
            say(json.dumps(found, indent=2, allow_nan=False))
    return 0


def as_flags(text: str) -> str:
    """Return advice for Python as advice for the command line: --bits 8 for bits=8, --overwrite for overwrite=True."""
    return re.sub(r"\b(bits|drop|slim|score|accuracy|sparsity|overwrite)=(\S+)",
                  lambda found: f"--{found[1]}" + (f" {found[2]}" if found[2] != "True" else ""), text)
