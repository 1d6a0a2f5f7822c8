"""`modicum export`: one adapter in three formats, and whole models in those of other engines."""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel
from tests import models_for_tests as models
from tests.cli.adapter_files import make_files, run, tokenizer, trained
from transformers import LlamaForCausalLM

from modicum.adapters.elastic import SubNetwork, Switch
from modicum.methods.elastic_lora import ElasticLoraConfig
from modicum.quant.huggingface import AffineConfig
from modicum.store.files import load_adapter


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return make_files(tmp_path_factory.mktemp("files"))


@torch.no_grad()
def logits(model):
    return model(input_ids=models.tokens()).logits


@pytest.mark.parametrize("fmt", ["lora", "modicum", "peft"])
@pytest.mark.parametrize("source", ["record", "peft"])
def test_every_format_gives_the_same_model(files, fmt, source, tmp_path, capsys):
    out = tmp_path / "out"
    words = [
        "export",
        "--model",
        files.base,
        "--adapter",
        getattr(files, source),
        "--format",
        fmt,
        "--output",
        out,
    ]
    tried = run(capsys, *words, "--dry-run", "--json")
    assert tried.code == 0, tried.out
    assert list(tmp_path.iterdir()) == []
    done = run(capsys, *words, "--json")
    assert done.code == 0, done.out
    assert (tried.json["bytes"], tried.json["dry_run"]) == (done.json["bytes"], True)
    place = done.json["output"]
    loaded = (
        PeftModel.from_pretrained(models.llama(), place)
        if fmt == "lora"
        else load_adapter(models.llama(), place)
    )
    torch.testing.assert_close(logits(loaded), files.wanted, rtol=1e-5, atol=2e-5)
    again = run(capsys, *words)
    assert again.code == 1
    assert "exists already" in again.err
    assert run(capsys, *words, "--overwrite").code == 0


def test_faults_are_named(files, tmp_path, capsys):
    words = ["export", "--model", files.base, "--adapter", files.record, "--output", tmp_path / "out"]
    assert "no format 'lara' (did you mean 'lora'?)" in run(capsys, *words, "--format", "lara").err
    words[4] = files.folder / "absent.modicum"
    assert "no adapter at" in run(capsys, *words).err
    words[4] = files.lora
    assert "'peft' instead of 'lora'" in run(capsys, *words).err
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def low_bit(tmp_path_factory):
    """Folders of two quantized models by their zero-points, with a tokenizer."""
    folder = tmp_path_factory.mktemp("low_bit")
    dense = folder / "dense"
    models.llama().save_pretrained(dense)
    tokenizer().save_pretrained(dense)
    for zero_point in ("integer", "float"):
        config = AffineConfig(bits=4, group_size=16, zero_point=zero_point)
        LlamaForCausalLM.from_pretrained(dense, quantization_config=config).save_pretrained(
            folder / zero_point
        )
        tokenizer().save_pretrained(folder / zero_point)
    return folder


def test_a_model_on_an_integer_grid(low_bit, tmp_path, capsys):
    words = ["export", "--model", low_bit / "integer", "--format", "gptq", "--output", tmp_path / "out"]
    tried = run(capsys, *words, "--dry-run", "--json")
    assert (tried.code, tried.json["exact"], tried.json["files"]) == (0, True, {}), tried.out
    assert list(tmp_path.iterdir()) == []
    done = run(capsys, *words, "--json")
    assert (done.code, done.json["max_weight_error"]) == (0, 0.0), done.out
    assert done.json["files"] == {path.name: path.stat().st_size for path in (tmp_path / "out").iterdir()}
    assert "exists already" in run(capsys, *words).err
    shown = run(capsys, *words, "--overwrite")
    assert shown.code == 0
    assert "float16 of scales" in shown.out
    assert "0.000% at most" in shown.out


