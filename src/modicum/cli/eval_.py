"""Measure a model, with or without an adapter, on rows of data."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from modicum.cli._common import JsonFlag, emit, progress, table


def run(
    model: Annotated[str, typer.Option("--model", "-m", help="Folder, hub name, or 'embedded'.")],
    data: Annotated[
        str, typer.Option("--data", "-d", help="File, folder, bundled:NAME or hub name; test split.")
    ],
    adapter: Annotated[
        str | None, typer.Option("--adapter", "-a", help="Folder of an adapter or a run.")
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
    as_json: JsonFlag = False,
) -> None:
    """Measure MODEL (carrying ADAPTER) on the rows of DATA; every metric comes with a 95 % interval."""
    from modicum.evaluate.load import load_for_evaluation
    from modicum.evaluate.run import evaluate

    loaded = load_for_evaluation(
        model, data, adapter=adapter, task=task, overrides=overrides or (), num_labels=num_labels, dtype=dtype
    )
    with progress("rows", None) as advance:
        result = evaluate(
            loaded.model,
            loaded.tokenizer,
            loaded.rows,
            loaded.task,
            batch_size=batch_size,
            exact_match=exact_match,
            max_new_tokens=max_new_tokens,
            advance=advance,
        )
    emit({**result.as_dict(), "model": model, "adapter": adapter, "data": data}, as_json, _table)


def _table(result: dict[str, Any]) -> Any:
    rows = [
        [name, f"{m['value']:.4f}", f"{m['low']:.4f}", f"{m['high']:.4f}", f"{m['n']:,}", m["method"]]
        for name, m in result["metrics"].items()
    ]
    title = f"{result['model']}{' + ' + result['adapter'] if result['adapter'] else ''} on {result['data']}"
    return table(title, ["metric", "value", "low", "high", "n", "interval"], rows)
