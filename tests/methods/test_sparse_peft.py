"""SparsePEFT: the masked product against its formula, what training keeps in memory, zeros that survive the merge."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from tests.laws.cases import OneLayer, base_layer
from torch.nn import functional as F

from modicum import QASparsePeftConfig, SparsePeftConfig
from modicum.adapters import panels
from modicum.adapters.elastic import SubNetwork, Switch
from modicum.quant.huggingface import quantized_linear
from modicum.quant.spec import AffineSpec

OUT, IN, RANK = 200, 48, 6


def adapted(kind="linear", dtype=torch.float32, **options):
    base = base_layer(kind, IN, OUT, dtype, bias=True, seed=0)
    config = SparsePeftConfig(r=RANK, alpha=12, target_modules=["layer"], init_weights=False, **options)
    model = get_peft_model(base, config).eval()
    layer = model.base_model.model.layer
    return model, layer, layer.adapters["default"]


@pytest.fixture(autouse=True)
def _several_panels(monkeypatch):
    # 64 rows each, so that the layer has three and a bit
    monkeypatch.setattr(panels, "_PANEL", 1)


def inputs(dtype=torch.float32):
    return torch.randn(5, 3, IN, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("rank", [1, 4, RANK])
def test_values_and_gradients_are_those_of_the_formula(kind, rank):
    model, layer, adapter = adapted(kind)
    Switch(model).activate(SubNetwork(ranks={"layer": rank}))
    weight, x = layer.site.weight(), inputs().requires_grad_()
    a, b = adapter.A, adapter.B
    delta = 12 / RANK * (b[:, :rank] @ a[:rank]) * (weight != 0)
    wanted = F.linear(x, weight + delta, layer.site.bias)
    got = model(x)
    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(layer.get_delta_weight("default"), delta)
    slope = torch.linspace(-1, 2, OUT)
    truth = torch.autograd.grad((wanted.tanh() * slope).sum(), [x, a, b])
    for cheap in (got, F.linear(x, weight + layer.get_delta_weight("default"), layer.site.bias)):
        found = torch.autograd.grad((cheap.tanh() * slope).sum(), [x, a, b])
        for ours, theirs in zip(found, truth, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_training_keeps_nothing_of_the_size_of_the_weight():
    model, layer, adapter = adapted()
    model.train()
    kept: list[torch.Tensor] = []

    def pack(tensor):
        kept.append(tensor)
        return tensor

    x = inputs()
    own = {p.untyped_storage().data_ptr() for p in (*adapter.parameters(), layer.base_layer.weight)}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = model(x)
    sizes = [t.numel() for t in kept if t.untyped_storage().data_ptr() not in own]
    assert len(kept) > 2
    # the input, and B times the scaling
    assert max(sizes) <= max(x.numel(), OUT * RANK) < OUT * IN / 4
    y.sum().backward()
    assert adapter.A.grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_every_zero_of_the_base_is_a_zero_of_the_merged_model(dtype, kind):
    model, layer, _ = adapted(kind, dtype)
    before, delta = layer.site.weight().clone(), layer.get_delta_weight("default")
    pruned = before == 0
    assert 0.2 < pruned.float().mean() < 0.5
    unmerged = model(inputs(dtype))
    merged = model.merge_and_unload()
    after = merged.layer.weight.T if kind == "conv1d" else merged.layer.weight
    assert torch.equal((after == 0) & pruned, pruned)
    assert (after[~pruned] != before[~pruned]).float().mean() > 0.9
    assert torch.equal(after, (before.float() + delta).to(dtype))
    error = (merged(inputs(dtype)) - unmerged).abs().max() / unmerged.abs().max()
    assert error < {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}[dtype]


def test_the_mask_of_a_low_bit_base_is_kept_in_bits():
    dense = base_layer("linear", IN, OUT, torch.float32, bias=True, seed=0).layer.requires_grad_(False)
    base = quantized_linear(dense, AffineSpec(4, (1, 16), "integer", offset_dtype="float32"))
    config = SparsePeftConfig(r=RANK, target_modules=["layer"], init_weights=False)
    model = get_peft_model(OneLayer(base), config)
    layer = model.base_model.model.layer
    wanted = base.dequantized() != 0
    assert torch.equal(layer.site.mask(slice(64, 192)), wanted[64:192])
    assert torch.equal(layer.get_delta_weight("default") != 0, wanted)
    model.add_adapter("two", SparsePeftConfig(r=2, target_modules=["layer"]))
    model(inputs())
    assert layer.site._mask.nbytes == OUT * IN / 8


@pytest.mark.parametrize("config", [SparsePeftConfig, QASparsePeftConfig])
def test_dropout_leaves_the_base_alone(config):
    dense = base_layer("linear", IN, OUT, torch.float32, bias=True, seed=0)
    if config is QASparsePeftConfig:
        spec = AffineSpec(4, (1, 16), "integer", offset_dtype="float32", residuals=True)
        dense = OneLayer(quantized_linear(dense.layer.requires_grad_(False), spec))
    options = {"r": RANK, "alpha": 12, "target_modules": ["layer"], "init_weights": False}
    model = get_peft_model(dense, config(**options, dropout=0.999))
    layer = model.base_model.model.layer
    base = layer.base_layer(inputs())
    assert not torch.equal(model.eval()(inputs()), base)
    torch.manual_seed(0)
    # next to nothing is left of the adapter's input, and all of the base's
    quiet = (model.train()(inputs()) - base).eq(0).float().mean()
    assert quiet > 0.8


def test_autocast_rounds_the_output_and_not_the_update():
    model, layer, adapter = adapted()
    x = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer.get_delta_weight("default"), adapter.delta_weight())
        y = model(x)
        delta = layer.get_delta_weight("default")
    assert y.dtype == torch.bfloat16
    wanted = 12 / RANK * (adapter.B @ adapter.A) * (layer.site.weight() != 0)
    torch.testing.assert_close(delta, wanted)
    y.float().square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in adapter.parameters())
