"""Write an adapter in another format: standard LoRA, one compact record, or a PEFT folder."""

from pathlib import Path
from typing import Annotated, Any

import typer

from modicum.cli._common import JsonFlag, emit, table


def run(
    model: Annotated[str, typer.Option(help="The base model: a folder, a hub name, or 'embedded'.")],
    adapter: Annotated[Path, typer.Option(help="A .modicum file or a PEFT folder.")],
    output: Annotated[Path, typer.Option(help="The file (modicum) or folder (lora, peft) to write.")],
    fmt: Annotated[
        str,
        typer.Option(
            "--format",
            help="lora: a standard LoRA, exactly equal, for software without modicum. modicum: one compact "
            "file. peft: a PEFT folder of the same method.",
        ),
    ] = "lora",
    dtype: Annotated[
        str, typer.Option(help="Type of the numbers in a compact record: bfloat16, float16 or float32.")
    ] = "bfloat16",
    overwrite: Annotated[bool, typer.Option(help="Replace what is at the output.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, write nothing.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Write the adapter in another format and say how many bytes it takes."""
    from modicum.store.convert import export_adapter, load_for

    result = export_adapter(
        load_for(model, adapter)[0], output, fmt, dtype=dtype, overwrite=overwrite, dry_run=dry_run
    )
    emit(result, as_json, _show)


def _show(result: Any) -> Any:
    done = "would write" if result.dry_run else "written"
    rows = [
        ["format", result.format],
        [done, str(result.output)],
        ["values", f"{result.values:,}"],
        ["bytes", f"{result.bytes:,}"],
    ]
    return table("export", ["", "what"], rows)
