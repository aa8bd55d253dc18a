"""Several inputs, in tuples and dicts, of arrays, Datasets and DataLoaders: through every way that a run evaluates and trains."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, SubsetRandomSampler, TensorDataset, WeightedRandomSampler

import evoprune
from evoprune import EvopruneError
from evoprune.inputs.nested import applied, described, examples, joined, leaves, mapped, taken
from evoprune.inputs.splits import as_split


class Two(nn.Module):
    """Tokens with a mask of what counts, and a table beside them; of both kinds of arguments."""

    def __init__(self):
        super().__init__()
        self.embed, self.tokens, self.table, self.head = nn.Embedding(9, 8), nn.Linear(8, 12), nn.Linear(3, 12), nn.Linear(12, 4)

    def forward(self, ids, mask=None, table=None):
        x = self.tokens(self.embed(ids)).relu()
        x = (x * mask[:, :, None]).sum(1)
        return self.head(x + self.table(table))


@pytest.fixture(scope="module")
def arrays():
    rng = np.random.default_rng(0)
    ids, table = rng.integers(0, 9, (120, 5)), rng.standard_normal((120, 3))
    inputs = {"ids": ids, "mask": (rng.random((120, 5)) < 0.8).astype(np.float32), "table": table}
    return inputs, (ids.sum(1) + (table[:, 0] > 0)) % 4


class Items(Dataset):
    def __init__(self, arrays, make):
        self.arrays, self.labels, self.make = *arrays, make

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        return self.make({name: value[i] for name, value in self.arrays.items()}, int(self.labels[i]))


def as_dict(inputs, label):
    return {**inputs, "labels": label}


def forms(arrays):
    inputs, labels = arrays
    return {"dict": (inputs, labels), "tuple": (tuple(inputs.values()), labels),
            "items": Items(arrays, lambda inputs, label: (inputs, label)), "dict items": Items(arrays, as_dict),
            "label": Items(arrays, lambda inputs, label: {"label": torch.tensor(label), **inputs}),
            "tuple items": Items(arrays, lambda inputs, label: (tuple(inputs.values()), label)),
            "loader": DataLoader(Items(arrays, as_dict), batch_size=7, shuffle=True)}


def test_every_form_is_the_same_split(arrays):
    splits = {name: as_split(form, name) for name, form in forms(arrays).items()}
    splits["inputs"] = as_split(Items(arrays, lambda inputs, label: (*inputs.values(), label)), "inputs", inputs=3)
    first = splits["dict"]
    for name, split in splits.items():
        assert torch.equal(split.labels, first.labels), name
        assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(leaves(split.images), leaves(first.images))), name
        assert isinstance(split.images, tuple if name in ("tuple", "tuple items", "inputs") else dict), name


SETTINGS = {"population": 8, "generations": 2, "threads": 1}


@pytest.mark.parametrize("options", [{}, {"repair": "least-squares"}, {"finetune_epochs": 1, "front": 3},
                                     {"total_epochs": 20, "targets": "0.5,0.8"},
                                     {"layerwise": True, "population": 4}, {"start": "fisher"}], ids=str)
def test_a_tuple_and_a_dict_give_the_front_of_the_same_net_with_one_input(options, arrays, tmp_path):
    """One float tensor holds all: the obvious way to hand several inputs to what takes one."""
    class One(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, x):
            return self.net(x[:, :5].long(), x[:, 5:10], x[:, 10:])

    torch.manual_seed(0)
    net, (inputs, labels) = Two(), arrays
    whole = np.concatenate([inputs["ids"], inputs["mask"], inputs["table"]], 1).astype(np.float32)
    fronts = []
    for name, model, images in (("one", One(net), whole), ("tuple", net, tuple(inputs.values())), ("dict", net, inputs)):
        split = as_split((images, labels), name)
        parts = [replace(split, images=taken(split.images, index), labels=split.labels[index])
                 for index in (slice(0, 60), slice(60, 90), slice(90, 120))]
        fronts.append(evoprune.prune(model, evoprune.Data(*parts), out=tmp_path / name, **{**SETTINGS, **options}))
    texts = [(front.path / "front.csv").read_text() for front in fronts]
    assert texts[0] == texts[1] == texts[2]
    point = fronts[2].points[-1]
    held = (taken(as_split((inputs, labels), "x").images, slice(90, 120)), labels[90:])
    assert evoprune.accuracy(point.model(), held) == point.test_accuracy


def test_workers_and_resumes_give_the_same_bytes(arrays, tmp_path):
    inputs, labels = arrays
    torch.manual_seed(0)
    model = Two()
    kept = []
    for name, options in (("a", {}), ("b", {"engine": "processes", "workers": 1})):
        evoprune.prune(model, (inputs, labels), out=tmp_path / name, **SETTINGS, **options)
        kept.append((tmp_path / name / "front.csv").read_bytes())
    evoprune.prune(model, (inputs, labels), out=tmp_path / "c", **SETTINGS, max_seconds=0.0)
    with pytest.raises(EvopruneError, match="holds another model|belongs to another run|other"):
        evoprune.prune(model, ({**inputs, "mask": 1 - inputs["mask"]}, labels), resume=tmp_path / "c")
    evoprune.prune(model, (inputs, labels), resume=tmp_path / "c")
    assert kept[0] == kept[1] == (tmp_path / "c" / "front.csv").read_bytes()


def padded(items):
    """A collate function of sequences of several lengths."""
    longest = max(len(ids) for ids, _ in items)
    ids = torch.stack([nn.functional.pad(ids, (0, longest - len(ids))) for ids, _ in items])
    return {"ids": ids, "mask": (ids > 0).float(), "labels": torch.tensor([label for _, label in items])}


def test_sequences_of_several_lengths_come_through_a_loader():
    items = [(torch.arange(1, 2 + i % 5), i % 3) for i in range(20)]
    split = as_split(DataLoader(items, batch_size=2, collate_fn=padded), "x")
    assert split.images["ids"].shape == (20, 5) and torch.equal(split.images["mask"], (split.images["ids"] > 0).float())
    assert split.images["ids"][3].tolist() == [1, 2, 3, 4, 0]
    with pytest.raises(EvopruneError, match=r"item 1 of the dataset has shape \(2,\), the first \(1,\); .* DataLoader whose"):
        as_split(items, "x")


def test_a_loader_that_reads_some_items_gives_these():
    items = TensorDataset(torch.arange(20.0)[:, None], torch.arange(20) % 3)
    some = DataLoader(items, batch_size=4, sampler=SubsetRandomSampler([7, 3, 12, 19, 0]))
    assert as_split(some, "x").images.flatten().tolist() == [0, 3, 7, 12, 19]
    assert len(as_split(DataLoader(items, shuffle=True), "x")) == 20
    for options in ({"sampler": WeightedRandomSampler([1] * 20, 5)}, {"batch_sampler": [[0, 1]]}):
        with pytest.raises(EvopruneError, match="x: found a DataLoader with a .*, which is not followed; hand in one without"):
            as_split(DataLoader(items, **options), "x")


def test_items_that_are_batches_are_read_as_such():
    batches = [(torch.full((4, 2), float(i)), torch.arange(4) % 3) for i in range(3)]
    split = as_split(DataLoader(batches, batch_size=None), "x")
    assert split.images[:, 0].tolist() == [0.0] * 4 + [1.0] * 4 + [2.0] * 4 and split.labels.tolist() == [0, 1, 2, 0] * 3


def test_examples_of_whole_numbers_below_zero_can_be_made():
    assert examples(described(torch.tensor([[-3], [-1]])), 5).shape == (5, 1)


class Stream(IterableDataset):
    def __iter__(self):
        return iter([(torch.zeros(1), 0)])


def test_a_loader_of_a_stream_says_what_to_hand_in():
    with pytest.raises(EvopruneError, match=r"x: found a DataLoader of an IterableDataset, expected .*; list\(dataset\) is one"):
        as_split(DataLoader(Stream()), "x")
    assert len(as_split(list(Stream()), "x")) == 1


def test_images_in_bytes_are_normalised_beside_other_inputs():
    images, flags = torch.full((4, 8, 8), 255, dtype=torch.uint8), torch.ones(4, 2, dtype=torch.uint8)
    split = as_split(((images, flags), torch.zeros(4).long()), "x", mean=(0.5,), std=(0.5,))
    batch = split.inputs(slice(0, 2))
    assert split.scaled and not as_split(((images / 255, flags), torch.zeros(4).long()), "x").scaled
    assert torch.equal(batch[0], torch.ones(2, 1, 8, 8)) and torch.equal(batch[1], flags[:2])


@pytest.mark.parametrize(("source", "said"), [
    (lambda a: ({**a[0], "ids": a[0]["ids"][:9]}, a[1]), r"x: found labels of shape \(120,\) for 9 images"),
    (lambda a: ({**a[0], "mask": a[0]["mask"][:9]}, a[1]), r"x: found an input of shape \(9, 5\) for 120 labels, expected \(120"),
    (lambda a: ({}, a[1]), "x: no inputs"),
    (lambda a: Items(a, lambda inputs, label: inputs), "x: item 0 of the dataset has ids, mask, table, expected labels"),
    (lambda a: Items(a, lambda inputs, label: {"text": "a", "labels": 1}), "text is str, expected numbers; leave such"),
    (lambda a: Items(a, lambda inputs, label: (*inputs.values(), label)),
     r"is tuple of 4, expected \(image, label\), or Data\(..., inputs=N\) for several inputs"),
    (lambda a: DataLoader(Items(a, lambda inputs, label: inputs)), "what the DataLoader collates has ids, mask, table"),
])
def test_what_does_not_go_together_is_one_line(source, said, arrays):
    with pytest.raises(EvopruneError, match=said):
        as_split(source(arrays), "x")


def test_nested_helpers_keep_the_structure():
    inputs = {"a": torch.arange(6).view(3, 2), "b": (torch.ones(3), {"c": torch.zeros(3, 1)})}
    assert mapped(len, inputs) == {"a": 3, "b": (3, {"c": 3})}
    assert applied(lambda a, b: (a.shape, b[0].shape), taken(inputs, slice(0, 2))) == ((2, 2), (2,))
    twice = joined([inputs, inputs])
    assert [len(leaf) for leaf in leaves(twice)] == [6, 6, 6] and twice["b"][1].keys() == {"c"}


def test_a_dict_is_handed_over_by_name_and_shorter_examples_are_filled():
    def model(image, table):
        return image - table

    assert torch.equal(applied(model, {"table": torch.ones(2), "image": torch.full((2,), 5.0)}), torch.full((2,), 4.0))
    whole = joined([torch.zeros(2, 3, dtype=torch.long), torch.zeros(1, 1, dtype=torch.long)], -100)
    assert whole.tolist() == [[0, 0, 0], [0, 0, 0], [0, -100, -100]]
