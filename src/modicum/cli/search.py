"""Search a trained super-network for its best sub-networks within a budget."""

from pathlib import Path
from typing import Annotated, Any

import typer

from modicum.cli._common import JsonFlag, RayFlag, emit, parse_overrides, progress, table


def run(
    folder: Annotated[
        Path, typer.Argument(help="The folder of a finished `modicum tune` with a search space.")
    ],
    strategy: Annotated[str, typer.Option(help="heuristic, hill, random or nsga2.")] = "hill",
    trials: Annotated[int, typer.Option(help="Sub-networks to evaluate.")] = 50,
    objective: Annotated[
        list[str] | None,
        typer.Option(
            help="A metric of the task, parameters, macs, bytes, memory, prefill_time, decode_time."
        ),
    ] = None,
    budget: Annotated[
        list[str] | None,
        typer.Option(help="COST=LIMIT, e.g. parameters=0.8: a share up to 1, absolute above."),
    ] = None,
    rows: Annotated[
        str | None, typer.Option(help="Rows to score on; the validation rows of the recipe when unset.")
    ] = None,
    max_rows: Annotated[int | None, typer.Option(help="Score on so many of them at most.")] = None,
    population: Annotated[int, typer.Option(help="nsga2: sub-networks of a generation.")] = 16,
    workers: Annotated[int, typer.Option(help="Processes that evaluate side by side.")] = 1,
    seed: Annotated[int, typer.Option(help="Seed of the search.")] = 0,
    prompt: Annotated[int, typer.Option(help="Tokens of the prompt in times, MACs and memory.")] = 128,
    generate: Annotated[int, typer.Option(help="Tokens decoded when times are measured.")] = 16,
    batch: Annotated[int, typer.Option(help="Sequences in times, MACs and memory.")] = 1,
    repeats: Annotated[int, typer.Option(help="Turns of each measurement of times.")] = 5,
    output: Annotated[
        Path | None, typer.Option(help="Where to keep the study; FOLDER/search when unset.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an unfinished search.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Start again.")] = False,
    ray: RayFlag = False,
    as_json: JsonFlag = False,
) -> None:
    """Evaluate sub-networks of the adapter in FOLDER, and keep every point, the Pareto front and the best one.

    Writes study.db (Optuna), search.json, sub_network.json (for `modicum extract`), pareto.html and pareto.png. Rows
    that training or the reported test has seen are refused.
    """
    from pydantic import ValidationError

    from modicum.errors import ConfigError
    from modicum.search.options import SearchOptions
    from modicum.train.search import search_run

    if resume and overwrite:
        raise ConfigError("--resume keeps what is there, --overwrite starts again: give one of them")
    try:
        options = SearchOptions(
            strategy=strategy,  # pyright: ignore[reportArgumentType]
            trials=trials,
            objectives=objective or [],
            budgets=parse_overrides(budget),
            rows=rows,
            max_rows=max_rows,
            population=population,
            workers=workers,
            seed=seed,
            prompt=prompt,
            generate=generate,
            batch=batch,
            repeats=repeats,
        )
    except ValidationError as error:
        raise ConfigError("; ".join(f"{f['loc'][0]}: {f['msg']}" for f in error.errors())) from error
    with progress("search", None if strategy == "heuristic" else trials) as advance:
        result = search_run(
            folder,
            options,
            output,
            resume=resume,
            overwrite=overwrite,
            ray=ray,
            tell=lambda point: advance(1, _said(point)),
        )
    emit(result, as_json, _show)


def _said(point: Any) -> str:
    return " ".join(f"{name} {value:.5g}" for name, value in point.values.items())


def _show(result: Any) -> Any:
    names = list(dict.fromkeys(name for point in result.points for name in point.values))
    rows = []
    for point in result.front:
        shares = {n: point.values[n] / result.whole[n] for n in names if n in result.whole}
        cells = [
            f"{point.values[name]:.5g}" + (f" ({shares[name]:.3f})" if name in shares else "")
            for name in names
        ]
        rows.append([str(point.number), *cells])
    best = result.best
    about = [
        ["evaluated", f"{len(result.points)} of {result.space_size:,} sub-networks ({result.strategy})"],
        ["best", f"trial {best.number}: {_said(best)}" if best else "none keeps the budgets"],
        [
            "written",
            f"{result.folder}: search.json, pareto.html, pareto.png" + (", sub_network.json" if best else ""),
        ],
    ]
    title = "Pareto front (in brackets: share of the super-network)"
    return [table("search", ["", "what"], about), table(title, ["trial", *names], rows)]
