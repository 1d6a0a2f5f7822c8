"""Fold an adapter into its base model, after measuring what that costs."""

from pathlib import Path
from typing import Annotated, Any

import typer

from modicum.cli._common import JsonFlag, OutputOption, emit, table


def run(
    model: Annotated[str, typer.Option(help="The base model: a folder, a hub name, or 'embedded'.")],
    adapter: Annotated[Path, typer.Option(help="A .modicum file or a PEFT folder.")],
    output: OutputOption,
    dtype: Annotated[
        str,
        typer.Option(
            help="Type of the merged weights: auto (what the base is, quantized or as loaded), or dense in "
            "float32, bfloat16 or float16."
        ),
    ] = "auto",
    text: Annotated[
        Path | None,
        typer.Option(help="Measure on the lines of this text file instead of the bundled examples."),
    ] = None,
    allow_inexact: Annotated[
        bool,
        typer.Option(
            "--allow-inexact",
            help="Write even if the error exceeds the tolerance; what a quantized base cannot take exactly is "
            "quantized again with error feedback.",
        ),
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Measure only, write nothing.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Write the base model with the adapter folded in as a normal model folder, tokenizer included.

    First runs real text through the unmerged and the merged model and reports the difference. Refuses when it
    exceeds what rounding to the output's type has to cost. A quantized base stays quantized: its codes and scales
    are kept bit for bit, and its offsets take the updates of q_bara, qa_hira, qa_lora and qa_blora exactly.
    """
    from modicum.compress.merge import merge_to_folder

    result = merge_to_folder(
        model,
        adapter,
        output,
        texts=_texts(text),
        dtype=dtype,
        allow_inexact=allow_inexact,
        dry_run=dry_run,
    )
    emit(result, as_json, _show)


def _texts(path: Path | None, count: int = 32) -> list[str]:
    from modicum.data import bundled
    from modicum.errors import DataError

    if path is None:
        return bundled.texts("notes", "test")[:count]
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()][:count]
    if not lines:
        raise DataError(f"{path} holds no text to measure on")
    return lines


def _show(result: Any) -> Any:
    report = result.report
    verdict = "exact up to rounding" if result.exact else "INEXACT"
    rows = [
        ["verdict", f"{verdict} for {report.dtype}"],
        ["tokens compared", f"{report.tokens:,}"],
        ["error of the logits", f"{report.logit_error:.2e} (tolerance {report.tolerance:.0e})"],
        ["largest difference", f"{report.max_difference:.3g}"],
        ["same most likely token", f"{report.same_answer:.2%}"],
        ["effect of the adapter", f"{report.effect:.2e}"],
        ["lost by merging", f"{report.lost:.2%} of that"],
        *([f"worst layer {n}", f"{w.name} {w.error:.1e}"] for n, w in enumerate(report.worst_layers[:3], 1)),
        *(
            [["bits per weight", f"{result.bits_before:.3g} before, {result.bits_after:.3g} after"]]
            if result.bits_before and result.bits_after
            else []
        ),
        *(
            [["note", "small blocks cost many bits: blocks that hold the base's groups would cost none"]]
            if (result.bits_after or 0) > 1.5 * (result.bits_before or 16)
            else []
        ),
        *[
            [f"with {kind} offsets", f"{loss:.1%} of the update would be lost"]
            for kind, loss in result.coarser_offsets.items()
        ],
        ["output", f"{result.output} (nothing written)" if result.dry_run else str(result.output)],
        *([f"  {name}", f"{size:,} bytes"] for name, size in result.files.items()),
    ]
    return table("merge", ["", "what"], rows)
