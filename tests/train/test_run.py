"""Runs as wholes: what they leave behind, and that nothing but the recipe decides the numbers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from pyarrow import parquet
from safetensors.torch import load_file
from tests.small_checkpoints import recipe_values

from modicum.errors import ConfigError, ModicumError
from modicum.train import artifacts
from modicum.train.recipe import make_recipe
from modicum.train.run import tune
from modicum.train.trainer import TwoRateTrainer


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def changed(values: dict, folder: Path, **train) -> dict:
    return {**values, "output": str(folder), "train": {**values["train"], **train}}


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], tolerance: float = 0.0) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        torch.testing.assert_close(value, b[name], rtol=tolerance, atol=tolerance, msg=name)


class StopError(Exception):
    """A crash."""


def stop_at(monkeypatch, step: int) -> None:
    from modicum.train.callbacks import Meter

    original = Meter.on_step_end

    def on_step_end(self, args, state, control, **kwargs):
        original(self, args, state, control, **kwargs)
        if state.global_step == step:
            raise StopError

    monkeypatch.setattr(Meter, "on_step_end", on_step_end)


def test_a_run_leaves_adapter_report_recipe_and_card(tmp_path):
    result = tune(make_recipe(recipe_values(tmp_path)))
    names = {entry.name for entry in result.folder.iterdir()}
    assert names == {"adapter", "report.json", "history.parquet", "recipe.yaml"}
    report = json.loads((result.folder / "report.json").read_text())
    assert report == result.report
    table = parquet.read_table(result.folder / "history.parquet").to_pylist()
    assert [{k: v for k, v in row.items() if v is not None} for row in table] == report["history"]
    assert report["steps"] == 6
    assert report["metrics"]["validation"]["loss"] < report["metrics"]["before"]["loss"]
    assert report["metrics"]["test"] is None
    trained = sum(tensor.numel() for tensor in weights(result.folder).values())
    assert report["trained_values"] == {"adapter": trained, "head": 0, "total": trained}
    assert report["stored_bytes"]["weights"] == (result.adapter / "adapter_model.safetensors").stat().st_size
    used = report["resources"]
    assert used["seconds"] >= report["timing"]["setup_seconds"] + report["timing"]["train_seconds"]
    assert used["peak_memory_bytes"] > 2**20
    assert used["cpu_seconds"] > 0
    assert report["timing"]["steps"] == 6
    assert report["timing"]["tokens_per_second"] > 0
    assert report["recipe_digest"] == make_recipe(recipe_values(tmp_path)).digest()
    assert "import modicum" not in (result.adapter / "README.md").read_text()


def test_reported_tokens_are_those_without_padding(tmp_path):
    result = tune(make_recipe(recipe_values(tmp_path)))
    # 24 rows in one epoch of 6 steps of 4
    assert result.report["timing"]["tokens"] == result.report["data"]["train"]["tokens"]


def test_the_saved_adapter_gives_the_reported_metrics(tmp_path):
    from modicum.evaluate.load import load_for_evaluation
    from modicum.evaluate.run import evaluate

    values = recipe_values(tmp_path)
    result = tune(make_recipe(values))
    loaded = load_for_evaluation(
        values["model"]["name_or_path"], values["data"]["validation"], adapter=str(result.folder)
    )
    found = evaluate(loaded.model, loaded.tokenizer, loaded.rows, resamples=10)
    for name in ("loss", "perplexity", "token_accuracy"):
        assert found.metrics[name].value == pytest.approx(result.metrics["validation"][name], rel=1e-5)


@pytest.mark.parametrize("task", ["causal_lm", "seq_cls"])
@pytest.mark.parametrize(
    "method", [{"name": "lora", "r": 2, "lora_dropout": 0.2}, {"name": "lora_xs", "r": 2}]
)
@pytest.mark.parametrize("step", [3, 5])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, monkeypatch, task, method, step):
    values = {**recipe_values(tmp_path, task, max_steps=9), "method": method}
    whole = tune(make_recipe(changed(values, tmp_path / "whole")))
    recipe = make_recipe(changed(values, tmp_path / "broken"))
    with monkeypatch.context() as patch:
        stop_at(patch, step + 1)
        with pytest.raises(StopError):
            tune(recipe)
    assert not (recipe.folder / "adapter").exists()
    with pytest.raises(ConfigError, match="unfinished run: --resume"):
        tune(recipe)
    resumed = tune(recipe, resume=True)
    assert resumed.report["timing"]["resumed_from"] == "checkpoint-3"
    assert_same(weights(whole.folder), weights(resumed.folder))
    assert resumed.metrics == whole.metrics


def test_a_run_killed_behind_its_last_step_makes_no_other(tmp_path, monkeypatch):
    # the last step is inside an epoch, and the rate is not zero there
    values = recipe_values(tmp_path, max_steps=3, scheduler="constant", load_best=False)
    whole = tune(make_recipe(changed(values, tmp_path / "whole")))
    recipe = make_recipe(changed(values, tmp_path / "broken"))

    def stop(self, *_):
        raise StopError

    with monkeypatch.context() as patch:
        patch.setattr(TwoRateTrainer, "_finalize_training", stop)
        with pytest.raises(StopError):
            tune(recipe)
    resumed = tune(recipe, resume=True)
    assert resumed.report["timing"]["resumed_from"] == "checkpoint-3"
    assert resumed.report["steps"] == whole.report["steps"] == 3
    assert_same(weights(whole.folder), weights(resumed.folder))
    assert resumed.metrics == whole.metrics


def test_a_resumed_run_takes_what_all_its_attempts_took(tmp_path, monkeypatch):
    recipe = make_recipe(recipe_values(tmp_path))
    for step in (2, 4):
        with monkeypatch.context() as patch:
            stop_at(patch, step)
            with pytest.raises(StopError):
                tune(recipe, resume=True)
    log = recipe.folder / "checkpoints" / "resources-0.json"
    legs = json.loads(log.read_text())["attempts"]
    assert len(legs) == 2
    # as if the attempts had been long ones
    for leg in legs:
        leg["seconds"] += 1000.0
        leg["cpu_seconds"] += 2000.0
    log.write_text(json.dumps({"attempts": legs}))
    used = tune(recipe, resume=True).report["resources"]
    before = sum(leg["seconds"] for leg in legs)
    assert before < used["seconds"] < before + 500
    assert used["cpu_seconds"] > sum(leg["cpu_seconds"] for leg in legs)
    assert used["peak_memory_bytes"] >= max(leg["peak_memory_bytes"] for leg in legs)
    # what is thrown away is not counted
    assert tune(recipe, overwrite=True).report["resources"]["seconds"] < before


def test_what_a_killed_run_took_is_on_disk_with_its_checkpoints(tmp_path, monkeypatch):
    from modicum.train.callbacks import ResourceLog

    # as a process ends that is killed: nothing runs any more
    monkeypatch.setattr(ResourceLog, "__exit__", lambda self, *error: None)
    recipe = make_recipe(changed(recipe_values(tmp_path), tmp_path / "run", save_steps=2, eval_steps=2))
    stop_at(monkeypatch, 4)
    with pytest.raises(StopError):
        tune(recipe)
    legs = json.loads((recipe.folder / "checkpoints" / "resources-0.json").read_text())["attempts"]
    assert len(legs) == 1
    assert legs[0]["seconds"] > 0


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("step", [6, 8])
def test_a_run_resumed_in_its_second_epoch_sees_the_same_rows(tmp_path, monkeypatch, grouped, step):
    # six steps make an epoch: the checkpoints lie on its end and inside the next one
    values = recipe_values(tmp_path, "seq_cls", max_steps=14, eval_steps=2)
    values["data"]["group_by_length"] = grouped
    values["method"]["lora_dropout"] = 0.2
    whole = tune(make_recipe(changed(values, tmp_path / "whole")))
    recipe = make_recipe(changed(values, tmp_path / "broken"))
    with monkeypatch.context() as patch:
        stop_at(patch, step + 1)
        with pytest.raises(StopError):
            tune(recipe)
    resumed = tune(recipe, resume=True)
    assert resumed.report["timing"]["resumed_from"] == f"checkpoint-{step}"
    assert_same(weights(whole.folder), weights(resumed.folder))


def test_a_half_written_checkpoint_is_passed_over(tmp_path, monkeypatch):
    values = recipe_values(tmp_path, max_steps=9)
    recipe = make_recipe(values)
    with monkeypatch.context() as patch:
        stop_at(patch, 7)
        with pytest.raises(StopError):
            tune(recipe)
    (recipe.folder / "checkpoints" / "checkpoint-6" / "trainer_state.json").write_text('{"epo')
    assert artifacts.last_checkpoint(recipe.folder).name == "checkpoint-3"
    resumed = tune(recipe, resume=True)
    assert_same(
        weights(tune(make_recipe(changed(values, tmp_path / "whole"))).folder), weights(resumed.folder)
    )


@pytest.mark.parametrize("task", ["causal_lm", "seq_cls"])
def test_accumulated_batches_equal_one_big_batch(tmp_path, task):
    values = recipe_values(tmp_path, task, batch_size=8, load_best=False)
    values["train"]["max_grad_norm"] = 0
    big = tune(make_recipe(changed(values, tmp_path / "big")))
    small = {"batch_size": 2, "gradient_accumulation_steps": 4}
    accumulated = tune(make_recipe(changed(values, tmp_path / "small", **small)))
    assert_same(weights(big.folder), weights(accumulated.folder), 2e-5)


def test_the_same_recipe_gives_the_same_numbers_and_another_seed_others(tmp_path):
    values = recipe_values(tmp_path, "seq_cls")
    first, again = (tune(make_recipe(changed(values, tmp_path / name))) for name in "ab")
    assert_same(weights(first.folder), weights(again.folder))
    other = tune(make_recipe(changed(values, tmp_path / "c", seed=1)))
    assert any(
        not torch.equal(weights(first.folder)[k], weights(other.folder)[k]) for k in weights(first.folder)
    )


def test_a_finished_run_is_never_overwritten_unasked(tmp_path):
    values = recipe_values(tmp_path)
    recipe = make_recipe(values)
    first = tune(recipe)
    stamp = (first.folder / "report.json").stat().st_mtime_ns
    with pytest.raises(ConfigError, match="finished run: --resume to keep it, --overwrite to start again"):
        tune(recipe)
    kept = tune(recipe, resume=True)
    assert kept.reused
    assert kept.report == first.report
    with pytest.raises(ConfigError, match=r"another recipe \(train.seed: 0 → 1\)"):
        tune(recipe.with_values(train__seed=1), resume=True)
    assert (first.folder / "report.json").stat().st_mtime_ns == stamp
    assert tune(recipe, overwrite=True).reused is False
    assert (first.folder / "report.json").stat().st_mtime_ns != stamp


FULL = [
    OSError(28, "No space left on device"),
    RuntimeError("I/O error: No space left on device (os error 28)"),
]


@pytest.mark.parametrize("error", FULL)
def test_a_full_disk_is_one_clear_message_and_leaves_no_half_adapter(tmp_path, monkeypatch, error):
    from peft import PeftModel

    recipe = make_recipe(recipe_values(tmp_path, save_steps=30, load_best=False))

    def save(self, folder, **kwargs):
        (Path(folder) / "adapter_model.safetensors").write_bytes(b"half")
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(PeftModel, "save_pretrained", save)
        with pytest.raises(ModicumError, match="the disk is full: cannot write to"):
            tune(recipe)
    assert {entry.name for entry in recipe.folder.iterdir()} == {"recipe.yaml", "checkpoints"}
    assert tune(recipe, resume=True).adapter.is_dir()


def test_a_full_disk_in_a_checkpoint_keeps_the_last_whole_one(tmp_path, monkeypatch):
    from transformers import Trainer

    recipe = make_recipe(recipe_values(tmp_path, max_steps=9))
    original = Trainer._save_rng_state

    def save(self, folder):
        if folder.endswith("-6"):
            raise OSError(28, "No space left on device")
        original(self, folder)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_save_rng_state", save)
        with pytest.raises(ModicumError, match="the disk is full"):
            tune(recipe)
    assert [entry.name for entry in (recipe.folder / "checkpoints").glob("checkpoint-*")] == ["checkpoint-3"]
    assert tune(recipe, resume=True).report["steps"] == 9


def test_full_fine_tuning_saves_a_model(tmp_path):
    values = {**recipe_values(tmp_path), "method": {"name": "full"}}
    result = tune(make_recipe(values))
    assert result.adapter.name == "model"
    assert (result.adapter / "tokenizer.json").is_file()
    assert result.report["trained_values"]["head"] == 0


def scripted_losses(monkeypatch, *losses):
    from modicum.evaluate import metrics

    left = list(losses)
    monkeypatch.setattr(
        metrics, "language", lambda sums: {"loss": left.pop(0), "perplexity": 1.0, "token_accuracy": 0.0}
    )


def test_the_best_checkpoint_is_the_one_that_is_kept(tmp_path, monkeypatch):
    values = recipe_values(tmp_path, max_steps=9, scheduler="constant", warmup_ratio=0.0)
    short = tune(make_recipe(changed(values, tmp_path / "short", max_steps=3)))
    # before training, then after 3, 6 and 9 steps
    scripted_losses(monkeypatch, 0.5, 1.0, 2.0, 3.0)
    result = tune(make_recipe(values))
    assert result.report["best_step"] == 3
    assert result.metrics["validation"]["loss"] == 1.0
    assert result.metrics["before"]["loss"] == 0.5
    assert_same(weights(result.folder), weights(short.folder))


def test_early_stopping_stops(tmp_path, monkeypatch):
    scripted_losses(monkeypatch, 9.0, 1.0, 2.0, 3.0)
    values = recipe_values(tmp_path, max_steps=60, early_stopping_patience=2)
    result = tune(make_recipe(values))
    assert result.report["steps"] == 9
    assert result.report["best_step"] == 3


def test_things_that_need_validation_say_so(tmp_path):
    values = recipe_values(tmp_path, load_best=True)
    del values["data"]["validation"]
    values["data"]["train"] = str(Path(values["data"]["train"]).rename(tmp_path / "only.jsonl"))
    with pytest.raises(ConfigError, match=r"need validation rows: set data\.validation"):
        tune(make_recipe(values))


def test_rows_longer_than_the_model_are_refused(tmp_path):
    values = recipe_values(tmp_path)
    values["data"]["max_length"] = 4000
    with pytest.raises(ConfigError, match="max_length = 4000 is more than the 128 positions"):
        tune(make_recipe(values))


def test_tensorboard_logs_are_written(tmp_path):
    values = recipe_values(tmp_path)
    values["train"]["report_to"] = "tensorboard"
    result = tune(make_recipe(values))
    assert list((result.folder / "logs").rglob("events.out.*"))


def test_plain_progress_goes_to_stderr(tmp_path, capsys):
    tune(make_recipe(recipe_values(tmp_path)), show="lines")
    out, err = capsys.readouterr()
    assert not out
    assert "step 3/6 eval loss" in err
