"""Measure a model, with or without an adapter, on rows of data or on a suite of tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from modicum.cli._common import JsonFlag, emit, table
from modicum.cli._suites import check_suite, run_rows, run_suites
from modicum.errors import ConfigError


def run(
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Folder, hub name, or 'embedded'.")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option("--data", "-d", help="File, folder, bundled:NAME or hub name; test split."),
    ] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option("--adapter", "-a", help="Folder of an adapter or a run; with --suite also several."),
    ] = None,
    task: Annotated[
        str, typer.Option("--task", "-t", help="causal_lm, seq_cls or regression.")
    ] = "causal_lm",
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Options of the data section, e.g. max_length=128."),
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Rows per batch.")] = 16,
    num_labels: Annotated[
        int | None, typer.Option("--num-labels", help="Classes; counted when unset.")
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option("--max-new-tokens", help="Longest completion.")
    ] = None,
    exact_match: Annotated[
        bool | None, typer.Option("--exact-match/--no-exact-match", help="Compare generated completions.")
    ] = None,
    dtype: Annotated[str, typer.Option("--dtype", help="auto, float32, bfloat16 or float16.")] = "auto",
    suite: Annotated[
        str | None, typer.Option("--suite", "-s", help="Name of a bundled suite, or a YAML file.")
    ] = None,
    protocol: Annotated[
        str | None, typer.Option("--protocol", help="llm-adapters, lm-eval, classifier or perplexity.")
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option("--only", help="A task of the suite; several times for several.")
    ] = None,
    data_dir: Annotated[Path, typer.Option("--data-dir", help="The suite's data folder.")] = Path("data"),
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Items of each task.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The folder for the suite's records.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the records in the output folder.")
    ] = False,
    adapters_at_once: Annotated[
        int, typer.Option("--adapters-at-once", min=1, help="Adapters of a suite that share batches.")
    ] = 16,
    validate: Annotated[
        bool, typer.Option("--validate", help="Check the suite and its data; run nothing.")
    ] = False,
    report_to: Annotated[
        list[str] | None,
        typer.Option("--report-to", help="mlflow, trackio, tensorboard or wandb get the results too."),
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Measure MODEL (carrying ADAPTER) on the rows of DATA, or on the tasks of SUITE; metrics come with intervals."""
    if suite is not None:
        if data is not None or overrides or task != "causal_lm":
            raise ConfigError("a suite says itself what is measured: leave out --data, --task and KEY=VALUE")
        if validate:
            check_suite(suite, protocol, only, data_dir, as_json)
            return
        run_suites(
            suite, protocol, only, data_dir, as_json, report_to or (), model=_given(model, "--model"),
            output=_given(output, "--output"), adapters=adapter or (), limit=limit, resume=resume,
            batch_size=batch_size, adapters_at_once=adapters_at_once, dtype=dtype,
        )  # fmt: skip
        return
    if protocol or only or limit or output or resume or validate:
        raise ConfigError("--protocol, --only, --limit, --output, --resume and --validate go with --suite")
    if adapter and len(adapter) > 1:
        raise ConfigError("several adapters are measured on suites only; give one --adapter, or a --suite")
    found = run_rows(
        _given(model, "--model"), _given(data, "--data"), adapter[0] if adapter else None, report_to or (),
        task=task, overrides=overrides or (), num_labels=num_labels, dtype=dtype,
        measuring={"batch_size": batch_size, "exact_match": exact_match, "max_new_tokens": max_new_tokens},
    )  # fmt: skip
    emit(found, as_json, _table)


def _given(value: Any, option: str) -> Any:
    if value is None:
        raise typer.BadParameter("it must be given", param_hint=option)
    return value


def _table(result: dict[str, Any]) -> Any:
    rows = [
        [name, f"{m['value']:.4f}", f"{m['low']:.4f}", f"{m['high']:.4f}", f"{m['n']:,}", m["method"]]
        for name, m in result["metrics"].items()
    ]
    title = f"{result['model']}{' + ' + result['adapter'] if result['adapter'] else ''} on {result['data']}"
    return table(title, ["metric", "value", "low", "high", "n", "interval"], rows)
