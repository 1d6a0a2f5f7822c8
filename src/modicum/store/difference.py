"""What two versions differ in: what is said about them, their configuration, metrics, and how far the numbers moved.

Everything comes from the records themselves; no model is loaded. The distance of two layers is that of the numbers
that were trained in them, flat and in one row: of LoRA-XS the core R, of LoRA the factors A and B.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from modicum.store.catalogue.lookup import Version
    from modicum.store.catalogue.names import Reference
    from modicum.store.reading import Readable
    from modicum.store.record import Record

#: what is said about a version and may differ
_FACTS = (
    "method", "dtype", "task_type", "base_fingerprint", "basis_fingerprint", "parent", "data_digest", "seed",
    "tags", "note", "actor", "bytes",
)  # fmt: skip
#: names of LoRA's and other methods' factors, which belong to the layer above
_FACTORS = ("lora_", "vera_", "ada_", "ia3_", "hada_", "lokr_", "oft_", "boft_", "fourierft_", "vblora_")


@dataclass(frozen=True)
class Change:
    """One thing that is not the same; None where a version does not have it."""

    name: str
    a: Any
    b: Any


@dataclass(frozen=True)
class Distance:
    """How far apart the numbers of one layer are; None for numbers that cannot be set side by side."""

    layer: str
    #: how many numbers, of `a` and of `b`
    values: tuple[int, int]
    #: Euclidean norm of each
    norms: tuple[float, float]
    #: ‖a − b‖, the same relative to ‖a‖, and the cosine of the angle between them
    distance: float | None = None
    relative: float | None = None
    cosine: float | None = None


@dataclass(frozen=True)
class Difference:
    """What two versions differ in."""

    a: str
    b: str
    #: whether their records are equal to the last bit
    same_record: bool
    facts: tuple[Change, ...]
    configuration: tuple[Change, ...]
    #: all metrics of either
    metrics: tuple[Change, ...]
    #: all numbers together, then layer by layer; heads and other full modules after those
    total: Distance
    layers: tuple[Distance, ...]
    #: why the distances may say little
    notes: tuple[str, ...] = field(default=())


def diff(store: Readable, a: str | Reference, b: str | Reference) -> Difference:
    """What versions `a` and `b` of a store (or of a snapshot of one) differ in.

    Raises:
        NotStoredError: one of them is not there.
        CorruptAdapterError: one of them is damaged.
    """
    one, other = store.show(a), store.show(b)
    # by number: an alias may have moved since
    first, second = store.get(str(one)), store.get(str(other))
    layers = _layers(_grouped(first), _grouped(second))
    return Difference(
        a=str(one),
        b=str(other),
        same_record=one.digest == other.digest,
        facts=_facts(one, other, first, second),
        configuration=_changes(_flat(first.config), _flat(second.config)),
        metrics=tuple(
            Change(name, one.metrics.get(name), other.metrics.get(name))
            for name in sorted(one.metrics.keys() | other.metrics.keys())
        ),
        total=_total(layers),
        layers=layers,
        notes=tuple(_notes(one, other, layers)),
    )


def _facts(one: Version, other: Version, first: Record, second: Record) -> tuple[Change, ...]:
    said = [{name: getattr(version, name) for name in _FACTS} for version in (one, other)]
    for facts, record in zip(said, (first, second), strict=True):
        facts["recipe_digest"] = record.recipe_digest
        facts |= {f"metadata.{key}": value for key, value in _flat(record.metadata).items()}
    return _changes(*said)


def _changes(a: Mapping[str, Any], b: Mapping[str, Any]) -> tuple[Change, ...]:
    names = sorted(a.keys() | b.keys())
    return tuple(Change(n, a.get(n), b.get(n)) for n in names if a.get(n) != b.get(n))


def _flat(values: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Nested values by dotted names."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{above}{key}"
        found |= _flat(value, f"{name}.") if isinstance(value, dict) and value else {name: value}
    return found


def _grouped(record: Record) -> dict[str, dict[str, np.ndarray]]:
    """The tensors of every layer by what is left of their names; full modules by their own names."""
    found: dict[str, dict[str, np.ndarray]] = {}
    for name, values in record.tensors():
        layer = layer_of(name)
        found.setdefault(layer, {})[name.removeprefix(layer)] = values
    for section in record.sections:
        found.setdefault(section.name, {})[""] = section.array()
    return found


def layer_of(name: str) -> str:
    """The layer that the tensor `name` of a record belongs to: `…q_proj` of `…q_proj.R` and `…q_proj.lora_A.weight`."""
    parts = name.split(".")
    for place, part in enumerate(parts):
        if place and part.startswith(_FACTORS):
            return ".".join(parts[:place])
    return ".".join(parts[:-1]) or name


def _layers(a: dict[str, dict[str, np.ndarray]], b: dict[str, dict[str, np.ndarray]]) -> tuple[Distance, ...]:
    return tuple(_distance(layer, a.get(layer, {}), b.get(layer, {})) for layer in {**a, **b})


def _distance(layer: str, a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> Distance:
    values = (sum(x.size for x in a.values()), sum(x.size for x in b.values()))
    norms = (_norm(a.values()), _norm(b.values()))
    if {name: x.shape for name, x in a.items()} != {name: x.shape for name, x in b.items()}:
        return Distance(layer, values, norms)
    pairs = [(x.astype(np.float64), b[name].astype(np.float64)) for name, x in a.items()]
    distance = _norm(x - y for x, y in pairs)
    inner = float(sum(np.vdot(x, y) for x, y in pairs))
    length = norms[0] * norms[1]
    return Distance(
        layer,
        values,
        norms,
        distance,
        distance / norms[0] if norms[0] else None,
        inner / length if length else None,
    )


def _norm(arrays: Iterable[np.ndarray]) -> float:
    return math.sqrt(sum(float(np.square(x, dtype=np.float64).sum()) for x in arrays))


def _total(layers: tuple[Distance, ...]) -> Distance:
    values = (sum(x.values[0] for x in layers), sum(x.values[1] for x in layers))
    norms = (math.hypot(*(x.norms[0] for x in layers)), math.hypot(*(x.norms[1] for x in layers)))
    apart = [x.distance for x in layers if x.distance is not None]
    if len(apart) < len(layers):
        return Distance("all", values, norms)
    distance, length = math.hypot(*apart), norms[0] * norms[1]
    inner = (norms[0] ** 2 + norms[1] ** 2 - distance**2) / 2
    return Distance(
        "all",
        values,
        norms,
        distance,
        distance / norms[0] if norms[0] else None,
        inner / length if length else None,
    )


def _notes(one: Version, other: Version, layers: tuple[Distance, ...]) -> Iterable[str]:
    apart = [x.layer for x in layers if x.distance is None]
    if one.base_fingerprint != other.base_fingerprint:
        yield "they were trained on different base models: equal numbers mean different updates"
    elif one.basis_fingerprint != other.basis_fingerprint:
        yield "they were trained in different bases: equal numbers mean different updates"
    if apart:
        yield f"{len(apart)} of {len(layers)} layers differ in their tensors, so that their numbers have no distance"
