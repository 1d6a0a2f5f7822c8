"""Sweeps: selection on validation, test with the chosen rate only, finished runs skipped."""

from __future__ import annotations

import json

import pytest
from pyarrow import parquet
from scipy import stats
from tests.small_checkpoints import recipe_values, signs, sums

from modicum.errors import ConfigError
from modicum.train.recipe import make_recipe
from modicum.train.run import tune


def values_of(tmp_path, **sweep):
    values = recipe_values(tmp_path, "seq_cls")
    values["data"]["test"] = str(signs(tmp_path / "test.jsonl", 10, 200))
    return {**values, "sweep": {"learning_rate": [1e-4, 2e-2], "seeds": [0, 1, 2], **sweep}}


def test_a_sweep_chooses_on_validation_and_tests_only_the_chosen_rate(tmp_path):
    result = tune(make_recipe(values_of(tmp_path)))
    summary = json.loads((result.folder / "summary.json").read_text())
    assert summary == result.report
    cells = {path.parent.parent.name: path for path in result.folder.glob("lr=*/seed=*/report.json")}
    assert set(cells) == {"lr=0.0001", "lr=0.02"}
    means = {
        entry["learning_rate"]: entry["validation"]["accuracy"]["value"]
        for entry in summary["learning_rates"]
    }
    best = summary["best_learning_rate"]
    assert means[best] == max(means.values())
    tested = {path.parent.parent.name for path in result.folder.glob("lr=*/seed=*/test.json")}
    assert tested == {f"lr={best:g}"}
    assert all(json.loads(path.read_text())["metrics"]["test"] is None for path in cells.values())
    scores = [run["metrics"]["accuracy"] for run in summary["test_runs"]]
    expected = stats.t.interval(0.95, 2, loc=sum(scores) / 3, scale=stats.sem(scores))
    measured = summary["metrics"]["test"]["accuracy"]
    if len(set(scores)) > 1:
        assert (measured["low"], measured["high"]) == pytest.approx(expected)
    assert measured["n"] == 3
    assert measured["value"] == pytest.approx(sum(scores) / 3)
    rows = {row["folder"]: row for row in parquet.read_table(result.folder / "runs.parquet").to_pylist()}
    assert set(rows) == {f"{rate}/seed={seed}" for rate in cells for seed in range(3)}
    for folder, row in rows.items():
        report = json.loads((result.folder / folder / "report.json").read_text())
        assert row["validation_accuracy"] == report["metrics"]["validation"]["accuracy"]
        assert row["resources_cpu_seconds"] == report["resources"]["cpu_seconds"]
        assert row["chosen"] == (row["learning_rate"] == best)
        assert (row["test_accuracy"] is None) != row["chosen"]


def test_finished_runs_of_a_broken_sweep_are_skipped(tmp_path, monkeypatch):
    from modicum.train import sweep

    recipe = make_recipe(values_of(tmp_path, seeds=[0, 1]))
    original, ran = sweep.run_one, []

    def run_one(cell, **options):
        if len(ran) == 3:
            raise KeyboardInterrupt
        result = original(cell, **options)
        ran.append((cell.learning_rate, cell.train.seed, result.reused))
        return result

    with monkeypatch.context() as patch:
        patch.setattr(sweep, "run_one", run_one)
        with pytest.raises(KeyboardInterrupt):
            tune(recipe)
    stamps = {p: p.stat().st_mtime_ns for p in recipe.folder.rglob("report.json")}
    assert len(stamps) == 3
    with pytest.raises(ConfigError, match="unfinished run: --resume"):
        tune(recipe)
    result = tune(recipe, resume=True)
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())
    assert result.report["metrics"]["validation"]["accuracy"]["n"] == 2
    assert tune(recipe, resume=True).reused
    with pytest.raises(ConfigError, match="finished run"):
        tune(recipe)


def test_selecting_on_the_first_seed_runs_the_others_with_the_chosen_rate_only(tmp_path):
    result = tune(make_recipe(values_of(tmp_path, select_on="first_seed")))
    counts = {entry["learning_rate"]: len(entry["runs"]) for entry in result.report["learning_rates"]}
    assert sorted(counts.values()) == [1, 3]
    assert counts[result.report["best_learning_rate"]] == 3


def test_a_diverged_rate_is_never_chosen(tmp_path, monkeypatch):
    from types import SimpleNamespace

    from modicum.train.sweep import choose

    def cell(loss):
        return SimpleNamespace(metrics={"validation": {"loss": loss}})

    recipe = make_recipe(recipe_values(tmp_path))
    assert choose(recipe, {1e-3: [cell(2.0), cell(2.2)], 1e-2: [cell(1.0), cell(None)]}) == 1e-3
    # smaller losses are better, and all seeds count
    assert choose(recipe, {1e-3: [cell(2.0), cell(2.2)], 1e-2: [cell(1.9), cell(2.5)]}) == 1e-3
    assert choose(recipe, {1e-3: [cell(2.0), cell(2.2)], 1e-2: [cell(1.9), cell(2.1)]}) == 1e-2


def test_choosing_a_rate_needs_validation(tmp_path):
    values = values_of(tmp_path)
    del values["data"]["validation"]
    with pytest.raises(ConfigError, match="choosing among learning rates needs validation rows"):
        tune(make_recipe(values))


def test_seeds_alone_need_no_validation_and_use_the_recipes_rate(tmp_path):
    values = recipe_values(tmp_path)
    del values["data"]["validation"], values["train"]["eval_steps"]
    values["data"]["test"] = str(sums(tmp_path / "test.jsonl", 6, 300))
    result = tune(make_recipe({**values, "sweep": {"seeds": [3, 4]}}))
    assert result.report["best_learning_rate"] == 5e-3
    assert result.report["metrics"]["validation"] is None
    assert result.report["metrics"]["test"]["loss"]["n"] == 2
