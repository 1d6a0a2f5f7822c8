"""One recipe from a checkpoint to a merged low-bit model in another engine's format, in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import yaml
from tests.small_checkpoints import recipe_values

from modicum.errors import ConfigError
from modicum.train.recipe import make_recipe


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
