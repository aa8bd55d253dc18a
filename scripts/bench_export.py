"""What a pruned model weighs and how fast it runs, as it is taken away: in one run, measured in turns, medians, one thread.

    python scripts/bench_export.py [NAME...]      all, or these of lenet5, resnet18, vit, mlp

Random weights, masked uniformly (the same share of each layer) or by LAMP over all layers, and, of whole filters, half of the
rows of every layer but the last. Times in milliseconds a batch, dense (fp32, and bf16 beside it) and slim in the faster of two
layouts, contiguous or channels_last, and how many times as fast as dense in fp32. `sparse` is slim first. Rows are kept:
results/bench_export/table.csv, where it goes on. All of it takes some hours of one core.
"""

from __future__ import annotations

import argparse
import copy
import csv
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.numpy import save
from torch import Tensor, nn
from torchvision.models import VisionTransformer

from evoprune.files import to_safetensors
from evoprune.inputs.models import LeNet5, resnet18
from evoprune.masks.layers import find_layers
from evoprune.masks.packed import pack
from evoprune.masks.saliency import gene_scores, keep_top
from evoprune.results.export import write_program
from evoprune.results.machine import device_name, versions
from evoprune.results.reload import program
from evoprune.values.slim import slimmed
from evoprune.values.sparse import sparsely_run, timed

OUT = Path(__file__).resolve().parent.parent / "results" / "bench_export" / "table.csv"
BATCHES = (1, 32, 256)
COLUMNS = ("network", "mask", "sparsity", "batch", "dense_bytes", "packed_bytes", "packed_int8_bytes", "slim_channels",
           "dense_ms", "dense_bf16_ms", "slim_ms", "sparse_ms", "onnx_dense_ms", "onnx_slim_ms", "slim_times", "sparse_times",
           "sparse_layers", "largest_difference", "machine", "commit")


def vit() -> nn.Module:
    """ViT-S/16's shape at 112 pixels, a class token, 10 classes."""
    net = VisionTransformer(112, 16, 12, 6, 384, 1536, num_classes=10)
    nn.init.normal_(net.heads.head.weight, std=0.02)
    return net


def mlp() -> nn.Module:
    layers = [part for _ in range(4) for part in (nn.Linear(1024, 1024), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(1024, 10))


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "lenet5": (LeNet5, (1, 28, 28)), "resnet18": (resnet18, (3, 32, 32)), "vit": (vit, (3, 112, 112)), "mlp": (mlp, (1024,))}
MASKS = [("uniform", 0.9), ("uniform", 0.95), ("uniform", 0.98), ("lamp", 0.9), ("lamp", 0.95), ("lamp", 0.98), ("filters", 0.5)]


def masked(name: str, kind: str, share: float) -> nn.Module:
    """Return a network with so large a share of its weights, or of the rows of each layer but the last, zero."""
    torch.manual_seed(0)
    net = NETS[name][0]().eval()
    layout = find_layers(net)
    weights = [net.get_parameter(layer.name) for layer in layout]
    if kind == "lamp":
        kept = keep_top(gene_scores("lamp", layout, [w.detach() for w in weights]), round((1 - share) * layout.weights), layout)
    elif kind == "uniform":
        kept = [torch.rand(w.shape) >= share for w in weights]
    else:
        kept = [(torch.arange(len(w)) % 2 == 1).view(-1, *[1] * (w.dim() - 1)).expand(w.shape) for w in weights[:-1]]
    for weight, mask in zip(weights, kept):
        weight.data *= mask
    if kind == "filters":  # what feeds a dead filter is dead too, so that nothing of it is left
        for module in net.modules():
            bias = getattr(module, "bias", None)
            if isinstance(module, (nn.Conv2d, nn.Linear)) and bias is not None and len(bias) > 10:
                bias.data[::2] = 0
    return net


