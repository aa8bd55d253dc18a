"""Opens an exported file as somebody else would, in a process of its own, which has neither the model nor the run.

    python -m evoprune.results.reload KIND FILE INPUTS OUTPUTS PLACE

writes what the file holds to OUTPUTS, as safetensors: its tensors, or, of a program, what it returns for the tensors in INPUTS,
whose names are those of its arguments or their numbers; the logits of what ONNX returns are at PLACE.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import EvopruneError
from ..files import from_safetensors, metadata_of, to_safetensors
from ..inputs.models import logits_of
from ..masks.packed import unpack

BATCH = 256  # examples that a program gets at a time


def tensors(kind: str, path: Path) -> dict[str, Tensor]:
    """Return the state dict in a file.

    Raises:
        EvopruneError: it is no such file.
    """
    if kind == ".pt":
        state: dict[str, Tensor] = torch.load(path, weights_only=True)
        return state
    content = path.read_bytes()
    try:
        found, metadata = from_safetensors(content), metadata_of(content)
    except Exception as error:  # noqa: BLE001  # safetensors has several
        raise EvopruneError(f"{path}: {type(error).__name__}: {error}; expected a safetensors file") from None
    return unpack(found, metadata, str(path)) if kind.startswith(".packed") else found


def outputs(kind: str, path: Path, inputs: dict[str, Tensor], place: int = 0) -> Tensor:
    """Return the logits that a program makes of all examples; of ONNX, the tensor at that place."""
    run = program(kind, path, list(inputs), place)
    parts = []
    for i in range(0, len(next(iter(inputs.values()))), BATCH):
        parts.append(run({name: value[i:i + BATCH] for name, value in inputs.items()}))
    return torch.cat(parts)


def program(kind: str, path: Path, names: list[str], place: int = 0) -> Any:
    """Return a function of a dict of tensors: the program in a file; ONNX on one thread, of which the output at `place`."""
    if kind == ".onnx":
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        session = onnxruntime.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])
        wanted = [each.name for each in session.get_inputs()]

        def answered(given: dict[str, Tensor]) -> Tensor:
            arrays = {w: given[w if w in given else n].numpy() for w, n in zip(wanted, names)}
            return torch.from_numpy(session.run(None, arrays)[place])

        return answered
    module = torch.export.load(path).module()

    def run(given: dict[str, Tensor]) -> Tensor:
        with torch.no_grad():
            return logits_of(module(**given) if not names[0].isdigit() else module(*given.values()))

    return run


def reopen(kind: str, path: Path, given: Path, out: Path, place: int = 0) -> None:
    """Write what a file holds, or returns for what is given."""
    if kind in (".pt2", ".onnx"):
        inputs = from_safetensors(given.read_bytes())  # in no order
        if all(name.isdigit() for name in inputs):
            inputs = {name: inputs[name] for name in sorted(inputs, key=int)}
        result = {"outputs": outputs(kind, path, inputs, place)}
    else:
        result = tensors(kind, path)
    out.write_bytes(to_safetensors(result))


if __name__ == "__main__":
    torch.set_num_threads(1)
    wanted, file, asked, answers, at = sys.argv[1:]
    reopen(wanted, Path(file), Path(asked), Path(answers), int(at))
