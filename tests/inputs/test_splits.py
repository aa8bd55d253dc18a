import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset
from torchvision.transforms import functional as F

import evoprune
from evoprune.errors import EvopruneError
from evoprune.inputs.splits import Data, Split, as_split, halved

IMAGES = torch.arange(6 * 3 * 4 * 4, dtype=torch.int64).view(6, 3, 4, 4).to(torch.uint8)
LABELS = torch.tensor([0, 1, 2, 0, 1, 2])


def test_images_are_normalised_exactly_as_torchvision_does():
    split = as_split((IMAGES, LABELS), "x", (0.4, 0.5, 0.6), (0.2, 0.3, 0.4))
    expected = F.normalize(IMAGES.float() / 255, [0.4, 0.5, 0.6], [0.2, 0.3, 0.4])
    assert torch.equal(split.inputs(slice(None)), expected)
    assert split.images.dtype == torch.uint8


def test_float_images_are_left_as_they_are():
    images = torch.randn(6, 5)
    assert torch.equal(as_split((images, LABELS), "x").inputs(slice(2, 4)), images[2:4])
    with pytest.raises(EvopruneError, match="x: found mean and std without uint8 images, which alone are normalised; leave them"):
        as_split((images, LABELS), "x", (9.0,), (9.0,))


def test_a_dataset_and_its_arrays_make_the_same_split():
    a, b = as_split(TensorDataset(IMAGES, LABELS), "x"), as_split((IMAGES.numpy(), LABELS.numpy()), "x")
    assert torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels)


def test_a_pair_is_cut_into_halves_by_the_split_seed():
    images = torch.arange(101, dtype=torch.float32)[:, None]
    labels = torch.arange(101) % 3
    data = halved(as_split((images, labels), "x"), 0)
    assert data.sizes() == {"train": 0, "search": 51, "test": 50}
    both = torch.cat([data.search.images, data.test.images])
    assert sorted(both.flatten().tolist()) == list(range(101))
    assert torch.equal(data.search.labels, data.search.images.flatten().long() % 3)
    assert not torch.equal(halved(as_split((images, labels), "x"), 1).search.images, data.search.images)


def test_classes_are_counted_over_all_splits():
    assert Data(None, (IMAGES[:2], LABELS[:2]), (IMAGES, LABELS)).classes == 3


@pytest.mark.parametrize(("images", "labels", "said"), [
    (IMAGES, LABELS[:5], "x: found labels of shape (5,) for 6 images, expected (6,), or (6, ...) of several targets each"),
    (IMAGES, LABELS / 0, "x: found targets that are NaN or infinite, expected whole numbers or finite ones"),
    (IMAGES, LABELS * 1j, "x: found targets that are complex, expected whole numbers or finite ones"),
    (IMAGES[:0], LABELS[:0], "x: no images"),
    (torch.full((6, 2), float("nan")), LABELS, "x: images hold NaN or infinity"),
])
def test_images_and_labels_that_do_not_go_together_are_refused(images, labels, said):
    with pytest.raises(EvopruneError) as error:
        as_split((images, labels), "x")
    assert str(error.value) == said


def test_wrong_constants_are_refused():
    with pytest.raises(EvopruneError, match="found 2 means and 2 stds, expected 1 or 3, a number a channel"):
        as_split((IMAGES, LABELS), "x", (0.1, 0.2), (0.1, 0.2))
    with pytest.raises(EvopruneError, match=r"found mean \(0\.1,\) and std \(0\.0,\), expected finite numbers, std above 0"):
        as_split((IMAGES, LABELS), "x", (0.1,), (0.0,))


def test_items_of_different_shape_are_refused():
    dataset = [(np.zeros((1, 2, 2), np.uint8), 0), (np.zeros((1, 3, 2), np.uint8), 1), (np.zeros((1, 2, 2), np.uint8), 1)]
    with pytest.raises(EvopruneError, match=r"item 1 of the dataset has shape \(1, 3, 2\), the first \(1, 2, 2\)"):
        as_split(dataset, "x")


def test_a_split_is_kept_as_it_is():
    split = Split(IMAGES, LABELS)
    assert as_split(split, "x") is split


def test_more_classes_than_outputs_are_refused(tmp_path):
    images, labels = torch.randn(30, 5), torch.arange(30) % 3
    data = evoprune.Data(None, (images, labels), (images, labels), classes=4)
    with pytest.raises(EvopruneError, match=r"^data: found 4 classes, expected at most 3, as many as the model has outputs$"):
        evoprune.prune(nn.Linear(5, 3), data, out=tmp_path / "run")


def test_only_the_search_split_has_to_be_named(digits):
    alone = evoprune.Data(search=digits.search)
    assert alone.search is digits.search and alone.train is None is alone.test
    with pytest.raises(EvopruneError, match="data: no search split; Data\\(train, search, test\\) needs at least search"):
        evoprune.Data(train=digits.train)
