"""Check a version against thresholds before it is released: quality, size, speed, exactness."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from modicum.cli._common import JsonFlag, emit, table

if TYPE_CHECKING:
    from modicum.evaluate.gate import GateReport


def run(
    gates: Annotated[Path, typer.Argument(metavar="GATES.yaml", help="The thresholds.")],
    json_report: Annotated[Path | None, typer.Option(help="A JSON file for the verdicts.")] = None,
    junit: Annotated[Path | None, typer.Option(help="A JUnit XML file for CI systems.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Check every gate in GATES.yaml and exit with 1 if one is not kept or cannot be measured.

    Kinds of gates: not_worse (than other records, at the far end of the interval), metric, size, latency (from
    `modicum bench --output`), same (merged and unmerged), sparsity, parameters.
    """
    from modicum.evaluate.gate import check_gates, write_json, write_junit

    report = check_gates(gates)
    if json_report is not None:
        write_json(report, json_report)
    if junit is not None:
        write_junit(report, junit)
    emit(report, as_json, _show)
    if not report.passed:
        raise typer.Exit(1)


def _show(report: "GateReport") -> list[Any]:
    rows = [
        [
            "ok" if verdict.passed else "FAILED",
            verdict.name,
            verdict.compared,
            verdict.error or verdict.shown,
            verdict.limit_shown,
        ]
        for verdict in report.verdicts
    ]
    failed = sum(not verdict.passed for verdict in report.verdicts)
    summary = f"{failed} of {len(rows)} gates failed" if failed else f"all {len(rows)} gates passed"
    return [table(report.file, ["", "gate", "compared", "measured", "limit"], rows), f"{summary}."]
