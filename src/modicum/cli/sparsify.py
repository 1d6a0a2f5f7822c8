"""Zero the weights of a model that matter least, layer by layer, and say what it costs."""

from typing import Annotated, Any

import typer

from modicum.cli._common import (
    JsonFlag,
    ModelArgument,
    OutputOption,
    OverwriteFlag,
    SequenceLength,
    emit,
    layer_progress,
    table,
)
from modicum.cli._shown import outcome


def run(  # long: one line or three for each option
    model: ModelArgument,
    output: OutputOption,
    sparsity: Annotated[
        float | None, typer.Option(help="Share of zeros in each layer; 0.5 unless a pattern says it.")
    ] = None,
    algorithm: Annotated[
        str, typer.Option(help="wanda (weights times the inputs they meet) or magnitude.")
    ] = "wanda",
    pattern: Annotated[
        str | None, typer.Option(help="N:M, e.g. 2:4: of each M inputs in a row the N best are kept.")
    ] = None,
    per: Annotated[
        str | None, typer.Option(help="Compare in a row or in a layer; wanda: row, magnitude: layer.")
    ] = None,
    ratio: Annotated[
        list[str] | None,
        typer.Option(help="PATTERN=SHARE for some layers, e.g. down_proj=0.4; endings, a regex."),
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(help="Layers that stay as they are: name endings, a regex.")
    ] = None,
    calibration: Annotated[
        list[str] | None,
        typer.Option(help="wanda: text files, or hub:NAME, hub:NAME:CONFIG; bundled text without."),
    ] = None,
    sequences: Annotated[int, typer.Option(help="wanda: sequences to calibrate on, at most.")] = 128,
    sequence_length: SequenceLength = 512,
    eval_text: Annotated[
        str | None, typer.Option(help="Measure perplexity on this file or hub:NAME; bundled text without.")
    ] = None,
    eval_sequences: Annotated[int, typer.Option(help="Measure on so many sequences at most, 0: all.")] = 64,
    no_eval: Annotated[bool, typer.Option("--no-eval", help="Do not measure perplexity.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an unfinished run.")] = False,
    overwrite: OverwriteFlag = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Plan only, write nothing.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Write MODEL with zeros among the weights of its linear layers as a folder that `from_pretrained` loads.

    Embeddings and heads stay as they are. One decoder or encoder layer is in memory at a time.
    """
    from modicum.compress.sparsify import sparsify_model
    from modicum.compress.sparsify_report import SparsifyOptions, parse_ratios

    options = SparsifyOptions(
        sparsity=sparsity,
        algorithm=algorithm,
        pattern=pattern,
        per=per,
        ratios=parse_ratios(ratio or []),
        exclude=tuple(exclude or ()),
        calibration=tuple(calibration or ()),
        sequences=sequences,
        sequence_length=sequence_length,
        evaluate=not no_eval,
        eval_text=eval_text,
        eval_sequences=eval_sequences,
    )
    with layer_progress("sparsify") as advance:
        report = sparsify_model(
            model, output, options, resume=resume, overwrite=overwrite, dry_run=dry_run, progress=advance
        )
    emit(report, as_json, _show)


def _show(report: Any) -> Any:
    layers = [
        [layer.name, "x".join(map(str, layer.shape)), f"{layer.sparsity:.4f}"]
        + [f"{e:.4f}" if e is not None else "" for e in (layer.weight_error, layer.output_error)]
        for layer in report.layers
    ]
    columns = ["layer", "shape", "sparsity", "weight error", "output error"]
    rows = [
        ["sparsity", f"{report.sparsity:.4f}"],
        ["weights", f"{report.weights:,} in {len(layers)} layers ({report.kept_weights:,} others stay)"],
        *([] if report.dry_run else [["seconds", f"{report.seconds:.1f}"]]),
        *outcome(report),
    ]
    return [table("sparsify", ["", "what"], rows), table("layers", columns, layers)]
