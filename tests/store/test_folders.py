"""PEFT folders and runs as records, and records as PEFT folders, without a base model."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from tests import models_for_tests as models
from tests.cli.adapter_files import trained
from tests.store.test_files import logits

from modicum.errors import ConfigError, CorruptAdapterError
from modicum.methods.lora_xs import LoraXSConfig
from modicum.store.files import load_adapter, save_adapter
from modicum.store.folders import folder_of_record, record_of_folder
from modicum.store.record import decode
from modicum.store.sources import read_source

CONFIGS = {
    "lora_xs": lambda: LoraXSConfig(r=4, alpha=6.0),
    "lora": lambda: LoraConfig(r=2, target_modules=["q_proj"], use_dora=True),
    "head": lambda: LoraXSConfig(r=4, target_modules=["query"], task_type="SEQ_CLS"),
}


def base(name):
    return models.bert() if name == "head" else models.llama()


@pytest.mark.parametrize("name", CONFIGS)
def test_a_folder_is_the_record_that_the_model_gives(name, tmp_path):
    model = trained(base(name), CONFIGS[name]())
    model.save_pretrained(tmp_path / "folder")
    saved = save_adapter(model, tmp_path / "a.modicum", dtype="float32")
    record = record_of_folder(tmp_path / "folder")
    assert record == decode(saved.path.read_bytes())
    assert read_source(tmp_path / "folder", dtype="bfloat16").record.dtype == "bfloat16"


@pytest.mark.parametrize("name", CONFIGS)
def test_a_record_becomes_the_same_folder(name, tmp_path):
    model = trained(base(name), CONFIGS[name]())
    model.save_pretrained(tmp_path / "folder")
    record = record_of_folder(tmp_path / "folder")
    folder_of_record(record, tmp_path / "again")
    one, other = (load_file(tmp_path / f / "adapter_model.safetensors") for f in ("folder", "again"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert record_of_folder(tmp_path / "again") == record
    if name != "head":
        loaded = PeftModel.from_pretrained(base(name), str(tmp_path / "again")).eval()
        torch.testing.assert_close(logits(loaded), logits(load_adapter(base(name), tmp_path / "folder")))
    with pytest.raises(ConfigError, match="exists already"):
        folder_of_record(record, tmp_path / "again")
    assert folder_of_record(record, tmp_path / "again", overwrite=True).is_dir()
    (tmp_path / "mine").mkdir()
    with pytest.raises(ConfigError, match="exists already"):
        folder_of_record(record, tmp_path / "mine", overwrite=True)  # no adapter of ours to replace


@pytest.fixture
def run_folder(tmp_path):
    folder = tmp_path / "run"
    trained(models.llama()).save_pretrained(folder / "adapter")
    (tmp_path / "rows.jsonl").write_text("{}\n")
    metrics = {
        "before": {"loss": 3.0, "n": 9},
        "validation": {"loss": 1.5, "accuracy": 0.5, "n": 9},
        "test": {"loss": float("nan"), "accuracy": 0.25},
    }
    report = {
        "kind": "run", "recipe_digest": "r1", "seed": 7, "metrics": metrics, "data": {"train": {"rows": 3}},
        "recipe": {"data": {"train": str(tmp_path / "rows.jsonl")}},
    }  # fmt: skip
    (folder / "report.json").write_text(json.dumps(report))
    return folder


def test_a_run_tells_its_lineage(run_folder, tmp_path):
    found = read_source(run_folder)
    assert found.metrics == {"validation.loss": 1.5, "validation.accuracy": 0.5, "test.accuracy": 0.25}
    assert (found.seed, found.record.recipe_digest) == (7, "r1")
    again = read_source(run_folder)
    assert again.data_digest == found.data_digest
    (tmp_path / "rows.jsonl").write_text("{}\n{}\n")
    assert read_source(run_folder).data_digest != found.data_digest


def test_a_pipeline_tells_of_the_adapter_that_it_chose(run_folder, tmp_path):
    pipeline = tmp_path / "pipeline"
    pipeline.mkdir()
    run_folder.rename(pipeline / "tune")
    (pipeline / "pipeline.json").write_text(
        json.dumps({"measure": {"adapted": {"accuracy": {"value": 0.75}}}})
    )
    assert read_source(pipeline).metrics["validation.loss"] == 1.5
    trained(models.llama(), size=0.1).save_pretrained(pipeline / "chosen")
    found = read_source(pipeline)
    assert found.metrics == {"test.accuracy": 0.75}
    assert found.record.values.tolist() == record_of_folder(pipeline / "chosen").values.tolist()


def test_what_cannot_be_put(tmp_path, run_folder):
    (tmp_path / "run2").mkdir()
    (tmp_path / "run2" / "summary.json").write_text("{}")
    (tmp_path / "x.modicum").write_bytes(b"\x8aMODICUM\x01")
    for path, message in (
        (tmp_path / "rum", "no such file or folder.*'run'"),
        (tmp_path / "run2", "sweep"),
        (tmp_path / "rows.jsonl", "no record"),
        (tmp_path, "adapter_config.json"),
    ):
        with pytest.raises(ConfigError, match=message):
            read_source(path)
    with pytest.raises(CorruptAdapterError):
        read_source(tmp_path / "x.modicum")
    (run_folder / "report.json").write_text("[")
    with pytest.raises(CorruptAdapterError, match="cannot be read"):
        read_source(run_folder)
    (run_folder / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(CorruptAdapterError, match="names no method"):
        record_of_folder(run_folder / "adapter")
