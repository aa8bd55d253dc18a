"""What a pruned model weighs and how fast it runs, as it is taken away: in one run, measured in turns, medians, one thread.

    python scripts/bench_export.py [NAME...]      all, or these of lenet5, resnet18, vit, mlp

Random weights, masked uniformly (the same share of each layer) or by LAMP over all layers, and, of whole filters, half of the
rows of every layer. Times in milliseconds a batch, and how many times as fast as the faster dense layout (contiguous or
channels_last, fp32); dense in bf16 beside it. Rows are kept: results/bench_export/table.csv, where it goes on.
"""

from __future__ import annotations

import argparse
import copy
import csv
import io
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.numpy import save
from torch import Tensor, nn
from torchvision.models import VisionTransformer

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


def row(name: str, kind: str, share: float, batch: int) -> dict[str, Any]:
    """Return what a masked network weighs and how fast it is."""
    net = masked(name, kind, share)
    x = torch.randn(batch, *NETS[name][1], generator=torch.Generator().manual_seed(0))
    last = copy.deepcopy(net).to(memory_format=torch.channels_last)
    small, gone = slimmed(net, x[:4] if batch > 3 else torch.randn(4, *NETS[name][1]))
    sparse = sparsely_run(small, x)
    with torch.inference_mode(), tempfile.TemporaryDirectory() as folder:
        half, given = copy.deepcopy(net).bfloat16(), x.bfloat16()
        sessions = [onnx(model, x, Path(folder) / f"{i}.onnx") for i, model in enumerate((net, small))]
        shaped = x.to(memory_format=torch.channels_last) if x.dim() == 4 else x
        small_last = copy.deepcopy(small).to(memory_format=torch.channels_last)
        times = timed(lambda: net(x), lambda: last(shaped), lambda: half(given), lambda: small(x), lambda: small_last(shaped),
                      lambda: sparse(x), *sessions)
        expected = net(x)
        difference = max(float((model(x) - expected).abs().max() / expected.abs().max()) for model in (small, sparse))
    dense, narrow = min(times[:2]), min(times[3:5])
    measured = dict(zip(("dense_ms", "dense_bf16_ms", "slim_ms", "sparse_ms", "onnx_dense_ms", "onnx_slim_ms"),
                        (f"{1e3 * t:.4f}" for t in (dense, times[2], narrow, *times[5:]))))
    return {"network": name, "mask": kind, "sparsity": share, "batch": batch, "dense_bytes": size(net, None),
            "packed_bytes": size(net, 32), "packed_int8_bytes": size(net, 8), "slim_channels": sum(gone.channels.values()),
            **measured, "slim_times": f"{dense / narrow:.2f}", "sparse_times": f"{dense / times[5]:.2f}",
            "sparse_layers": len(sparse.sparse_layers), "largest_difference": f"{difference:.1e}",
            "machine": device_name(torch.device("cpu")), "commit": versions()["commit"]}


def onnx(model: nn.Module, x: Tensor, path: Path) -> Callable[[], Any]:
    """Return what runs a model's program in onnxruntime, on one thread."""
    write_program(".onnx", copy.deepcopy(model), x if len(x) > 1 else x.repeat(2, *[1] * (x.dim() - 1)), path)
    run = program(".onnx", path, ["0"])
    return lambda: run({"0": x})


def size(net: nn.Module, bits: int | None) -> int:
    """Return the bytes of a state dict as torch.save writes it, or packed."""
    if bits is not None:
        return len(save(*pack(net.state_dict(), bits)))
    buffer = io.BytesIO()
    torch.save(net.state_dict(), buffer)
    return buffer.tell()


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
            for batch in given.batches:
                if (name, kind, str(share), str(batch)) not in there:
                    found = row(name, kind, share, batch)
                    with given.out.open("a", newline="") as file:
                        csv.DictWriter(file, COLUMNS, lineterminator="\n").writerow(found)
                    print({c: found[c] for c in (*COLUMNS[:4], "slim_times", "sparse_times")}, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
