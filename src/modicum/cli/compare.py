"""Compare methods at several ranks on several compressed bases, every learning rate swept, over seeds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from modicum.cli._common import JsonFlag, OverwriteFlag, RayFlag, emit, table


def run(
    paths: Annotated[
        list[Path], typer.Argument(metavar="FILE", help="The comparison, a YAML file; with --join folders.")
    ],
    join: Annotated[
        bool, typer.Option("--join", help="Make one comparison of the finished ones in these folders.")
    ] = False,
    output: Annotated[
        Path | None, typer.Option(help="Folder of the results; that of the file when unset.")
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="Runs at the same time, a process each; that of the file when unset."),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Check everything, and show cells, runs and trained values only."),
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an interrupted comparison; try failed runs again.")
    ] = False,
    overwrite: OverwriteFlag = False,
    ray: RayFlag = False,
    as_json: JsonFlag = False,
) -> None:
    """Train and measure every cell of the comparison in FILE: method x rank x compression, over rates and seeds.

    Each cell chooses its learning rate on validation rows and meets the test rows with that one alone. Writes
    comparison.json, runs.parquet, report.html and report.md, after every finished cell. Ends with 1 if a cell failed.
    """
    from modicum.compare import join as joining
    from modicum.compare.report import write_report
    from modicum.compare.run import run_comparison
    from modicum.errors import ConfigError

    if resume and overwrite:
        raise ConfigError("--resume keeps what is there, --overwrite starts again: give one of them")
    if join:
        if output is None:
            raise ConfigError("--join writes a comparison of its own: name its folder with --output")
        found = joining.join(paths, output, overwrite=overwrite)
        write_report(output, found)
        emit({"folder": str(output), **found}, as_json, _show)
        return
    spec = _spec(paths, output, workers)
    if dry_run:
        from modicum.compare.plan import plan

        emit(plan(spec), as_json, _plan)
        return
    result = run_comparison(
        spec,
        resume=resume,
        overwrite=overwrite,
        ray=ray,
        say=lambda line: typer.echo(line, err=True),
        publish=write_report,
    )
    emit({"folder": str(result.folder), **result.comparison}, as_json, _show)
    if result.failed:
        raise typer.Exit(1)


def _spec(paths: list[Path], output: Path | None, workers: int | None) -> Any:
    from modicum.compare.spec import load_comparison
    from modicum.errors import ConfigError

    if len(paths) > 1:
        raise ConfigError("one comparison at a time; finished ones are joined with --join")
    changes: dict[str, Any] = {"output": None if output is None else str(output), "workers": workers}
    spec = load_comparison(paths[0])
    return spec.with_options(**{name: value for name, value in changes.items() if value is not None})


def _plan(plan: dict[str, Any]) -> Any:
    rows = [
        [
            cell["compression"],
            cell["label"],
            f"{cell['trained_values']:,}",
            ", ".join(f"{rate:g}" for rate in cell["learning_rates"]),
            cell["runs"],
        ]
        for cell in plan["cells"]
    ]
    lines = [
        f"{plan['runs']} runs of {plan['steps']:,} steps at most, seeds {', '.join(map(str, plan['seeds']))}",
        f"{plan['workers']} at a time, threads of each: {plan['threads']}; {plan['selected_on']}",
        f"results go to {plan['output']}",
    ]
    title = "dry run: nothing is trained"
    return [table(title, ["base", "cell", "trained values", "learning rates", "runs"], rows), *lines]


def _show(comparison: dict[str, Any]) -> Any:
    from modicum.compare.markdown import table as short

    shown = short(comparison)
    failed = [cell for cell in comparison["cells"] if cell["state"] == "failed"]
    return [
        table(comparison["name"], shown["columns"], shown["rows"]),
        *(f"FAILED {cell['error']}" for cell in failed),
        shown["note"],
        f"wrote {comparison['folder']}: report.html, report.md, comparison.json, runs.parquet",
    ]
