"""Layers written in the published formats come back number for number."""

from __future__ import annotations

from collections import defaultdict

import pytest
import torch
from safetensors.torch import load_file
from tests.quant import published

from modicum.errors import ConfigError
from modicum.ops.affine import pack, unpack
from modicum.quant.affine import AffineLinear
from modicum.quant.interchange import Quantized, from_awq, from_compressed_tensors, from_gptq, unpack_words


def layers(folder, last: str) -> dict[str, dict[str, torch.Tensor]]:
    """The tensors of every quantized layer of a checkpoint; `last` is the name one of them must have."""
    found = defaultdict(dict)
    for key, value in load_file(folder / "model.safetensors").items():
        name, _, tensor = key.rpartition(".")
        found[name][tensor] = value
    return {name: tensors for name, tensors in found.items() if last in tensors}


def same(read: dict[str, Quantized], written: dict[str, torch.Tensor]) -> None:
    assert set(read) == set(written)
    for name, layer in read.items():
        assert torch.equal(layer.weight(), written[name]), name
        stored = AffineLinear.from_quantized(layer.codes, layer.grid, layer.spec)
        assert torch.equal(stored.dequantized(), written[name]), name
        assert torch.equal(
            unpack(pack(layer.codes, layer.bits), layer.bits, layer.codes.shape[1]), layer.codes
        )


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_gptq(tmp_path, bits, version, symmetric):
    written = published.gptq(tmp_path, published.llama(), bits, symmetric=symmetric, version=version)
    found = layers(tmp_path, "qweight")
    read = {name: from_gptq(t, minus_one=version == 1) for name, t in found.items()}
    same(read, written)
    assert all((layer.grid.offsets is None) == symmetric for layer in read.values())
    assert all((layer.bits, layer.block) == (bits, (1, 32)) for layer in read.values())
    name, tensors = found.popitem()
    del tensors["g_idx"]
    assert torch.equal(from_gptq(tensors, 32, minus_one=version == 1).weight(), written[name])


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_gptq_zero_points_of_zero_borrow_from_the_next_field(bits):
    """Stored as −1 in words: 0 takes one from its neighbour, and adding to whole words gives it back."""
    zeros = torch.tensor([[0, 1, 2, 3] * 8])
    word = torch.zeros(1, bits, dtype=torch.int64)
    for place, value in enumerate(zeros[0].tolist()):
        word[0, place * bits // 32] += value << (place * bits % 32)
    stored = word - sum(1 << shift for shift in range(0, 32, bits))
    stored = ((stored + 2**31) % 2**32 - 2**31).int()
    tensors = {
        "qweight": torch.zeros(bits, 32, dtype=torch.int32),
        "qzeros": stored,
        "scales": torch.ones(1, 32, dtype=torch.float16),
    }
    assert torch.equal(from_gptq(tensors).weight()[:, 0], -zeros[0].float())


def test_gptq_act_order_is_refused_unless_groups_are_runs(tmp_path):
    shuffled = torch.randperm(64, generator=torch.Generator().manual_seed(0)) // 32
    published.gptq(tmp_path, published.llama(), g_idx=shuffled)
    tensors = layers(tmp_path, "qweight")["model.layers.0.self_attn.q_proj"]
    with pytest.raises(ConfigError, match="act-order"):
        from_gptq(tensors)
    tensors["g_idx"] = torch.arange(64) // 32
    assert from_gptq(tensors).block == (1, 32)


def test_awq(tmp_path):
    written = published.awq(tmp_path, published.llama())
    same({name: from_awq(t, 32) for name, t in layers(tmp_path, "qweight").items()}, written)


@pytest.mark.parametrize(
    "options",
    [
        {"bits": 2},
        {"bits": 3},
        {"bits": 4},
        {"bits": 4, "symmetric": True},
        {"bits": 4, "group": None},
        {"bits": 8, "group": None},
        {"bits": 8, "packed": False},
        {"bits": 8, "group": None, "packed": False, "symmetric": True},
        {"bits": 3, "symmetric": True, "words_of_ten": True},
    ],
    ids=lambda options: "-".join(f"{key}={value}" for key, value in options.items()),
)
def test_compressed_tensors(tmp_path, options):
    written = published.compressed_tensors(tmp_path, published.llama(), **options)
    read = {
        name: from_compressed_tensors(tensors, options["bits"])
        for name, tensors in layers(tmp_path, "weight_scale").items()
    }
    same(read, written)


def test_compressed_tensors_of_one_scale_and_of_blocks():
    codes = torch.randint(-128, 128, (8, 12), dtype=torch.int8, generator=torch.Generator().manual_seed(0))
    one = from_compressed_tensors({"weight": codes, "weight_scale": torch.tensor([0.25])}, 8)
    assert torch.equal(one.weight(), codes.float() / 4)
    assert one.block == (8, 12)
    scales = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    blocks = from_compressed_tensors({"weight": codes, "weight_scale": scales}, 8, (4, 6))
    assert torch.equal(blocks.weight(), codes * scales.repeat_interleave(4, 0).repeat_interleave(6, 1))


def test_fields_of_three_bits_cross_words():
    values = torch.arange(64) % 8
    words = torch.from_numpy(published.words(values.view(2, 32).numpy(), 3))
    assert words.shape == (2, 3)
    assert torch.equal(unpack_words(words, 3, 32).long(), values.view(2, 32))


def test_what_contradicts_itself_is_refused(tmp_path):
    published.gptq(tmp_path, published.llama())
    good = next(iter(layers(tmp_path, "qweight").values()))
    with pytest.raises(ConfigError, match="groups of 16"):
        from_gptq({key: value for key, value in good.items() if key != "g_idx"}, 16)
    with pytest.raises(ConfigError, match="5 bits"):
        from_compressed_tensors({"weight": torch.zeros(2, 2), "weight_scale": torch.ones(1)}, 5)
    with pytest.raises(ConfigError, match="gemm"):
        from_awq(good)
    with pytest.raises(ConfigError, match="equal width"):
        from_gptq({**good, "qzeros": good["qzeros"][:, :3]})
    with pytest.raises(ConfigError, match="do not fit"):
        from_compressed_tensors({"weight": torch.zeros(4, 6), "weight_scale": torch.ones(4, 4)}, 8)
