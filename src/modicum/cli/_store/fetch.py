"""What comes out of a store."""

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from modicum.cli._common import JsonFlag, OverwriteFlag, emit
from modicum.cli._store._shared import Reference, StoreOption, opened, rows
from modicum.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from modicum.store import Store

FORMATS = ("modicum", "peft", "lora", "basis")


def get(
    version: Reference,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The file (modicum, basis) or folder to write.")
    ],
    store: StoreOption,
    fmt: Annotated[
        str,
        typer.Option(
            "--format",
            help="modicum (one compact file, the stored bytes), peft (a PEFT folder), lora (an exactly equal standard "
            "LoRA, needs --model), or basis (the file of the basis that it needs, for `modicum basis add`).",
        ),
    ] = "modicum",
    model: Annotated[str | None, typer.Option(help="The base model, for --format lora.")] = None,
    overwrite: OverwriteFlag = False,
    as_json: JsonFlag = False,
) -> None:
    """Write a version to OUTPUT, checked to the last bit, and say whether the basis that it needs is in the store."""
    from modicum.store import basis_state

    if fmt not in FORMATS:
        raise ConfigError(f"no format {fmt!r}{did_you_mean(fmt, FORMATS)}; known: {', '.join(FORMATS)}")
    with opened(store) as found:
        one = found.show(version)
        if one.method == "basis":
            fmt = "basis"
        written = _write(found, str(one), output, fmt, model, overwrite)
        basis = basis_state(found, str(one))
    result = {"version": str(one), "digest": one.digest, "format": fmt, "output": written, "basis": basis}
    emit(result, as_json, _show)


def _write(store: "Store", version: str, output: Path, fmt: str, model: str | None, overwrite: bool) -> Path:
    target = output if fmt != "modicum" or output.suffix else output.with_suffix(".modicum")
    if target.exists() and not overwrite:
        raise ConfigError(f"{target} exists already; choose another name or pass --overwrite")
    if fmt == "basis":
        from modicum.store import basis_of

        basis_of(store, version).save(target)
        return target
    if fmt == "modicum":
        from modicum.store.atomic import new_file

        data = store.get_bytes(version)
        with new_file(target) as stream:
            stream.write(data)
        return target
    if fmt == "peft":
        from modicum.store.folders import folder_of_record

        return folder_of_record(store.get(version), output, overwrite=overwrite)
    if model is None:
        raise ConfigError("--format lora multiplies the adapter out, and needs its base model: --model MODEL")
    from modicum.store.convert import export_adapter, load_for

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "adapter.modicum"
        file.write_bytes(store.get_bytes(version))
        export_adapter(load_for(model, file)[0], output, "lora", overwrite=overwrite)
    return output


def _show(result: dict[str, Any]) -> Any:
    basis = result["basis"]
    return rows(
        "get",
        [
            ("version", result["version"]),
            ("digest", result["digest"]),
            ("written", result["output"]),
            ("basis", None if basis is None else basis.stored or "NOT IN THIS STORE"),
            ("to have it here", None if basis is None else basis.command),
        ],
    )