def test_a_model_off_the_integer_grid(low_bit, tmp_path, capsys):
    words = [
        "export",
        "--model",
        low_bit / "float",
        "--format",
        "compressed-tensors",
        "--output",
        tmp_path / "out",
    ]
    refused = run(capsys, *words)
    assert refused.code == 1
    assert "14 of 14 low-bit layers" in refused.err
    assert "--allow-inexact" in refused.err
    assert list(tmp_path.iterdir()) == []
    done = run(capsys, *words, "--allow-inexact", "--json")
    assert done.code == 0, done.out
    assert not done.json["exact"]
    assert f"{done.json['max_weight_error']:.2%}" in refused.err
    assert done.json["worst_layers"][0]["weight_error"] == done.json["max_weight_error"]


def test_adapters_and_models_are_not_confused(files, tmp_path, capsys):
    words = ["export", "--model", files.base, "--output", tmp_path / "out"]
    assert "name one with --adapter" in run(capsys, *words).err
    both = run(capsys, *words, "--adapter", files.record, "--format", "gguf")
    assert both.code == 1
    assert f"first `modicum merge --model {files.base} --adapter {files.record} --output MERGED`" in both.err
    assert "no format 'ggf' (did you mean 'gguf'" in run(capsys, *words, "--format", "ggf").err
    assert "quantize it first" in run(capsys, *words, "--format", "gptq").err
    assert list(tmp_path.iterdir()) == []


def test_a_sub_network_is_chosen_by_a_file(files, tmp_path, capsys):
    model = trained(models.llama(), ElasticLoraConfig(r=4, alpha=6.0))
    model.save_pretrained(tmp_path / "adapter")
    name = "model.layers.0.self_attn.q_proj"
    chosen = SubNetwork(ranks={name: 2})
    (tmp_path / "small.json").write_text(json.dumps(chosen.as_dict()))
    words = ["export", "--model", files.base, "--adapter", tmp_path / "adapter", "--format", "lora"]
    done = run(
        capsys, *words, "--output", tmp_path / "lora", "--sub-network", tmp_path / "small.json", "--json"
    )
    assert done.code == 0, done.out
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert list(config["rank_pattern"].values()) == [2]
    assert list(config["alpha_pattern"].values()) == [3]
    Switch(model).activate(chosen)
    lora = PeftModel.from_pretrained(models.llama(), tmp_path / "lora")
    torch.testing.assert_close(logits(lora), logits(model), rtol=1e-5, atol=2e-5)
    # a configuration that has one serves too
    model.save_pretrained(tmp_path / "active")
    again = [
        *words,
        "--output",
        tmp_path / "again",
        "--sub-network",
        tmp_path / "active" / "adapter_config.json",
    ]
    assert run(capsys, *again).code == 0
    assert (
        json.loads((tmp_path / "again" / "adapter_config.json").read_text())["rank_pattern"]
        == config["rank_pattern"]
    )


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{", "no sub-network can be read"),
        ("[1]", "names no ranks"),
        ('{"choices": {"g": 1}}', "names no ranks"),
        ('{"ranks": {"model.layers.0.self_attn.q_prj": 2}}', "carries no adapter"),
        ('{"ranks": {"model.layers.0.self_attn.q_proj": 9}}', "rank 9"),
        ('{"widths": {"model.layers.0.mlp": 8}}', "modicum extract"),
    ],
)
def test_files_without_a_fitting_sub_network_are_refused(files, text, told, tmp_path, capsys):
    trained(models.llama(), ElasticLoraConfig(r=4)).save_pretrained(tmp_path / "adapter")
    (tmp_path / "small.json").write_text(text)
    words = [
        "--adapter",
        tmp_path / "adapter",
        "--output",
        tmp_path / "lora",
        "--sub-network",
        tmp_path / "small.json",
    ]
    done = run(capsys, "export", "--model", files.base, *words)
    assert done.code == 1
    assert told in done.err
    assert not (tmp_path / "lora").exists()


def test_a_sub_network_needs_an_adapter_that_has_some(files, tmp_path, capsys):
    (tmp_path / "small.json").write_text('{"ranks": {"a": 2}}')
    words = [
        "export",
        "--model",
        files.base,
        "--output",
        tmp_path / "out",
        "--sub-network",
        tmp_path / "small.json",
    ]
    assert "--adapter" in run(capsys, *words, "--format", "gguf").err
    assert "not elastic" in run(capsys, *words, "--adapter", files.lora, "--format", "peft").err
