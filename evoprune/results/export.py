"""A point as a file to take away, by its suffix; each is opened again in a fresh process before it is called done.

    .safetensors          the state dict, zeros included
    .packed.safetensors   the same, only what is not zero (`masks.packed`), in 32, 16 or 8 bits
    .pt                   the state dict, as torch.load(weights_only=True) reads it
    .pt2, .onnx           a program that needs no Python code of the model (torch.export, ONNX), smaller where `slim`
"""

from __future__ import annotations

import io
import logging
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.numpy import save
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves  # in the order in which torch.export takes outputs apart

from ..errors import EvopruneError, first_line, shown
from ..files import from_safetensors, to_safetensors
from ..inputs.datasets import nested_tensors
from ..inputs.models import logits_of, off_by, private_copy
from ..inputs.named import names_function, says_what_it_calls
from ..inputs.nested import Inputs, applied, batches, leaves, taken
from ..inputs.sources import load_data
from ..inputs.splits import Split, as_split, example_sums, score
from ..inputs.tasks import task_of
from ..inputs.weights import load_weights
from ..masks.packed import BITS, pack
from ..values.sparse import sparsely_run, timed
from .machine import device_name
from .reload import program, tensors
from .written import DENSE, free_file, write_file

Point = Any  # of results.front, which comes later
STATES, PROGRAMS = (".packed.safetensors", ".safetensors", ".pt"), (".pt2", ".onnx")
SEEDED = 64  # random examples that outputs are compared on
TOLERANCE = 1e-4  # of the largest output, between a program and the model
log = logging.getLogger("evoprune")


@dataclass(frozen=True)
class Made:
    """What is written, and what it was made from."""

    kind: str
    path: Path  # where it is to lie
    model: nn.Module | None  # with the values that the file has
    state: dict[str, Tensor]
    inputs: Inputs | None  # some that the model takes, None where that is not known
    split: Split | None  # to count on
    batch: int  # examples at a time that it is timed with


def export(point: Point, path: str | Path, bits: int = 32, slim: bool = False, data: Any = None, overwrite: bool = False) -> Path:
    """Write a point to a file; see `Point.export`."""
    # 6 arguments: they are a user's wishes
    path, kind = checked(path, bits, slim, overwrite)
    state = point.state_dict()
    split = counted(point, data, next((v.dtype for v in state.values() if v.is_floating_point()), torch.float32))
    batch = point.front.record.config.latency_batch
    inputs = None
    if split is not None or kind in PROGRAMS or point.front.record.inputs is not None:
        inputs = point.front.examples(max(SEEDED, batch)) if split is None else split.inputs(slice(0, max(SEEDED, batch)))
    try:
        with tempfile.TemporaryDirectory() as folder:
            part = Path(folder) / f"point{kind}"
            if kind in STATES:
                content, state = as_content(kind, state, bits, point, split)
                part.write_bytes(content)
                made = Made(kind, path, model_of(point, state), state, inputs, split, batch)
            else:
                made = Made(kind, path, point.model(slim=slim), state, inputs, split, batch)
                write_program(kind, made.model, inputs, part, facts_of(point))  # type: ignore[arg-type]  # a model there is
            told = reopened(made, part, point)
            write_file(path, part.read_bytes())
    except OSError as error:
        raise EvopruneError(f"{path}: {error.strerror}; nothing is written") from None
    say(point, made, told)
    return path


def checked(name: str | Path, bits: int, slim: bool, overwrite: bool) -> tuple[Path, str]:
    """Return where a file is to lie, and its kind; raise `EvopruneError` for what cannot be."""
    path = free_file("export", name, (*STATES, *PROGRAMS), overwrite)
    kind = next(each for each in (*STATES, *PROGRAMS) if path.name.lower().endswith(each))
    if bits not in BITS or (bits != 32 and kind != STATES[0]):
        raise EvopruneError(f"export: found bits={shown(bits)}, expected 32, or in {STATES[0]} 16 or 8")
    if slim and kind in STATES:
        raise EvopruneError(f"export: a state dict ({kind}) has the shapes of your model; a slim one goes into .pt2 or .onnx")
    if kind == ".onnx":
        try:
            import onnxruntime  # noqa: F401
            import onnxscript  # noqa: F401
        except ImportError as error:
            raise EvopruneError(f"export: {first_line(error)}; pip install 'evoprune[onnx]'") from None
    return path, kind


def counted(point: Point, data: Any, dtype: torch.dtype) -> Split | None:
    """Return the examples that the file's accuracy is counted on: `data`, or the test split of a run whose data are named, and by
    no function: what a folder names as code is not run for that."""
    record = point.front.record
    config, split = record.config, None
    if data is not None:
        split = as_split(data, "data", record.mean, record.std)
        says_what_it_calls(config.task or "", "counting on data=", "exporting without it")
    elif record.named_data and not (names_function(config.data) or names_function(config.task or "")):
        split = load_data(config, None).test
    return None if split is None else replace(split.to(torch.device("cpu"), dtype), task=task_of(config.task))


