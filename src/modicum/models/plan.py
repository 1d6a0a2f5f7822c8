"""What an adapter costs before it is trained: numbers, bytes on disk and optimizer memory, for N users.

Arithmetic on shapes; no weight is loaded. Also what headline figures leave out: the frozen directions that
all LoRA-XS adapters of a base model share, task heads, and the container around the numbers.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from modicum.adapters import registry
from modicum.errors import ConfigError, TargetError, did_you_mean, listing
from modicum.models.counts import BASELINES, FULL

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from modicum.adapters.config import AdapterConfig
    from modicum.models.architecture import Architecture

    Shapes = Mapping[str, tuple[int, int]]

DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
_SAFETENSORS_NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
#: the compact record spends at most this much over the numbers themselves
RECORD_BYTES = 1024
#: directions are cached in float32
BASIS_BYTES = 4
#: AdamW keeps two float32 moments per trained number, and its gradient is a third
OPTIMIZER_BYTES, GRADIENT_BYTES = 8, 4
#: options of PEFT configs that choose among layers
_LAYERS = ("layers_to_transform", "layers_pattern")


@dataclass(frozen=True)
class PlanRow:
    """One method at one rank; all sizes in bytes."""

    method: str
    #: None where the rank changes nothing
    rank: int | None
    #: trained numbers in the adapted layers, and in the head
    trained: int
    head: int
    #: the trained numbers of one adapter, and of its head, in the stored dtype
    payload_bytes: int
    head_bytes: int
    #: what the container adds per adapter: our compact record (at most), a PEFT folder's safetensors header
    record_overhead_bytes: int
    folder_overhead_bytes: int
    #: frozen numbers that PEFT writes into every adapter folder although they can be made again
    folder_frozen_bytes: int
    #: frozen directions, once per base model whatever the number of users
    basis_bytes: int
    #: one user's adapter in a compact record, head included; and all users' plus the basis
    user_bytes: int
    total_bytes: int
    #: AdamW's moments and the gradients while one adapter trains, in float32
    optimizer_bytes: int
    gradient_bytes: int
    #: how many of these payloads take the room of one LoRA payload of the same rank
    smaller_than_lora: float


@dataclass(frozen=True)
class Plan:
    """What the chosen methods cost on one architecture."""

    model: str
    parameters: int
    adapted_layers: int
    users: int
    dtype: str
    rows: list[PlanRow] = field(default_factory=list)


def all_methods() -> list[str]:
    """The names a plan knows: our methods, the baselines, full fine-tuning."""
    return [*registry.names(), *BASELINES, FULL]


def make_plan(
    architecture: Architecture,
    *,
    methods: Sequence[str] | None = None,
    ranks: Sequence[int] = (16,),
    targets: str | Iterable[str] = "all-linear",
    users: int = 1,
    dtype: str = "bfloat16",
    options: Mapping[str, Any] | None = None,
) -> Plan:
    """The plan of every method at every rank on the layers that `targets` names.

    `options` are set on the config of every method of ours that has them (`core="diagonal"`).

    Raises:
        ConfigError: an unknown method, dtype or option, or a count below 1.
        TargetError: a target matches no linear layer, or a rank is larger than a layer.
    """
    chosen = list(methods or all_methods())
    _check(chosen, ranks, users, dtype, options or {})
    shapes = architecture.shapes(targets)
    rows: list[PlanRow] = []
    for method in chosen:
        try:
            counts = {rank: _count(method, architecture, shapes, rank, options or {}) for rank in ranks}
        except TargetError:
            if methods:
                raise
            continue  # a method nobody asked for may not fit
        if method == FULL or (len(counts) > 1 and len(set(counts.values())) == 1):
            counts = {None: counts[ranks[0]]}
        for rank, count in counts.items():
            lora = BASELINES["lora"].trained(shapes, rank or ranks[0])
            rows.append(_row(method, rank, count, architecture, shapes, users, dtype, lora))
    return Plan(architecture.name, architecture.parameters, len(shapes), users, dtype, rows)


@dataclass(frozen=True)
class AdapterNumbers:
    """Numbers of one adapter, and the frozen ones that all adapters of its base model share."""

    trained: int
    #: directions that are cached and carried from machine to machine: U alone, the input side follows from it
    basis: int
    #: directions that layers hold in memory, both sides
    directions: int


def adapter_numbers(
    method: str, architecture: Architecture, rank: int, options: Mapping[str, Any]
) -> AdapterNumbers:
    """The numbers of an adapter of `rank` with the other `options` of its config, targets among them.

    Raises:
        TargetError: a target matches no linear layer, or the rank is larger than a layer.
    """
    shapes = architecture.shapes(
        options.get("target_modules") or "all-linear",
        exclude=options.get("exclude_modules"),
        **{name: options[name] for name in _LAYERS if options.get(name) is not None},
    )
    chosen = ("r", "target_modules", "exclude_modules", *_LAYERS)
    rest = {name: value for name, value in options.items() if name not in chosen}
    count = _count(method, architecture, shapes, rank, rest)
    both = sum(rank * (out + into) for out, into in shapes.values()) if count.basis else 0
    return AdapterNumbers(count.trained, count.basis, both)


@dataclass(frozen=True)
class _Count:
    trained: int
    frozen: int = 0
    basis: int = 0


def _count(
    method: str, architecture: Architecture, shapes: Shapes, rank: int, options: Mapping[str, Any]
) -> _Count:
    if method == FULL:
        return _Count(architecture.parameters - architecture.head_parameters)
    if method in BASELINES:
        form = BASELINES[method]
        return _Count(form.trained(shapes, rank), form.frozen(shapes, rank))
    adapter, config_class = registry.get(method), registry.config_class(method)
    config = config_class(**{"r": rank, **_known(config_class, options)})
    reasons = {name: adapter.misfit(into, out, rank, config) for name, (out, into) in shapes.items()}
    misfits = [f"{name} {shapes[name]}: {reason}" for name, reason in reasons.items() if reason]
    if misfits:
        raise TargetError(f"{method} does not fit {listing(misfits, 3)}")
    trained = sum(adapter.count(into, out, rank, config) for out, into in shapes.values())
    # U alone, (out, r): the input side follows from it and the weight
    basis = sum(rank * out for out, _ in shapes.values()) if config.basis_spec() is not None else 0
    return _Count(trained, basis=basis)


def _row(
    method: str,
    rank: int | None,
    count: _Count,
    architecture: Architecture,
    shapes: Shapes,
    users: int,
    dtype: str,
    lora: int,
) -> PlanRow:
    width = DTYPE_BYTES[dtype]
    payload, head = count.trained * width, architecture.head_parameters * width
    overhead = 0 if method == FULL else RECORD_BYTES
    basis = count.basis * BASIS_BYTES
    trains = count.trained + architecture.head_parameters
    return PlanRow(
        method=method,
        rank=rank,
        trained=count.trained,
        head=architecture.head_parameters,
        payload_bytes=payload,
        head_bytes=head,
        record_overhead_bytes=overhead,
        folder_overhead_bytes=_safetensors_header(method, shapes, count.trained, dtype),
        folder_frozen_bytes=count.frozen * width,
        basis_bytes=basis,
        user_bytes=payload + head + overhead,
        total_bytes=users * (payload + head + overhead) + basis,
        optimizer_bytes=trains * OPTIMIZER_BYTES,
        gradient_bytes=trains * GRADIENT_BYTES,
        smaller_than_lora=lora / count.trained,
    )


def _safetensors_header(method: str, shapes: Shapes, trained: int, dtype: str) -> int:
    """Bytes of a safetensors header that names the tensors of every layer."""
    baselines = {"lora": 2, "dora": 3, "vera": 2, "psoft": 3, "tiny_lora": 4}
    sides = registry.get(method).tensors if method in registry.names() else baselines.get(method, 1)
    label = f"base_model.model.{{}}.{registry.prefix(method)}adapters.R"
    entry = {"dtype": _SAFETENSORS_NAMES[dtype], "shape": [trained], "data_offsets": [trained, trained]}
    header = {label.format(name) + "x" * side: entry for name in shapes for side in range(sides)}
    # eight bytes of length, padded to a multiple of eight
    return 0 if method == FULL else 8 + -(-len(json.dumps(header, separators=(",", ":"))) // 8) * 8


def _known(config_class: type[AdapterConfig], options: Mapping[str, Any]) -> dict[str, Any]:
    names = {spec.name for spec in dataclasses.fields(config_class)}
    return {name: value for name, value in options.items() if name in names}


def _check(
    methods: Sequence[str], ranks: Sequence[int], users: int, dtype: str, options: Mapping[str, Any]
) -> None:
    """Refuse what cannot be planned; all faults at once."""
    known = all_methods()
    faults = [f"no method {name!r}{did_you_mean(name, known)}" for name in methods if name not in known]
    if dtype not in DTYPE_BYTES:
        faults.append(
            f"no dtype {dtype!r}{did_you_mean(dtype, DTYPE_BYTES)}; known: {', '.join(DTYPE_BYTES)}"
        )
    counted = [("users", users), *(("rank", rank) for rank in ranks)]
    faults += [f"{name} = {number}, must be at least 1" for name, number in counted if number < 1]
    if not ranks:
        faults.append("no rank given")
    ours = [registry.config_class(name) for name in methods if name in registry.names()]
    has = {spec.name for config_class in ours for spec in dataclasses.fields(config_class)}
    faults += [
        f"no chosen method has the option {o!r}{did_you_mean(o, has)}" for o in options if o not in has
    ]
    if faults:
        raise ConfigError("; ".join(faults))
