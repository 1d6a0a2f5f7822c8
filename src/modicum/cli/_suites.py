"""Suites on the command line: running them, checking them, and their results as tables."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from modicum.cli._common import emit, progress, table


def run_suites(
    suite: str,
    protocol: str | None,
    only: Sequence[str] | None,
    data_dir: Path,
    as_json: bool,
    report_to: Sequence[str],
    **options: Any,
) -> None:
    """Run `suite` and print its results; `options` are those of `modicum.evaluate.run_suite.run_suite`.

    `report_to`: the experiment trackers that get the results too.
    """
    from modicum.evaluate.run_suite import RESOURCES, result_folders, run_suite
    from modicum.evaluate.suites import load_suite
    from modicum.evaluate.tracked import publish_suites
    from modicum.evaluate.tracking import ensure_trackers

    ensure_trackers(report_to)
    chosen = load_suite(suite, protocol).only(only or ())
    with progress("items", None) as advance:
        results = run_suite(chosen, data_dir=data_dir, advance=advance, **options)
    output = options["output"]
    resources = json.loads((output / RESOURCES).read_text(encoding="utf-8"))["total"]
    publish_suites(report_to, results, list(result_folders(output, options["adapters"])), resources)
    found = {"results": [result.as_dict() for result in results], "resources": resources}
    emit(found, as_json, lambda found: [_results(one) for one in found["results"]])


def run_rows(
    model: str, data: str, adapter: str | None, report_to: Sequence[str], **options: Any
) -> dict[str, Any]:
    """What `evaluate` finds on the rows of `data`, and what it took; sent to the trackers `report_to` too.

    `options` are those of `load_for_evaluation` and of `evaluate`, the latter below `measuring`.
    """
    from modicum.evaluate.load import load_for_evaluation
    from modicum.evaluate.resources import Resources
    from modicum.evaluate.run import evaluate
    from modicum.evaluate.tracked import publish_evaluation
    from modicum.evaluate.tracking import ensure_trackers

    ensure_trackers(report_to)
    measuring = options.pop("measuring")
    with Resources() as used:
        loaded = load_for_evaluation(model, data, adapter=adapter, **options)
        with progress("rows", None) as advance:
            result = evaluate(
                loaded.model, loaded.tokenizer, loaded.rows, loaded.task, advance=advance, **measuring
            )
    found = {
        **result.as_dict(), "model": model, "adapter": adapter, "data": data, "resources": used.as_dict()
    }  # fmt: skip
    publish_evaluation(report_to, found)
    return found


def check_suite(
    suite: str, protocol: str | None, only: Sequence[str] | None, data_dir: Path, as_json: bool
) -> None:
    """Check `suite` and its data and print what each task holds."""
    from modicum.evaluate.run_suite import checked
    from modicum.evaluate.suites import load_suite

    chosen = load_suite(suite, protocol).only(only or ())
    tasks = [
        {"task": task.name, "items": len(task.ids), "notes": task.notes} for task in checked(chosen, data_dir)
    ]
    emit(
        {"suite": chosen.name, "protocol": chosen.protocol, "tasks": tasks},
        as_json,
        lambda found: table(
            f"{found['suite']} under {found['protocol']}: nothing wrong",
            ["task", "items", "note"],
            [[one["task"], one["items"] or "", "; ".join(one["notes"])] for one in found["tasks"]],
        ),
    )


def _results(result: dict[str, Any]) -> Any:
    rows = [
        [task, name, _number(m["value"]), _number(m["low"]), _number(m["high"]), f"{m['n']:,}", m["method"]]
        for task, found in result["tasks"].items()
        for name, m in found["metrics"].items()
    ]
    if result["average"] is not None:
        rows.append(["average", "", _number(result["average"]), "", "", "", "mean of the tasks"])
    carried = f" + {result['adapter']}" if result["adapter"] else ""
    limited = f", at most {result['limit']} items a task" if result["limit"] else ""
    title = f"{result['model']}{carried} on {result['suite']} under {result['protocol']}{limited}"
    return table(title, ["task", "metric", "value", "low", "high", "n", "interval"], rows)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
