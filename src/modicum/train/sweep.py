"""Learning rates x seeds: the rate is chosen on validation, and only the chosen one meets the test rows."""

from __future__ import annotations

import dataclasses
import math
import shutil
from typing import TYPE_CHECKING, Any

from modicum.data.prepare import Prepared, prepare
from modicum.errors import ConfigError
from modicum.evaluate.intervals import over_seeds
from modicum.evaluate.resources import total
from modicum.models.loading import load_tokenizer
from modicum.train import artifacts
from modicum.train.run import TuneResult, claim, finished_model, measure, process_state, run_one

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from modicum.train.callbacks import Show
    from modicum.train.recipe import Recipe

SUMMARY = "summary.json"
Cells = dict[float, list[TuneResult]]


def run_sweep(
    recipe: Recipe,
    *,
    resume: bool = False,
    overwrite: bool = False,
    data: Prepared | None = None,
    show: Show = "none",
) -> TuneResult:
    """The finished sweep of `recipe`: one folder per run and `summary.json`; finished runs are skipped on resume.

    Raises:
        ConfigError: several rates but no validation rows to choose by.
    """
    from modicum.train.callbacks import ResourceLog

    finished = claim(recipe, resume=resume, overwrite=overwrite, report=SUMMARY)
    if finished is not None:
        return TuneResult(recipe.folder, finished, reused=True)
    sweep = recipe.sweep
    assert sweep is not None
    rates, seeds = learning_rates(recipe), sweep.seeds
    with ResourceLog(recipe.folder, process_state(recipe)):
        tokenizer = load_tokenizer(recipe.model.name_or_path, revision=recipe.model.revision)
        data = data or prepare(recipe.data, tokenizer, recipe.model.task, recipe.model.num_labels)
    if len(rates) > 1 and data.validation is None:
        raise ConfigError(
            "choosing among learning rates needs validation rows: set data.validation or data.validation_fraction"
        )

    def run(rate: float, seed: int) -> TuneResult:
        cell = cell_recipe(recipe, rate, seed)
        title = f"lr {rate:g} seed {seed}"
        # a cell of this sweep may always be continued; after --overwrite it starts again
        begun = (cell.folder / artifacts.RECIPE).is_file()
        return run_one(
            cell,
            resume=begun and not overwrite,
            overwrite=overwrite,
            data=data,
            show=show,
            use_test=False,
            title=title,
            sweep=str(recipe.folder),
        )

    first = seeds if sweep.select_on == "all_seeds" or len(rates) == 1 else seeds[:1]
    cells: Cells = {rate: [run(rate, seed) for seed in first] for rate in rates}
    best = choose(recipe, cells) if len(rates) > 1 else rates[0]
    cells[best] += [run(best, seed) for seed in seeds if seed not in first]
    return _finish(recipe, cells, best, tokenizer, data)


def _finish(recipe: Recipe, cells: Cells, best: float, tokenizer: Any, data: Prepared) -> TuneResult:
    """Measures the chosen runs on the test rows, and writes the summary."""
    from modicum.train.callbacks import ResourceLog
    from modicum.train.trackers import publish_sweep

    assert recipe.sweep is not None
    state = process_state(recipe)
    seeds = recipe.sweep.seeds if data.test is not None else []
    # what the sweep does itself; its runs count for themselves
    with ResourceLog(recipe.folder, state) as own:
        tests = [_test(recipe, best, seed, tokenizer, data) for seed in seeds]
    summary = summarize(recipe, cells, best, tests)
    # runs that an earlier version finished have none
    used = [found for runs in cells.values() for cell in runs if (found := cell.report.get("resources"))]
    summary["resources"] = total([*used, own.total()])
    if state.is_main_process:
        artifacts.write_table(recipe.folder / artifacts.RUNS, _rows(summary, cells, recipe.folder))
        artifacts.write_json(recipe.folder / SUMMARY, summary)
        shutil.rmtree(recipe.folder / artifacts.CHECKPOINTS, ignore_errors=True)
        publish_sweep(recipe, summary)
    state.wait_for_everyone()
    return TuneResult(recipe.folder, summary)


def learning_rates(recipe: Recipe) -> list[float]:
    """The rates of the sweep; the recipe's own when it names none."""
    rates = recipe.sweep.learning_rate if recipe.sweep else []
    return list(dict.fromkeys(rates)) or [recipe.learning_rate]


def cell_recipe(recipe: Recipe, rate: float, seed: int) -> Recipe:
    """The recipe of one run of a sweep, in its own folder."""
    folder = recipe.folder / f"lr={rate:g}" / f"seed={seed}"
    return recipe.with_values(sweep=None, output=str(folder), train__learning_rate=rate, train__seed=seed)


