"""Weights as people have them, and models of other libraries."""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from evoprune.config import Config
from evoprune.errors import EvopruneError
from evoprune.inputs.models import LeNet
from evoprune.inputs.named import build_model, load_model
from evoprune.inputs.weights import load_weights, read_weights
from evoprune.inputs.zoo import hugging_face_preset, preset_of, without_auxiliary


def prefixed(prefix):
    return lambda state: {f"{prefix}{name}": value for name, value in state.items()}


def checkpoint(state):
    """What Lightning writes, of plain values."""
    return {"epoch": 3, "global_step": 9, "pytorch-lightning_version": "2.5", "state_dict": prefixed("model.")(state),
            "optimizer_states": [{"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 0.1}]}], "loops": {}}


@pytest.mark.parametrize("suffix", ["pth", "th", "bin", "ckpt"])
@pytest.mark.parametrize("wrap", [checkpoint, prefixed("module."), prefixed("_orig_mod."), prefixed("model._orig_mod.net."),
                                  lambda state: {"model": prefixed("module.")(state), "epoch": 1}])
def test_weights_are_found_under_other_names(wrap, suffix, tmp_path):
    state = LeNet().state_dict()
    torch.save(wrap(state), tmp_path / f"w.{suffix}")
    model = load_model(Config(weights=str(tmp_path / f"w.{suffix}")), 10, 1)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_another_net_beside_it_is_refused_by_name(tmp_path):
    state = LeNet().state_dict()
    with pytest.raises(EvopruneError) as error:
        load_weights(LeNet(), {**prefixed("net.")(state), "loss.weight": torch.ones(3)}, "w.ckpt")
    assert str(error.value) == "weights: w.ckpt: the model has no loss.weight; expected the state dict of this model"


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.norm, self.head = nn.Embedding(5, 3), nn.BatchNorm1d(3), nn.Linear(3, 5)
        self.head.weight = self.embed.weight


def test_tied_tensors_and_counters_need_not_be_there_twice():
    wanted = Tied().state_dict()
    fewer = {name: value for name, value in wanted.items() if name not in ("head.weight", "norm.num_batches_tracked")}
    model = Tied()
    load_weights(model, fewer, "w")
    assert torch.equal(model.head.weight, wanted["embed.weight"]) and model.head.weight is model.embed.weight
    with pytest.raises(EvopruneError, match="head.bias is missing"):
        load_weights(model, {name: value for name, value in fewer.items() if name != "head.bias"}, "w")


def sharded(folder, names=("model-1.safetensors", "model-2.safetensors")):
    state = LeNet().state_dict()
    shards = [dict(list(state.items())[:3]), dict(list(state.items())[3:])]
    for name, shard in zip(("model-1.safetensors", "model-2.safetensors"), shards):
        save_file(shard, folder / name)
    index = {"metadata": {}, "weight_map": {key: name for name, shard in zip(names, shards) for key in shard}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return state, str(folder / "model.safetensors.index.json")


def test_sharded_safetensors_are_read_by_their_index(tmp_path):
    state, index = sharded(tmp_path)
    found = read_weights(index)
    assert found.keys() == state.keys() and all(torch.equal(found[name], state[name]) for name in state)
    with pytest.raises(EvopruneError, match=r"a folder, expected a file: model-1.safetensors, model-2.safetensors, model\.safe"):
        read_weights(str(tmp_path))


@pytest.mark.parametrize(("names", "said"), [
    (("../model-1.safetensors", "model-2.safetensors"), "a file that does not lie beside it; expected the index of"),
    (("model-1.safetensors", "/etc/passwd"), "a file that does not lie beside it"),
    (("model.safetensors.index.json", "model-2.safetensors"), "a file that does not lie beside it"),
    (("model-3.safetensors", "model-2.safetensors"), "model-3.safetensors: no such file")])
def test_an_index_names_only_files_beside_it(names, said, tmp_path):
    _, index = sharded(tmp_path, names)
    with pytest.raises(EvopruneError, match=said):
        read_weights(index)


@pytest.mark.parametrize("text", ["", "[]", '{"weight_map": 5}', '{"weight_map": {"a": 5}}'])
def test_a_damaged_index_is_one_line(text, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(EvopruneError, match="expected the index of a sharded model, with a weight_map of names and files$"):
        read_weights(str(tmp_path / "model.safetensors.index.json"))


@pytest.mark.parametrize(("about", "resize", "crop", "interpolation"), [
    ({"size": 224, "crop_pct": 0.875, "resample": 3}, [256], [224, 224], "bicubic"),
    ({"size": {"shortest_edge": 384}, "crop_pct": 0.875, "resample": 3}, [384, 384], [384, 384], "bicubic"),
    ({"size": {"height": 224, "width": 200}}, [224, 200], [224, 200], "bilinear"),
    ({"size": 224, "resample": 0}, [224, 224], [224, 224], "nearest"),
    ({"size": {"shortest_edge": 256}, "do_center_crop": True, "crop_size": {"height": 224, "width": 224}}, [256], [224, 224],
     "bilinear"),
    ({"size": 256, "do_center_crop": True, "crop_size": 224}, [256], [224, 224], "bilinear")])
def test_images_are_prepared_as_a_folder_of_hugging_face_says(about, resize, crop, interpolation):
    found = hugging_face_preset({**about, "image_mean": [0.5] * 3, "image_std": [0.25] * 3})
    assert (found.resize, found.crop, found.interpolation.value, found.mean) == (resize, crop, interpolation, (0.5,) * 3)
    assert hugging_face_preset({**about, "do_normalize": False, "image_mean": 1, "image_std": 1}).std == (1.0,) * 3


def test_torchvision_models_are_rebuilt_as_their_weights_make_them():
    with torch.device("meta"):
        inception, googlenet = (build_model(f"torchvision:{name}", 5, 3) for name in ("inception_v3", "googlenet"))
        assert build_model("torchvision:vit_h_14", 5, 3).image_size == 518
    assert inception.transform_input and googlenet.transform_input and googlenet.aux1 is None
    assert without_auxiliary("torchvision:googlenet", {"aux1.fc": 1, "fc": 2}) == {"fc": 2}
    assert without_auxiliary("torchvision:resnet18", {"aux1.fc": 1}) == {"aux1.fc": 1}


def test_timm_models_are_made_and_nothing_is_fetched(monkeypatch):
    timm = pytest.importorskip("timm")
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("a connection"))
    assert build_model("timm:test_resnet", 7, 1).eval()(torch.zeros(1, 1, 64, 64)).shape == (1, 7)
    with pytest.raises(EvopruneError, match="weights: the timm:test_resnet has none of its own; give --weights FILE"):
        load_model(Config(model="timm:test_resnet"), 7, 3)
    with pytest.raises(EvopruneError, match=r"model: timm has no model 'resnot'; there are resn"):
        build_model("timm:resnot", 7, 3)
    found, cfg = preset_of("timm:resnet18"), timm.get_pretrained_cfg("resnet18")
    assert (found.crop, found.mean, found.interpolation.value) == ([cfg.input_size[1]], tuple(cfg.mean), cfg.interpolation)


def test_a_folder_of_hugging_face_is_read_and_runs_no_code(tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("a connection"))
    config = transformers.ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
                                    image_size=16, patch_size=8, num_labels=3)
    model = transformers.ViTForImageClassification(config).eval()
    model.save_pretrained(tmp_path / "vit")
    (tmp_path / "vit" / "preprocessor_config.json").write_text(json.dumps(
        {"size": {"height": 16, "width": 16}, "image_mean": [0.5], "image_std": [0.25]}))
    again = load_model(Config(model=f"hf:{tmp_path / 'vit'}"), 3, 3).eval()
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(model(images).logits, again(images).logits)
    assert preset_of(f"hf:{tmp_path / 'vit'}").mean == (0.5,) and preset_of(f"hf:{tmp_path / 'vit'}").crop == [16, 16]
    trained = load_model(Config(model=f"hf:{tmp_path / 'vit'}", train_epochs=2), 3, 3).eval()
    assert torch.equal(model(images).logits, trained(images).logits)  # training starts from what is there
    about = json.loads((tmp_path / "vit" / "config.json").read_text())
    for changes, said in (({"architectures": ["Evil"]}, "architectures names 'Evil', expected a model of transformers"),
                          ({"auto_map": {"AutoConfig": "evil.Config"}, "model_type": "evil"}, "contains custom code")):
        (tmp_path / "vit" / "config.json").write_text(json.dumps({**about, **changes}))
        (tmp_path / "vit" / "evil.py").write_text("raise SystemExit(9)")
        with pytest.raises(EvopruneError, match=said):
            build_model(f"hf:{tmp_path / 'vit'}", 3, 3)
    with pytest.raises(EvopruneError, match="no config.json, expected a folder that save_pretrained wrote"):
        build_model(f"hf:{tmp_path}", 3, 3)


def test_without_the_library_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    with pytest.raises(EvopruneError, match=r"^model: timm is not installed; pip install 'evoprune\[zoo\]'$"):
        build_model("timm:resnet18", 7, 3)
