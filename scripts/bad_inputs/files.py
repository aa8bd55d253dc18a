"""Files of weights, arrays and images that are damaged, of another kind, or meant to harm."""

from __future__ import annotations

import io
import os
import pickle
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from evoprune.inputs.models import LeNet

from .case import CODE_RAN, TEMPLATES, Case, Cases, group, mine, prune, prune_named, tiny

State = dict[str, torch.Tensor]


class Code:
    """A pickle of it runs code."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {CODE_RAN}",)


def saved(change: Callable[[State], Any], name: str = "w.pt") -> Callable[[], None]:
    """Return what writes the weights of a LeNet, changed."""
    return lambda: torch.save(change(load_file(TEMPLATES[0] / "w.safetensors")), name)


def one(value: Callable[[torch.Tensor], Any], name: str = "fc1.weight") -> Callable[[], None]:
    """Return what writes the weights of a LeNet, one tensor changed."""
    return saved(lambda state: {**state, name: value(state[name])})


def all_of(value: Callable[[torch.Tensor], Any]) -> Callable[[], None]:
    """Return what writes the weights of a LeNet, every tensor changed."""
    return saved(lambda state: {name: value(each) for name, each in state.items()})


def written(content: bytes, name: str = "w.pt") -> Callable[[], None]:
    """Return what writes a file."""
    return lambda: (Path(name).parent.mkdir(parents=True, exist_ok=True), Path(name).write_bytes(content))[0]


def cut(name: str, part: float) -> Callable[[], None]:
    """Return what cuts a file off."""
    return lambda: Path(name).write_bytes(Path(name).read_bytes()[:int(part * Path(name).stat().st_size)]) and None


def in_zip(content: bytes) -> bytes:
    """Return a zip file like torch's with one member."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("archive/data.pkl", content)
    return buffer.getvalue()