def as_content(kind: str, state: dict[str, Tensor], bits: int, point: Point, split: Split | None) -> tuple[bytes,
                                                                                                     dict[str, Tensor]]:
    """Return a file of a state dict, and the values that it has."""
    facts = facts_of(point)
    if kind == ".pt":
        buffer = io.BytesIO()
        torch.save({name: value.detach().cpu().clone().contiguous() for name, value in state.items()}, buffer)
        return buffer.getvalue(), state
    if kind == ".safetensors":
        return to_safetensors(state, facts), state
    entries, metadata = pack(state, bits)
    with tempfile.TemporaryDirectory() as folder:  # what a reader finds, rounded
        rounded = Path(folder) / "rounded"
        rounded.write_bytes(save(entries, metadata))
        found = tensors(kind, rounded)
    if bits != 32 and split is not None and (model := model_of(point, found)) is not None:
        facts["measured"] = f"{score(model, split, point.front.record.batch_size)} on {len(split)} examples"
    return save(entries, {**metadata, **facts}), {name: found[name] for name in state}


def facts_of(point: Point) -> dict[str, str]:
    """Return what the head of a file says of its point."""
    inputs = {} if (said := point.front.record.normalised) is None else {"inputs": said}
    return {"run": point.front.path.name, "point": point.id, "kept": f"{point.kept} of {point.weights} weights", **inputs}


def model_of(point: Point, state: dict[str, Tensor]) -> nn.Module | None:
    """Return the model with these values, None where it is not here, or only a function that the folder names makes it."""
    if not point.front.has_model:
        return None
    model: nn.Module = point.front.structure()
    load_weights(model, state, "export")
    return model.eval()


def write_program(kind: str, model: nn.Module, inputs: Inputs, path: Path, facts: dict[str, str]) -> None:
    """Write a model as a program for any number of examples, and facts beside it."""
    arguments, named = ((), inputs) if isinstance(inputs, dict) else (inputs if isinstance(inputs, tuple) else (inputs,), {})
    sizes = {0: torch.export.Dim("batch", min=1)}
    shapes: Any = {name: sizes for name in named} if named else tuple(sizes for _ in arguments)
    said = io.StringIO()
    try:
        with warnings.catch_warnings(action="ignore"), redirect_stdout(said), redirect_stderr(said), torch.no_grad():
            if kind == ".pt2":
                torch.export.save(torch.export.export(model, arguments, named, dynamic_shapes=shapes), path, extra_files=facts)
            else:
                made = torch.onnx.export(model, arguments, kwargs=named, dynamic_shapes=shapes, dynamo=True, verbose=False)
                made.model.metadata_props.update(facts)  # type: ignore[union-attr]  # with dynamo it is no None
                made.save(path, external_data=False)  # type: ignore[union-attr]
    except Exception as error:  # noqa: BLE001  # torch runs the user's code on stand-ins
        raise EvopruneError(f"export: torch cannot write the model as {kind}: {first_line(error)}") from None


def reopened(made: Made, part: Path, point: Point) -> str:
    """Open a file in a fresh process; return what was found, in words.

    Raises:
        EvopruneError: it holds something else than it should.
    """
    with tempfile.TemporaryDirectory() as folder:
        given, out = Path(folder) / "given", Path(folder) / "out"
        split = made.split
        inputs = () if made.kind in STATES else made.inputs if split is None else split.inputs(slice(0, len(split)))
        given.write_bytes(to_safetensors(flat(inputs)))
        place = 0 if made.model is None or made.kind in STATES else place_of_logits(made.model, taken(inputs, slice(0, 2)))
        done = subprocess.run([sys.executable, "-m", "evoprune.results.reload", made.kind, str(part), str(given), str(out),
                               str(place)], capture_output=True, text=True)
        if done.returncode:
            why = (done.stderr.strip() or "it ended").splitlines()[-1]
            raise EvopruneError(f"export: {made.path.name} cannot be opened again: {why}")
        found = from_safetensors(out.read_bytes())
    if made.kind in STATES:
        if found.keys() != made.state.keys() or not all(torch.equal(found[n].float(), v.float()) for n, v in made.state.items()):
            raise EvopruneError(f"export: {made.path.name} has other values than the point")
        return measured(point, split, None if split is None or made.model is None else
                        example_sums(made.model, split, point.front.record.batch_size))
    assert made.model is not None
    with torch.no_grad():
        expected = torch.cat([logits_of(applied(made.model, batch)) for batch in batches(inputs, 256)])
    difference = off_by(expected, found["outputs"])
    if not difference <= TOLERANCE:
        raise EvopruneError(f"export: {made.path.name} gives other outputs than the model, by {difference:.1e} of the largest")
    if split is None:
        return measured(point, None, None) + (f" (outputs for {len(expected)} random inputs differ by {difference:.1e} of the "
                                              f"largest)")
    return measured(point, split, split.task.sums(found["outputs"], split.labels))


