"""GPTQ, AWQ and compressed-tensors folders become folders of ours with the same weights."""

from __future__ import annotations

import json
import os
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests import models_for_tests as models
from tests.cli.adapter_files import tokenizer
from tests.compress.folder_cases import Stop, stop_at
from tests.quant import published
from transformers import AutoModelForCausalLM

from modicum import AffineConfig, QALoraConfig
from modicum.compress.export import export_model
from modicum.compress.import_quantized import import_quantized, quantization_of
from modicum.compress.merge import merge_to_folder
from modicum.errors import ConfigError, CorruptAdapterError
from modicum.models.loading import load_base, load_tokenizer
from modicum.quant.affine import AffineLinear

WRITERS = {
    "gptq": published.gptq,
    "gptq 3 bits, second format": lambda folder, model: published.gptq(folder, model, 3, version=2),
    "gptq symmetric": lambda folder, model: published.gptq(folder, model, 8, symmetric=True),
    "awq": published.awq,
    "compressed-tensors": published.compressed_tensors,
    "compressed-tensors rows": lambda folder, model: published.compressed_tensors(folder, model, 8, None),
    "compressed-tensors int8": lambda folder, model: published.compressed_tensors(
        folder, model, 8, packed=False
    ),
}


def settings_of(folder, **changes) -> None:
    """Change the quantization_config of a folder."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"] |= changes
    file.write_text(json.dumps(config))


def dense(written: dict[str, torch.Tensor], dtype: torch.dtype):
    """The test model with the weights that were written, in float32."""
    model = published.llama(torch.float32)
    model.load_state_dict(published.llama(dtype).state_dict())
    for name, weight in written.items():
        model.get_submodule(name).weight.data = weight
    return model


@pytest.mark.parametrize("kind", WRITERS)
def test_the_imported_model_is_the_one_that_was_written(tmp_path, kind):
    written = WRITERS[kind](tmp_path / "theirs", published.llama())
    (tmp_path / "theirs" / "tokenizer_config.json").write_text("{}")
    seen = []
    tried = import_quantized(tmp_path / "theirs", tmp_path / "ours", dry_run=True)
    assert not list(tmp_path.glob("ours*"))
    report = import_quantized(
        tmp_path / "theirs", tmp_path / "ours", progress=lambda *step: seen.append(step)
    )
    assert report.layers == len(written) == len(seen) == 14
    assert (report.bits, report.bytes_after, report.notes) == (tried.bits, tried.bytes_after, ())
    assert not list(tmp_path.glob("*.partial"))
    assert (tmp_path / "ours" / "tokenizer_config.json").is_file()
    stored = load_file(tmp_path / "ours" / "model.safetensors")
    assert sum(tensor.nbytes for tensor in stored.values()) == report.bytes_after
    model = load_base(str(tmp_path / "ours"), dtype="float32")
    for name, weight in written.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, AffineLinear)
        assert torch.equal(layer.dequantized(), weight), name
    ids = models.tokens()
    with torch.no_grad():
        torch.testing.assert_close(
            model(ids).logits, dense(written, torch.bfloat16)(ids).logits, rtol=1e-4, atol=1e-5
        )


def test_what_is_imported_can_be_saved_and_loaded_again(tmp_path):
    written = published.gptq(tmp_path / "theirs", published.llama())
    import_quantized(tmp_path / "theirs", tmp_path / "ours")
    AutoModelForCausalLM.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    for name, weight in written.items():
        assert torch.equal(again.get_submodule(name).dequantized(), weight)


@pytest.mark.parametrize("kind", ["gptq 3 bits, second format", "gptq symmetric", "compressed-tensors"])
def test_an_adapter_merges_into_an_imported_base_exactly(tmp_path, kind):
    WRITERS[kind](tmp_path / "theirs", published.llama())
    tokenizer().save_pretrained(tmp_path / "theirs")
    import_quantized(tmp_path / "theirs", tmp_path / "ours")
    config = QALoraConfig(r=4, pool=32, init_weights=False, task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(load_base(str(tmp_path / "ours"), dtype="float32"), config).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    texts = ["w1 w2 w3 w4 w5", "w3 w9 w2 w7"]
    done = merge_to_folder(str(tmp_path / "ours"), tmp_path / "adapter", tmp_path / "merged", texts=texts)
    assert done.exact
    assert done.report.effect > 0.01
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "merged"))
    frozen = [key for key in before if key.endswith((".codes", ".scales"))]
    assert len(frozen) == 2 * 14
    assert all(torch.equal(before[key], after[key]) for key in frozen)
    merged, ids = load_base(str(tmp_path / "merged"), dtype="float32"), models.tokens()
    with torch.no_grad():
        found, wanted = merged(ids).logits, adapted(ids).logits
    assert (found - wanted).norm() < 1e-5 * wanted.norm()


def test_what_was_exported_comes_back(tmp_path):
    """Out through the exporter and in again: the exporter knows nothing of the reader."""
    load_base("embedded").save_pretrained(tmp_path / "dense")
    config = AffineConfig(bits=3, group_size=32, zero_point="integer", scale_dtype="float16")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=config)
    export_model(model, load_tokenizer("embedded"), tmp_path / "theirs", "compressed-tensors")
    report = import_quantized(tmp_path / "theirs", tmp_path / "ours")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, AffineLinear)}
    assert report.bits == {3: len(layers)}
    for name, layer in layers.items():
        assert torch.equal(again.get_submodule(name).unpacked_codes(), layer.unpacked_codes()), name
        assert torch.equal(again.get_submodule(name).dequantized(), layer.dequantized()), name


def test_layers_may_have_different_widths(tmp_path):
    """One group of the configuration for the attention, one for the rest, by patterns and by class."""
    model = published.llama()
    four = published.compressed_tensors(tmp_path / "four", model, 4)
    eight = published.compressed_tensors(tmp_path / "eight", model, 8, None, symmetric=True)
    tensors = load_file(tmp_path / "four" / "model.safetensors")
    other = load_file(tmp_path / "eight" / "model.safetensors")
    tensors = {key: value for key, value in tensors.items() if "self_attn" not in key}
    tensors |= {key: value for key, value in other.items() if "self_attn" in key}
    save_file(tensors, tmp_path / "four" / "model.safetensors")
    groups = [
        json.loads((tmp_path / name / "config.json").read_text())["quantization_config"]["config_groups"][
            "group_0"
        ]
        for name in ("four", "eight")
    ]
    groups[1]["targets"] = ["re:.*self_attn.*"]
    groups[1]["input_activations"] = {"num_bits": 8, "dynamic": True}
    settings_of(tmp_path / "four", config_groups={"group_0": groups[0], "group_1": groups[1]})
    report = import_quantized(tmp_path / "four", tmp_path / "ours")
    assert report.bits == {4: 6, 8: 8}
    assert "activations" in report.notes[0]
    ours = load_base(str(tmp_path / "ours"))
    for name in four:
        wanted = eight[name] if "self_attn" in name else four[name]
        assert torch.equal(ours.get_submodule(name).dequantized(), wanted), name


def test_settings_of_older_tools_are_found(tmp_path):
    """AutoGPTQ's quantize_config.json beside a weights file of any name."""
    written = published.gptq(tmp_path, published.llama())
    config = json.loads((tmp_path / "config.json").read_text())
    settings = config.pop("quantization_config")
    for key in ("quant_method", "checkpoint_format"):
        del settings[key]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert quantization_of(tmp_path) is None
    (tmp_path / "quantize_config.json").write_text(json.dumps(settings))
    (tmp_path / "model.safetensors").rename(tmp_path / "gptq_model-4bit-32g.safetensors")
    assert import_quantized(tmp_path, tmp_path / "ours").quant_method == "gptq"
    model = load_base(str(tmp_path / "ours"))
    assert all(
        torch.equal(model.get_submodule(name).dequantized(), weight) for name, weight in written.items()
    )


