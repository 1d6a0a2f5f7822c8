"""Run every stage of a recipe: compress, tune, search, extract or merge, export, measure."""

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
    resume: Annotated[bool, typer.Option("--resume", help="Go on after the last finished stage.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Start again in a folder with results.")
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Run the stages that the recipe CONFIG has, and measure on its test rows.

    They are sparsify, reorder, quantize, tune, search, extract or merge, export. Finished ones are kept.

    `modicum tune` runs the training of a recipe alone.
    """
    from modicum.errors import ConfigError
    from modicum.train.pipeline import run_recipe
    from modicum.train.recipe import load_recipe

    if resume and overwrite:
        raise ConfigError("--resume keeps what is there, --overwrite starts again: give one of them")
    recipe = load_recipe(config, overrides or ())
    result = run_recipe(
        recipe,
        resume=resume,
        overwrite=overwrite,
        show="auto",
        say=lambda stage: typer.echo(f"{stage} …", err=True),
    )
    emit({"folder": result.folder, "reused": result.reused, **result.report}, as_json, _show)


def _show(result: dict[str, Any]) -> Any:
    shown = []
    rows = []
    if found := result.get("sparsify"):
        rows.append(["sparse", f"{found['sparsity']:.1%} of the weights are 0"])
    if found := result.get("reorder"):
        rows.append(["reordered", f"{len(found['widths'])} widths, by {found['importance']}"])
    if found := result.get("quantize"):
        rows.append(["quantized", f"{found['bits_per_weight']:.3g} bits per weight"])
    rows.append(["trained", f"{result['tune']['trained_values']['total']:,} values"])
    if found := result.get("search"):
        best = ", ".join(f"{name} {value:,.5g}" for name, value in found["best"]["values"].items())
        rows.append(["searched", f"trial {found['best']['number']}: {best}"])
    if found := result.get("extract"):
        share = found["parameters"] / found["parameters_before"]
        rows.append(
            ["extracted", f"{found['parameters']:,} parameters ({share:.1%}), {found['model_class']}"]
        )
    if found := result.get("merge"):
        report = found["report"]
        verdict = "exact" if found["exact"] else "INEXACT"
        rows.append(
            ["merged", f"{verdict} ({report['dtype']}), error of the logits {report['logit_error']:.1e}"]
        )
    for name, found in result.get("export", {}).items():
        size = sum(found["files"].values())
        verdict = "same grid" if found["exact"] else "INEXACT"
        rows.append(
            [f"exported {name}", f"{verdict}, {size:,} bytes, weight error {found['max_weight_error']:.1e}"]
        )
    if result["reused"]:
        rows.append(["there already", ", ".join(result["reused"])])
    shown.append(table(f"{result['folder']}", ["stage", "what"], rows))
    if measured := result.get("measure"):
        names = list(next(iter(measured.values())))
        lines = [[name, *(f"{measured[who][name]['value']:.4f}" for who in measured)] for name in names]
        shown.append(table("on the test rows", ["metric", *measured], lines))
    return shown
