"""Runs whose files were damaged: to look at, and to go on with."""

from __future__ import annotations

import hashlib
import io
import json
import math
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

import evoprune
from evoprune.evolution.checkpoint import MAGIC
from evoprune.results.written import hashes

from .case import Case, Cases, a_run, group
from .files import Code

Damage = Callable[[], Any]
OUT = Path("out")
TRAINED = "models/first"  # stands for the first of the trained models


def file(name: str) -> Path:
    """Return the path of a file of the run."""
    return min((OUT / "models").iterdir()) if name == TRAINED else OUT / name


def edit(name: str, change: Callable[[bytes], bytes]) -> Damage:
    """Return what changes the bytes of a file of the run."""
    return lambda: file(name).write_bytes(change(file(name).read_bytes()))


def flip(content: bytes) -> bytes:
    """Return bytes, one bit in the middle changed."""
    middle = len(content) * 2 // 3
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1:]


def masks(change: Callable[[Any], Any]) -> Damage:
    """Return what changes every array of masks.npz."""
    def do() -> None:
        with np.load(OUT / "masks.npz") as file:
            arrays = {name: change(file[name]) for name in file.files}
        np.savez(OUT / "masks.npz", **arrays)

    return do


def config(change: Callable[[dict[str, Any]], Any]) -> Damage:
    """Return what changes config.json: the object itself, or what a function makes of it."""
    def do() -> None:
        found = json.loads((OUT / "config.json").read_text())
        made = change(found)
        (OUT / "config.json").write_text(json.dumps(found if made is None else made))

    return do


def entry(name: str, value: Any) -> Damage:
    """Return what puts a value into config.json, at a.b.c."""
    def change(found: dict[str, Any]) -> None:
        *above, last = name.split(".")
        for each in above:
            found = found[int(each)] if each.isdecimal() else found[each]
        found[last] = value

    return config(change)


def dense(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]], name: str = "dense.safetensors") -> Damage:
    """Return what changes a state dict of the run."""
    return lambda: save_file(change(load_file(file(name))), file(name))


def replaced(name: str, content: bytes) -> Damage:
    return edit(name, lambda _: content)


def gone(name: str) -> Damage:
    return lambda: file(name).unlink()


def a_folder(name: str) -> Damage:
    return lambda: [(path.unlink(), path.mkdir()) for path in [file(name)]]


def a_link(name: str, to: str = "") -> Damage:
    return lambda: [(path.unlink(), path.symlink_to(to or path.name)) for path in [file(name)]]


def column(name: str, value: str, file: str = "front.csv") -> Damage:
    """Return what puts a text into a column of the first row of a table."""
    def change(content: bytes) -> bytes:
        lines = [line.split(",") for line in content.decode().split("\n")]
        lines[1][lines[0].index(name)] = value
        return "\n".join(map(",".join, lines)).encode()

    return edit(file, change)


def sealed() -> None:
    """Make done.json agree with the damaged files, as someone who means it would."""
    done = json.loads((OUT / "done.json").read_text())
    (OUT / "done.json").write_text(json.dumps({**done, "files": hashes(OUT)}))


def unfinished() -> None:
    (OUT / "done.json").unlink()


def look() -> None:
    """Do all that one does with a front."""
    front = evoprune.load_front("out")
    str(front), front.best(sparsity=0.0), front.knee()
    for point in front:
        point.masks(), point.state_dict(), point.model()