def place_of_logits(model: nn.Module, inputs: Inputs) -> int:
    """Return which of the tensors that a model returns has the logits: a program in ONNX has them as a list."""
    with torch.no_grad():
        output = applied(model, inputs)
    logits = logits_of(output)
    tensors = [each for each in tree_leaves(output) if isinstance(each, Tensor)]
    return next((i for i, each in enumerate(tensors) if each is logits), 0)


def flat(inputs: Inputs) -> dict[str, Tensor]:
    """Return inputs as tensors by name, or by number."""
    found = inputs if isinstance(inputs, dict) else dict(enumerate(inputs if isinstance(inputs, tuple) else (inputs,)))
    if not all(isinstance(value, Tensor) for value in found.values()):
        raise EvopruneError("export: found inputs within inputs, which no .pt2 or .onnx takes; expected a tensor, or several")
    return {str(name): value for name, value in found.items()}


def measured(point: Point, split: Split | None, sums: Tensor | None) -> str:
    """Return what was counted again, in words, beside what front.csv says; `sums` are those of each example."""
    objective = point.objectives[point.objectives.score]
    if split is None or sums is None:
        why = "for want of data: Python can hand in data=" if split is None else f"for {no_model(point)}"
        return f"{objective.title} was not counted again, {why}"
    stated = "" if point.test is None else f", {objective.shown(point.test)} in the run's front"
    return (f"{objective.title} of the file, opened in a fresh process, {objective.within(*split.task.tested(sums))} on "
            f"{len(split):,} examples{stated}")


def say(point: Point, made: Made, told: str) -> None:
    """Say what was written, and how fast it is."""
    objectives, tested = point.objectives, f", test {point.tested} (95 %)" if point.tested else ""
    values = ", ".join(f"{o.title} {o.shown(value)}" for o, value in zip(objectives, point.values))
    log.info("%s: %s bytes, point %s, %s of %s weights, %s%s; %s", made.path, f"{made.path.stat().st_size:,}", point.id,
             f"{point.kept:,}", f"{point.weights:,}", values, tested, told)
    if (inputs := point.front.record.normalised) is not None:
        log.info("it takes %s", inputs)
    if made.model is None or made.inputs is None:
        missing = no_model(point) if made.model is None else "the run has not recorded what inputs are like"
        log.info("not timed: %s", missing)
        return
    dense = point.front.structure().eval()
    load_weights(dense, point.front.written.tensors(DENSE), "export")
    batch = taken(made.inputs, slice(0, made.batch))
    with torch.inference_mode():
        before, after = timed(lambda: applied(dense, batch), runner(made, batch), threads=1)
    log.info("%d at a time take %.3f ms, dense %.3f ms (medians of turns, 1 thread, %s)", len(leaves(batch)[0]), 1e3 * after,
             1e3 * before, device_name(torch.device("cpu")))


def no_model(point: Point) -> str:
    """Return why there is no model of a point, whose values alone are written."""
    if not point.front.record.rebuildable:
        return "its model is not here: load_front can be given it"
    return "its model is not built: a function that the run's folder names would be called, as a .pt2 or .onnx needs it"


def runner(made: Made, batch: Inputs) -> Callable[[], Any]:
    """Return a function that runs what a file has on a batch."""
    if made.kind in STATES:
        return lambda: applied(made.model, batch)  # type: ignore[arg-type]  # a model there is
    given = flat(batch)
    run = program(made.kind, made.path, list(given))
    return lambda: run(given)


def load_packed(path: str | Path, model: nn.Module, sparse: bool = False, inputs: Any = None) -> nn.Module:
    """Return a copy of `model`, in eval mode, on the CPU, with the values of a packed file. With `sparse`, layers that are faster
    so on this machine skip their zeros, and its `sparse_layers` says which (`values.sparse`): that is measured on `inputs`, a
    batch (n, ...) as the model will get it, a tensor or a tuple or dict of tensors.

    Raises:
        EvopruneError: it is no packed file, or one of another model; inputs are missing, or do not go through the model.
    """
    if sparse != (inputs is not None):
        found = "sparse=True without inputs=" if sparse else "inputs= without sparse=True"
        raise EvopruneError(f"load_packed: found {found}; give both: layers run sparse where that is faster for inputs, a batch "
                            f"as the model will get it")
    if not isinstance(model, nn.Module):
        raise EvopruneError(f"load_packed: found {shown(model)} for a model, expected an nn.Module")
    try:
        state = tensors(STATES[0], Path(path))
    except OSError as error:
        raise EvopruneError(f"{path}: {error.strerror}, expected a packed file") from None
    model = private_copy(model)
    load_weights(model, state, str(path))
    if not sparse:
        return model.eval()
    try:
        return sparsely_run(model, nested_tensors(inputs))
    except Exception as error:  # noqa: BLE001  # the user's code
        raise EvopruneError(f"load_packed: inputs do not go through the model: {first_line(error)}") from None
