"""The real command line in a process of its own: train, try again, resume, evaluate, load with PEFT."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
import yaml
from tests.small_checkpoints import recipe_values


def modicum(*arguments):
    command = [sys.executable, "-m", "modicum", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def here(capsys, *arguments):
    """The command inside this process, because starting Python takes longer than training."""
    from modicum.cli import main

    with pytest.raises(SystemExit) as stop:
        main([*map(str, arguments)])
    return stop.value.code, *capsys.readouterr()


@pytest.fixture
def recipe(tmp_path):
    file = tmp_path / "r.yaml"
    values = recipe_values(tmp_path)
    values["method"] = {"name": "lora_xs", "r": 2}
    file.write_text(yaml.safe_dump(values))
    return file


def test_tune_and_eval_in_processes_of_their_own(recipe, tmp_path):
    done = modicum("tune", "--config", recipe, "--json", "train.seed=3")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["seed"] == 3
    assert "step 6/6 eval loss" in done.stderr
    values = yaml.safe_load(recipe.read_text())
    measured = modicum(
        "eval", "--model", values["model"]["name_or_path"], "--adapter", tmp_path / "run",
        "--data", values["data"]["validation"], "--json",
    )  # fmt: skip
    assert measured.returncode == 0, measured.stderr
    found = json.loads(measured.stdout)["metrics"]
    assert found["loss"]["value"] == pytest.approx(report["metrics"]["validation"]["loss"], rel=1e-5)
    assert found["exact_match"]["n"] == 8


@pytest.mark.parametrize("method", [{"name": "lora", "r": 2}, {"name": "lora_xs", "r": 2}])
def test_the_adapter_loads_with_peft_alone(recipe, tmp_path, capsys, method):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    import modicum  # noqa: F401, makes our methods known to PEFT

    values = yaml.safe_load(recipe.read_text())
    recipe.write_text(yaml.safe_dump({**values, "method": method}))
    code, out, _ = here(capsys, "tune", "--config", recipe)
    assert code == 0
    assert "trained values" in out
    base = AutoModelForCausalLM.from_pretrained(values["model"]["name_or_path"])
    ids = torch.tensor([[1, 20, 21, 22]])
    before = base(input_ids=ids).logits
    adapted = PeftModel.from_pretrained(base, tmp_path / "run" / "adapter").eval()
    assert not torch.allclose(adapted(input_ids=ids).logits, before, atol=1e-4)
    card = (tmp_path / "run" / "adapter" / "README.md").read_text()
    assert ("`import modicum` is needed" in card) == (method["name"] == "lora_xs")


def test_a_dry_run_trains_nothing_and_leaves_nothing(recipe, tmp_path, capsys):
    code, out, _ = here(capsys, "tune", "--config", recipe, "--dry-run", "--json", "sweep.seeds=[0,1]")
    plan = json.loads(out)
    assert code == 0
    assert not (tmp_path / "run").exists()
    assert plan["steps"] == 6
    assert plan["steps_per_epoch"] == 6
    assert plan["runs"] == 2
    assert plan["trained_values"]["total"] == 14 * 4
    code, out, _ = here(capsys, "tune", "--config", recipe, "--json")
    report = json.loads(out)
    assert report["trained_values"] == plan["trained_values"]
    assert report["stored_bytes"]["total"] == plan["adapter_bytes"]
    _, out, _ = here(capsys, "tune", "--config", recipe, "--dry-run")
    assert "nothing is trained" in out


def test_flags_of_the_output_folder(recipe, capsys):
    assert here(capsys, "tune", "--config", recipe)[0] == 0
    code, _, err = here(capsys, "tune", "--config", recipe)
    assert code == 1
    assert "holds a finished run" in err
    code, out, _ = here(capsys, "tune", "--config", recipe, "--resume")
    assert code == 0
    assert "kept" in out
    assert here(capsys, "tune", "--config", recipe, "--overwrite")[0] == 0
    code, _, err = here(capsys, "tune", "--config", recipe, "--overwrite", "--resume")
    assert "give one of them" in err


def test_a_sweep_prints_its_choice(recipe, capsys):
    code, out, _ = here(
        capsys, "tune", "--config", recipe, "sweep.learning_rate=[1e-3, 1e-2]", "sweep.seeds=[0]"
    )
    assert code == 0
    assert "chosen" in out


def test_faults_of_a_recipe_are_printed(recipe, capsys):
    code, _, err = here(capsys, "tune", "--config", recipe, "train.seeds=1", "method.rank=3")
    assert code == 1
    assert "no option 'train.seeds' (did you mean 'seed'" in err
    assert "lora_xs has no option 'rank'" in err


def test_the_shipped_recipe_learns_the_bundled_task(tmp_path, capsys):
    from tests.conftest import ROOT

    code, out, _ = here(
        capsys, "tune", "--config", ROOT / "recipes" / "lora_xs.yaml", "--json", f"output={tmp_path / 'run'}",
        "train.max_steps=8", "train.batch_size=8", "train.eval_steps=8", "data.max_rows=64", "data.max_eval_rows=8",
    )  # fmt: skip
    report = json.loads(out)
    assert code == 0
    assert report["metrics"]["validation"]["loss"] < report["metrics"]["before"]["loss"]
    assert report["metrics"]["test"]["n"] == 8
