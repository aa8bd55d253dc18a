"""Training, search and test images are apart, and masks are repaired on training images."""

import numpy as np
import pytest
from test_sources import arrays

from evoprune.config import Config
from evoprune.inputs.sources import load_data
from evoprune.run.prepare import get_data
from evoprune.run.run import calibration_images
from evoprune.values.repair import LAST_IMAGES


@pytest.fixture
def numbered(tmp_path):
    """600 training and 50 test images, each of a value of its own."""
    images = np.arange(650, dtype=np.float32)[:, None, None, None].repeat(4, 2).repeat(4, 3)
    labels = np.arange(650) % 3
    return arrays(tmp_path / "a.npz", x_train=images[:600], y_train=labels[:600], x_test=images[600:], y_test=labels[600:])


def values(split):
    return set(split.images[:, 0, 0, 0].tolist())


@pytest.mark.parametrize("settings", [{"repair": "bn"}, {"repair": "least-squares"}, {"total_epochs": 3.0}, {"train_epochs": 2},
                                      {"finetune_epochs": 2, "split_seed": 3}, {"start": "fisher", "train_images": 50}, {}])
def test_the_three_splits_are_apart_and_repair_looks_at_training_images(settings, numbered):
    config = Config(data=numbered, **settings)
    data = get_data(config, numbered)
    train, search, test = map(values, (data.train, data.search, data.test))
    assert not train & search and test == set(range(600, 650)) and train | search <= set(range(600)) and len(search) == 120
    found = calibration_images(Config(**{**config.settings(), "repair": config.repair or "bn"}), data, 256, LAST_IMAGES)
    assert values(found) <= train and len(found) == min(len(train), LAST_IMAGES)


def test_of_the_training_images_only_what_calibration_takes_is_read(numbered, monkeypatch):
    monkeypatch.setattr("evoprune.run.prepare.LAST_IMAGES", 100)
    for settings, images in (({}, 100), ({"repair": "bn"}, 100), ({"repair": "none"}, 0), ({"layerwise": True}, 0),
                             ({"repair": "least-squares"}, 480), ({"total_epochs": 1.0}, 480)):
        assert get_data(Config(data=numbered, **settings), numbered).sizes()["train"] == images
    fewer, all_of_them = (load_data(Config(data=numbered), most=most) for most in (100, None))
    assert values(fewer.train) <= values(all_of_them.train) and values(fewer.search) == values(all_of_them.search)
