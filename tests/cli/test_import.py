"""`modicum import`: checkpoints of the authors' LoRA-XS code become adapters of ours."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tests import models_for_tests as models
from tests.cli.adapter_files import run
from tests.store.test_files import logits
from tests.store.test_published import LLAMA, checkpoint, with_updates

from modicum.adapters.basis import BasisCache
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
