"""Train an adapter (or sweep learning rates and seeds) as a recipe says."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from modicum.cli._common import JsonFlag, emit, table


def run(
    config: Annotated[Path, typer.Option("--config", "-c", help="The recipe, a YAML file.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Changes, e.g. train.learning_rate=1e-3."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show steps, trained values and bytes only.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue from the last checkpoint; keep what is finished.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Start again in a folder with results.")
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Train as the recipe CONFIG says, with values changed by KEY=VALUE; also under torchrun and accelerate launch."""
    from modicum.errors import ConfigError
    from modicum.train.plan import plan
    from modicum.train.recipe import load_recipe
    from modicum.train.run import tune
    from modicum.train.stages import ensure_training_alone

    if resume and overwrite:
        raise ConfigError("--resume keeps what is there, --overwrite starts again: give one of them")
    recipe = load_recipe(config, overrides or ())
    ensure_training_alone(recipe, config)
    if dry_run:
        emit(plan(recipe), as_json, _plan_table)
        return
    result = tune(recipe, resume=resume, overwrite=overwrite, show="auto")
    if _is_main():
        report = {**result.report, "folder": str(result.folder), "reused": result.reused}
        emit(report, as_json, _sweep_table if report["kind"] == "sweep" else _run_table)


def _is_main() -> bool:
    from accelerate import PartialState

    return PartialState().is_main_process


def _plan_table(plan: dict[str, Any]) -> Any:
    trained = plan["trained_values"]
    rows = [
        *([name.replace("_", " "), plan[name]] for name in ("output", "base_model", "method")),
        [
            "trained values",
            f"{trained['total']:,} (adapter {trained['adapter']:,}, head {trained['head']:,})",
        ],
        ["adapter on disk", f"{plan['adapter_bytes']:,} bytes"],
        [
            "steps",
            f"{plan['steps']:,} of {plan['rows_per_step']} rows ({plan['steps_per_epoch']:,} per epoch)",
        ],
        ["learning rates", ", ".join(f"{rate:g}" for rate in plan["learning_rates"])],
        ["seeds", ", ".join(map(str, plan["seeds"]))],
        ["runs", str(plan["runs"])],
    ]
    for split, counts in plan["data"].items():
        rows.append([split, ", ".join(f"{count:,} {name}" for name, count in counts.items())])
    return table("dry run: nothing is trained", ["", ""], rows)


def _run_table(report: dict[str, Any]) -> Any:
    metrics = report["metrics"]
    columns = [name for name in ("before", "validation", "test") if metrics[name]]
    names = list(metrics[columns[-1]]) if columns else []
    rows = [[name, *(_cell(metrics[column].get(name)) for column in columns)] for name in names]
    trained, size, timing = report["trained_values"], report["stored_bytes"], report["timing"]
    step, used = timing["seconds_per_step_median"], report.get("resources")
    lines = [
        f"{'kept' if report['reused'] else 'wrote'} {report['folder']}",
        f"{trained['total']:,} trained values (adapter {trained['adapter']:,}, head {trained['head']:,}), "
        f"{size['total']:,} bytes on disk, {report['steps']} steps"
        + (f", {step:.3g} s per step" if step is not None else "")
        + (f", {used['cpu_seconds']:.3g} processor seconds" if used else ""),
    ]
    return [
        table(f"{report['method']}, recipe {report['recipe_digest']}", ["metric", *columns], rows),
        *lines,
    ]


def _sweep_table(report: dict[str, Any]) -> Any:
    metric = report["metric"]
    rows = []
    for entry in report["learning_rates"]:
        chosen = "chosen" if entry["learning_rate"] == report["best_learning_rate"] else ""
        measured = (entry["validation"] or {}).get(metric)
        rows.append([f"{entry['learning_rate']:g}", len(entry["runs"]), _interval(measured), chosen])
    lines = [f"wrote {report['folder']}; intervals: {report['interval']}"]
    if report["metrics"]["test"]:
        lines += [f"test {name} {_interval(value)}" for name, value in report["metrics"]["test"].items()]
    return [table(f"{report['method']}: validation {metric}", ["lr", "seeds", metric, ""], rows), *lines]


def _interval(measured: dict[str, Any] | None) -> str:
    if measured is None or measured["value"] is None:
        return ""
    if measured["low"] is None:
        return _cell(measured["value"])
    return f"{measured['value']:.4f} [{measured['low']:.4f}, {measured['high']:.4f}]"


def _cell(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value if value is not None else "")
