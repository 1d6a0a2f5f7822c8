"""What is said of a model folder: counts, zeros and fingerprints, against the model itself."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests import models_for_tests as models

from modicum.errors import ConfigError
from modicum.quant.affine import AffineLinear, fold
from modicum.quant.huggingface import AffineConfig, AffineQuantizer, quantize_linears
from modicum.store import model_inspection
from modicum.store.inspection import inspect

MAKERS = {
    "llama": models.llama,
    "tied": lambda: models.llama(tied=True),
    "gpt2": models.gpt2,
    "bert": models.bert,
}


def saved(model, folder, **options):
    model.save_pretrained(folder, **options)
    return folder


def rewrite(folder, **values):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.parametrize("name", MAKERS)
def test_counts_are_those_of_the_model(name, tmp_path):
    model = MAKERS[name]()
    found = inspect(saved(model, tmp_path))
    assert (found.kind, found.state) == ("model folder", "ok")
    assert found.model_class == type(model).__name__
    assert found.parameters == sum(p.numel() for p in model.parameters())
    linear = {n: m for n, m in model.named_modules() if type(m).__name__ in ("Linear", "Conv1D")}
    if name in ("tied", "gpt2"):
        del linear["lm_head"]
    assert found.linear_parameters == sum(m.weight.numel() for m in linear.values())
    assert {layer.name.removesuffix(".weight").removeprefix("transformer.") for layer in found.layers} == {
        n.removeprefix("transformer.") for n in linear
    }
    assert found.dtypes == ("float32",)
    assert found.bytes == (tmp_path / "model.safetensors").stat().st_size
    assert (found.base_model, found.sub_network) == (None, None)


def test_a_head_that_is_stored_although_it_is_tied_counts_once(tmp_path):
    model = models.llama(tied=True)
    once = inspect(saved(model, tmp_path))
    state = load_file(tmp_path / "model.safetensors")
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    twice = inspect(tmp_path)
    assert twice.tensors == once.tensors + 1
    assert (twice.parameters, twice.linear_parameters) == (once.parameters, once.linear_parameters)
    state["lm_head.weight"][0, 0] += 1
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    assert inspect(tmp_path).parameters == once.parameters + 67 * 32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_zeros_are_counted_layer_by_layer(dtype, tmp_path):
    model = models.llama(dtype)
    shares = {}
    with torch.no_grad():
        for index, (name, module) in enumerate(model.named_modules()):
            if isinstance(module, torch.nn.Linear):
                module.weight.view(-1)[: index * 7] = 0
                module.weight.view(-1)[:2] *= -1  # -0 is zero too
                shares[f"{name}.weight"] = float((module.weight == 0).float().mean())
    found = inspect(saved(model, tmp_path))
    assert {layer.name: pytest.approx(layer.sparsity) for layer in found.layers} == shares
    assert (found.least_sparse, found.sparsest) == pytest.approx((min(shares.values()), max(shares.values())))
    linear = [m.weight for m in model.modules() if isinstance(m, torch.nn.Linear)]
    zeros = sum(int((w == 0).sum()) for w in linear)
    assert found.sparsity == pytest.approx(zeros / sum(w.numel() for w in linear))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("zero_point", ["integer", "none", "float"])
def test_zeros_of_quantized_layers_are_those_of_the_weights_they_decode_to(
    bits, zero_point, tmp_path, monkeypatch
):
    monkeypatch.setattr(model_inspection, "_PART", 300)  # several panels of rows in each layer
    model = models.llama()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[:20] = 0
        model.model.layers[1].mlp.up_proj.weight[:, ::2] = 0
    config = AffineConfig(
        bits=bits, block=[2, 8], zero_point=zero_point, layers={"model.layers.0.mlp.gate_proj": {"block": [1, 16]}}
    )  # fmt: skip
    low = quantized(model, config)
    found = inspect(saved(low, tmp_path))
    assert found.kind == "model folder, quantized by modicum"
    assert found.parameters == sum(p.numel() for p in models.llama().parameters())
    assert found.linear_parameters == sum(
        m.weight.numel() for m in models.llama().modules() if isinstance(m, torch.nn.Linear)
    )
    layers = {layer.name: layer for layer in found.layers}
    for name, module in low.named_modules():
        if isinstance(module, AffineLinear):
            assert layers[name].sparsity == pytest.approx(float((module.dequantized() == 0).float().mean()))
            assert (layers[name].shape, layers[name].dtype) == (tuple(module.weight.shape), f"{bits} bit")
    if zero_point != "float":
        assert layers["model.layers.1.mlp.up_proj"].sparsity >= 0.5


def quantized(model, config):
    quantize_linears(model, config)
    model.config.quantization_config = AffineConfig.of(model)
    model.hf_quantizer = AffineQuantizer(model.config.quantization_config)
    model.is_quantized = True
    return model


def test_folded_updates_are_seen(tmp_path):
    low = quantized(models.llama(), AffineConfig(bits=4, block=[1, 16], zero_point="none"))
    before = inspect(saved(low, tmp_path / "a"))
    name = "model.layers.0.mlp.up_proj"
    fold(low.get_submodule(name), torch.full((12, 8), 1e-7), (4, 4))
    after = inspect(saved(low, tmp_path / "b"))
    assert after.state == "ok"
    share = {layer.name: layer.sparsity for layer in before.layers}[name]
    assert share > 0
    assert {layer.name: layer.sparsity for layer in after.layers}[name] == 0
    assert before.fingerprint != after.fingerprint


def test_the_fingerprint_is_of_the_weights(tmp_path):
    first = inspect(saved(models.llama(), tmp_path / "a"))
    assert len(first.fingerprint) == 32
    # how they are spread over files does not matter
    shards = inspect(saved(models.llama(), tmp_path / "b", max_shard_size="20KB"))
    assert len(list((tmp_path / "b").glob("*.safetensors"))) > 2
    assert shards.fingerprint == first.fingerprint
    assert shards.parameters == first.parameters
    # one bit does, even one that bfloat16 does not have
    state = load_file(tmp_path / "a" / "model.safetensors")
    weight = state["model.layers.1.mlp.up_proj.weight"]
    weight[3, 5] = torch.nextafter(weight[3, 5], torch.tensor(9.0))
    save_file(state, tmp_path / "a" / "model.safetensors", {"format": "other"})
    assert inspect(tmp_path / "a").fingerprint != first.fingerprint
    # another name is another model, and so are two tensors exchanged
    state = models.llama().state_dict()
    renamed = {name.replace("lm_head", "lm_heap"): value for name, value in state.items()}
    save_file(renamed, tmp_path / "a" / "model.safetensors", {"format": "pt"})
    assert inspect(tmp_path / "a").fingerprint != first.fingerprint
    up, gate = (f"model.layers.0.mlp.{name}_proj.weight" for name in ("up", "gate"))
    state = models.llama().state_dict()
    state[up], state[gate] = state[gate].clone(), state[up].clone()
    save_file(dict(state), tmp_path / "a" / "model.safetensors", {"format": "pt"})
    assert inspect(tmp_path / "a").fingerprint != first.fingerprint


def test_an_extracted_model_says_which_sub_network_it_is(tmp_path):
    saved(models.llama(), tmp_path)
    sub = {"widths": {"model.layers.0.mlp": 24}, "choices": {"mlp": 24}, "ranks": {"a": 4, "b": 4, "c": 2}}
    rewrite(tmp_path, modicum={"sub_network": sub, "base_model": "big"})
    found = inspect(tmp_path)
    assert found.kind == "model folder, sub-network"
    assert found.base_model == "big"
    active = found.sub_network
    assert (active.widths, active.choices, active.ranks) == (sub["widths"], sub["choices"], {2: 1, 4: 2})
    rewrite(
        tmp_path, modicum={"sub_network": sub | {"widths": {"model.layers.0.mlp": 25}}, "base_model": "big"}
    )
    assert inspect(tmp_path).sub_network.digest != active.digest


def cut_file(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-9])


def nan(folder):
    state = load_file(folder / "model.safetensors")
    state["model.norm.weight"][3] = float("nan")
    save_file(state, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (cut_file, "damaged"),
        (nan, "NaN or infinite values in model.norm.weight"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b""), "damaged"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json cannot be read"),
        (lambda folder: (folder / "config.json").write_text("[]"), "config.json cannot be read"),
        (lambda folder: rewrite(folder, modicum={"sub_network": {"ranks": 3}}), "config.json cannot be read"),
    ],
)
def test_damage_is_a_state(damage, told, tmp_path):
    damage(saved(models.llama(), tmp_path))
    assert told in inspect(tmp_path).state


def test_missing_shards_and_tensors(tmp_path):
    saved(models.llama(), tmp_path, max_shard_size="20KB")
    index = tmp_path / "model.safetensors.index.json"
    promised = json.loads(index.read_text())
    promised["weight_map"]["model.extra.weight"] = "model-00001-of-00005.safetensors"
    names = sorted(set(promised["weight_map"].values()))
    promised["weight_map"]["model.extra.weight"] = names[0]
    index.write_text(json.dumps(promised))
    assert "model.extra.weight missing" in inspect(tmp_path).state
    (tmp_path / names[-1]).unlink()
    assert f"{names[-1]} missing" in inspect(tmp_path).state
    index.write_text("{")
    assert "index.json cannot be read" in inspect(tmp_path).state


def test_layers_that_are_not_stored_as_the_configuration_says(tmp_path):
    saved(quantized(models.llama(), AffineConfig(bits=4, group_size=16)), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    for wrong in ({"bits": 8}, {"block": [1, 8]}, {"zero_point": "none"}, {"bits": 5}, {"block": 3}):
        rewrite(tmp_path, quantization_config=config | wrong)
        state = inspect(tmp_path).state
        assert "stored as" in state, wrong
        assert "config.json says" in state, wrong


def test_foreign_formats_are_not_counted(tmp_path):
    saved(models.llama(), tmp_path)
    rewrite(tmp_path, quantization_config={"quant_method": "gptq", "bits": 4})
    found = inspect(tmp_path)
    assert (found.kind, found.state) == ("model folder, quantized by gptq", "ok")
    assert (found.parameters, found.linear_parameters, found.layers) == (None, None, ())
    assert found.fingerprint


def test_a_folder_without_weights(tmp_path):
    models.llama().config.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="configuration but no model"):
        inspect(tmp_path)


def test_dense_models_need_no_torch(tmp_path):
    saved(models.llama(torch.bfloat16), tmp_path)
    code = (
        "import sys\nfrom modicum.store.inspection import inspect\n"
        f"assert inspect({str(tmp_path)!r}).state == 'ok'\n"
        "print([m for m in ('torch', 'transformers', 'peft') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
