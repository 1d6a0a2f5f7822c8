"""One recipe from a checkpoint to a merged low-bit model in another engine's format, in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from tests.small_checkpoints import recipe_values
from transformers import AutoModelForCausalLM

from modicum.errors import ConfigError
from modicum.evaluate.load import load_for_evaluation
from modicum.evaluate.run import evaluate
from modicum.train.recipe import make_recipe

ROOT = Path(__file__).resolve().parents[2]


def modicum(*arguments):
    command = [sys.executable, "-m", "modicum", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture
def recipe(tmp_path):
    values = recipe_values(tmp_path)
    values["quantize"] = {"bits": 4, "group_size": 16, "algorithm": "rtn", "evaluate": False}
    values["method"] = {"name": "qa_lora", "r": 2, "pool": 16}
    values["merge"] = {}
    values["export"] = ["onnx"]
    values["data"]["test"] = values["data"]["validation"]
    file = tmp_path / "r.yaml"
    file.write_text(yaml.safe_dump(values))
    return file


def test_quantize_tune_merge_export_measure_and_again(recipe):
    pytest.importorskip("onnxruntime", reason="needs the extra modicum[export]")
    alone = modicum("tune", "--config", recipe)
    assert alone.returncode == 1
    assert "modicum run --config" in alone.stderr
    done = modicum("run", "--config", recipe, "--json", "train.learning_rate=0.05")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["quantize"]["bits_per_weight"] == 6.0
    assert report["merge"]["exact"]
    assert report["merge"]["report"]["effect"] > 1e-3
    assert report["merge"]["bits_after"] == 7.0
    assert report["export"]["onnx"]["max_weight_error"] == 0
    measured = report["measure"]
    for name, value in measured["adapted"].items():
        assert measured["merged"][name]["value"] == pytest.approx(value["value"], rel=1e-4), name
    assert measured["base"]["loss"]["value"] != pytest.approx(measured["adapted"]["loss"]["value"], rel=1e-4)
    again = modicum("run", "--config", recipe, "--json", "train.learning_rate=0.05")
    assert again.returncode == 1
    assert "--resume" in json.loads(again.stdout)["error"]
    kept = modicum("run", "--config", recipe, "--json", "--resume", "train.learning_rate=0.05")
    assert kept.returncode == 0, kept.stderr
    assert set(json.loads(kept.stdout)["reused"]) == {"quantize", "tune", "merge", "onnx"}
    assert json.loads(kept.stdout)["measure"] == measured
    other = modicum("run", "--config", recipe, "--json", "--resume", "train.learning_rate=0.01")
    assert "another recipe" in json.loads(other.stdout)["error"]


@pytest.mark.slow
def test_the_recipe_that_ships_on_the_embedded_model(tmp_path):
    """Real weights and text through every stage; of the recipe itself only the amounts are changed."""
    pytest.importorskip("gguf", reason="needs the extra modicum[export]")
    out = tmp_path / "run"
    fewer = [
        "train.max_steps=12", "train.batch_size=8", "train.evaluate_before=false", "train.report_to=none",
        "data.max_eval_rows=32", "quantize.sequences=8", "quantize.sequence_length=128", "quantize.eval_sequences=4",
    ]  # fmt: skip
    words = ["run", "--config", ROOT / "recipes" / "qa_lora.yaml", "--json", f"output={out}", *fewer]
    done = modicum(*words)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    # 4 bits and 2 of 16 for a group of 32; offsets have 32 after the merge
    assert report["quantize"]["bits_per_weight"] == pytest.approx(5.0)
    assert report["quantize"]["perplexity_after"] < 1.2 * report["quantize"]["perplexity_before"]
    assert report["merge"]["exact"]
    assert report["merge"]["report"]["effect"] > 0.1
    assert report["merge"]["report"]["logit_error"] < 1e-5
    assert (report["merge"]["bits_before"], report["merge"]["bits_after"]) == (5.0, 5.5)
    measured = {
        who: {name: m["value"] for name, m in found.items()} for who, found in report["measure"].items()
    }
    assert measured["adapted"]["loss"] < measured["base"]["loss"] - 1
    assert measured["merged"] == pytest.approx(measured["adapted"], rel=1e-4)
    # the exported file, read by Transformers' own loader, says the same of the same rows
    loaded = load_for_evaluation(
        str(out / "merged"),
        "bundled:notes",
        overrides=["max_length=128", "max_eval_rows=32"],
        dtype="float32",
    )
    theirs = AutoModelForCausalLM.from_pretrained(out / "export", gguf_file="gguf.gguf", dtype=torch.float32)
    found = evaluate(theirs, loaded.tokenizer, loaded.rows, loaded.task, exact_match=False)
    loss = found.metrics["loss"].value
    assert loss == pytest.approx(measured["merged"]["loss"], rel=1e-3)
    again = modicum(*words, "--resume")
    assert again.returncode == 0, again.stdout
    assert set(json.loads(again.stdout)["reused"]) == {"quantize", "tune", "merge", "gguf"}


def test_everything_wrong_with_the_stages_is_said_at_once(tmp_path):
    values = recipe_values(tmp_path)
    values |= {"quantize": {"bitz": 4}, "export": ["ggus"]}
    with pytest.raises(ConfigError) as caught:
        make_recipe(values)
    for text in ("'bitz' (did you mean 'bits'", "'ggus' (did you mean 'gguf'", "needs the section merge"):
        assert text in str(caught.value)
    values = recipe_values(tmp_path) | {"quantize": {"bits": 5}}
    with pytest.raises(ConfigError, match="bits = 5, must be one of 2, 3, 4, 8"):
        make_recipe(values)