FILES: dict[str, Damage] = {f"{name}: {how}": make(name) for name in ("config.json", "front.csv", "layers.csv", "masks.npz",
        "dense.safetensors", TRAINED) for how, make in {
        "a bit changed": lambda name: edit(name, flip), "empty": lambda name: replaced(name, b""), "gone": gone,
        "garbage": lambda name: replaced(name, bytes(range(256))), "a folder": a_folder,
        "cut": lambda name: edit(name, lambda content: content[:len(content) // 2]),
        "a pickle": lambda name: replaced(name, pickle.dumps(Code())), "a link to itself": lambda name: a_link(name)}.items()}
FILES |= {f"done.json: {name}": replaced("done.json", content) for name, content in {
        "[]": b"[]", "5": b"5", "null": b"null", "{}": b"{}", "empty": b"", "text": b"x", "deep": b"[" * 100_000,
        "generations 'x'": b'{"generations": "x"}', "files 5": b'{"generations": 1, "files": 5}',
        "no hash": b'{"generations": 1, "files": {}}',
        "hashes of numbers": b'{"generations": 1, "files": {"config.json": 5, "front.csv": null}}', "not text": b"\xff\xfe",
        "generations 10^5000": b'{"generations": ' + b"9" * 5000 + b"}"}.items()}
FILES["done.json: a folder"] = a_folder("done.json")
MASKS = {f"masks: {name}": masks(change) for name, change in {
        "inverted": lambda bits: ~bits, "too short": lambda bits: bits[:-1], "empty": lambda bits: bits[:0],
        "too long": lambda bits: np.append(bits, np.uint8(0)), "in two rows": lambda bits: bits[None],
        "of bool": lambda bits: bits > 0,
    "of floats": lambda bits: bits.astype(float), "of int64": lambda bits: bits.astype(np.int64), "scalars": lambda bits: bits[0],
        "texts": lambda bits: np.full(len(bits), "a"), "all kept": lambda bits: np.full_like(bits, 255),
        "pickles": lambda bits: np.array([Code()], object), "int8": lambda bits: bits.view(np.int8)}.items()}
STRUCTURE: dict[str, Damage] = {
    "dense: a key missing": dense(lambda s: {k: v for k, v in s.items() if k != "fc1.weight"}),
    "dense: other keys": dense(lambda s: {f"{k}x": v for k, v in s.items()}),
    "dense: other shapes": dense(lambda s: {**s, "fc1.weight": torch.zeros(3, 3)}),
    "dense: int64": dense(lambda s: {k: v.long() for k, v in s.items()}),
    "dense: bool": dense(lambda s: {k: v.bool() for k, v in s.items()}), "dense: nothing in it": dense(lambda s: {}),
    "dense: a key too many": dense(lambda s: {**s, "more": torch.zeros(1)}),
    "front.csv: no rows": edit("front.csv", lambda c: c.split(b"\n")[0] + b"\n"),
    "front.csv: no head": edit("front.csv", lambda c: b"\n".join(c.split(b"\n")[1:])),
    "front.csv: a NUL": edit("front.csv", lambda c: c.replace(b"0", b"\0", 3)),
    "front.csv: a row short": edit("front.csv", lambda c: c.replace(b",none", b"", 1)),
    "front.csv: not UTF-8": edit("front.csv", lambda c: c + b"\xff\xfe"),
    "front.csv: a row twice": edit("front.csv", lambda c: c + c.split(b"\n")[1] + b"\n"),
    "front.csv: a field of 200,000": column("origin", "x" * 200_000), "front.csv: id ../x": column("id", "../x"),
    "front.csv: id 999": column("id", "999"), "front.csv: id in colours": column("id", "\x1b[31m"),
    "front.csv: accuracy nan": column("accuracy", "nan"),
    "front.csv: sparsity x": column("sparsity", "x"), "front.csv: kept -1": column("kept", "-1"),
    "front.csv: kept too many": column("kept", "99999999"), "front.csv: weights 1": column("weights", "1"),
    "front.csv: generation x": column("generation", "x"),
    "front.csv: repair nope": column("repair", "nope"), "front.csv: origin in colours": column("origin", "\x1b[31m"),
    "front.csv: accuracy empty": column("accuracy", ""), "layers.csv: kept x": column("kept", "x", "layers.csv"),
    "layers.csv: no head": edit("layers.csv", lambda c: b"\n"),
    "masks.npz: other names": lambda: np.savez(OUT / "masks.npz", a=np.zeros(3)),
    "masks.npz: a .npy": lambda: (np.save("x.npy", np.zeros(3)), Path("x.npy").rename(OUT / "masks.npz"))}
CONFIG: dict[str, Damage] = {
    **{f"config.json: {name}": replaced("config.json", content) for name, content in {"[]": b"[]", "5": b"5", "null": b"null",
        "{}": b"{}", "empty": b"", "text": b"{", "100,000 deep": b"[" * 100_000 + b"]" * 100_000,
        "objects 100,000 deep": b'{"a":' * 100_000,
        "UTF-16": "{}".encode("utf-16"),
        "a number of 5000 digits": b"9" * 5000,
        "a text": b'"two\\nlines"'}.items()},
    **{f"config.json: {name} {value!r:.24}": entry(name, value) for name, values in {
        "command": (5, [], {}), "search_batch_size": (-1, 0, None, "x", 1.5, True, 10**30),
        "settings": (None, [], {}, "x", {"nope": 1}), "settings.population": (7, "4", None, -4, 10**30),
        "settings.model": (None, 5, "nope", "", "a\nb:c"), "settings.data": (None, 5),
        "settings.unit": ("nope",), "settings.out": (None, 5), "settings.threads": (10**9,),
        "layout": ([], None, "x", [5], [{}], [None]), "layout.0.shape": ([], [-1], [0, 0], "x", None, [10**30], [1.5], [3, 3]),
        "layout.0.name": (None, 5, "nope", "a\nb"),
        "weights": (0, -1, 1, "x", None, 10**30), "outputs": (0, -1, "x", 10**9, 3), "channels": (0, -1, None, 10**9, 3),
        "splits": (None, [], {}, {"train": "x"}), "mean": ("x", 5, ["a"], [None]),
        "dense": (5, [], {}, "x", {"accuracy": "x"}, {"accuracy": None}),
        "dense.accuracy": ("x", None, math.nan, 7, []), "objectives": ([], None, "x", [5], [{"name": "accuracy"}]),
        "aliases": ("x", 5, [5], [[]], [["a", "b"]], [[5]]), "rebuildable": (None, 5, "x"), "versions": (None, 5),
        "batch_size": (0, -1, None, 1.5), "threads": (0, -1, "x"),
        "toolbox": (5, []), "device": (None, 5)}.items() for value in values},
    **{f"config.json: no {name}": config(lambda found, name=name: found.pop(name) and None) for name in ("settings",
        "rebuildable", "layout", "weights", "dense", "objectives", "splits", "batch_size", "command")},
    "config.json: two layers of a name": config(lambda found: found["layout"].append(found["layout"][0])),
    "config.json: layers the other way": config(lambda found: found["layout"].reverse())}
HARMLESS = {f"config.json: {name}" for name in (  # to look, nobody needs it; or it has a default, as of an older evoprune
        f"search_batch_size {10**30!r:.24}", "settings {}", "settings.out None", "no objectives", "layers the other way")}


@group("a damaged run, looked at")
def looked_at() -> Cases:
    found = {f"{name}, finished": Case(look, (a_run("tuned" if TRAINED in name else "named"), damage)) for name,
        damage in {**FILES, **MASKS, **STRUCTURE}.items()}
    found |= {f"{name}, hashes made to fit": Case(look, (a_run(), damage, sealed), "accepted" if name in HARMLESS else "one line")
        for name, damage in {**MASKS, **STRUCTURE, **CONFIG}.items()}
    found |= {f"{name}, without done.json": Case(look, (a_run(), damage, unfinished)) for name,
        damage in {**MASKS, **STRUCTURE}.items()}
    junk: dict[str, Damage] = {"junk": lambda: (OUT / "models/junk").write_bytes(b"x"),
        "a folder": lambda: (OUT / "models/x.safetensors").mkdir(),
        "code": lambda: (OUT / "models/999.safetensors").write_bytes(pickle.dumps(Code()))}
    found |= {f"models/ with {name}": Case(look, (a_run("tuned"), damage), "accepted") for name,
        damage in junk.items()}  # no file of the run's
    found["models/ of another run"] = Case(look, (a_run(), lambda: shutil.copytree(OUT / ".." / "out", "x"), a_run("tuned", "y"),
            lambda: shutil.copytree("y/models", "out/models")), "accepted")  # likewise
    found["models/ gone"] = Case(look, (a_run("tuned"), lambda: shutil.rmtree(OUT / "models")))
    found["models/ gone, without done.json"] = Case(look, (a_run("tuned"), lambda: shutil.rmtree(OUT / "models"), unfinished))
    found["models/000 of another shape"] = Case(look, (a_run("tuned"), dense(lambda s: {**s, "fc1.weight": torch.zeros(3, 3)},
            TRAINED), sealed))
    found["models/000 of int64"] = Case(look, (a_run("tuned"), dense(lambda s: {k: v.long() for k, v in s.items()}, TRAINED),
            sealed))
    found["models/000 empty"] = Case(look, (a_run("tuned"), dense(lambda s: {}, TRAINED), sealed))
    found["a whole run"] = Case(look, (a_run("tuned"),), "accepted")  # it must not always refuse
    return found


def checkpoint(change: Callable[[dict[str, Any]], Any]) -> Damage:
    """Return what changes the arrays of every checkpoint, with a checksum that is right."""
    def do() -> None:
        for path in (OUT / "checkpoint").glob("[0-9]*.npz"):
            with np.load(io.BytesIO(path.read_bytes()[len(MAGIC) + 32:])) as file:
                arrays = {name: file[name] for name in file.files}
            change(arrays)
            buffer = io.BytesIO()
            np.savez(buffer, **arrays)
            path.write_bytes(MAGIC + hashlib.sha256(buffer.getvalue()).digest() + buffer.getvalue())

    return do


def said(name: str, value: Any) -> Damage:
    """Return what changes the text of every checkpoint."""
    def change(arrays: dict[str, Any]) -> None:
        text = json.loads(arrays["text"].tobytes())
        arrays["text"] = np.frombuffer(json.dumps({**text, name: value}).encode(), np.uint8)

    return checkpoint(change)


def array(name: str, change: Callable[[Any], Any]) -> Damage:
    """Return what changes an array of every checkpoint."""
    return checkpoint(lambda arrays: arrays.update({name: change(arrays[name])}))


def bytes_of(value: Any) -> Any:
    return np.frombuffer(json.dumps(value).encode(), np.uint8)


SAID: dict[str, tuple[Any, ...]] = {
    "generation": ("x", -1, None, 10**9, 1.5), "log": ([], None, -1, 10**9, "x"), "seen": (None, -1, 10**9, "x"),
    "columns": ([], None, "x", [5], ["a"] * 99), "segments": (None, 5, [5], ["seen-0-x.segment"], ["seen-../../x-y.segment"]),
    "carried": (5, [["x", [3]]], [["<f4", [10**12]]], [["|O", [1]]], None), "run": (None, 5, "another")}
ARRAYS: dict[str, dict[str, Callable[[Any], Any]]] = {
    "population_bits": {
        "empty": lambda a: a[:0], "flat": np.ravel, "floats": lambda a: a.astype(float), "narrow": lambda a: a[:, :5],
        "wide": lambda a: np.hstack([a, a]), "one": lambda a: a[:1],
        "texts": lambda a: np.full(a.shape, "a")},
    **{f"{name}_values": {
        "NaN": lambda a: a * np.nan, "texts": lambda a: np.full(a.shape, "a"), "narrow": lambda a: a[:, :1],
        "empty": lambda a: a[:0], "flat": np.ravel} for name in ("population", "archive")},
    **{name: {
        "cut": lambda a: a[:-1], "empty": lambda a: a[:0], "flat": np.ravel, "narrow": lambda a: a[:, :-3],
        "floats": lambda a: a.astype(float), "of 255": lambda a: np.full_like(a, 255),
        "a pickle": lambda a: np.array([Code()], object)} for name in ("seen", "log")},
    "archive_about": {f"{value!r:.20}": lambda a, value=value: bytes_of(value) for value in (
        [], None, [5] * 9, [["x"]] * 9, [[5, "x", {}, {}, None]] * 9, [["x", 1, {"a": 99}, {}, None]] * 9)},
    "text": {
        "cut": lambda a: a[:5], "a list": lambda a: bytes_of([]), "floats": lambda a: a.astype(float),
        "deep": lambda a: np.frombuffer(b"[" * 100_000, np.uint8)}}
CHECKPOINTS: dict[str, Damage] = {
    **{f"text: {name} {value!r:.20}": said(name, value) for name, values in SAID.items() for value in values},
    **{f"{name} {how}": array(name, change) for name, changes in ARRAYS.items() for how, change in changes.items()},
    "an array missing": checkpoint(lambda arrays: arrays.pop("archive_bits")),
    "the text missing": checkpoint(lambda arrays: arrays.pop("text")),
    "archive empty": checkpoint(lambda arrays: arrays.update(
        archive_bits=arrays["archive_bits"][:0], archive_values=arrays["archive_values"][:0], archive_about=bytes_of([])))}
FILES_OF: dict[str, Callable[[Path], Any]] = {
    "empty files": lambda path: path.write_bytes(b""),
    "a bit changed": lambda path: path.write_bytes(flip(path.read_bytes())),
    "older ones": lambda path: path.write_bytes(path.read_bytes().replace(MAGIC, b"evoprune checkpoint 2\n")),
    "folders": lambda path: (path.unlink(), path.mkdir()),
    "not an npz": lambda path: path.write_bytes(MAGIC + hashlib.sha256(b"x").digest() + b"x"),
    "pickles": lambda path: path.write_bytes(pickle.dumps(Code())),
    "links to themselves": lambda path: (path.unlink(), path.symlink_to(path.name))}
BROKEN: dict[str, Damage] = {
    f"checkpoint/: {name}": lambda change=change: [change(path) for path in (OUT / "checkpoint").glob("[0-9]*.npz")]
    for name, change in FILES_OF.items()}
UNREAD = ("done.json: no hash", "done.json: hashes of numbers")  # a run that goes on writes new ones
DENSE: dict[str, Damage] = {name: damage for name, damage in {**FILES, **STRUCTURE}.items() if name.startswith("dense")}


def go_on() -> Any:
    """Resume the run."""
    return evoprune.prune(resume="out", generations=2)


@group("a damaged run, resumed from Python")
def resumed() -> Cases:
    damages = {**{f"checkpoint: {name}": damage for name, damage in CHECKPOINTS.items()}, **BROKEN, **DENSE}
    damages |= {name: damage for name, damage in FILES.items() if name.startswith("done.json")}
    taken = {name: "accepted" if name in UNREAD else "one line" for name in damages}
    found = {f"{name}, finished": Case(go_on, (a_run(), damage), taken[name]) for name, damage in damages.items()}
    return found | {f"{name}, without done.json": Case(go_on, (a_run(), damage, unfinished), taken[name])
                    for name, damage in {**BROKEN, **DENSE}.items()}


MENDED = {f"config.json: {name}" for name in (  # what a run that goes on finds anew, and writes
    "settings.out None", "layout.0.shape []", "layout.0.shape [3, 3]",
    "layout.0.name 'nope'", "layout.0.name 'a\\nb'", f"weights {10**30!r:.24}", f"channels {10**9}", "channels 3",
    "no dense", "no objectives", "layers the other way")}


@group("a damaged run, resumed on the command line")
def resumed_by_flag() -> Cases:
    line = ("--resume", "out", "--generations", "2")
    found = {name: Case(line, (a_run(), damage), "accepted" if name in MENDED else "one line") for name, damage in CONFIG.items()}
    names = ("dense.safetensors: empty", "dense.safetensors: cut", "dense.safetensors: a folder", "dense.safetensors: a pickle")
    found |= {f"{name}, {how}": Case(line, (a_run(), FILES[name], *more)) for name in names for how,
        more in {"finished": (), "without done.json": (unfinished,)}.items()}
    found |= {name: Case(line, (a_run(), damage)) for name, damage in FILES.items() if name in ("done.json: []", "done.json: 5",
            "done.json: null", "done.json: deep")}
    found |= {f"checkpoint: {name}": Case(line, (a_run(), CHECKPOINTS[name])) for name in ("population_bits narrow",
            "text: generation 'x'", "text: log []", "seen a pickle", "text cut")}
    elsewhere = (lambda: Path("mine").mkdir(), lambda: Path("mine/letter").write_bytes(b"dear"))
    link = (lambda: shutil.rmtree(OUT / "models"), lambda: (OUT / "models").symlink_to("../mine"))
    found["models a symbolic link"] = Case(("--resume", "out"), (a_run("tuned"), *elsewhere, *link, unfinished),
        "accepted")  # the link is replaced, what it led to stays
    found["config.json gone"] = Case(line, (a_run(), gone("config.json")))
    found["config.json a link to itself"] = Case(line, (a_run(), a_link("config.json")))
    found["the folder a link to itself"] = Case(line, (lambda: OUT.symlink_to("out"),))
    found["a whole run"] = Case(line, (a_run(),), "accepted")  # it must not always refuse
    return found

