"""A state dict in one small file: which values are not zero, those values, and the shape, each deflated (zlib, RFC 1950).

Of a tensor NAME the file has, as bytes (uint8) that any reader of safetensors opens,

    NAME.compressed  the values that are not zero, in order: all first bytes, then all second ones, and so on
    NAME.shape       int32, unless there is one dimension and no zero
    NAME.bitmask     as `numpy.packbits`, 1 where there is one; or NAME.index, the distances between their places (uint32, the
                     first from place 0), in the same order of bytes; neither where all values are there
    NAME.scale       float16, a number a row (first dimension) that 8-bit values are multiplied by

Values are int8 where there is a scale, otherwise float32, or float16 in a file of 16 or 8 `bits`, unless the metadata `types`,
JSON, name another numpy type; `names`, JSON, has further names of tensors: of tied weights.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..errors import EvopruneError, first_line

FORMAT = "evoprune packed 1"
BITS = (32, 16, 8)
NOTHING = 1e-6  # times the largest value of a tensor: a row without larger ones need not be right
SCALED = 1e-3  # of the largest value of a row: from here on what multiplies it is right to 0.4 % in float16
LARGEST = 1 << 34  # values of a tensor: a file that says more is damaged
Bytes = npt.NDArray[np.uint8]


def pack(state: Mapping[str, Tensor], bits: int = 32) -> tuple[dict[str, Bytes], dict[str, str]]:
    """Return a state dict as the entries and the metadata of a packed file.

    With 16 `bits` values are rounded to float16, with 8 those of tensors with rows to whole numbers of -127 to 127 times a scale
    a row, or to float16 where a row is too small for its scale; a tensor that holds what float16 does not, counters, running
    variances and rows of small values say, stays as it is.
    """
    entries: dict[str, Bytes] = {}
    types: dict[str, str] = {}
    first: dict[tuple[Any, ...], str] = {}
    names: dict[str, str] = {}
    for name, tensor in state.items():
        values = plain(tensor)
        if (same := first.setdefault((values.dtype.str, values.shape, values.tobytes()), name)) != name:
            names[name] = same
            continue
        rounded, scale = reduced(values, bits)
        there = rounded.reshape(-1) != 0
        if values.ndim != 1 or not there.all():
            put(entries, name, "shape", np.array(values.shape, "<i4"))
        if not there.all():
            mask, places = deflated(np.packbits(there)), np.flatnonzero(there)
            index = deflated(planes(np.diff(places, prepend=0).astype("<u4")))
            entries[f"{name}.{'bitmask' if len(mask) <= len(index) else 'index'}"] = min(mask, index, key=len)
        put(entries, name, "compressed", rounded.reshape(-1)[there])
        if scale is not None:
            put(entries, name, "scale", scale)
        if rounded.dtype.str != usual(bits, scale is not None):
            types[name] = rounded.dtype.str
    return entries, {"format": FORMAT, "bits": str(bits), "types": json.dumps(types), "names": json.dumps(names)}


def unpack(entries: Mapping[str, Tensor], metadata: Mapping[str, str], where: str) -> dict[str, Tensor]:
    """Return the state dict of a packed file's entries and metadata; `where` they come from.

    Raises:
        EvopruneError: it is no packed file, or a damaged one.
    """
    if metadata.get("format") != FORMAT:
        raise EvopruneError(f"{where}: found {metadata.get('format', 'no format')!r} in its metadata, expected {FORMAT!r}")
    try:
        types, bits = json.loads(metadata["types"]), int(metadata["bits"])
        found = [entry.removesuffix(".compressed") for entry in entries if entry.endswith(".compressed")]
        state = {name: read(entries, name, np.dtype(types.get(name) or usual(bits, f"{name}.scale" in entries)))
                 for name in found}
        return {**state, **{name: state[same].clone() for name, same in json.loads(metadata["names"]).items()}}
    except (KeyError, TypeError, ValueError, AttributeError, zlib.error, OverflowError) as error:
        raise EvopruneError(f"{where}: damaged: {first_line(error)}; expected a file that point.export wrote") from None


def read(entries: Mapping[str, Tensor], name: str, kind: np.dtype[Any]) -> Tensor:
    """Return one tensor."""
    shape = tuple(get(entries, name, "shape", np.dtype("<i4"), 64).tolist()) if f"{name}.shape" in entries else None
    size = LARGEST if shape is None else math.prod(shape)
    if kind.kind not in "fiub" or size > LARGEST or any(n < 0 for n in shape or ()):
        raise ValueError(f"{name} of shape {shape} and type {kind}")
    found = get(entries, name, "compressed", kind, size)
    if shape is None:
        return as_tensor(found)
    flat = np.zeros(size, kind)
    if f"{name}.bitmask" in entries:
        flat[np.unpackbits(get(entries, name, "bitmask", np.dtype(np.uint8), -(-size // 8)), count=size).astype(bool)] = found
    elif f"{name}.index" in entries:
        flat[np.cumsum(get(entries, name, "index", np.dtype("<u4"), size).astype(np.int64))] = found
    else:
        flat[:] = found
    values = flat.reshape(shape)
    if f"{name}.scale" in entries:
        scale = get(entries, name, "scale", np.dtype("<f2"), shape[0]).astype(np.float32)
        values = values * scale.reshape(-1, *[1] * (len(shape) - 1))
    return as_tensor(values)


def as_tensor(values: npt.NDArray[Any]) -> Tensor:
    """Return an array as a tensor; float16 as float32."""
    return torch.from_numpy(values.astype(np.float32) if values.dtype == np.float16 else values)


def usual(bits: int, scaled: bool) -> str:
    """Return the numpy type of most values."""
    return "|i1" if scaled else "<f4" if bits == 32 else "<f2"


def plain(tensor: Tensor) -> npt.NDArray[Any]:
    """Return a tensor as an array; bfloat16, which numpy has not, as float32."""
    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).contiguous().numpy()


def reduced(values: npt.NDArray[Any], bits: int) -> tuple[npt.NDArray[Any], npt.NDArray[Any] | None]:
    """Return values in so many bits and what 8-bit rows are multiplied by."""
    if bits == 32 or values.dtype.kind != "f":
        return values, None
    largest = np.abs(values).max(initial=0)
    if not largest < np.finfo(np.float16).max or (values.ndim < 2 and smallest(values) < np.finfo(np.float16).tiny):
        return values, None
    if values.ndim < 2 or not values.size:
        return values.astype("<f2"), None
    rows = values.reshape(len(values), -1)
    most = np.abs(rows).max(1, initial=0)
    least = most[most >= NOTHING * largest].min() if largest else math.inf
    if least < np.finfo(np.float16).tiny:
        return values, None
    if bits == 16 or least < SCALED:
        return values.astype("<f2"), None
    scale = (most / 127).astype("<f2")
    scale[scale == 0] = np.finfo(np.float16).tiny
    whole = np.clip(np.rint(rows / scale.astype(np.float32)[:, None]), -127, 127).astype(np.int8)
    return whole.reshape(values.shape), scale


def smallest(values: npt.NDArray[Any]) -> float:
    """Return the smallest magnitude that is not zero."""
    return float(np.abs(values[values != 0]).min(initial=1))


def planes(values: npt.NDArray[Any]) -> Bytes:
    """Return the bytes of values, all first ones, then all second ones: those of exponents are alike, and deflate well."""
    return np.ascontiguousarray(values).view(np.uint8).reshape(-1, values.dtype.itemsize).T.copy().reshape(-1)


def deflated(content: Bytes) -> Bytes:
    return np.frombuffer(zlib.compress(content.tobytes(), 9), np.uint8)


def put(entries: dict[str, Bytes], name: str, part: str, values: npt.NDArray[Any]) -> None:
    entries[f"{name}.{part}"] = deflated(planes(values))


def get(entries: Mapping[str, Tensor], name: str, part: str, kind: np.dtype[Any], most: int) -> npt.NDArray[Any]:
    """Return the values of an entry, of which there are at most so many: no more is inflated."""
    content = entries[f"{name}.{part}"].numpy()
    inflated = zlib.decompressobj().decompress(content.tobytes(), most * kind.itemsize + 1)
    if content.dtype != np.uint8 or len(inflated) > most * kind.itemsize or len(inflated) % kind.itemsize:
        raise ValueError(f"{name}.{part} has other bytes than its shape says")
    return np.frombuffer(inflated, np.uint8).reshape(kind.itemsize, -1).T.copy().view(kind).reshape(-1)
