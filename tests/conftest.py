"""What many tests need: a small trained model, its data, and a run of it."""

from __future__ import annotations

import hashlib
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import evoprune
from evoprune.config import Config
from evoprune.evolution.starts import Known
from evoprune.inputs.models import LeNet
from evoprune.inputs.sources import load_data
from evoprune.masks.genome import Individual
from evoprune.masks.layers import find_layers
from evoprune.masks.saliency import gene_scores
from evoprune.masks.tensors import masks
from evoprune.values.training import recipe_for, tune
from evoprune.views import pictures

ROOT = Path(__file__).parent.parent
signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background it is ignored, by what tests start too
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"
DRAWN = {name: getattr(pictures, name) for name in ("front_figure", "layers_figure", "progress_figure", "png", "report")}


def knowing(weights, layout):
    """What rules may look at, of plain weights: gradients of 1, and no repair."""
    weights = [torch.as_tensor(w).detach().float() for w in weights]

    def repaired(individual):
        return [w * mask for w, mask in zip(weights, masks(individual, layout))]

    return Known(layout, lambda: weights, lambda: [torch.ones_like(w) for w in weights], repaired,
                 lambda values: gene_scores("lamp", layout, values))


def group_of(values):
    """Individuals with these objectives and masks all different."""
    group = []
    for i, value in enumerate(values):
        group.append(Individual([np.frombuffer(i.to_bytes(4, "big"), np.uint8).copy()]))
        group[-1].fitness.values = tuple(float(v) for v in value)
    return group


def pytest_collection_modifyitems(items):
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def hashes(folder):
    """A hash of each file below a folder, but for locks."""
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "lock"}


class Small(nn.Module):
    """Two layers for 8x8 images, 650 weights."""

    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(64, 8)
        self.fc2 = nn.Linear(8, 10)

    def forward(self, x):
        return self.fc2(self.fc1(x.flatten(1)).relu())


@pytest.fixture(autouse=True, scope="module")
def plain_views(request):
    """Runs of this process have pictures and reports of a few bytes, but where those are looked at: they take a second a run."""
    if request.path.parent.name == "views" or request.path.name in ("test_plots.py", "test_commands.py", "test_main.py",
                                                                            "test_objectives.py"):
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        for name in DRAWN:
            patch.setattr(pictures, name, lambda *given: None)
        patch.setattr(pictures, "png", lambda figure: b"a picture")
        patch.setattr(pictures, "report", lambda *given: "a report")
        yield


@pytest.fixture(scope="session")
def digits():
    return load_data(Config(), most=None)


def trained(make, data, epochs):
    """A model trained for a few epochs."""
    torch.manual_seed(0)
    model = make()
    tune(model, data.train, recipe_for(model, epochs, seed=0))
    return model


@pytest.fixture(scope="session")
def lenet(digits):
    """A LeNet trained on digits for a few epochs; do not change it."""
    return trained(LeNet, digits, 8)


@pytest.fixture(scope="session")
def small(digits):
    """The least model, trained for a few epochs; do not change it."""
    return trained(Small, digits, 3)


@pytest.fixture(scope="session")
def weights_file(lenet, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "lenet.pth"
    torch.save(lenet.state_dict(), path)
    return str(path)


@pytest.fixture(scope="session")
def layout(lenet):
    return find_layers(lenet)


@pytest.fixture(scope="session")
def run_folder(lenet, digits, tmp_path_factory):
    """The folder of a finished small run with training, its pictures drawn; do not change it."""
    out = tmp_path_factory.mktemp("runs") / "tuned"
    with pytest.MonkeyPatch.context() as patch:  # whichever module asks for it first
        for name, function in DRAWN.items():
            patch.setattr(pictures, name, function)
        evoprune.prune(lenet, digits, out=str(out), population=8, generations=3, finetune_epochs=1, front=4, threads=1)
    return out


@pytest.fixture
def rng():
    return np.random.default_rng(0)
