"""The training forward is the merged artifact's forward, for every (method, bits, block, zero-point) that claims it."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from tests.laws.cases import OneLayer
from torch import nn

from modicum.adapters import registry
from modicum.errors import InexactMergeError
from modicum.quant.huggingface import quantized_linear
from modicum.quant.spec import DTYPES, AffineSpec

ON_GRID = [name for name in registry.names() if registry.get(name).on_grid]
EXACT = [name for name in registry.names() if "pool" in registry.config_class(name).__dataclass_fields__]
BLOCKS = [(1, 8), (1, 16), (1, 32), (1, 64), (1, 128), (4, 4), (8, 4), (2, 32)]
law = settings(max_examples=40, deadline=None, derandomize=True)


def widened(base):
    """`base` with as many columns as its blocks divide."""
    columns = base["block"][1]
    return {**base, "columns": -(-base["columns"] // columns) * columns}


DTYPE = st.sampled_from(["bfloat16", "float16", "float32"])
bases = st.fixed_dictionaries(
    {
        "bits": st.sampled_from([2, 3, 4, 8]),
        "block": st.sampled_from(BLOCKS),
        "zero_point": st.sampled_from(["float", "integer", "none"]),
        "scale_dtype": DTYPE,
        "offset_dtype": DTYPE,
        "rows": st.integers(1, 3).map(lambda n: 64 * n),
        "columns": st.integers(1, 3).map(lambda n: 64 * n),
        "bias": st.booleans(),
        "seed": st.integers(0, 5),
    }
).map(widened)
adapter_blocks = st.tuples(st.sampled_from([1, 2, 4, 8, 16]), st.sampled_from([1, 2, 4, 8, 16, 32, 64, 128]))


def quantized(base) -> OneLayer:
    torch.manual_seed(base["seed"])
    linear = nn.Linear(base["columns"], base["rows"], bias=base["bias"])
    if base.get("sparse"):
        linear.weight.data *= torch.rand_like(linear.weight) > 0.5
    # s · z has more digits than 16 bits hold
    offsets = "float32" if base["zero_point"] == "integer" else base.get("offset_dtype", "bfloat16")
    spec = AffineSpec(
        base["bits"],
        base["block"],
        base["zero_point"],
        base.get("scale_dtype", "bfloat16"),
        offsets,
        residuals=base.get("residuals", False),
    )
    return OneLayer(quantized_linear(linear.requires_grad_(False), spec))


def block_options(method, base, block):
    """The options of an adapter whose pool divides the columns: of one that does not, the part that does."""
    repeat, pool = block
    return {"pool": math.gcd(pool, base["columns"])} | ({"repeat": repeat} if method != "qa_lora" else {})


def adapted(method, base, block, **options):
    values = block_options(method, base, block)
    config = registry.config_class(method)(
        r=3, alpha=6, target_modules=["layer"], init_weights=False, **values, **options
    )
    return get_peft_model(quantized(base), config).eval()


def fixed(layer):
    return layer.codes.clone(), layer.scales.clone()


@pytest.mark.parametrize("method", EXACT)
@law
@given(base=bases, block=adapter_blocks)
def test_merging_moves_offsets_only_and_changes_no_output(method, base, block):
    model = adapted(method, base, block)
    layer = model.base_model.model.layer
    before, weight, delta = fixed(layer.base_layer), layer.site.weight(), layer.get_delta_weight("default")
    x = torch.randn(9, base["columns"], generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        plain, unmerged = layer.base_layer(x), model(x)
        merged_model = model.merge_and_unload()
        merged = merged_model(x)
    after = merged_model.layer
    assert all(torch.equal(a, b) for a, b in zip(before, fixed(after), strict=True))
    # one rounding of each offset, and one of the sum
    largest = (weight.abs() + delta.abs()).max().item() + after.grid().scales.abs().max().item() * 2**7
    assert (after.dequantized() - (weight + delta)).abs().max() <= 2**-22 * largest
    size = unmerged.abs().max() + plain.abs().max()
    assert (merged - unmerged).abs().max() <= 4e-6 * size
    assert (unmerged - plain).abs().max() > 1e-3 * size


@pytest.mark.parametrize("method", EXACT)
@law
@given(base=bases, block=adapter_blocks, rows=st.sampled_from([1, 3, 40]))
def test_in_bfloat16_too_few_rows_or_many(method, base, block, rows):
    """bfloat16 rounds outputs; what it must not do is round offsets, which would lose a part of small updates."""
    model = adapted(method, base, block)
    layer = model.base_model.model.layer
    with torch.no_grad():
        for parameter in layer.adapters["default"].parameters():
            parameter.mul_(0.1)
    exact = torch.randn(rows, base["columns"], generator=torch.Generator().manual_seed(1)).bfloat16()
    with torch.no_grad():
        base_output = layer.base_layer(exact.float())
        wanted = model(exact.float())
        merged = model.bfloat16().merge_and_unload()
        got = merged(exact).float()
    assert merged.layer.grid().scales.dtype == DTYPES[base["scale_dtype"]]
    error = (got - wanted).norm() / wanted.norm()
    assert error < 2**-7
    # the error is no part of the update: projected on it, next to nothing is lost
    effect = wanted - base_output
    lost = ((got - wanted) * effect).sum() / effect.square().sum()
    noise = 2**-8 * wanted.norm() / (effect.norm() * (wanted.numel() ** 0.5)) * 8
    assert abs(lost) < 0.01 + noise


@pytest.mark.filterwarnings("ignore:Already following adapters were merged")
@pytest.mark.parametrize("method", EXACT)
@law
@given(base=bases, block=adapter_blocks, other=adapter_blocks)
def test_two_adapters_merge_and_unmerge_bit_for_bit(method, base, block, other):
    model = adapted(method, base, block)
    values = block_options(method, base, other)
    model.add_adapter(
        "two",
        registry.config_class(method)(r=2, target_modules=["layer"], init_weights=False, seed=1, **values),
    )
    layer = model.base_model.model.layer
    weight, spec = layer.site.weight(), layer.base_layer.spec
    deltas = layer.get_delta_weight("default") + layer.get_delta_weight("two")
    model.merge_adapter(["default"])
    model.merge_adapter(["two"])
    merged = layer.base_layer.dequantized()
    size = (weight.abs() + deltas.abs()).max() + layer.base_layer.grid().scales.abs().max() * 2**7
    assert (merged - weight - deltas).abs().max() <= 2**-21 * size
    assert torch.equal(layer.site.weight(), weight)
    model.unmerge_adapter()
    assert torch.equal(layer.base_layer.dequantized(), weight)
    assert layer.base_layer.spec == spec


on_zero = st.fixed_dictionaries(
    {
        "bits": st.sampled_from([2, 3, 4, 8]),
        "block": st.sampled_from(BLOCKS),
        "zero_point": st.sampled_from(["integer", "none"]),
        "scale_dtype": DTYPE,
        "rows": st.integers(1, 3).map(lambda n: 64 * n),
        "columns": st.integers(1, 3).map(lambda n: 64 * n),
        "bias": st.booleans(),
        "seed": st.integers(0, 5),
        "residuals": st.booleans(),
        "sparse": st.just(True),
    }
).map(widened)


@pytest.mark.parametrize("method", ON_GRID)
@law
@given(
    base=on_zero, alpha=st.sampled_from([0.05, 1.0, 6.0]), training=st.sampled_from(["float32", "bfloat16"])
)
def test_merging_moves_codes_only_and_lands_on_what_was_trained(method, base, alpha, training):
    config = registry.config_class(method)(r=3, alpha=alpha, target_modules=["layer"], init_weights=False)
    model = get_peft_model(quantized(base), config).to(getattr(torch, training)).eval()
    layer = model.base_model.model.layer
    frozen = layer.base_layer
    before = {name: value.clone() for name, value in frozen.state_dict().items()}
    weight, delta = layer.site.weight(), layer.get_delta_weight("default")
    x = torch.randn(9, base["columns"], generator=torch.Generator().manual_seed(1)).to(
        getattr(torch, training)
    )
    with torch.no_grad():
        trained = model.train()(x)
        model.merge_adapter()
        merged = model.eval()(x)
    after = frozen.state_dict()
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed <= {"codes"}
    assert before.keys() - after.keys() == ({"residuals"} if base["residuals"] else set())
    # whole steps; scales of 8 and 11 bits times them are exact, those of 24 are rounded once
    exact = base["scale_dtype"] != "float32"
    assert (frozen.dequantized() - (weight + delta)).abs().max() <= (
        0 if exact else 2**-22 * weight.abs().max()
    )
    assert not frozen.dequantized()[weight == 0][delta[weight == 0] == 0].any()
    if alpha == 6.0 and base["bits"] > 2:
        assert changed
    tolerance = 4e-6 if training == "float32" else 2e-2
    assert (merged - trained).abs().max() <= tolerance * (trained.abs().max() + x.abs().max())
    assert torch.equal(layer.site.weight(), weight)
    model.unmerge_adapter()
    restored = frozen.state_dict()
    assert restored.keys() == before.keys()
    assert all(torch.equal(restored[name], value) for name, value in before.items())


@pytest.mark.parametrize("method", ON_GRID)
@law
@given(base=on_zero)
def test_weights_that_were_pruned_stay_zero(method, base):
    config = registry.config_class(method)(r=3, alpha=30, target_modules=["layer"], init_weights=False)
    model = get_peft_model(quantized(base), config)
    pruned = model.base_model.model.layer.site.weight() == 0
    if base["residuals"]:
        pruned = model.base_model.model.layer.base_layer.residuals == -128
    assert pruned.float().mean() > 0.3
    assert not model.merge_and_unload().layer.dequantized()[pruned].any()


def test_an_update_that_is_not_constant_on_blocks_is_refused():
    base = {
        "bits": 4,
        "block": (1, 32),
        "zero_point": "float",
        "rows": 64,
        "columns": 64,
        "bias": True,
        "seed": 0,
    }
    model = get_peft_model(
        quantized(base), registry.config_class("lora_xs")(r=4, target_modules=["layer"], init_weights=False)
    )
    layer = model.base_model.model.layer
    weight = layer.site.weight()
    with pytest.raises(InexactMergeError, match="not constant on blocks"):
        model.merge_and_unload()
    assert torch.equal(layer.base_layer.dequantized(), weight)


def test_every_method_with_blocks_is_here():
    assert {"q_bara", "qa_hira", "qa_lora", "qa_blora"} <= set(EXACT)
    assert ON_GRID == ["qa_sparse_peft"]
