"""Streaming a checkpoint: names and orientation of the model, one matrix at a time, clear errors."""

from __future__ import annotations

import gc
import json
import weakref

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tests.models_for_tests import bert, gpt2, llama

from modicum.errors import ConfigError, CorruptAdapterError, TargetError
from modicum.models.checkpoint import iter_weights, target_shapes
from modicum.quant.base import format_of

MODELS = {"llama": (llama, "causal_lm"), "gpt2": (gpt2, "causal_lm"), "bert": (bert, "seq_cls")}


def expected(model, names):
    return {name: format_of(model.get_submodule(name)).weight(model.get_submodule(name)) for name in names}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("shard", ["10GB", "20KB"])
def test_names_and_weights_are_those_of_the_model(tmp_path, kind, shard):
    make, task = MODELS[kind]
    model = make()
    model.save_pretrained(tmp_path, max_shard_size=shard)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard == "20KB")
    found = dict(iter_weights(tmp_path))
    peft_task = {"causal_lm": "CAUSAL_LM", "seq_cls": "SEQ_CLS"}[task]
    adapted = get_peft_model(
        make(), LoraConfig(target_modules="all-linear", task_type=peft_task, fan_in_fan_out=kind == "gpt2")
    )
    assert {f"base_model.model.{name}" for name in found} == {
        name.removesuffix(".lora_A.default")
        for name, _ in adapted.named_modules()
        if name.endswith(".lora_A.default")
    }
    for name, weight in expected(model, found).items():
        assert torch.equal(found[name], weight)


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], r".*\.1\..*_proj", "all-linear"])
def test_targets_match_as_in_peft(tmp_path, targets):
    llama().save_pretrained(tmp_path)
    adapted = get_peft_model(llama(), LoraConfig(target_modules=targets))
    assert {f"base_model.model.{name}" for name, _ in iter_weights(tmp_path, targets)} == {
        name.removesuffix(".lora_A.default")
        for name, _ in adapted.named_modules()
        if name.endswith(".lora_A.default")
    }


def test_prefixes_of_another_task_are_found(tmp_path):
    model = bert()
    model.save_pretrained(tmp_path)
    as_base = dict(iter_weights(tmp_path, ["query"], task="base"))
    assert set(as_base) == {f"encoder.layer.{i}.attention.self.query" for i in range(2)}
    model.bert.save_pretrained(tmp_path / "base")
    as_classifier = dict(iter_weights(tmp_path / "base", ["query"], task="seq_cls"))
    assert set(as_classifier) == {f"bert.encoder.layer.{i}.attention.self.query" for i in range(2)}
    for a, b in zip(as_base.values(), as_classifier.values(), strict=True):
        assert torch.equal(a, b)


def test_the_stored_dtype_is_kept(tmp_path):
    llama(torch.bfloat16).save_pretrained(tmp_path)
    assert {weight.dtype for _, weight in iter_weights(tmp_path)} == {torch.bfloat16}


def test_one_matrix_is_alive_at_a_time(tmp_path):
    llama().save_pretrained(tmp_path, max_shard_size="20KB")
    alive: list[weakref.ref] = []
    for _, weight in iter_weights(tmp_path):
        alive.append(weakref.ref(weight))
        del weight
        gc.collect()
        # the stream itself still holds the one it handed out last
        assert sum(ref() is not None for ref in alive) <= 1
    assert len(alive) == 14


def test_shapes_need_no_weights(tmp_path):
    model = gpt2()
    model.config.save_pretrained(tmp_path)
    shapes = target_shapes(tmp_path, ["c_attn"], task="causal_lm")
    assert shapes == {f"transformer.h.{i}.attn.c_attn": (96, 32) for i in range(2)}


def test_what_is_wrong_with_a_folder_is_said(tmp_path):
    model = llama()
    with pytest.raises(ConfigError, match="no model"):
        list(iter_weights(tmp_path / "absent"))
    with pytest.raises(ConfigError, match="hf download"):
        list(iter_weights("someone/some-model"))
    model.config.architectures = ["LlamaForCausalLM"]
    model.config.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="save_pretrained"):
        list(iter_weights(tmp_path))
    model.save_pretrained(tmp_path)
    with pytest.raises(TargetError, match="q_prj"):
        list(iter_weights(tmp_path, ["q_prj"]))
    file = tmp_path / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-50])
    with pytest.raises(CorruptAdapterError, match="copy"):
        list(iter_weights(tmp_path))
    file.write_bytes(whole)
    tensors = load_file(file)
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ConfigError, match=r"layers\.0\.mlp\.up_proj"):
        list(iter_weights(tmp_path))
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(3, 3)
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(CorruptAdapterError, match="mixes two models"):
        list(iter_weights(tmp_path))


def test_a_missing_shard_is_named(tmp_path):
    llama().save_pretrained(tmp_path, max_shard_size="20KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    lost = sorted(set(index["weight_map"].values()))[1]
    (tmp_path / lost).unlink()
    with pytest.raises(ConfigError, match=lost):
        list(iter_weights(tmp_path))