def rows(name: str, kind: str, share: float, batches: list[int]) -> Iterator[dict[str, Any]]:
    """Yield what a masked network weighs and how fast it is, a row a batch size."""
    net, generator = masked(name, kind, share), torch.Generator().manual_seed(0)
    few = torch.randn(4, *NETS[name][1], generator=generator)
    small, gone = slimmed(net, few)
    common = {"network": name, "mask": kind, "sparsity": share, "dense_bytes": size(net, None), "packed_bytes": size(net, 32),
              "packed_int8_bytes": size(net, 8), "slim_channels": sum(gone.channels.values()),
              "machine": device_name(torch.device("cpu")), "commit": versions()["commit"]}
    with tempfile.TemporaryDirectory() as folder:
        programs = []
        for i, model in enumerate((net, small)):
            write_program(".onnx", copy.deepcopy(model), few, Path(folder) / f"{i}.onnx", {})
            programs.append(program(".onnx", Path(folder) / f"{i}.onnx", ["0"]))
        for batch in batches:
            yield {**common, "batch": batch,
                   **measured(net, small, programs, torch.randn(batch, *NETS[name][1], generator=generator))}


def measured(net: nn.Module, small: nn.Module, programs: list[Any], x: Tensor) -> dict[str, Any]:
    """Return the times of one batch, in turns, and by how much outputs in fp32 differ."""
    sparse = sparsely_run(small, x)
    shaped = x.to(memory_format=torch.channels_last) if x.dim() == 4 else x
    narrow = [copy.deepcopy(net).bfloat16(), last(net).bfloat16()]
    runs: dict[str, list[Callable[[], Any]]] = {  # what is called the same is the faster of its layouts
        "dense": [partial(net, x), partial(last(net), shaped)],
        "dense_bf16": [partial(narrow[0], x.bfloat16()), partial(narrow[1], shaped.bfloat16())],
        "slim": [partial(small, x), partial(last(small), shaped)], "sparse": [partial(sparse, x)],
        "onnx_dense": [partial(programs[0], {"0": x})], "onnx_slim": [partial(programs[1], {"0": x})]}
    with torch.inference_mode():
        times = iter(timed(*(run for each in runs.values() for run in each)))
        best = {what: min(next(times) for _ in each) for what, each in runs.items()}
        expected = net(x)
        difference = max(float((run() - expected).abs().max() / expected.abs().max())
                         for what, each in runs.items() if what != "dense_bf16" for run in each)
    return {**{f"{what}_ms": f"{1e3 * seconds:.4f}" for what, seconds in best.items()},
            "slim_times": f"{best['dense'] / best['slim']:.2f}", "sparse_times": f"{best['dense'] / best['sparse']:.2f}",
            "sparse_layers": len(sparse.sparse_layers), "largest_difference": f"{difference:.1e}"}


def last(net: nn.Module) -> nn.Module:
    """Return a copy whose images have their channels last."""
    return copy.deepcopy(net).to(memory_format=torch.channels_last)


def size(net: nn.Module, bits: int | None) -> int:
    """Return the bytes of a state dict as safetensors, or packed."""
    state = net.state_dict()
    return len(to_safetensors(state) if bits is None else save(*pack(state, bits)))


def main() -> int:
    """Write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NETS)}")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES)
    given = parser.parse_args()
    torch.set_num_threads(1)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    there = {tuple(r[c] for c in COLUMNS[:4]) for r in csv.DictReader(given.out.open())} if given.out.exists() else set()
    if not there:
        given.out.write_text(",".join(COLUMNS) + "\n")
    for name in given.names or NETS:
        for kind, share in MASKS:
            missing = [batch for batch in given.batches if (name, kind, str(share), str(batch)) not in there]
            for found in rows(name, kind, share, missing) if missing else ():
                with given.out.open("a", newline="") as file:
                    csv.DictWriter(file, COLUMNS, lineterminator="\n").writerow(found)
                print({c: found[c] for c in (*COLUMNS[:4], "slim_times", "sparse_times")}, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
