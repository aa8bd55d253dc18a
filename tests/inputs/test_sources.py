from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from torch import nn

from evoprune.config import Config
from evoprune.errors import EvopruneError
from evoprune.inputs.images import handed
from evoprune.inputs.models import LeNet
from evoprune.inputs.named import build_model, load_model, read_weights
from evoprune.inputs.sources import load_data, read_digits
from evoprune.inputs.splits import Data


def folders(root, sizes=((8, 8), (8, 8)), classes=("cat", "dog")):
    """An ImageFolder of 12 training and 6 test images a class."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 12), ("test", 6)):
        for k, name in enumerate(classes):
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 255, (*sizes[i % 2], 3), dtype=np.uint8)
                pixels[0, 0] = k * 255
                Image.fromarray(pixels).save(root / part / name / f"{i:02d}.png")
    return f"folder:{root}"


def arrays(path, **changes):
    rng = np.random.default_rng(0)
    made = {"x_train": rng.integers(0, 255, (40, 8, 8), dtype=np.uint8), "y_train": np.arange(40) % 4,
            "x_test": rng.integers(0, 255, (20, 8, 8), dtype=np.uint8), "y_test": np.arange(20) % 4, **changes}
    np.savez(path, **{k: v for k, v in made.items() if v is not None})
    return f"npz:{path}"


def test_digits_are_those_of_scikit_learn():
    theirs, ours = load_digits(), read_digits("").train
    assert np.array_equal(ours.labels, theirs.target)
    assert np.array_equal(ours.read(np.arange(1797), None)[:, 0].numpy(), (theirs.images * (255 / 16)).round())


def test_digits_are_cut_into_three_that_share_no_image():
    data = load_data(Config(), most=None)
    assert data.sizes() == {"train": 1151, "search": 287, "test": 359} and data.classes == 10
    seen = [{x.numpy().tobytes() for x in split.images} for split in (data.train, data.search, data.test)]
    assert not (seen[0] & seen[1] or seen[0] & seen[2] or seen[1] & seen[2])
    pixels = data.train.images.float() / 255
    assert abs(pixels.mean() - data.search.mean[0]) < 0.002 and abs(pixels.std() - data.search.std[0]) < 0.002


def test_the_split_goes_by_split_seed_alone_and_train_is_read_only_for_training():
    a, b, c = (load_data(Config(**k), most=0) for k in ({}, {"seed": 1}, {"split_seed": 1}))
    assert torch.equal(a.search.images, b.search.images) and not torch.equal(a.search.images, c.search.images)
    assert a.train is None


def test_subsets_are_seeded_and_as_large_as_asked():
    config = Config(search_images=50, train_images=60, test_images=70)
    a, b = load_data(config, most=None), load_data(config, most=None)
    assert a.sizes() == {"train": 60, "search": 50, "test": 70}
    assert torch.equal(a.train.images, b.train.images)


def test_pictures_of_16_bits_keep_what_they_show_and_of_32_are_refused(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 65536, (8, 8), dtype=np.uint16)
    for name in ("train/a/1.png", "train/b/1.tif", "test/a/1.png", "test/b/1.tif"):
        (tmp_path / name).parent.mkdir(parents=True)
        Image.fromarray(pixels).save(tmp_path / name)
    data = load_data(Config(model="resnet18", data=f"folder:{tmp_path}", search_images=1, train_epochs=1), None)
    for split in (data.train, data.search, data.test):
        assert torch.equal(split.images, torch.from_numpy((pixels >> 8).astype(np.uint8)).expand(len(split), 3, 8, 8))
    for kind in (np.int32, np.float32):
        Image.fromarray(pixels.astype(kind)).save(tmp_path / "test/b/1.tif")
        with pytest.raises(EvopruneError) as error:
            load_data(Config(model="resnet18", data=f"folder:{tmp_path}", search_images=1, train_epochs=1), None)
        assert str(error.value) == f"data: {tmp_path}/test/b/1.tif: found pixels of 32 bits, expected 8 or 16 a channel"


def test_folders_are_read_as_torchvision_does(tmp_path):
    data = load_data(Config(data=folders(tmp_path), mean="0.5", std="0.25", search_images=5), most=None)
    assert data.sizes() == {"train": 19, "search": 5, "test": 12} and data.classes == 2
    assert data.train.images.shape == (19, 3, 8, 8) and data.train.images.dtype == torch.uint8
    assert torch.equal(data.train.images[:, 0, 0, 0] // 255, data.train.labels.to(torch.uint8))
    assert data.search.mean == (0.5,)


def test_images_of_any_size_are_resized_and_cropped(tmp_path):
    spec = folders(tmp_path, ((20, 30), (40, 25)))
    with pytest.raises(EvopruneError, match=r"is (30x20|25x40), .* is (30x20|25x40); make them equal with --image-size"):
        load_data(Config(data=spec), most=None)
    assert load_data(Config(data=spec, image_size=16), most=None).search.images.shape[1:] == (3, 16, 16)


def test_a_torchvision_model_brings_its_own_transforms(tmp_path):
    data = load_data(Config(data=folders(tmp_path, ((300, 280), (260, 400))), model="torchvision:resnet18"), most=0)
    assert data.search.images.shape[1:] == (3, 224, 224) and data.search.mean == (0.485, 0.456, 0.406)
    config = Config(data=f"folder:{tmp_path}", model="torchvision:resnet18", image_size=32, mean="0", std="1")
    assert load_data(config, most=0).search.images.shape[1:] == (3, 32, 32)


def test_arrays_are_read_in_every_layout(tmp_path):
    grey = load_data(Config(data=arrays(tmp_path / "a.npz")), most=None)
    assert grey.train.images.shape == (32, 1, 8, 8) and grey.sizes() == {"train": 32, "search": 8, "test": 20}
    last = np.zeros((40, 8, 6, 3), np.uint8), np.zeros((20, 8, 6, 3), np.uint8)
    colour = load_data(Config(data=arrays(tmp_path / "b.npz", x_train=last[0], x_test=last[1])), most=None)
    assert colour.train.images.shape == (32, 3, 8, 6)
    floats = np.ones((40, 5), np.float64), np.ones((20, 5), np.float64)
    table = load_data(Config(data=arrays(tmp_path / "c.npz", x_train=floats[0], x_test=floats[1])), most=None)
    assert table.train.images.dtype == torch.float32 and table.train.images.shape == (32, 5)


def test_arrays_for_a_model_with_a_preset(tmp_path):
    def load(model="torchvision:resnet18", **changes):
        settings = {name: changes.pop(name) for name in ("mean", "std") if name in changes}
        return load_data(Config(model=model, data=arrays(tmp_path / "x.npz", **changes), **settings), None).search

    floats = {name: np.random.default_rng(0).random((40, 3, 8, 8), np.float32) for name in ("x_train", "x_test")}
    labels = {"y_train": np.arange(40) % 4, "y_test": np.arange(40) % 4}
    found = load(**floats, **labels)
    assert found.images.shape[1:] == (3, 8, 8) and found.mean is None  # as they are
    with pytest.raises(EvopruneError, match="found mean and std without uint8 images, which alone are normalised"):
        load(**floats, **labels, mean="0.5", std="0.25")
    with pytest.raises(EvopruneError, match="torchvision:resnet18 has those of 3 channels, found images with 1; give --mean and"):
        load()
    rgba = {name: np.zeros((40, 8, 8, 4), np.uint8) for name in ("x_train", "x_test")}
    assert load("lenet", **rgba, **labels).images.shape[1:] == (4, 8, 8)


def test_images_handed_in_are_normalised_as_the_named_model_wants_it():
    images, labels = torch.zeros(6, 3, 8, 8, dtype=torch.uint8), torch.arange(6) % 2
    config = Config(model="torchvision:resnet18")
    assert handed(config, (images, labels)).search.mean == pytest.approx((0.485, 0.456, 0.406))
    assert handed(replace(config, mean="0.5", std="0.1"), (images, labels)).test.mean == (0.5,)
    assert handed(config, (images.float(), labels)).search.mean is None and handed(Config(), (images, labels)).search.mean is None
    own = Data(None, (images, labels), None)
    assert handed(config, own) is own


def test_functions_bring_models_and_data(tmp_path, monkeypatch):
    (tmp_path / "mine_for_test.py").write_text(
        "import torch\nfrom torch import nn\n"
        "def net():\n    return nn.Linear(4, 3)\n"
        "def data():\n    return torch.randn(20, 4), torch.arange(20) % 3\n"
        "def other():\n    return 5\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for spec in ("mine_for_test:", "mine_for_test.py:", f"{tmp_path}/mine_for_test.py:"):
        assert isinstance(load_model(Config(model=spec + "net"), 3, 1), nn.Linear)
        assert load_data(Config(data=spec + "data", search_images=4), 0).sizes() == {"train": 0, "search": 4, "test": 10}
    with pytest.raises(EvopruneError, match=r"model: mine_for_test\.py has no function 'nett'; there are net, data, other"):
        load_model(Config(model="mine_for_test.py:nett"), 3, 1)
    with pytest.raises(EvopruneError, match=r"mine_for_test:other returned int, expected a torch\.nn\.Module"):
        load_model(Config(model="mine_for_test:other"), 3, 1)
    with pytest.raises(EvopruneError, match="data: found int, expected"):
        load_data(Config(data="mine_for_test:other"), 0)


def test_torchvision_models_are_built_with_the_outputs_of_the_data():
    assert build_model("torchvision:squeezenet1_1", 7, 3)(torch.zeros(1, 3, 64, 64)).shape == (1, 7)


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"state_dict": s, "epoch": 3}, lambda s: {"model": s},
                                  lambda s: {f"module.{k}": v for k, v in s.items()}])
def test_weights_are_found_in_what_people_save(wrap, tmp_path):
    state = LeNet().state_dict()
    torch.save(wrap(state), tmp_path / "w.pth")
    model = load_model(Config(weights=str(tmp_path / "w.pth")), 10, 1)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_safetensors_are_read(tmp_path):
    state = LeNet().state_dict()
    save_file(state, tmp_path / "w.safetensors")
    assert torch.equal(read_weights(str(tmp_path / "w.safetensors"))["fc1.weight"], state["fc1.weight"])


def test_a_pickled_model_is_refused_and_never_run(tmp_path):
    torch.save(LeNet(), tmp_path / "whole.pt")
    with pytest.raises(EvopruneError, match=r"whole\.pt: .*expected a plain state dict"):
        read_weights(str(tmp_path / "whole.pt"))


@pytest.mark.parametrize(("change", "said"), [
    (lambda s: {**s, "fc2.weight": torch.zeros(3, 64)}, "fc2.weight is (3, 64) in the file, (10, 64) in the model"),
    (lambda s: {k: v for k, v in s.items() if k != "conv1.bias"}, "conv1.bias is missing"),
    (lambda s: {**s, "extra": torch.zeros(1), "more": torch.zeros(1)}, "the model has no extra (and 1 more)"),
])
def test_weights_that_do_not_fit_say_where(change, said, tmp_path):
    path = str(tmp_path / "w.pt")
    torch.save(change(LeNet().state_dict()), path)
    with pytest.raises(EvopruneError) as error:
        load_model(Config(weights=path), 10, 1)
    assert str(error.value) == f"weights: {path}: {said}; expected the state dict of this model"


def test_wrong_data_says_what_was_expected(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "junk.npz").write_bytes(b"junk")
    np.savez(tmp_path / "pickled.npz", x_train=np.array([{}], object))
    folders(tmp_path / "good")
    folders(tmp_path / "odd")
    (tmp_path / "odd" / "test" / "bird").mkdir()
    (tmp_path / "odd" / "test" / "bird" / "x.png").write_bytes(b"x")
    (tmp_path / "empty" / "train").mkdir(parents=True)
    (tmp_path / "hollow" / "train" / "cat").mkdir(parents=True)
    (tmp_path / "good" / "train" / "cat" / "00.png").write_bytes(b"not an image")
    for settings, said in [
        ({"data": "imagenet"}, "data: found 'imagenet', expected one of digits, mnist, cifar10, folder:DIR"),
        ({"data": "mnist", "data_dir": "nowhere"}, "data_dir: no MNIST in 'nowhere' (expected nowhere/MNIST/raw/"),
        ({"data": "cifar10", "data_dir": "nowhere"}, "data_dir: no CIFAR10 in 'nowhere'"),
        ({"data": "folder:nowhere"}, "data: nowhere/train: "),
        ({"data": "folder:empty"}, "data: empty/train: "),
        ({"data": "folder:hollow"}, "data: hollow/train: Found no valid file for the classes cat"),
        ({"data": "folder:odd"}, "data: odd: class 'bird' is in only one of train and test"),
        ({"data": "folder:good"}, "data: good/train/cat/00.png: cannot identify image file"),
        ({"data": "npz:nowhere.npz"}, "data: nowhere.npz: "),
        ({"data": "npz:junk.npz"}, "data: junk.npz: "),
        ({"data": "npz:pickled.npz"}, "data: pickled.npz: no y_train, expected x_train, y_train, x_test, y_test; found x_train"),
        ({"data": arrays("short.npz", y_test=np.arange(3))}, "data: short.npz: x_test: found labels of shape (3,) for 20"),
        ({"data": arrays("none.npz", x_train=np.zeros((0, 8, 8), np.uint8), y_train=np.zeros(0, int))},
         "data: none.npz: x_train: no images"),
        ({"data": arrays("obj.npz", x_train=np.array([None] * 40, object))}, "data: obj.npz: Object arrays cannot be loaded"),
        ({"search_images": 5000}, "search_images: found 5000, expected at most the 1438 images there are"),
        ({"mean": "0.5"}, "mean, std: found only one of the two, expected both or none"),
        ({"mean": "a,b", "std": "1"}, "mean: found 'a,b', expected numbers with commas between"),
        ({"data": "no_such_package:data"}, "data: found no module no_such_package, neither in this folder nor installed"),
        ({"data": "nowhere.py:data"}, "data: nowhere.py: no such file, expected FILE.py:function"),
    ]:
        with pytest.raises(EvopruneError) as error:
            load_data(Config(**settings), most=None)
        assert str(error.value).startswith(said) and "\n" not in str(error.value)


def test_wrong_models_say_what_exists():
    for settings, said in [
        ({"model": "lenet6", "train_epochs": 1}, "model: found 'lenet6', expected lenet, lenet5, resnet18, torchvision:NAME"),
        ({"model": "torchvision:resnet19", "train_epochs": 1}, "model: torchvision has no classifier 'resnet19'; there are "),
        ({"model": "resnet18"}, "weights: the built-in resnet18 has none of its own; give --weights FILE, or train it first"),
        ({"model": "lenet", "weights": "nowhere.pt"}, "weights: nowhere.pt: no such file"),
    ]:
        with pytest.raises(EvopruneError) as error:
            load_model(Config(**settings), 10, 1)
        assert str(error.value).startswith(said)
