"""What `modicum basis` does, as plain functions that return plain data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from modicum.adapters.basis import Basis, BasisCache, BasisSpec, canonical_size
from modicum.errors import BasisMismatchError, ConfigError, listing
from modicum.models.architecture import parse_targets
from modicum.models.basis import build_basis
from modicum.models.checkpoint import iter_weights, target_shapes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from torch import Tensor

#: largest |uᵀu − 1| of a sound orthonormal basis in float32
_ORTHONORMAL = 1e-4
#: captured energy, relative to the promised, under which a basis does not belong to a weight
_CAPTURES = 0.99


def spec(*, kind: str, directions: str, mode: str, seed: int) -> BasisSpec:
    """The specification in these words; other directions than the top ones imply the exact mode."""
    mode = "exact" if directions != "top" else mode
    if kind == "stored":
        raise ConfigError(
            "a stored basis is not built from weights; add its file with `modicum basis add FILE`"
        )
    return BasisSpec(cast("Any", kind), cast("Any", directions), cast("Any", mode), seed)


def plan(model: str, basis: BasisSpec, *, targets: list[str] | None, rank: int, task: str) -> dict[str, Any]:
    """What `build` would compute, from the configuration alone."""
    shapes = target_shapes(model, parse_targets(targets or ["all-linear"]), task=task)
    sizes = {name: canonical_size(rank, *shape) for name, shape in shapes.items()}
    rows = sum(4 * sizes[name] * (shape[0] + 1) for name, shape in shapes.items())
    return {"model": model, "basis": basis.token(), "rank": rank, "layers": len(shapes), "bytes": rows}


def build(
    model: str,
    basis: BasisSpec,
    output: Path | None,
    progress: Callable[..., None] | None = None,
    *,
    targets: list[str] | None,
    rank: int,
    task: str,
) -> dict[str, Any]:
    """Build the basis of a model folder, keep it in the cache and in `output`; returns its description."""
    words = parse_targets(targets or ["all-linear"])
    made = build_basis(model, words, rank, basis, task=task, progress=progress)
    if output is not None:
        made.save(output)
    return {"model": model, **_described(made), "output": None if output is None else str(output)}


def add(file: Path, *, dry_run: bool = False) -> dict[str, Any]:
    """Add the basis in `file` to the cache; returns its description and where it went."""
    basis = Basis.load(file)
    kept = None if dry_run else str(BasisCache().add(basis))
    return {**_described(basis), "kept": kept, "dry_run": dry_run or None}


def show(file: Path) -> dict[str, Any]:
    """The description of the basis in `file`."""
    basis = Basis.load(file)
    return {**_described(basis), "bytes": file.stat().st_size}


def verify(file: Path, model: str, *, task: str = "auto") -> dict[str, Any]:
    """How the basis in `file` fits the weights of a model folder, layer by layer, and a verdict."""
    basis = Basis.load(file)
    known = target_shapes(model, task=task)
    absent = [name for name in basis if name not in known]
    if absent:
        raise BasisMismatchError(
            f"{model} has no linear layer {listing(absent)}; the basis belongs to another model, or its layers are "
            "named for another --task"
        )

    def stream() -> Iterator[tuple[str, Tensor]]:
        yield from iter_weights(model, list(basis), task=task)

    reports = [{**report._asdict(), "ok": _sound(report, basis.spec)} for report in basis.verify(stream())]
    faulty = [report["name"] for report in reports if not report["ok"]]
    verdict = (
        f"{len(faulty)} of {len(reports)} layers do not belong"
        if faulty
        else "the basis belongs to this model"
    )
    return {"ok": not faulty, "verdict": verdict, "layers": len(reports), "reports": reports}


def cache_info() -> dict[str, Any]:
    """Folder, entries and bytes of the cache."""
    return BasisCache().info()._asdict()


def cache_clear(*, dry_run: bool = False) -> dict[str, Any]:
    """Folder, entries and bytes that were (or would be) removed."""
    cache = BasisCache()
    return (cache.info() if dry_run else cache.clear())._asdict()


def _described(basis: Basis) -> dict[str, Any]:
    return {
        "basis": basis.spec.token(),
        "layers": len(basis),
        "rank": basis.rank,
        "columns": basis.columns,
        "fingerprint": basis.fingerprint(),
        "base_fingerprint": basis.base_fingerprint,
    }


def _sound(report: Any, basis: BasisSpec) -> bool:
    orthonormal = basis.kind == "random_kaiming" or report.orthonormality < _ORTHONORMAL
    # `relative` may exceed 1: the fast procedure's singular values are lower bounds
    belongs = report.relative is None or report.relative > _CAPTURES
    return orthonormal and belongs and report.same_weight is not False
