"""Quantize a model to 2, 3, 4 or 8 bits, layer by layer, and say what it costs."""

from typing import Annotated

import typer

from modicum.cli._common import (
    JsonFlag,
    ModelArgument,
    OutputOption,
    OverwriteFlag,
    SequenceLength,
    emit,
    layer_progress,
)
from modicum.cli._shown import quantization


def run(  # long: one line or three for each option
    model: ModelArgument,
    output: OutputOption,
    bits: Annotated[int, typer.Option(help="2, 3, 4 or 8.")] = 4,
    group_size: Annotated[int, typer.Option(help="Inputs of a row that share a scale.")] = 128,
    block: Annotated[
        str | None, typer.Option(help="QxP, e.g. 8x4: blocks that share a scale, instead of groups.")
    ] = None,
    zero_point: Annotated[str, typer.Option(help="float, integer or none (symmetric).")] = "float",
    algorithm: Annotated[
        str, typer.Option(help="rtn, mse (clipped) or gptq; nf4 and int8 are those of bitsandbytes.")
    ] = "gptq",
    clip: Annotated[
        str, typer.Option(help="gptq: grids cover the range (minmax) or have the least error (mse).")
    ] = "minmax",
    act_order: Annotated[
        bool, typer.Option("--act-order", help="gptq: columns with large inputs first.")
    ] = False,
    calibration: Annotated[
        list[str] | None,
        typer.Option(help="gptq: text files, or hub:NAME, hub:NAME:CONFIG; bundled text without."),
    ] = None,
    sequences: Annotated[int, typer.Option(help="gptq: sequences to calibrate on, at most.")] = 128,
    sequence_length: SequenceLength = 512,
    eval_text: Annotated[
        str | None, typer.Option(help="Measure perplexity on this file or hub:NAME; bundled text without.")
    ] = None,
    eval_sequences: Annotated[int, typer.Option(help="Measure on so many sequences at most, 0: all.")] = 64,
    no_eval: Annotated[bool, typer.Option("--no-eval", help="Do not measure perplexity.")] = False,
    double_quant: Annotated[bool, typer.Option(help="nf4: quantize the scales too.")] = True,
    scale_dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    offset_dtype: Annotated[
        str | None, typer.Option(help="bfloat16 unless set; float32 for integer zero-points.")
    ] = None,
    keep_zeros: Annotated[
        bool,
        typer.Option("--keep-zeros", help="Weights that are 0 stay 0; needs --zero-point integer or none."),
    ] = False,
    keep_residuals: Annotated[
        bool,
        typer.Option(
            "--keep-residuals", help="Keep what rounding takes away, for qa_sparse_peft: 8 bits more."
        ),
    ] = False,
    head: Annotated[bool, typer.Option("--head", help="The output head too, if it is not tied.")] = False,
    exclude: Annotated[
        list[str] | None, typer.Option(help="Layers that stay as they are: name endings, a regex.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an unfinished run.")] = False,
    overwrite: OverwriteFlag = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Plan only, write nothing.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Write MODEL with quantized linear layers as a folder that `from_pretrained` loads.

    Embeddings stay as they are, and the output head unless --head is given. One decoder layer is in memory at a time.
    """
    from modicum.compress.quantize import quantize_model
    from modicum.compress.quantize_report import QuantizeOptions, parse_block

    options = QuantizeOptions(
        bits=bits,
        group_size=group_size,
        block=None if block is None else parse_block(block),
        zero_point=zero_point,
        algorithm=algorithm,
        clip=clip,
        act_order=act_order,
        double_quant=double_quant,
        scale_dtype=scale_dtype,
        offset_dtype=offset_dtype,
        keep_zeros=keep_zeros,
        keep_residuals=keep_residuals,
        head=head,
        exclude=tuple(exclude or ()),
        calibration=tuple(calibration or ()),
        sequences=sequences,
        sequence_length=sequence_length,
        evaluate=not no_eval,
        eval_text=eval_text,
        eval_sequences=eval_sequences,
    )
    with layer_progress("quantize") as advance:
        report = quantize_model(
            model, output, options, resume=resume, overwrite=overwrite, dry_run=dry_run, progress=advance
        )
    emit(report, as_json, quantization)
