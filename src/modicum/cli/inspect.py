"""Say what an adapter file holds and whether it is undamaged; needs no model."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from modicum.cli._common import JsonFlag, emit, table

if TYPE_CHECKING:
    from modicum.store.inspection import Inspection


def run(
    path: Annotated[
        Path, typer.Argument(help="A .modicum file, a PEFT folder, a basis or another safetensors file.")
    ],
    as_json: JsonFlag = False,
) -> None:
    """Say what PATH holds: method, ranks, trained numbers, bytes, fingerprints, and whether it is undamaged.

    Reads the file alone and loads no model. Exits with 1 when the file is damaged.
    """
    from modicum.store.inspection import OK, inspect

    found = inspect(path)
    emit(found, as_json, _show)
    if found.state != OK:
        raise typer.Exit(1)


def _show(found: "Inspection") -> Any:
    rows = [
        ("kind", found.kind),
        ("state", found.state),
        ("method", found.method or ""),
        ("ranks", ", ".join(map(str, found.ranks))),
        (
            "frozen values" if found.kind == "basis" else "trained values",
            f"{found.values:,} in {found.tensors} tensors",
        ),
        ("head values", f"{found.head_values:,}" if found.head_values else ""),
        ("types", ", ".join(found.dtypes)),
        ("bytes", f"{found.bytes:,}"),
        ("  values", f"{found.value_bytes:,}"),
        ("  head", f"{found.head_bytes:,}" if found.head_bytes else ""),
        ("  container", f"{found.container_bytes:,}"),
        ("base model", found.base_model or ""),
        ("task", found.task_type or ""),
        ("base fingerprint", found.base_fingerprint or ""),
        ("basis fingerprint", found.basis_fingerprint or ""),
        ("recipe", found.recipe_digest or ""),
        ("digest", found.digest or ""),
        *((f"option {key}", str(value)) for key, value in sorted(found.options.items())),
        *((f"metadata {key}", str(value)) for key, value in sorted(found.metadata.items())),
    ]
    return table(str(found.path), ["", "what"], [row for row in rows if row[1]])