def choose(recipe: Recipe, cells: Cells) -> float:
    """The rate with the best mean of the selecting metric on validation; a diverged run is the worst of all."""
    sign = 1.0 if recipe.larger_is_better else -1.0

    def score(rate: float) -> float:
        values = _values([cell.metrics["validation"] for cell in cells[rate]], recipe.metric)
        mean = sign * sum(values) / len(values)
        return mean if math.isfinite(mean) else -math.inf

    return max(cells, key=score)


def summarize(recipe: Recipe, cells: Cells, best: float, tests: Sequence[dict[str, float]]) -> dict[str, Any]:
    """What a sweep found: every run, the chosen rate, and means over seeds with Student's t interval."""
    sweep = recipe.sweep
    assert sweep is not None
    chosen = [cell.metrics["validation"] for cell in cells[best]]
    return {
        "kind": "sweep",
        "recipe_digest": recipe.digest(),
        "method": recipe.method.name,
        "metric": recipe.metric,
        "selected_on": f"validation {recipe.metric}, {sweep.select_on}",
        "interval": f"Student's t over seeds, {sweep.confidence:.0%}",
        "best_learning_rate": best,
        "trained_values": cells[best][0].report["trained_values"],
        "stored_bytes": cells[best][0].report["stored_bytes"],
        "metrics": {
            "validation": _over_seeds(chosen, sweep.confidence),
            "test": _over_seeds(list(tests), sweep.confidence),
        },
        "learning_rates": [
            {
                "learning_rate": rate,
                "validation": _over_seeds([cell.metrics["validation"] for cell in runs], sweep.confidence),
                "runs": [_run_entry(cell, recipe) for cell in runs],
            }
            for rate, runs in cells.items()
        ],
        "test_runs": [
            {"seed": seed, "metrics": test} for seed, test in zip(sweep.seeds, tests, strict=False)
        ],
    }


def _run_entry(cell: TuneResult, recipe: Recipe) -> dict[str, Any]:
    keys = ("seed", "steps", "best_step", "train_loss")
    return {
        **{key: cell.report[key] for key in keys},
        "folder": str(cell.folder.relative_to(recipe.folder)),
        "validation": cell.metrics["validation"],
        "seconds_per_step": cell.report["timing"]["seconds_per_step_median"],
    }


def _rows(summary: dict[str, Any], cells: Cells, folder: Path) -> list[dict[str, Any]]:
    """One flat row per run: rate, seed, metrics, and what it took."""
    tests = {entry["seed"]: entry["metrics"] for entry in summary["test_runs"]}
    rows = []
    for rate, runs in cells.items():
        for cell in runs:
            report = cell.report
            chosen = rate == summary["best_learning_rate"]
            found = {
                "validation": cell.metrics["validation"],
                "test": tests.get(report["seed"]) if chosen else None,
                "resources": report.get("resources"),
            }
            rows.append(
                {
                    "folder": str(cell.folder.relative_to(folder)),
                    "method": report["method"],
                    "learning_rate": rate,
                    "seed": report["seed"],
                    "chosen": chosen,
                    "steps": report["steps"],
                    "train_loss": report["train_loss"],
                    "trained_values": report["trained_values"]["total"],
                    "stored_bytes": report["stored_bytes"]["total"],
                    **{
                        f"{name}_{key}": value
                        for name, values in found.items()
                        for key, value in (values or {}).items()
                    },
                }
            )
    return rows


def _values(metrics: Sequence[dict[str, float] | None], name: str) -> list[float]:
    values = [(entry or {}).get(name) for entry in metrics]
    return [math.nan if value is None else float(value) for value in values]


def _over_seeds(metrics: Sequence[dict[str, float] | None], confidence: float) -> dict[str, Any] | None:
    if not metrics or metrics[0] is None:
        return None
    names = [name for name in metrics[0] if name != "n"]
    return {name: dataclasses.asdict(over_seeds(_values(metrics, name), confidence)) for name in names}


def _test(recipe: Recipe, rate: float, seed: int, tokenizer: Any, data: Prepared) -> dict[str, float]:
    """Test metrics of one finished run, from what it saved; remembered in its folder."""
    from modicum.train.trainer import build_trainer

    cell = cell_recipe(recipe, rate, seed)
    path = cell.folder / "test.json"
    known = artifacts.read_json(path)
    state = process_state(recipe)
    state.wait_for_everyone()
    if known is not None:
        return known
    model = finished_model(cell, cell.folder, tokenizer, data)
    quiet = cell.with_values(train__report_to="none")
    trainer = build_trainer(quiet, model, data, tokenizer.pad_token_id, cell.folder)
    metrics = measure(trainer, data.test)
    assert metrics is not None
    leftover = cell.folder / artifacts.CHECKPOINTS
    if state.is_main_process:
        artifacts.write_json(path, metrics)
        if leftover.is_dir() and not any(leftover.iterdir()):
            leftover.rmdir()
    state.wait_for_everyone()
    return metrics
