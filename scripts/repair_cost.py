"""What one least-squares repair costs, by network, density and images: a row each in results/repair_cost/table.csv, and a plot.

    python scripts/repair_cost.py [NETWORK...]     rows that are there stay; one thread unless OMP_NUM_THREADS says otherwise

Random weights, masks and images: nothing is said of accuracy. `first` is what a process does once, before its first repair (the
dense model's outputs, and how much its logits feel errors), `repair` one mask with what weights are worth, `plain` one without,
`norms` what fitting norms takes then, in four passes, of the points of a front alone; seconds of the clock. `mb` is
the most memory that the process had.
"""

from __future__ import annotations

import argparse
import csv
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch
from resnet_cifar import resnet20, resnet56
from torch import nn

from evoprune.inputs.models import resnet18
from evoprune.inputs.splits import Split
from evoprune.masks.layers import find_layers
from evoprune.results.machine import device_name, versions
from evoprune.values.norms import EPOCHS, Fitting
from evoprune.values.repair import Repairer

OUT = Path(__file__).resolve().parent.parent / "results" / "repair_cost"
DENSITIES = (0.5, 0.2, 0.05)
NETWORKS = {"resnet20": (32, (768, 2048)), "resnet56": (32, (768,)), "resnet18": (32, (768,)), "resnet50": (64, (256,)),
            "vit_b_16": (224, (16,))}  # pixels a side, and images
COLUMNS = ("network", "weights", "widest", "density", "images", "threads", "first", "repair", "plain", "norms", "mb", "left",
           "device", "torch", "commit")


def network(name: str) -> nn.Module:
    """Return a network with random weights."""
    own = {"resnet20": resnet20, "resnet56": resnet56, "resnet18": resnet18}
    if name in own:
        return own[name]().eval()
    import torchvision

    return torchvision.models.get_model(name, weights=None).eval()  # type: ignore[no-any-return]  # torchvision is untyped


def measure(name: str, density: float, images: int) -> dict[str, object]:
    """Return a row."""
    torch.manual_seed(0)
    net, size = network(name), NETWORKS[name][0]
    layout = find_layers(net)
    inputs = torch.randn(images, 3, size, size)
    began = time.monotonic()
    repairer = Repairer("least-squares", net, layout, inputs)
    took = [time.monotonic() - began]
    repairer.study(Fitting(Split(inputs, torch.zeros(images)), torch.arange(images), EPOCHS))
    masks = {layer.name: torch.rand(layer.shape) < density for layer in layout}
    dense = {layer.name: net.get_parameter(layer.name).detach().clone() for layer in layout}
    repairer(masks)  # the first imports what fits the last layer, and computes the first layer's moments
    for repairer.asked in (True, False):
        with torch.no_grad():
            for layer, mask in masks.items():
                net.get_parameter(layer).copy_(dense[layer] * mask)
        began = time.monotonic()
        repairer(masks)
        took.append(time.monotonic() - began)
    began = time.monotonic()
    repairer.fit_norms()
    took.append(time.monotonic() - began)
    first, repair, plain, norms = (round(seconds, 2) for seconds in took)
    found = versions()
    return {"network": name, "weights": layout.weights, "widest": max(s.dense.shape[1] for s in repairer.layers.values()),
            "density": density, "images": images, "threads": torch.get_num_threads(), "first": first, "repair": repair,
            "plain": plain, "norms": norms, "mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
            "left": len(repairer.left()), "device": device_name(torch.device("cpu")),
            "torch": found["torch"], "commit": found.get("commit")}


def read() -> list[dict[str, str]]:
    """Return the rows that are there."""
    path = OUT / "table.csv"
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def plot(rows: list[dict[str, str]]) -> None:
    """Draw seconds a repair against density, a line a network and number of images."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    for name, images in sorted({(row["network"], row["images"]) for row in rows}):
        mine = sorted((float(row["density"]), float(row["repair"])) for row in rows
                      if (row["network"], row["images"]) == (name, images))
        axes.plot(*zip(*mine), marker="o", label=f"{name}, {images} images")
    axes.set(xscale="log", yscale="log", xlabel="density", ylabel="seconds a repair")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))  # beside the lines
    figure.savefig(OUT / "cost.png", dpi=120, metadata={"Software": None})


def main() -> int:
    """Measure what is not there, each in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("networks", nargs="*", metavar="NETWORK")
    parser.add_argument("--row", nargs=3, metavar=("NETWORK", "DENSITY", "IMAGES"), help="measure one, and print it")
    given = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    if given.row:
        writer = csv.DictWriter(sys.stdout, COLUMNS, lineterminator="\n")
        writer.writerow(measure(given.row[0], float(given.row[1]), int(given.row[2])))
        return 0
    OUT.mkdir(exist_ok=True)
    for name in given.networks or NETWORKS:
        for images in NETWORKS[name][1]:
            for density in DENSITIES:
                rows = read()
                key = (name, str(density), str(images), str(torch.get_num_threads()))
                if key in {(r["network"], r["density"], r["images"], r["threads"]) for r in rows}:
                    continue
                line = subprocess.run([sys.executable, __file__, "--row", *key[:3]], check=True, capture_output=True,
                                      text=True).stdout
                print(line, end="", flush=True)
                rows += list(csv.DictReader([line], COLUMNS))
                with open(OUT / "table.csv", "w", newline="") as file:
                    writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
                    writer.writeheader()
                    writer.writerows(rows)
    plot(read())
    return 0


if __name__ == "__main__":
    sys.exit(main())
