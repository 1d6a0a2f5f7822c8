"""Build, check, share and cache the frozen directions that adapters live in."""

from pathlib import Path
from typing import Annotated, Any

import typer

from modicum.cli._common import JsonFlag, emit, progress, size, table

app = typer.Typer(no_args_is_help=True)
cache_app = typer.Typer(no_args_is_help=True, help="Show or empty the cache of computed bases.")
app.add_typer(cache_app, name="cache")

DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done, write nothing.")]
Model = Annotated[str, typer.Argument(help="A model folder, or 'embedded'.")]
File = Annotated[Path, typer.Argument(help="A basis file.")]
Task = Annotated[
    str, typer.Option(help="Name the layers as in the model for: auto, causal_lm, seq_cls or base.")
]


@app.command()
def build(
    model: Model,
    targets: Annotated[
        list[str] | None, typer.Option(help="Layers: name endings, a regular expression.")
    ] = None,
    rank: Annotated[int, typer.Option(help="Columns per layer.")] = 16,
    mode: Annotated[str, typer.Option(help="fast, or exact (slower, converged directions).")] = "fast",
    directions: Annotated[str, typer.Option(help="top, middle or bottom singular directions.")] = "top",
    kind: Annotated[str, typer.Option(help="svd, random or random_kaiming.")] = "svd",
    seed: Annotated[int, typer.Option(help="Seed of a random basis.")] = 0,
    output: Annotated[Path | None, typer.Option(help="Write the basis to this file, to share it.")] = None,
    task: Task = "auto",
    dry_run: DryRun = False,
    as_json: JsonFlag = False,
) -> None:
    """Compute the basis of a model folder, one matrix at a time; it lands in the cache and in --output."""
    from modicum.models import basis_jobs as jobs

    options = {"targets": targets, "rank": rank, "task": task}
    spec = jobs.spec(kind=kind, directions=directions, mode=mode, seed=seed)
    todo = jobs.plan(model, spec, **options)
    if dry_run:
        emit({**todo, "output": output, "dry_run": True}, as_json, _rows("would build"))
        return
    with progress("basis", total=todo["layers"]) as advance:
        emit(jobs.build(model, spec, output, advance, **options), as_json, _rows("built"))


@app.command()
def add(file: File, dry_run: DryRun = False, as_json: JsonFlag = False) -> None:
    """Add an exported basis to the cache, where adapters that name its fingerprint find it."""
    from modicum.models import basis_jobs as jobs

    emit(jobs.add(file, dry_run=dry_run), as_json, _rows("would add" if dry_run else "added"))


@app.command()
def show(file: File, as_json: JsonFlag = False) -> None:
    """Print what a basis file holds."""
    from modicum.models import basis_jobs as jobs

    emit(jobs.show(file), as_json, _rows(str(file)))


@app.command()
def verify(file: File, model: Model, task: Task = "auto", as_json: JsonFlag = False) -> None:
    """Check a basis file against the weights of a model folder; fails when a layer does not belong."""
    from modicum.models import basis_jobs as jobs

    result = jobs.verify(file, model, task=task)
    emit(result, as_json, _reports)
    if not result["ok"]:
        raise typer.Exit(1)


@cache_app.command("info")
def cache_info(as_json: JsonFlag = False) -> None:
    """Print where the cache is and how much it holds."""
    from modicum.models import basis_jobs as jobs

    emit(jobs.cache_info(), as_json, _rows("cache"))


@cache_app.command("clear")
def cache_clear(dry_run: DryRun = False, as_json: JsonFlag = False) -> None:
    """Remove every cached basis, added ones included."""
    from modicum.models import basis_jobs as jobs

    emit(jobs.cache_clear(dry_run=dry_run), as_json, _rows("would remove" if dry_run else "removed"))


def _rows(title: str) -> Any:
    def show_rows(result: dict[str, Any]) -> Any:
        shown = {
            key: size(value) if key == "bytes" else value
            for key, value in result.items()
            if value is not None
        }
        return table(title, ["", "value"], [[key.replace("_", " "), value] for key, value in shown.items()])

    return show_rows


def _reports(result: dict[str, Any]) -> Any:
    rows = [
        [
            layer["name"], "yes" if layer["ok"] else "NO", f"{layer['orthonormality']:.1e}", f"{layer['captured']:.4f}",
            "-" if layer["relative"] is None else f"{layer['relative']:.4f}",
            {True: "yes", False: "no", None: "unknown"}[layer["same_weight"]],
        ]
        for layer in result["reports"]
    ]  # fmt: skip
    return table(
        result["verdict"], ["layer", "ok", "orthonormality", "captured", "of promised", "same weight"], rows
    )
