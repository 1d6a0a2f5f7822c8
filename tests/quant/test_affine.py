"""The low-bit layer: what it stores, in which number types, in which layout, and what it refuses."""

from __future__ import annotations

import copy
import io

import peft
import pytest
import torch
from tests.models_for_tests import llama, tokens
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from modicum import AffineConfig
from modicum.errors import ConfigError, CorruptAdapterError, InexactMergeError
from modicum.ops.affine import Grid, fit_grid
from modicum.quant import int4pack, matmul
from modicum.quant.affine import AffineLinear, fold
from modicum.quant.base import format_of
from modicum.quant.huggingface import AffineQuantizer, effective_bits, quantize_linears, quantized_linear
from modicum.quant.spec import AffineSpec

needs_kernel = pytest.mark.skipif(
    not int4pack.available(), reason="this processor's int4 kernel has another layout"
)


def layer(out=64, inner=128, bits=4, block=(1, 32), zero_point="float", bias=True, **spec):
    torch.manual_seed(0)
    linear = nn.Linear(inner, out, bias=bias)
    if zero_point == "integer":
        spec["offset_dtype"] = "float32"
    return quantized_linear(linear, AffineSpec(bits, block, zero_point, **spec))


def stored(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


@needs_kernel
def test_offsets_beyond_bfloat16_reach_the_packed_kernel():
    """Two groups that all but cancel: what is left is below the last digit of a bfloat16 offset."""
    codes = torch.full((64, 64), 8, dtype=torch.uint8)
    offsets = torch.tensor([[1 + 2**-10, -1.0]]).expand(64, 2).contiguous()
    found = AffineLinear.from_quantized(
        codes,
        Grid(torch.ones(64, 2, dtype=torch.bfloat16), offsets),
        AffineSpec(4, (1, 32), offset_dtype="float32"),
    )
    with torch.no_grad():
        y = found(torch.ones(1, 64, dtype=torch.bfloat16))
    assert found.packed
    assert torch.equal(y.float(), torch.full((1, 64), 2.0**-5))
    assert torch.equal(found.grid().offsets, offsets)


@needs_kernel
@pytest.mark.parametrize("zero_point", ["float", "integer", "none"])
def test_the_layout_is_an_inside_matter(zero_point):
    found = layer(zero_point=zero_point)
    fold(found, torch.randn(64, 4), (1, 32))
    before = stored(found)
    with torch.no_grad():
        found(torch.randn(1, 128).bfloat16())
    assert found.packed
    weight = found.dequantized()
    assert all(torch.equal(value, before[name]) for name, value in found.state_dict().items())
    with torch.no_grad():
        found(torch.randn(1, 128).bfloat16())
    other = layer(zero_point=zero_point)
    fold(other, torch.randn(64, 4), (1, 32))
    found.load_state_dict(other.state_dict())
    assert torch.equal(found.dequantized(), other.dequantized())
    found.load_state_dict(before)
    assert torch.equal(found.dequantized(), weight)
    copied = copy.deepcopy(found)
    file = io.BytesIO()
    torch.save(found, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert torch.equal(copied.dequantized(), weight)
    assert torch.equal(loaded.dequantized(), weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_casting_a_model_leaves_scales_and_offsets_alone(dtype):
    found = layer()
    fold(found, torch.randn(64, 4) * 1e-3, (1, 32))
    fold(found, torch.randn(8, 32) * 1e-3, (8, 4))
    before = stored(found)
    found.to(dtype)
    assert found.dtype == dtype
    assert found.bias.dtype == dtype
    for name in ("scales", "offsets", "block_offsets"):
        assert getattr(found, name).dtype == before[name].dtype
        assert torch.equal(getattr(found, name), before[name])


def test_folds_on_blocks_that_do_not_nest():
    found = layer(out=24, inner=64, block=(1, 32))
    weight = found.dequantized()
    one, two = torch.randn(6, 16), torch.randn(4, 8)
    fold(found, one, (4, 4))
    fold(found, two, (6, 8))
    assert found.spec.offset_block == (2, 4)
    wanted = weight + one.repeat_interleave(4, 0).repeat_interleave(4, 1)
    wanted = wanted + two.repeat_interleave(6, 0).repeat_interleave(8, 1)
    assert torch.allclose(found.dequantized(), wanted, atol=1e-6)


@pytest.mark.parametrize("panel", [1 << 8, 1 << 12, 1 << 30])
@pytest.mark.parametrize(
    ("bits", "block"), [(4, (1, 32)), (3, (1, 64)), (2, (8, 4)), (8, (1, 20)), (4, (1, 50))]
)
def test_output_and_gradient_in_panels_are_those_of_the_dense_layer(bits, block, panel, monkeypatch):
    monkeypatch.setattr(matmul, "PANEL", panel)
    inner = {20: 120, 50: 100}.get(block[1], 128)
    found = layer(out=200, inner=inner, bits=bits, block=block)
    x = torch.randn(3, 5, inner, requires_grad=True)
    wanted = nn.functional.linear(x, found.dequantized(), found.bias)
    target = torch.randn_like(wanted)
    dense = torch.autograd.grad(wanted, x, target)[0]
    y = found(x)
    assert torch.allclose(y, wanted, atol=1e-5)
    assert torch.allclose(torch.autograd.grad(y, x, target)[0], dense, atol=1e-5)


def test_the_bias_may_train():
    found = layer()
    found.bias.requires_grad_()
    found(torch.randn(7, 128)).sum().backward()
    assert torch.equal(found.bias.grad, torch.full((64,), 7.0))


def test_autocast_is_obeyed():
    found, x = layer(), torch.randn(9, 128)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert found(x).dtype == torch.bfloat16
    assert found(x).dtype == torch.float32


def test_the_weight_is_a_copy_that_cannot_be_assigned():
    found = layer()
    assert torch.equal(found.weight, found.dequantized())
    with pytest.raises(InexactMergeError, match="cannot be assigned"):
        found.weight.data += 1
    with pytest.raises(InexactMergeError, match="cannot be assigned"):
        found.weight = torch.zeros(64, 128)


def test_stock_lora_trains_and_refuses_to_merge_in_silence():
    base = llama().requires_grad_(False)
    quantize_linears(base, AffineConfig(bits=4, group_size=16))
    model = peft.get_peft_model(
        base, peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    )
    model(tokens(), labels=tokens()).loss.backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 14
    assert all(p.grad.abs().sum() > 0 for p in trained.values())
    with pytest.raises(InexactMergeError, match="modicum merge"):
        model.merge_and_unload()


def test_what_a_layer_costs_in_memory_is_what_the_spec_says():
    for bits, block, offsets in ((4, (1, 64), "bfloat16"), (3, (1, 32), "float32"), (2, (8, 4), "float16")):
        found = layer(out=256, inner=512, bits=bits, block=block, bias=False, offset_dtype=offsets)
        size = sum(value.numel() * value.element_size() for value in found.state_dict().values())
        assert size * 8 / (256 * 512) == found.spec.bits_per_weight(256, 512)
        with torch.no_grad():
            found(torch.randn(3, 512))
        assert sum(t.numel() * t.element_size() for t in found.buffers()) == size


def test_a_fold_forgets_the_residuals_and_undoing_it_brings_them_back():
    found = layer(zero_point="integer", offset_dtype="float32", residuals=True)
    fmt, before = format_of(found), found.residuals
    assert found.spec.bits_per_weight(64, 128) == 4 + 48 / 32 + 8
    saved = fmt.snapshot(found)
    fmt.fold(found, torch.ones(64, 4), (1, 32))
    assert found.residuals is None
    assert found.spec.bits_per_weight(64, 128) == 4 + 48 / 32
    fmt.restore(found, saved)
    assert found.residuals is before
    with pytest.raises(ConfigError, match="residuals need 0 on the grid"):
        AffineLinear(32, 32, AffineSpec(4, (1, 32), residuals=True))


def saved(folder, **options):
    model = llama()
    config = AffineConfig(**{"bits": 4, "group_size": 16, **options})
    quantize_linears(model, config)
    model.hf_quantizer = AffineQuantizer(config)
    model.save_pretrained(folder)
    return model.eval()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bits": 3},
        {"zero_point": "none", "block": [8, 4]},
        {"zero_point": "integer"},
        {"zero_point": "integer", "residuals": True},
    ],
)
def test_a_quantized_folder_loads_like_any_other(options, tmp_path):
    model = saved(tmp_path / "q", **options)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "q", dtype=torch.float32).eval()
    with torch.no_grad():
        wanted = model(tokens()).logits
        assert torch.equal(again(tokens()).logits, wanted)
        again.save_pretrained(tmp_path / "r")
        third = AutoModelForCausalLM.from_pretrained(tmp_path / "r", dtype=torch.float32)
        assert torch.equal(third(tokens()).logits, wanted)
        narrow = AutoModelForCausalLM.from_pretrained(tmp_path / "q", dtype=torch.bfloat16)
    for name, module in narrow.named_modules():
        if isinstance(module, AffineLinear):
            assert torch.equal(module.dequantized(), again.get_submodule(name).dequantized())
            assert (module.residuals is not None) == options.get("residuals", False)
            if module.residuals is not None:
                assert torch.equal(module.residuals, model.get_submodule(name).residuals)
    assert effective_bits(again) == effective_bits(model)


