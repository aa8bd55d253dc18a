"""How fast masks are evaluated, against the way it is usually written, in one run: interleaved, medians, one thread.

    python scripts/bench_evaluation.py [--repeats 3] [--device cpu]

A is: copy the model, set the masks with torch.nn.utils.prune, eval(), iterate a DataLoader over images with ToTensor and
Normalize (as torchvision's data sets are used), `.item()` every batch. A over tensors: they are normalised before. Images
are random: no row depends on what a model has learned. Ratios are of CPU time on the CPU (one thread, so it is wall time on
an idle machine, and holds on a busy one), of wall time on a GPU. Writes results/bench_evaluation/DEVICE.csv and .txt.
"""

from __future__ import annotations

import argparse
import copy
import csv
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn.utils import prune as torch_prune
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchvision import transforms

from evoprune.config import Config
from evoprune.evaluation.accuracy import batch_size_for, probe
from evoprune.evaluation.evaluator import Evaluator
from evoprune.evolution.generations import begin, evolve
from evoprune.evolution.operators import mate, mutate
from evoprune.evolution.selection import nsga2
from evoprune.evolution.toolbox import default_toolbox
from evoprune.inputs.models import LeNet5, resnet18
from evoprune.inputs.splits import Split
from evoprune.masks.genome import Individual, from_masks
from evoprune.masks.layers import find_layers
from evoprune.masks.layout import Layout
from evoprune.masks.tensors import masks
from evoprune.run.prepare import device_name, versions

EVALUATIONS = 64  # a layer, where layers are searched one at a time; preparing and filling the cache count once


def images(count: int, channels: int, size: int, classes: int, device: torch.device) -> Split:
    made = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (count, channels, size, size), generator=made, dtype=torch.uint8)
    labels = torch.randint(classes, (count,), generator=made)
    mean, std = (0.5,) * channels, (0.25,) * channels
    return Split(pixels.to(device), labels.to(device), mean, std)


def random_mask(layout: Layout, density: float = 0.3) -> Individual:
    rng = np.random.default_rng(0)
    return from_masks((rng.random(layer.shape) < density for layer in layout), "random")


class Pictures(Dataset):  # type: ignore[type-arg]
    """PIL images with transforms, as torchvision's data sets give them."""

    def __init__(self, split: Split):
        self.arrays = split.images.cpu().permute(0, 2, 3, 1).squeeze(3).numpy()  # (n, h, w) or (n, h, w, 3)
        self.labels = split.labels.tolist()
        self.transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize(split.mean, split.std)])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        return self.transform(Image.fromarray(self.arrays[i])), self.labels[i]


def usual_way(model: nn.Module, layout: Layout, split: Split, individual: Individual, batch: int,
              tensors: bool = False) -> Callable[[], int]:
    """Return A, over images or over tensors."""
    dataset = TensorDataset(split.inputs(slice(None)).cpu(), split.labels.cpu()) if tensors else Pictures(split)
    device = split.labels.device

    def evaluate() -> int:
        pruned = copy.deepcopy(model)
        for layer, mask in zip(layout, masks(individual, layout)):
            name, _, parameter = layer.name.rpartition(".")
            torch_prune.custom_from_mask(pruned.get_submodule(name), parameter, mask)
        pruned.to(device).eval()
        right = 0
        with torch.no_grad():
            for inputs, labels in DataLoader(dataset, batch):
                right += (pruned(inputs.to(device)).argmax(1) == labels.to(device)).sum().item()
        return right

    return evaluate


class Clock:
    """Times calls in turn: CPU seconds on the CPU, wall seconds on a GPU."""

    def __init__(self, device: torch.device, repeats: int):
        self.device, self.repeats = device, repeats

    def once(self, call: Callable[[], object]) -> tuple[float, float]:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        wall, cpu = time.perf_counter(), time.process_time()
        call()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - wall, time.process_time() - cpu

    def medians(self, *calls: Callable[[], object]) -> list[float]:
        """Return the median seconds of each call, all called once to warm up, then in turn."""
        times: list[list[float]] = [[] for _ in calls]
        for call in calls:
            call()
        for _ in range(self.repeats):
            for i, call in enumerate(calls):
                wall, cpu = self.once(call)
                times[i].append(cpu if self.device.type == "cpu" else wall)
        return [float(np.median(t)) for t in times]


