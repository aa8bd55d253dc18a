"""What goes from a classifier of each of torchvision's families where half of the filters of every layer but the last are dead:
two rows a network in results/slim_networks/table.csv. The weights are random: nothing is said of accuracy.

    python scripts/slim_networks.py [NAME...]     all of at most 100 million parameters, or these; rows that are there stay

`dead` says what a dead filter makes: zero (no bias behind it), or the constants of biases and of batch norms with shifts of
their own, which cannot be folded behind zero padding. Batch norms have the statistics of 16 random images. Once a network it is
packed and read back, to the bit, and with 95 % zeros runs all layers sparse that can. Differences are shares of the largest
output, as is by how much outputs vary over the eight images that they are taken from.
"""

from __future__ import annotations

import argparse
import csv
import logging
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from any_networks.zoo import TORCHVISION, torchvision_net
from safetensors.numpy import save
from torch import Tensor, nn

from evoprune.files import from_safetensors, metadata_of
from evoprune.inputs.models import copied, logits_of
from evoprune.masks.channels import NORMS
from evoprune.masks.layers import find_layers
from evoprune.masks.packed import pack, unpack
from evoprune.results.machine import versions
from evoprune.values.slim import slimmed
from evoprune.values.sparse import inputs_of_layers, skipping

OUT = Path(__file__).resolve().parent.parent / "results" / "slim_networks" / "table.csv"
LARGEST = 100_000_000  # parameters
COLUMNS = ("network", "dead", "parameters", "parameters_slim", "filters", "filters_dead", "channels_gone", "heads_gone",
           "slim_difference", "slim_difference_fp64", "outputs_vary", "packed_bytes", "sparse_layers", "sparse_difference",
           "seconds", "said", "commit")


def network(name: str, dead: str) -> tuple[nn.Module, int, int]:
    """Return a network with every other filter dead, how many it has, and how many are dead."""
    torch.manual_seed(0)
    net, images, _ = torchvision_net(name)
    net.eval()
    layers = [net.get_submodule(layer.name.rpartition(".")[0]) for layer in find_layers(net)[:-1]]
    for module in net.modules():
        if isinstance(module, nn.Linear) and not module.weight.any():  # ViT's head, as torchvision makes it
            nn.init.normal_(module.weight, std=0.02)
        if dead == "constant" and isinstance(bias := getattr(module, "bias", None), nn.Parameter):
            nn.init.normal_(bias, std=0.1)
    for layer in layers:
        weight = getattr(layer, "weight", None)
        if not isinstance(layer, nn.MultiheadAttention) and isinstance(weight, nn.Parameter):
            weight.data[::2] = 0
            if dead == "zero" and layer.bias is not None:
                layer.bias.data[::2] = 0
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, NORMS):
                module.reset_running_stats()
                module.train().momentum = None  # the mean over all
        net(images(16))
    net.eval()
    rows = [len(layer.weight) for layer in layers if isinstance(getattr(layer, "weight", None), nn.Parameter)]
    return net, sum(rows), sum(-(-n // 2) for n in rows)


def difference(model: nn.Module, other: nn.Module, x: Tensor) -> str:
    """Return by how much outputs differ at most, as a share of the largest."""
    with torch.inference_mode():
        expected, found = logits_of(model(x)), logits_of(other(x))
    return f"{float((found - expected).abs().max() / expected.abs().max()):.1e}"


def packed(net: nn.Module) -> int:
    """Return the bytes of a packed file, which has every value."""
    content = save(*pack(net.state_dict()))
    found = unpack(from_safetensors(content), metadata_of(content), "packed")
    assert all(torch.equal(found[name], value) for name, value in net.state_dict().items())
    return len(content)


def row(name: str, dead: str) -> dict[str, Any]:
    """Return the row of a network."""
    started, lines = time.perf_counter(), Lines()
    logging.getLogger("evoprune").handlers = [lines]
    logging.getLogger("evoprune").setLevel(logging.INFO)
    net, filters, gone = network(name, dead)
    images = torchvision_net(name)[1]
    small, cut = slimmed(net, images(4))
    said = [line for line in lines.said if "cut out of" not in line]
    x = images(8)
    with torch.inference_mode():
        outputs = logits_of(net(x))
    found = {"slim_difference": difference(net, small, x),
             "slim_difference_fp64": difference(copied(net).double(), copied(small).double(), x.double()),
             "outputs_vary": f"{float((outputs.amax(0) - outputs.amin(0)).max() / outputs.abs().max()):.1e}",
             **({"packed_bytes": packed(net), **run_sparse(net, x)} if dead == "zero" else {})}
    return {"network": name, "dead": dead, "parameters": size(net), "parameters_slim": size(small), "filters": filters,
            "filters_dead": gone, "channels_gone": sum(cut.channels.values()), "heads_gone": sum(cut.heads.values()), **found,
            "seconds": round(time.perf_counter() - started), "said": "; ".join(said), "commit": versions()["commit"]}


def run_sparse(net: nn.Module, x: Tensor) -> dict[str, Any]:
    """Return what comes of letting all layers that can skip their zeros, of which there are 95 %."""
    sparse = copied(net)
    for weight in [sparse.get_parameter(layer.name) for layer in find_layers(sparse)]:
        weight.data *= torch.rand(weight.shape) < 0.1  # half of them are zero already
    fast = copied(sparse)
    with torch.no_grad():
        able = list(inputs_of_layers(fast, x))
    for layer in able:
        fast.set_submodule(layer, skipping(fast.get_submodule(layer)))
    return {"sparse_layers": len(able), "sparse_difference": difference(sparse, fast, x)}


class Lines(logging.Handler):
    """Keeps what is said."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


def size(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def main() -> int:
    """Write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(TORCHVISION)}")
    parser.add_argument("--out", type=Path, default=OUT)
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # torchvision speaks of its releases to come
    given.out.parent.mkdir(parents=True, exist_ok=True)
    there = {(r["network"], r["dead"]) for r in csv.DictReader(given.out.open())} if given.out.exists() else set()
    if not there:
        given.out.write_text(",".join(COLUMNS) + "\n")
    sizes = {name: size(torchvision_net(name)[0]) for name in TORCHVISION}
    for name in given.names or sorted((name for name in sizes if sizes[name] <= LARGEST), key=sizes.__getitem__):
        for dead in ("zero", "constant"):
            if (name, dead) not in there:
                found = row(name, dead)
                with given.out.open("a", newline="") as file:
                    csv.DictWriter(file, COLUMNS, lineterminator="\n").writerow(found)
                print(found, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