def test_what_cannot_be_taken_over_is_refused_and_nothing_is_written(tmp_path):
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    with pytest.raises(ConfigError, match="no checkpoint quantized by gptq, awq"):
        import_quantized(tmp_path, ours)
    shuffled = torch.randperm(64, generator=torch.Generator().manual_seed(0)) // 32
    published.gptq(theirs, published.llama(), g_idx=shuffled)
    with pytest.raises(ConfigError, match=r"act-order.*layers.0.mlp.gate_proj.* and 9 more"):
        import_quantized(theirs, ours)
    published.awq(theirs, published.llama())
    settings_of(theirs, version="gemv")
    with pytest.raises(ConfigError, match="its format is 'gemv'; gemm"):
        import_quantized(theirs, ours)
    published.compressed_tensors(theirs, published.llama())
    settings_of(theirs, sparsity_config={"format": "sparse-24-bitmask"}, format="nvfp4-pack-quantized")
    with pytest.raises(ConfigError, match=r"its format is 'nvfp4.*stored sparse"):
        import_quantized(theirs, ours)
    assert not list(tmp_path.glob("ours*"))


def test_damaged_and_foreign_tensors_are_refused(tmp_path):
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    published.awq(theirs, published.llama())
    file = theirs / "model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "model.layers.0.mlp.act.scales": torch.ones(4)}, file)
    with pytest.raises(ConfigError, match=r"mlp.act.scales"):
        import_quantized(theirs, ours)
    save_file({key.replace("q_proj", "query"): value for key, value in tensors.items()}, file)
    with pytest.raises(ConfigError, match=r"layers.0.self_attn.query"):
        import_quantized(theirs, ours)
    save_file({key: value for key, value in tensors.items() if "up_proj.scales" not in key}, file)
    with pytest.raises(ConfigError, match="lacks the tensor 'scales'"):
        import_quantized(theirs, ours)
    save_file(tensors, file)
    os.truncate(file, 5000)
    with pytest.raises(CorruptAdapterError):
        import_quantized(theirs, ours)
    assert not list(tmp_path.glob("ours*"))


@pytest.mark.parametrize("layer", [3, 14])
def test_an_import_that_is_cut_leaves_nothing(tmp_path, layer):
    published.awq(tmp_path / "theirs", published.llama())
    with pytest.raises(Stop):
        import_quantized(tmp_path / "theirs", tmp_path / "ours", progress=stop_at(layer))
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


def test_an_existing_output_is_kept_unless_overwritten(tmp_path):
    published.awq(tmp_path / "theirs", published.llama())
    (tmp_path / "ours").mkdir()
    Path(tmp_path / "ours" / "mine").write_text("x")
    with pytest.raises(ConfigError, match="exists already"):
        import_quantized(tmp_path / "theirs", tmp_path / "ours")
    import_quantized(tmp_path / "theirs", tmp_path / "ours", overwrite=True)
    assert not (tmp_path / "ours" / "mine").exists()
