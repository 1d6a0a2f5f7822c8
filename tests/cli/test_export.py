"""`modicum export`: one adapter in three formats."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from tests import models_for_tests as models
from tests.cli.adapter_files import make_files, run

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