def test_other_heads_find_their_layers(tmp_path):
    saved(tmp_path / "q")
    bare = AutoModel.from_pretrained(tmp_path / "q")
    assert sum(isinstance(m, AffineLinear) for m in bare.modules()) == 14
    classifier = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "q", num_labels=3, pad_token_id=0
    )
    assert type(classifier.score) is nn.Linear
    assert sum(isinstance(m, AffineLinear) for m in classifier.modules()) == 14


def test_quantizing_while_loading(tmp_path):
    llama().save_pretrained(tmp_path / "dense")
    config = AffineConfig(bits=8, group_size=16)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=config)
    assert sum(isinstance(m, AffineLinear) for m in model.modules()) == 14
    model.save_pretrained(tmp_path / "q")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "q").model.layers[1].mlp.up_proj.spec.bits == 8
    with pytest.raises(ConfigError, match="sizes that do: 1, 2, 4, 8, 16, 32"):
        AutoModelForCausalLM.from_pretrained(
            tmp_path / "dense", quantization_config=AffineConfig(bits=4, group_size=24)
        )


def test_bad_configurations_and_folders_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="'groupsize' \\(did you mean 'group_size'"):
        AffineConfig(groupsize=32)
    with pytest.raises(ConfigError, match="newer modicum"):
        AffineConfig(version=99)
    with pytest.raises(ConfigError, match="needs offset_dtype = 'float32'"):
        layer(zero_point="float").__class__(32, 32, AffineSpec(4, (1, 32), "integer"))
    with pytest.raises(ConfigError, match="bits = 5"):
        AffineLinear(32, 32, AffineSpec(5, (1, 32)))
    model = saved(tmp_path / "q")
    llama().save_pretrained(tmp_path / "dense")
    (tmp_path / "dense" / "config.json").write_bytes((tmp_path / "q" / "config.json").read_bytes())
    with pytest.raises(CorruptAdapterError, match="belong to different models"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert model.config.quantization_config.bits == 4


def test_mixed_layers_keep_their_own_specs(tmp_path):
    model = llama()
    layers = {"model.layers.0.mlp.up_proj": {"bits": 8}, "model.layers.1.mlp.down_proj": {"block": [1, 8]}}
    config = AffineConfig(bits=4, group_size=16, layers=layers)
    quantize_linears(model, config)
    model.hf_quantizer = AffineQuantizer(config)
    model.save_pretrained(tmp_path / "q")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "q")
    assert again.model.layers[0].mlp.up_proj.spec.bits == 8
    assert again.model.layers[1].mlp.down_proj.spec.block == (1, 8)
    assert again.model.layers[1].mlp.up_proj.spec == AffineSpec(4, (1, 16))


def test_the_grid_of_a_layer_is_what_was_fitted():
    torch.manual_seed(0)
    linear = nn.Linear(64, 32)
    grid = fit_grid(linear.weight, 4, (1, 32), offset_dtype=torch.bfloat16)
    found = quantized_linear(linear, AffineSpec(4, (1, 32)))
    assert torch.equal(found.grid().scales, grid.scales)
    assert torch.equal(found.grid().offsets, grid.offsets)
    assert (found.dequantized() - linear.weight).abs().max() <= 0.6 * grid.scales.float().max()