def quantised(x: torch.Tensor) -> torch.Tensor:
    """Return a quantised tensor; torch warns when one is made."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(x, 0.1, 0, torch.qint8)


def deep() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for _ in range(300):
        found = {"state_dict": found}
    return found


def scripted() -> None:
    torch.jit.save(torch.jit.trace(LeNet().eval(), torch.zeros(1, 1, 8, 8)), "w.pt")


def tensors(change: Callable[[State], State]) -> Callable[[], None]:
    """Return what writes weights as safetensors, changed."""
    return lambda: save_file(change(load_file(TEMPLATES[0] / "w.safetensors")), "w.safetensors")


WEIGHTS: dict[str, tuple[str, tuple[Callable[[], Any], ...]]] = {  # file, what writes it
    **{f"all {name}": ("w.pt", (all_of(change),)) for name, change in {
        "int64": torch.Tensor.long, "int8": torch.Tensor.char, "bool": torch.Tensor.bool, "complex": lambda x: x + 0j,
        "quantised": quantised, "sparse": torch.Tensor.to_sparse, "on meta": lambda x: x.to("meta"), "uint8": torch.Tensor.byte,
        "transposed": lambda x: x.T.contiguous() if x.dim() == 2 else x, "numbers": lambda x: 5, "arrays": torch.Tensor.numpy,
        "None": lambda x: None, "lists": torch.Tensor.tolist, "empty": lambda x: x[:0]}.items()},
    **{f"one {name}": ("w.pt", (one(change),)) for name, change in {
        "int64": torch.Tensor.long, "bool": torch.Tensor.bool, "complex": lambda x: x + 0j, "quantised": quantised,
        "sparse": torch.Tensor.to_sparse, "csr": torch.Tensor.to_sparse_csr, "on meta": lambda x: x.to("meta"),
        "NaN": lambda x: x * torch.nan, "infinite": lambda x: x * torch.inf,
        "scalar": torch.Tensor.sum, "longer": lambda x: torch.cat([x, x]), "None": lambda x: None, "text": str,
        "nested": lambda x: torch.nested.nested_tensor([x, x[:1]])}.items()},
    "one key missing": ("w.pt", (saved(lambda s: {k: v for k, v in s.items() if k != "fc1.bias"}),)),
    "a key too many": ("w.pt", (saved(lambda s: {**s, "more": torch.zeros(1)}),)),
    "a key in lines": ("w.pt", (saved(lambda s: {**s, "more\nlines\x1b[31m": torch.zeros(1)}),)),
    "keys that are numbers": ("w.pt", (saved(lambda s: dict(enumerate(s.values()))),)),
    "other keys": ("w.pt", (saved(lambda s: {f"x{i}": v for i, v in enumerate(s.values())}),)),
    "empty state": ("w.pt", (saved(lambda s: {}),)), "a list": ("w.pt", (saved(lambda s: [*s.values()]),)),
    "a tensor": ("w.pt", (saved(lambda s: s["fc1.weight"]),)), "a number": ("w.pt", (saved(lambda s: 5),)),
    "nested 300 deep": ("w.pt", (saved(lambda s: deep()),)), "in state_dict: None": ("w.pt",
        (saved(lambda s: {"state_dict": None}),)),
    "a whole model": ("w.pt", (saved(lambda s: LeNet()),)), "a whole nn.Linear": ("w.pt", (saved(lambda s: nn.Linear(3, 3)),)),
    "a scripted model": ("w.pt", (scripted,)), "code": ("w.pt", (saved(lambda s: Code()),)),
    "code among tensors": ("w.pt", (saved(lambda s: {**s, "more": Code()}),)),
    "code, a bare pickle": ("w.pt", (written(pickle.dumps(Code())),)),
    "code, in a zip": ("w.pth", (written(in_zip(pickle.dumps(Code())), "w.pth"),)),
    "code, called safetensors": ("w.safetensors", (written(pickle.dumps(Code()), "w.safetensors"),)),
    "code, in the old format": ("w.pt", (lambda: torch.save(Code(), "w.pt", _use_new_zipfile_serialization=False),)),
    "an empty file": ("w.pt", (written(b""),)), "an empty safetensors": ("w.safetensors", (written(b"", "w.safetensors"),)),
    "garbage": ("w.pt", (written(bytes(range(256)) * 9),)), "text": ("w.pt", (written(b"hello\nworld\n"),)),
    "an empty zip": ("w.pt", (written(b"PK\5\6" + bytes(18)),)), "a zip of junk": ("w.pt", (written(in_zip(b"junk")),)),
    "cut off": ("w.pt", (saved(dict), cut("w.pt", 0.5))), "cut at the end": ("w.pt", (saved(dict), cut("w.pt", 0.99))),
    "a folder": ("w.pt", (lambda: Path("w.pt").mkdir(),)), "a link to itself": ("w.pt",
        (lambda: Path("w.pt").symlink_to("w.pt"),)),
    "a pipe": ("w.pt", (lambda: os.mkfifo("w.pt"),)), "/dev/zero": ("/dev/zero", ()), "no such file": ("w.pt", ()),
    "a name of 5000 letters": ("x" * 5000, ()), "a name in lines": ("two\nlines\x1b[31m.pt", ()),
    "safetensors called .pt": ("w.pt", (tensors(dict), lambda: Path("w.safetensors").rename("w.pt"))),
    "pt called .safetensors": ("w.safetensors", (saved(dict, "w.safetensors"),)),
    "safetensors of int64": ("w.safetensors", (tensors(lambda s: {k: v.long() for k, v in s.items()}),)),
    "safetensors of bool": ("w.safetensors", (tensors(lambda s: {k: v.bool() for k, v in s.items()}),)),
    "safetensors of NaN": ("w.safetensors", (tensors(lambda s: {k: v * torch.nan for k, v in s.items()}),)),
    "safetensors cut off": ("w.safetensors", (tensors(dict), cut("w.safetensors", 0.5))),
    "safetensors with a head of 2^63": ("w.safetensors", (written(struct.pack("<Q", 2**63) + b"{}", "w.safetensors"),)),
    "safetensors with a head of junk": ("w.safetensors", (written(struct.pack("<Q", 4) + b"junk", "w.safetensors"),)),
    "an npz": ("w.pt", (lambda: np.savez("w", a=np.zeros(3)), lambda: Path("w.npz").rename("w.pt")))}


@group("weights: from Python")
def weights() -> Cases:
    found = {name: Case(lambda file=file: prune_named(weights=file), prepare) for name, (file, prepare) in WEIGHTS.items()}
    return {**found, "a NUL in the name": Case(lambda: prune_named(weights="w\0.pt"))}


@group("weights: on the command line")
def weights_by_flag() -> Cases:
    names = ("all int64", "all bool", "all complex", "all quantised", "one sparse", "one NaN", "one csr", "a whole model", "code",
        "code, in a zip",
        "code among tensors", "an empty file", "a scripted model", "garbage", "a folder", "a key in lines", "one nested")
    return {name: Case(tiny("--weights", WEIGHTS[name][0]), WEIGHTS[name][1]) for name in names}


def arrays(**changes: Any) -> Callable[[], None]:
    """Return what writes data.npz of 8x8 images, some arrays changed, or left out where they are None."""
    usual = {"x_train": np.zeros((40, 8, 8), np.uint8), "y_train": np.arange(40) % 4, "x_test": np.zeros((20, 8, 8), np.uint8),
        "y_test": np.arange(20) % 4}
    return lambda: np.savez("data.npz", **{k: v for k, v in {**usual, **changes}.items() if v is not None})


def in_heads(at: int, value: int) -> Callable[[], None]:
    """Return what writes a field of 16 bits into the head of each member of data.npz, at its place in a local head."""
    def change() -> None:
        content = bytearray(Path("data.npz").read_bytes())
        for mark, place in ((b"PK\3\4", at), (b"PK\1\2", at + 2)):
            start = content.find(mark)
            while start >= 0:
                struct.pack_into("<H", content, start + place, value)
                start = content.find(mark, start + 4)
        Path("data.npz").write_bytes(content)

    return change


def with_head(shape: tuple[int, ...], kind: str = "|u1") -> Callable[[], None]:
    """Return what replaces x_train of data.npz by an array whose head promises more than there is."""
    def change() -> None:
        head = io.BytesIO()
        np.lib.format.write_array_header_1_0(head, {"shape": shape, "fortran_order": False, "descr": kind})
        with zipfile.ZipFile("data.npz") as old:
            members = {name: old.read(name) for name in old.namelist()}
        with zipfile.ZipFile("data.npz", "w") as new:
            for name, content in {**members, "x_train.npy": head.getvalue() + bytes(64)}.items():
                new.writestr(name, content)

    return change


X, Y = np.zeros((40, 8, 8)), np.arange(40) % 4
NPZ: dict[str, tuple[Callable[[], Any], ...]] = {
    "encrypted": (arrays(), in_heads(6, 1)), "of unknown compression": (arrays(), in_heads(8, 99)),
    "compressed by lzma it says": (arrays(), in_heads(8, 14)), "compressed by bzip2 it says": (arrays(), in_heads(8, 12)),
    "10^12 elements": (arrays(), with_head((10**12,))), "10^12 images": (arrays(), with_head((10**12, 8, 8), "<f8")),
    "2^70 elements": (arrays(), with_head((2**35, 2**35))), "a negative shape": (arrays(), with_head((-1, 8, 8))),
    "objects promised": (arrays(), with_head((40,), "|O")), "pickles": (arrays(x_train=np.array([Code()] * 40, object)),),
    "pickled labels": (arrays(y_test=np.array([Code()] * 20, object)),), "a key missing": (arrays(y_test=None),),
    "other keys": (lambda: np.savez("data.npz", a=X),), "no arrays": (lambda: np.savez("data.npz"),),
    "cut": (arrays(), cut("data.npz", 0.5)),
    "a byte changed": (arrays(), lambda: Path("data.npz").write_bytes(Path("data.npz").read_bytes().replace(bytes(99),
        b"\1" + bytes(98), 1))),
    "empty file": (written(b"", "data.npz"),), "text": (written(b"hello", "data.npz"),),
    "a .npy": (lambda: np.save("x.npy", X), lambda: Path("x.npy").rename("data.npz")),
    "a folder": (lambda: Path("data.npz").mkdir(),), "no images": (arrays(x_train=X[:0], y_train=Y[:0]),),
    "a scalar": (arrays(x_train=np.array(5)),),
    "labels of floats": (arrays(y_train=Y.astype(float)),), "labels of text": (arrays(y_train=Y.astype(str)),),
    "labels below 0": (arrays(y_train=Y - 1),), "labels of 2^62": (arrays(y_train=Y + 2**62),),
    "labels of 10^9": (arrays(y_train=Y + 10**9),),
    "labels in two columns": (arrays(y_train=np.stack([Y, Y], 1)),), "labels too few": (arrays(y_train=Y[:5]),),
    "images of text": (arrays(x_train=np.full(40, "a")),),
    "images of dates": (arrays(x_train=X.astype("M8[D]")),), "images of NaN": (arrays(x_train=X * np.nan),),
    "complex images": (arrays(x_train=X + 0j, x_test=X[:20] + 0j),),
    "records": (arrays(x_train=np.zeros(40, [("a", "i4"), ("b", "f4")])),),
    "images of bool": (arrays(x_train=X > 0, x_test=X[:20] > 0),),
    "other shape in test": (arrays(x_test=np.zeros((20, 9, 9), np.uint8)),),
    "wide floats": (arrays(x_train=X.astype(np.longdouble)),),
    "images of width 0": (arrays(x_train=np.zeros((40, 8, 0), np.uint8), x_test=np.zeros((20, 8, 0), np.uint8)),)}


def png(width: int, height: int) -> bytes:
    """Return the few bytes of a PNG that says it is large."""
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(9))) + chunk(b"IEND", b"")


def folders(train: str = "ab", test: str = "ab", size: int = 8) -> Callable[[], None]:
    """Return what writes images/train/CLASS/ and images/test/CLASS/ with ten images each."""
    def write() -> None:
        for part, classes in (("train", train), ("test", test)):
            for name in classes:
                Path("images", part, name).mkdir(parents=True)
                for i in range(10):
                    Image.new("RGB", (size, size), (25 * i, 0, 0)).save(f"images/{part}/{name}/{i}.png")

    return write


def all_images(content: bytes) -> Callable[[], Any]:
    """Return what replaces the training images of a class."""
    return lambda: [path.write_bytes(content) for path in Path("images/train/a").glob("*.png") if path.is_file()]


FOLDERS: dict[str, tuple[Callable[[], Any], ...]] = {
    "60000x60000 pixels": (folders(), all_images(png(60000, 60000))), "12000x12000 pixels": (folders(),
        all_images(png(12000, 12000))),
    "0x0 pixels": (folders(), all_images(png(0, 0))), "images of junk": (folders(), all_images(b"junk")),
    "empty images": (folders(), all_images(b"")),
    "cut images": (folders(), all_images(png(8, 8)[:50])), "a class only in train": (folders(train="abc"),),
    "a class only in test": (folders(test="abc"),),
    "one class only in train": (folders(train="a"),), "no classes": (folders("", ""),
        lambda: [Path("images", p).mkdir(parents=True) for p in ("train", "test")]),
    "empty classes": (folders("", ""), lambda: [Path("images", p, "a").mkdir(parents=True) for p in ("train", "test")]),
    "no test": (folders(test=""),), "no train": (folders(train=""),), "nothing": (), "a file": (written(b"x", "images"),),
    "an empty class beside others": (folders(), lambda: [Path("images", p, "c").mkdir() for p in ("train", "test")]),
    "texts": (folders("", ""), written(b"hello", "images/train/a/x.txt"), written(b"hello", "images/test/a/x.txt")),
    "images that are folders": (folders(), lambda: (Path("images/train/a/0.png").unlink(), Path("images/train/a/0.png").mkdir()),
        all_images(b"junk")),
    "images of other sizes": (folders(), lambda: Image.new("RGB", (9, 9)).save("images/train/a/5.png"), all_images(png(9, 9)))}


def idx(name: str, content: bytes) -> Callable[[], None]:
    """Return what replaces a file of MNIST."""
    return written(content, f"data/MNIST/raw/{name}")


def mnist(**changes: bytes) -> tuple[Callable[[], None], ...]:
    """Return what writes a tiny MNIST, some of whose files are others."""
    usual = {"train_images": struct.pack(">IIII", 2051, 40, 28, 28) + bytes(40 * 784),
        "train_labels": struct.pack(">II", 2049, 40) + bytes(range(10)) * 4,
        "t10k_images": struct.pack(">IIII", 2051, 20, 28, 28) + bytes(20 * 784),
        "t10k_labels": struct.pack(">II", 2049, 20) + bytes(range(10)) * 2}
    return tuple(idx(name.replace("_", "-") + ("-idx3-ubyte" if "images" in name else "-idx1-ubyte"), content)
        for name, content in {**usual, **changes}.items())


MNIST = {
    "empty images": mnist(train_images=b""), "empty labels": mnist(train_labels=b""), "empty test images": mnist(t10k_images=b""),
    "all empty": mnist(**dict.fromkeys(
        ("train_images", "train_labels", "t10k_images", "t10k_labels"), b"")),
    "cut images": mnist(train_images=struct.pack(">IIII", 2051, 40, 28, 28) + bytes(99)),
    "junk": mnist(train_images=b"junk and more junk"), "10^9 images": mnist(train_images=struct.pack(">IIII", 2051, 10**9, 28,
        28)), "too few labels": mnist(
        train_labels=struct.pack(">II", 2049, 5) + bytes(5)),
    "labels of 255": mnist(train_labels=struct.pack(">II", 2049, 40) + b"\xff" * 40),
    "images of another shape": mnist(train_images=struct.pack(">III", 2050, 40, 784) + bytes(40 * 784)), "no files": (),
    "a file in place of the folder": (written(b"", "data"),)}


@group("data: files, from Python")
def data() -> Cases:
    import evoprune

    def read(data: str, model: str, **more: Any) -> Callable[[], Any]:
        return lambda: evoprune.prune(model, data, **{"population": 4, "generations": 1, "threads": 1, "out": "out", **more})

    found = {f"npz {name}": Case(read("npz:data.npz", mine("flat")), prepare) for name, prepare in NPZ.items()}
    found |= {f"folder: {name}": Case(read("folder:images", mine("colour"), search_images=15), prepare) for name,
        prepare in FOLDERS.items()}
    found |= {f"mnist: {name}": Case(read("mnist", "lenet5", train_epochs=1), prepare) for name, prepare in MNIST.items()}
    for spec in ("folder:\0", "npz:\0", "npz:/dev/zero", "npz:/", "folder:/dev/null", "folder:two\nlines", "npz:two\nlines", "\0",
            "two\nlines", "\0:f", "x\0.py:f"):
        found[f"{spec!r}"] = Case(read(spec, mine("flat")))
    for spec in ("\0", "two\nlines", "\0:f", "x\0.py:f", "torchvision:\0", "torchvision:two\nlines", "os:\0"):
        found[f"model {spec!r}"] = Case(read(mine("pair"), spec))
        found[f"objectives {spec!r}"] = Case(lambda spec=spec: prune(objectives=f"accuracy,sparsity,{spec}"))
    return {**found, "cifar10 nowhere": Case(read("cifar10", "resnet18", train_epochs=1)),
        "a data_dir with a NUL": Case(read("mnist", "lenet5", train_epochs=1, data_dir="\0"))}


@group("data: files, on the command line")
def data_by_flag() -> Cases:
    npz = ("encrypted", "of unknown compression", "10^12 elements", "pickles", "other keys", "labels of 10^9", "a folder",
        "labels of text")
    found = {f"npz {name}": Case(tiny("--model", mine("flat"), "--data", "npz:data.npz", "--weights", "w.pt"),
            NPZ[name]) for name in npz}
    found |= {f"folder: {name}": Case(tiny("--model", mine("colour"), "--data", "folder:images"), FOLDERS[name])
        for name in ("60000x60000 pixels", "12000x12000 pixels", "empty classes", "one class only in train", "cut images")}
    found |= {f"mnist: {name}": Case(("--model", "lenet5", "--train-epochs", "1", "--data", "mnist", "--out", "out"), MNIST[name])
        for name in ("empty images", "all empty", "10^9 images", "too few labels")}
    return {**found, "npz:/dev/zero": Case(tiny("--data", "npz:/dev/zero"))}
