"""Fidelity against sums written out, closed forms, and models whose difference is known."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from peft import LoraConfig
from tests import models_for_tests as models
from tests.cli.adapter_files import trained
from tests.models.test_families import decoder
from torch.nn import functional as F

from modicum import AffineConfig
from modicum.errors import ConfigError, DataError
from modicum.evaluate import fidelity as module
from modicum.evaluate.fidelity import fidelity
from modicum.models.families import widths
from modicum.models.subnetwork import narrow
from modicum.ops.sparsity import magnitude_scores, mask
from modicum.quant.huggingface import quantize_linears

IDS = models.tokens(6, 20)


def noisy(model, size=0.05):
    """A copy whose linear layers, the head aside, are a little different."""
    changed = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in changed.named_parameters():
            if parameter.ndim == 2 and "embed" not in name and "lm_head" not in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=size)
    return changed


def test_the_sums_written_out(monkeypatch):
    monkeypatch.setattr(module, "_CHUNK", 7)  # in several parts, the last one shorter
    base, model = models.llama(), noisy(models.llama())
    with torch.no_grad():
        p, q = (each(input_ids=IDS).logits[:, :-1].double().softmax(-1) for each in (base, model))
    kl = (p * (p / q).log()).sum(-1).numpy()
    found = fidelity(model, base, IDS, batch_size=4)
    assert (found.sequences, found.tokens) == (6, 6 * 19)
    assert found.kl.value == pytest.approx(kl.mean(), rel=1e-4)
    assert found.kl_median == pytest.approx(np.median(kl), rel=1e-4)
    assert found.kl_p99 == pytest.approx(np.quantile(kl, 0.99), rel=1e-4)
    assert found.kl_max == pytest.approx(kl.max(), rel=1e-4)
    assert found.kl.low < found.kl.value < found.kl.high
    assert found.top1_agreement.value == pytest.approx((p.argmax(-1) == q.argmax(-1)).double().mean().item())
    assert 0.2 < found.top1_agreement.value < 1
    for value, probabilities in ((found.base_perplexity, p), (found.perplexity, q)):
        right = probabilities.gather(-1, IDS[:, 1:, None])
        assert value == pytest.approx(math.exp(-right.log().mean().item()), rel=1e-5)
    assert found.perplexity_ratio.value == pytest.approx(found.perplexity / found.base_perplexity)
    assert found.perplexity_ratio.low < found.perplexity_ratio.value < found.perplexity_ratio.high
    for size in (1, 6):
        assert fidelity(model, base, IDS, batch_size=size).kl.value == pytest.approx(found.kl.value, rel=1e-5)


def test_the_direction_of_the_divergence():
    base, model = models.llama(), noisy(models.llama(), 0.2)
    there, back = fidelity(model, base, IDS).kl.value, fidelity(base, model, IDS).kl.value
    assert there != pytest.approx(back, rel=0.01)
    assert fidelity(base, model, IDS).perplexity == pytest.approx(fidelity(model, base, IDS).base_perplexity)


def test_errors_of_layers_are_on_the_inputs_of_the_base():
    base, model = models.llama(), noisy(models.llama())
    inputs = {}
    name = "model.layers.1.mlp.down_proj"
    base.get_submodule(name).register_forward_hook(lambda m, args, y: inputs.update(x=args[0], y=y))
    found = {layer.name: layer for layer in fidelity(model, base, IDS, batch_size=6).layers}
    ours = F.linear(inputs["x"], model.get_submodule(name).weight)
    expected = (ours - inputs["y"]).norm() / inputs["y"].norm()
    assert found[name].error == pytest.approx(expected.item(), rel=1e-5)
    assert found["lm_head"].error == 0
    blocks = {layer.name for layer in found.values() if layer.kind == "block"}
    assert blocks == {f"model.layers.{i}.{part}" for i in (0, 1) for part in ("self_attn", "mlp")}
    assert len(found) == 2 * 7 + 1 + 4
    # twice the weight is an error of one, whatever came before
    doubled = copy.deepcopy(base)
    with torch.no_grad():
        doubled.get_submodule(name).weight *= 2
    errors = {layer.name: layer.error for layer in fidelity(doubled, base, IDS, batch_size=6).layers}
    assert {n for n, error in errors.items() if error > 1e-6} == {name, "model.layers.1.mlp"}
    assert errors[name] == errors["model.layers.1.mlp"] == pytest.approx(1)


def test_a_model_and_its_copy():
    base = models.llama()
    found = fidelity(copy.deepcopy(base), base, IDS)
    assert (found.kl.value, found.kl_max, found.top1_agreement.value, found.perplexity_ratio.value) == (
        0,
        0,
        1,
        1,
    )
    assert {layer.error for layer in found.layers} == {0}
    assert found.bits_per_weight == found.base_bits_per_weight == 32
    assert found.notes == ()
    assert not base.model.layers[0].mlp._forward_hooks


def test_quantized_weights_take_the_bits_of_all_they_hold():
    base, low = models.llama(tied=True), models.llama(tied=True)
    quantize_linears(low, AffineConfig(bits=4, group_size=16, modules_to_not_convert=["lm_head"]))
    found = fidelity(low, base, IDS)
    layers = [m for m in low.modules() if type(m).__name__ == "AffineLinear"]
    held = sum(t.nbytes for layer in layers for t in (*layer.parameters(), *layer.buffers()))
    weights = sum(m.weight.numel() for n, m in base.named_modules() if n.endswith("_proj"))
    # the head is the embedding again and counts as such
    assert found.bits_per_weight == pytest.approx(8 * held / weights)
    assert 4 < found.bits_per_weight <= 4 + 64 / 16
    assert found.base_bits_per_weight == 32
    assert found.weight_bytes < found.base_weight_bytes
    assert 0 < found.kl.value < 2
    assert len([layer for layer in found.layers if layer.kind == "linear"]) == 15


def test_a_sparse_model():
    base, sparse = models.llama(), models.llama()
    inputs, name = {}, "model.layers.1.mlp.down_proj"
    base.get_submodule(name).register_forward_hook(lambda m, args, y: inputs.update(x=args[0], y=y))
    with torch.no_grad():
        for module_name, layer in sparse.named_modules():
            if module_name.endswith("_proj"):
                layer.weight.mul_(mask(magnitude_scores(layer.weight), 0.5))
    zeros = [
        (layer.weight == 0).double().mean().item()
        for layer_name, layer in sparse.named_modules()
        if layer_name.endswith("_proj")
    ]
    assert zeros == [0.5] * 14
    found = fidelity(sparse, base, IDS, batch_size=6)
    assert 0 < found.kl.low < found.kl.value < found.kl.high
    assert 0 < found.top1_agreement.value < 1
    assert found.perplexity_ratio.value == pytest.approx(found.perplexity / found.base_perplexity)
    assert found.perplexity_ratio.value != pytest.approx(1, abs=1e-3)
    errors = {layer.name: layer.error for layer in found.layers}
    left = F.linear(inputs["x"], sparse.get_submodule(name).weight)
    assert errors[name] == pytest.approx(((left - inputs["y"]).norm() / inputs["y"].norm()).item(), rel=1e-5)
    assert min(error for layer_name, error in errors.items() if layer_name.endswith("_proj")) > 0.05
    # zeros that are kept as numbers take the room of numbers
    assert found.bits_per_weight == found.base_bits_per_weight == 32
    assert found.weight_bytes == found.base_weight_bytes


def test_adapted_models():
    base = models.llama()
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    adapted = trained(models.llama(), config, 0.1)
    merged = copy.deepcopy(adapted).merge_and_unload()
    found, plain = fidelity(adapted, base, IDS), fidelity(merged, base, IDS)
    assert found.kl.value == pytest.approx(plain.kl.value, rel=1e-3)
    errors = {layer.name: layer.error for layer in plain.layers}
    for layer in found.layers:
        assert layer.error == pytest.approx(errors[layer.name], rel=1e-3, abs=1e-6), layer.name
    assert errors["model.layers.0.self_attn.q_proj"] > 0.01
    # base weights and the adapter's factors
    extra = sum(p.numel() for n, p in adapted.named_parameters() if "lora_" in n)
    weights = sum(m.weight.numel() for m in base.modules() if isinstance(m, torch.nn.Linear))
    assert found.bits_per_weight == pytest.approx(32 * (1 + extra / weights))
    assert not adapted.training


def test_narrower_models_are_compared_by_their_blocks():
    base = models.llama()
    small = copy.deepcopy(base)
    left = {width.name: width.units // 2 for width in widths(small)[:2]}
    narrow(small, left)
    found = fidelity(small, base, IDS)
    errors = {layer.name: layer.error for layer in found.layers}
    assert "model.layers.0.mlp.up_proj" not in errors
    assert "model.layers.1.mlp.up_proj" in errors
    assert min(errors["model.layers.0.mlp"], errors["model.layers.0.self_attn"]) > 0.1
    # what was not cut gives the base's own outputs on the base's own inputs
    assert max(error for name, error in errors.items() if ".1." in name) == 0
    assert len(found.notes) == 1
    assert (
        "model.layers.0.mlp.gate_proj" in found.notes[0]
        or "model.layers.0.self_attn.q_proj" in found.notes[0]
    )
    assert found.bits_per_weight == 32
    assert found.weight_bytes < found.base_weight_bytes


def test_another_order_of_channels_is_the_same_function():
    base = models.llama()
    other = copy.deepcopy(base)
    order = torch.randperm(48, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        mlp = other.model.layers[0].mlp
        for layer in (mlp.gate_proj, mlp.up_proj):
            layer.weight.copy_(layer.weight[order])
        mlp.down_proj.weight.copy_(mlp.down_proj.weight[:, order])
    found = fidelity(other, base, IDS)
    errors = {layer.name: layer.error for layer in found.layers}
    assert found.kl.value < 1e-6
    assert errors["model.layers.0.mlp"] < 1e-5
    assert errors["model.layers.0.mlp.up_proj"] > 0.5


@pytest.mark.parametrize("kind", ["gpt2", "qwen2", "phi3"])
def test_other_families(kind):
    base = decoder(kind)
    found = fidelity(noisy(base), base, models.tokens(3, 9))
    assert found.kl.value > 0
    assert {"linear", "block"} == {layer.kind for layer in found.layers}


def test_tokens_that_are_excluded_add_nothing():
    left, right = torch.tensor([[[0.0, 0.0, -math.inf]]]), torch.tensor([[[0.0, math.log(3), -math.inf]]])
    found = module._tokens(left, right, torch.tensor([[1]]))
    assert found["kl"].item() == pytest.approx(0.25 * math.log(0.5) + 0.75 * math.log(1.5))
    assert found["loss"].item() == pytest.approx(math.log(2))


def test_what_does_not_compare():
    base, twin = models.llama(), models.llama()
    with pytest.raises(ConfigError, match="model and base are one model in memory"):
        fidelity(trained(base), base, IDS)
    with pytest.raises(ConfigError, match="sequences of up to 64 tokens, not 65"):
        fidelity(twin, base, models.tokens(1, 65))
    with pytest.raises(ConfigError, match="must be"):
        fidelity(twin, base, models.tokens(2, 1))
    with pytest.raises(ConfigError, match="ids up to 67, the models know 67"):
        fidelity(twin, base, torch.full((2, 5), 67))
    other = decoder("llama", vocab_size=80)
    with pytest.raises(ConfigError, match="model knows 80 tokens and base 67"):
        fidelity(other, base, IDS)
    broken = models.llama()
    with torch.no_grad():
        broken.lm_head.weight[3] = math.nan
    with pytest.raises(DataError, match="not finite"):
        fidelity(broken, base, IDS)
