"""`modicum import`: published LoRA-XS checkpoints become adapters of ours, quantized models quantized models."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tests import models_for_tests as models
from tests.cli.adapter_files import run
from tests.quant import published
from tests.store.test_files import logits
from tests.store.test_published import LLAMA, checkpoint, with_updates

from modicum.adapters.basis import BasisCache
from modicum.models.loading import load_base
from modicum.store.files import load_adapter


def test_import(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("MODICUM_CACHE", str(tmp_path / "cache"))
    models.llama().save_pretrained(tmp_path / "base")
    updates = checkpoint(tmp_path / "c", models.llama(), LLAMA, "old PEFT")
    words = ["import", tmp_path / "c", "--model", tmp_path / "base", "--output", tmp_path / "mine",
             "--basis", tmp_path / "basis.safetensors"]  # fmt: skip
    tried = run(capsys, *words, "--dry-run", "--json")
    assert tried.code == 0, tried.out
    assert not (tmp_path / "mine.modicum").exists()
    assert not (tmp_path / "basis.safetensors").exists()
    assert BasisCache().info().entries == 0
    shown = run(capsys, *words)
    assert shown.code == 0, shown.err
    for text in ("14", "224", "mine.modicum", "basis fingerprint"):
        assert text in shown.out
    loaded = load_adapter(models.llama(), tmp_path / "mine.modicum")
    torch.testing.assert_close(
        logits(loaded), logits(with_updates(models.llama(), updates)), rtol=1e-4, atol=1e-4
    )
    assert Path(tmp_path / "basis.safetensors").is_file()


def test_a_plain_lora_is_refused(tmp_path, capsys):
    models.llama().save_pretrained(tmp_path / "base")
    checkpoint(tmp_path / "c", models.llama(), ())
    (tmp_path / "c" / "adapter_config.json").write_text(json.dumps({"r": 4}))
    shown = run(
        capsys, "import", tmp_path / "c", "--model", tmp_path / "base", "--output", tmp_path / "m", "--json"
    )
    assert shown.code == 1
    assert "no LoRA-XS checkpoint" in shown.json["error"]


def test_an_adapter_needs_its_base_model(tmp_path, capsys):
    checkpoint(tmp_path / "c", models.llama(), LLAMA)
    shown = run(capsys, "import", tmp_path / "c", "--output", tmp_path / "m", "--json")
    assert shown.code == 1
    assert "needs --model" in shown.json["error"]


def test_a_quantized_model_is_recognised(tmp_path, capsys):
    written = published.gptq(tmp_path / "theirs", published.llama())
    words = ["import", tmp_path / "theirs", "--output", tmp_path / "ours"]
    tried = run(capsys, *words, "--dry-run", "--json")
    assert (tried.json["layers"], tried.json["quant_method"]) == (14, "gptq")
    assert not (tmp_path / "ours").exists()
    shown = run(capsys, *words)
    assert shown.code == 0, shown.err
    for text in ("gptq", "4 bits: 14 layers", "bits per weight", "ours"):
        assert text in shown.out
    model = load_base(str(tmp_path / "ours"))
    name, weight = next(iter(written.items()))
    assert torch.equal(model.get_submodule(name).dequantized(), weight)
    again = run(capsys, *words, "--json")
    assert again.code == 1
    assert "exists already" in again.json["error"]