def evaluator_of(model: nn.Module, layout: Layout, split: Split, precision: str = "fp32") -> Evaluator:
    batch = batch_size_for(probe(model, split)[1], split.labels.device)
    return Evaluator(model, layout, split, batch, precision=precision, cache_mb=4096)


def whole_model(clock: Clock, model: nn.Module, split: Split, batches: tuple[int, ...], bf16: bool) -> dict[str, float]:
    """Time A at each batch size, ours in fp32 (and bf16), and ours without masking."""
    layout = find_layers(model)
    individual = random_mask(layout)
    ours = evaluator_of(model, layout, split)
    calls: list[Callable[[], object]] = [usual_way(model, layout, split, individual, b) for b in batches]
    calls += [usual_way(model, layout, split, individual, batches[-1], tensors=True)]
    calls += [lambda: int(ours.sums(individual)[0]), lambda: int(ours.summed()[0])]
    if bf16:
        low = evaluator_of(model, layout, split, "bf16")
        calls.append(lambda: int(low.sums(individual)[0]))
    found = clock.medians(*calls)
    names = [f"A{b}" for b in batches] + ["tensors", "ours", "dense"] + ["bf16"] * bf16
    return dict(zip(names, found))


def layer_by_layer(clock: Clock, model: nn.Module, split: Split, usual: float) -> float:
    """Return how much faster `EVALUATIONS` masks of every layer in turn are than A's time for as many."""
    total = 0.0
    for layer in find_layers(model):
        layout = find_layers(model, layer.name)
        individual = random_mask(layout)

        def prepare_and_fill(layout: Layout = layout, individual: Individual = individual) -> None:
            int(evaluator_of(model, layout, split).sums(individual)[0])

        first = clock.once(prepare_and_fill)[clock.device.type == "cpu"]
        ours = evaluator_of(model, layout, split)
        each = clock.medians(lambda ours=ours, individual=individual: int(ours.sums(individual)[0]))[0]
        total += first + (EVALUATIONS - 1) * each
    return usual * EVALUATIONS * len(find_layers(model)) / total


class Random:
    """Objectives at random."""

    def __init__(self, rng: np.random.Generator):
        self.rng = rng

    def __call__(self, individual: Individual) -> tuple[float, float]:
        return self.rng.random(), self.rng.random()

    def simplify(self, individual: Individual) -> None:
        """Leave it."""


