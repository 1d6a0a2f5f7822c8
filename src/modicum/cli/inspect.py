"""Say what an adapter or a model folder holds and whether it is undamaged; builds no model."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from modicum.cli._common import JsonFlag, emit, table

if TYPE_CHECKING:
    from modicum.store.active import ActiveSubNetwork
    from modicum.store.inspection import Inspection
    from modicum.store.model_inspection import ModelInspection


def run(
    path: Annotated[
        Path,
        typer.Argument(
            help="A .modicum file, a PEFT folder, a basis or another safetensors file, a model folder (dense, sparse, "
            "quantized by modicum, extracted), or 'embedded'."
        ),
    ],
    layers: Annotated[bool, typer.Option("--layers", help="Also a table of the layers.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Say what PATH holds: method, ranks, numbers, bytes, fingerprints, zeros, the active sub-network, and any damage.

    Reads the files alone and builds no model. Exits with 1 when a file is damaged.
    """
    from modicum.store.inspection import OK, Inspection, inspect

    if str(path) == "embedded" and not path.exists():
        from modicum.models import embedded

        path = embedded.path()
    found = inspect(path)
    show = _adapter if isinstance(found, Inspection) else _model
    emit(found, as_json, lambda it: show(it, layers))
    if found.state != OK:
        raise typer.Exit(1)


def _adapter(found: "Inspection", layers: bool) -> list[Any]:
    rows = [
        ("kind", found.kind),
        ("state", found.state),
        ("method", found.method or ""),
        ("ranks", ", ".join(map(str, found.ranks))),
        (
            "frozen values" if found.kind == "basis" else "trained values",
            f"{found.values:,} in {found.tensors} tensors",
        ),
        *_sub_network(found.sub_network),
        ("head values", f"{found.head_values:,}" if found.head_values else ""),
        ("types", ", ".join(found.dtypes)),
        ("  off by", (r := found.rounding) and f"{r.largest:.3g} at most, {r.relative:.2%} of the norm"),
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
    shown = [table(str(found.path), ["", "what"], [row for row in rows if row[1]])]
    if layers and found.sub_network is not None:
        parts = [
            (layer.name, f"{layer.rank} of {layer.largest}", f"{layer.active:,} of {layer.values:,}")
            for layer in found.sub_network.layers
        ]
        shown.append(table("layers", ["layer", "rank", "values that run"], parts))
    return shown


def _model(found: "ModelInspection", layers: bool) -> list[Any]:
    sparsity = ""
    if found.sparsity is not None:
        sparsity = f"{found.sparsity:.1%} ({found.least_sparse:.1%} to {found.sparsest:.1%} of a layer)"
    rows = [
        ("kind", found.kind),
        ("state", found.state),
        ("class", found.model_class or ""),
        ("parameters", _count(found.parameters)),
        ("  in linear layers", _count(found.linear_parameters)),
        ("zeros in linear layers", sparsity),
        ("tensors", f"{found.tensors:,}"),
        ("types", ", ".join(found.dtypes)),
        ("bytes", f"{found.bytes:,}"),
        ("base model", found.base_model or ""),
        *_sub_network(found.sub_network),
        ("fingerprint", found.fingerprint or ""),
    ]
    shown = [table(str(found.path), ["", "what"], [row for row in rows if row[1]])]
    if layers:
        parts = [(x.name, "x".join(map(str, x.shape)), x.dtype, f"{x.sparsity:.2%}") for x in found.layers]
        shown.append(table("layers", ["layer", "shape", "stored as", "zeros"], parts))
    return shown


def _sub_network(active: "ActiveSubNetwork | None") -> Iterable[tuple[str, str]]:
    if active is None:
        return
    yield "sub-network", f"{active.digest}{' (all that was trained)' if active.whole else ''}"
    yield "  values that run", f"{active.active_values:,}" if active.active_values else ""
    yield "  their fingerprint", active.fingerprint or ""
    yield "  runs at ranks", ", ".join(f"{rank} ({count} layers)" for rank, count in active.ranks.items())
    yield "  widths", ", ".join(f"{name}: {units}" for name, units in active.widths.items())
    yield "  choices", ", ".join(f"{name}: {value}" for name, value in active.choices.items())


def _count(number: int | None) -> str:
    return "" if number is None else f"{number:,}"
