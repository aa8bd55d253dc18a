import json
import re
import zlib

import numpy as np
import pytest
import torch
from conftest import ROOT
from safetensors.numpy import save
from safetensors.torch import load

from evoprune.errors import EvopruneError
from evoprune.files import metadata_of
from evoprune.masks.packed import BITS, pack, unpack

BOMB = bytearray(zlib.compress(bytes(10 ** 8)))


def state(density, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def pruned(*shape):
        values = torch.randn(shape, generator=generator)
        return values * (torch.rand(shape, generator=generator) < density)

    shared = pruned(12, 7)
    return {"conv.weight": pruned(8, 3, 3, 3), "fc.weight": pruned(40, 300), "fc.bias": torch.randn(40, generator=generator),
            "up.weight": shared, "tied.weight": shared.clone(), "norm.running_var": torch.rand(8, generator=generator) * 1e-6,
            "norm.num_batches_tracked": torch.tensor(7), "half.weight": pruned(5, 5).bfloat16(), "empty": torch.zeros(0, 3),
            "zeros": torch.zeros(4, 4), "mask": torch.tensor([True, False, True]), "large": torch.tensor([1e30, 2.0])}


def written(content, bits=32):
    entries, metadata = pack(content, bits)
    file = save(entries, metadata)
    return load(file), metadata_of(file), len(file)


@pytest.mark.parametrize("density", [1.0, 0.3, 0.05, 0.002])
def test_a_packed_state_comes_back_to_the_bit(density):
    content = state(density)
    entries, metadata, _ = written(content)
    assert all(value.dtype == torch.uint8 for value in entries.values())
    found = unpack(entries, metadata, "file")
    assert found.keys() == content.keys()
    for name, value in content.items():
        assert torch.equal(found[name], value.float() if value.dtype == torch.bfloat16 else value) \
            and found[name].shape == value.shape, name
    assert "tied.weight.compressed" not in entries and json.loads(metadata["names"]) == {"tied.weight": "up.weight"}


def test_the_smaller_of_bitmask_and_index_is_taken():
    kinds = {density: {name.rpartition(".")[2] for name in written(state(density))[0] if name.startswith("fc.weight")}
             for density in (1.0, 0.3, 0.002)}
    assert kinds == {1.0: {"compressed", "shape"}, 0.3: {"compressed", "shape", "bitmask"},
                     0.002: {"compressed", "shape", "index"}}


@pytest.mark.parametrize(("bits", "most"), [(16, 2 ** -11), (8, 0.5 / 127 + 2 ** -11)])
def test_fewer_bits_round_by_what_they_must_and_keep_zeros(bits, most):
    content = state(0.3)
    entries, metadata, size = written(content, bits)
    found = unpack(entries, metadata, "file")
    for name in ("conv.weight", "fc.weight", "up.weight", "tied.weight"):
        row = content[name].flatten(1)
        assert ((found[name].flatten(1) - row).abs() <= most * row.abs().amax(1, keepdim=True) * 1.01).all()
        assert not found[name][content[name] == 0].any()
    assert torch.equal(found["large"], content["large"]) and torch.equal(found["norm.running_var"], content["norm.running_var"])
    assert int(found["norm.num_batches_tracked"]) == 7 and size < written(content)[2]


@pytest.mark.parametrize("bits", [16, 8])
@pytest.mark.parametrize("size", [1.0, 1e-2, 1e-4, 1e-6, 1e-9])
def test_small_values_are_as_right_as_large_ones(bits, size):
    rows = size * torch.randn(6, 50, generator=torch.Generator().manual_seed(0))
    rows[1] *= 1e-2
    rows[2] *= 1e-20  # a dead row keeps nothing from being small
    entries, metadata, _ = written({"fc.weight": rows}, bits)
    found = unpack(entries, metadata, "file")["fc.weight"]
    most = rows.abs().amax(1, keepdim=True)
    assert ((found - rows).abs() <= 0.008 * most)[[0, 1, 3, 4, 5]].all() and found[2].abs().max() <= 1e-6 * size


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("density", [1.0, 0.3, 0.002])
def test_readmes_lines_of_numpy_read_it(density, bits, tmp_path):
    block, = re.findall(r"```python\n(import json.*?)arrays = .*?```", (ROOT / "evoprune" / "README.md").read_text(), re.DOTALL)
    here = {}
    exec(block, here)
    entries, metadata = pack(state(density), bits)
    (tmp_path / "packed").write_bytes(save(entries, metadata))
    found = here["read_packed"](tmp_path / "packed")
    expected = unpack(load(save(entries, metadata)), metadata, "file")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        array = found[name].astype("f4") if found[name].dtype == "f2" else found[name]
        assert array.dtype == value.numpy().dtype and np.array_equal(array, value.numpy()), name


@pytest.mark.parametrize("damage", [
    lambda e, m: m.update(format="other"), lambda e, m: m.pop("types"), lambda e, m: m.update(types="[]"),
    lambda e, m: m.update(types='{"fc.weight": "O"}'), lambda e, m: m.update(names='{"x": "y"}'),
    lambda e, m: e.update({"fc.weight.compressed": e["fc.weight.compressed"][:-9]}),
    lambda e, m: e.update({"fc.weight.bitmask": torch.zeros(3, dtype=torch.uint8)}),
    lambda e, m: e.update({"fc.weight.shape": e["conv.weight.shape"]}), lambda e, m: e.pop("conv.weight.bitmask"),
    lambda e, m: e.update({"fc.bias.compressed": torch.zeros(9)}),
    lambda e, m: e.update({"fc.weight.compressed": torch.frombuffer(BOMB, dtype=torch.uint8)})])
def test_a_damaged_file_is_one_line(damage):
    entries, metadata, _ = written(state(0.3))
    damage(entries, metadata)
    with pytest.raises(EvopruneError, match=r"^file: (found|damaged)"):
        unpack(entries, metadata, "file")