def overhead_of_a_generation(layout: Layout, population: int, generations: int = 3) -> tuple[float, float]:
    """Return CPU seconds a generation of everything but evaluation, and bits a gene and individual."""
    rng = np.random.default_rng(0)
    config = Config(population=population, generations=generations)
    first = [from_masks((np.ones(layer.genes, bool) for layer in layout), "dense")]
    first += [Individual([rng.integers(256, size=(layer.genes + 7) // 8, dtype=np.uint8) for layer in layout])
              for _ in range(population - 1)]
    toolbox = default_toolbox(Random(rng), layout, config)
    state = begin(first, toolbox, config)
    times = []
    states = evolve(state, toolbox, config)
    for _ in range(generations):
        started = time.process_time()
        next(states)
        times.append(time.process_time() - started)
    bits = 8 * sum(b.nbytes for individual in first for b in individual) / population / sum(layer.genes for layer in layout)
    return float(np.median(times)), bits


def one_child(layout: Layout, repeats: int = 30) -> float:
    """Return the median CPU seconds of clone, mate, mutate and hash for one child."""
    rng = np.random.default_rng(0)
    parents = [random_mask(layout, d) for d in (0.3, 0.1)]
    times = []
    for _ in range(repeats):
        started = time.process_time()
        a, b = (parent.clone() for parent in parents)
        mate(a, b, rng)
        for child in (a, b):
            mutate(child, rng, layout)
            child.key()
        times.append((time.process_time() - started) / 2)
    return float(np.median(times))


def selection(n: int, repeats: int = 7) -> float:
    """Return the median CPU seconds of choosing n / 2 of n."""
    rng = np.random.default_rng(0)
    group = []
    for i, (accuracy, sparsity) in enumerate(rng.random((n, 2)).tolist()):
        group.append(Individual([np.frombuffer(i.to_bytes(4, "big"), np.uint8)]))
        group[-1].fitness.values = accuracy, sparsity
    times = []
    for _ in range(repeats):
        started = time.process_time()
        nsga2(group, n // 2)
        times.append(time.process_time() - started)
    return float(np.median(times))


def rows_of_evaluation(clock: Clock) -> list[tuple[str, float, str]]:
    """Return (measure, number, unit) of everything that runs a model."""
    device = clock.device
    lenet = LeNet5().to(device)
    digits = images(5000, 1, 28, 10, device)
    times = whole_model(clock, lenet, digits, (32,), bf16=False)
    rows = [("LeNet-5, 5,000 images, fp32, against A (batch 32)", times["A32"] / times["ours"], "x"),
            ("LeNet-5, 5,000 images, fp32, against A over tensors (batch 32)", times["tensors"] / times["ours"], "x"),
            ("LeNet-5, images a second", 5000 / times["ours"], "1/s"),
            ("LeNet-5, masked / dense forward", 100 * times["dense"] / times["ours"], "%"),
            (f"LeNet-5, five layers one at a time, {EVALUATIONS} masks each, against A (batch 32)",
             layer_by_layer(clock, lenet, digits, times["A32"]), "x")]
    torch.manual_seed(0)
    resnet = resnet18().to(device)
    photos = images(256 if device.type == "cpu" else 8192, 3, 32, 10, device)
    times = whole_model(clock, resnet, photos, (128, 32), bf16=True)
    rows += [("ResNet-18, fp32, against A (batch 128)", times["A128"] / times["ours"], "x"),
             ("ResNet-18, fp32, against A (batch 32)", times["A32"] / times["ours"], "x"),
             ("ResNet-18, fp32, against A over tensors (batch 32)", times["tensors"] / times["ours"], "x"),
             ("ResNet-18, bf16, against A (batch 128)", times["A128"] / times["bf16"], "x"),
             ("ResNet-18, images a second, fp32", len(photos) / times["ours"], "1/s"),
             ("ResNet-18, images a second, bf16", len(photos) / times["bf16"], "1/s"),
             ("ResNet-18, masked / dense forward", 100 * times["dense"] / times["ours"], "%"),
             (f"ResNet-18, 21 layers one at a time, {EVALUATIONS} masks each, against A (batch 128)",
              layer_by_layer(clock, resnet, photos, times["A128"]), "x")]
    from torchvision.models import mobilenet_v3_small

    mobile = mobilenet_v3_small(num_classes=10).to(device)
    times_mobile = whole_model(clock, mobile, images(512, 3, 64, 10, device), (32,), bf16=False)
    rows.append(("mobilenet_v3_small at 64x64, 512 images, against A (batch 32)",
                 times_mobile["A32"] / times_mobile["ours"], "x"))
    layout = find_layers(resnet)
    spent, bits = overhead_of_a_generation(layout, 100)
    share = 100 * spent / (spent + 100 * times["ours"])
    rows += [(f"everything but evaluation, a generation of 100, 11 M genes ({len(photos)} images each)", share, "%"),
             ("memory of a population, bits a gene and individual", bits, "bits")]
    return rows


def main() -> None:
    """Measure, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", default="results/bench_evaluation")
    given = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device(given.device)
    rows = rows_of_evaluation(Clock(device, given.repeats))
    layout = find_layers(resnet18())
    rows += [("one child of 11 M genes: clone, mate, mutate, hash", 1e3 * one_child(layout), "ms"),
             ("NSGA-II, 1,000 of 2,000", 1e3 * selection(2000), "ms"),
             ("NSGA-II, 10,000 of 20,000", 1e3 * selection(20_000), "ms")]
    facts = f"{device_name(device)}, 1 thread, " + ", ".join(f"{k} {v}" for k, v in versions().items())
    text = "\n".join([*(f"{number:14,.2f} {unit:4}  {measure}" for measure, number, unit in rows), facts]) + "\n"
    print(text)
    out = Path(given.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{device.type}.txt").write_text(text)
    with open(out / f"{device.type}.csv", "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows([("measure", "number", "unit"), *rows])


if __name__ == "__main__":
    main()
