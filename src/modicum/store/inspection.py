"""What a file holds, read from the file alone: no model, and torch for files of bases only.

Knows compact records, PEFT folders, safetensors files and files of bases.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from modicum.errors import ConfigError, CorruptAdapterError, listing
from modicum.store.numbers import finite
from modicum.store.record import MAGIC, decode, peek

OK = "ok"
_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
#: safetensors' type names -> (ours, NumPy type)
_SAFETENSORS = {
    "F64": ("float64", "<f8"), "F32": ("float32", "<f4"), "F16": ("float16", "<f2"), "BF16": ("bfloat16", "<u2"),
    "I64": ("int64", "<i8"), "I32": ("int32", "<i4"), "U8": ("uint8", "u1"), "I8": ("int8", "i1"),
    "BOOL": ("bool", "?"),
}  # fmt: skip
#: what PEFT's names for our methods start with
_OURS = "MODICUM_"


@dataclass(frozen=True)
class Inspection:
    """What is in a file or folder."""

    path: Path
    #: compact record, PEFT folder, basis, or safetensors file
    kind: str
    #: `ok`, or what is wrong
    state: str
    method: str | None = None
    #: types of the stored numbers
    dtypes: tuple[str, ...] = ()
    tensors: int = 0
    #: trained numbers, those of full modules not counted; of a basis, its frozen numbers
    values: int = 0
    #: numbers of full modules such as classification heads
    head_values: int = 0
    ranks: tuple[int, ...] = ()
    #: bytes: in all, of the trained numbers, of full modules, and the container around them
    bytes: int = 0
    value_bytes: int = 0
    head_bytes: int = 0
    container_bytes: int = 0
    base_model: str | None = None
    task_type: str | None = None
    base_fingerprint: str | None = None
    basis_fingerprint: str | None = None
    recipe_digest: str | None = None
    digest: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)


def inspect(path: str | Path) -> Inspection:
    """What the file or folder at `path` holds, and whether it is undamaged.

    Damage is reported in `state`, not raised: a damaged file still says what can be read of it.

    Raises:
        ConfigError: nothing there, or nothing of ours.
    """
    source = Path(path)
    if source.is_dir():
        if (source / "adapter" / _CONFIG).is_file():
            source /= "adapter"
        if not (source / _CONFIG).is_file():
            raise ConfigError(f"{source} is no adapter folder: it has no {_CONFIG}")
        return _folder(source)
    if not source.is_file():
        raise ConfigError(f"nothing at {source}")
    if source.suffix == ".safetensors":
        return _safetensors(source)
    return _record(source)


def _record(path: Path) -> Inspection:
    total = path.stat().st_size
    try:
        header = peek(path)
    except CorruptAdapterError as error:
        with path.open("rb") as file:
            if file.read(len(MAGIC)) != MAGIC:
                raise ConfigError(f"{path}: {error}") from error
        return Inspection(path, "compact record", str(error), bytes=total)
    state, head_values = OK, 0
    try:
        head_values = sum(math.prod(s.shape) for s in decode(path.read_bytes()).sections)
    except CorruptAdapterError as error:
        state = str(error)
    about = dict(header.description)
    options = about.pop("config", {})
    return Inspection(
        path=path,
        kind="compact record",
        state=state,
        method=header.method,
        dtypes=tuple(dict.fromkeys([header.dtype, *(dtype for _, dtype, _ in about.pop("sections"))])),
        tensors=header.tensors,
        values=header.values,
        head_values=head_values,
        ranks=_ranks(zip(header.layout.names, header.layout.shapes, strict=True)),
        bytes=header.bytes,
        value_bytes=header.value_bytes,
        head_bytes=header.section_bytes,
        container_bytes=header.container_bytes,
        base_model=options.pop("base_model_name_or_path", None),
        digest=header.digest,
        options=options,
        **about,
    )


def _folder(folder: Path) -> Inspection:
    try:
        config = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
        kind = str(config["peft_type"])
    except (ValueError, KeyError, TypeError) as error:
        return Inspection(
            folder, "PEFT folder", f"{_CONFIG} cannot be read ({error!r}); get the folder again"
        )
    method = kind.removeprefix(_OURS).lower() if kind.startswith(_OURS) else f"peft:{kind}"
    weights = folder / _WEIGHTS
    size = (folder / _CONFIG).stat().st_size
    about = {
        "method": method,
        "base_model": config.get("base_model_name_or_path"),
        "task_type": config.get("task_type"),
        "base_fingerprint": config.get("base_fingerprint"),
        "basis_fingerprint": config.get("basis_fingerprint"),
        "options": {k: v for k, v in config.items() if v not in (None, [], {}, False) and k not in _SHOWN},
    }
    if not weights.is_file():
        return Inspection(
            folder, "PEFT folder", f"{_WEIGHTS} is missing; get the folder again", bytes=size, **about
        )
    tensors, state = _read_safetensors(weights)
    # what is saved whole does not carry the method's prefix
    mine = {name: spec for name, spec in tensors.items() if f".{kind.lower()}_" in name} or tensors
    return _summary(folder, "PEFT folder", state, mine, tensors, size + weights.stat().st_size, about)


#: what the summary shows in fields of its own
_SHOWN = {
    "peft_type", "base_model_name_or_path", "task_type", "base_fingerprint", "basis_fingerprint", "peft_version",
    "inference_mode", "auto_mapping",
}  # fmt: skip


def _safetensors(path: Path) -> Inspection:
    tensors, state = _read_safetensors(path)
    found = _summary(path, "safetensors file", state, tensors, tensors, path.stat().st_size, {})
    return _basis(found) if _is_basis(path) else found


def _is_basis(path: Path) -> bool:
    # the metadata stand at the start of the header
    with path.open("rb") as file:
        return b'"modicum-basis-' in file.read(1 << 20)


def _basis(found: Inspection) -> Inspection:
    """`found`, a file of a basis, with its fingerprints; reading those takes torch."""
    from modicum.adapters.basis import Basis

    try:
        basis = Basis.load(found.path)
    except CorruptAdapterError as error:
        return replace(found, kind="basis", state=str(error))
    return replace(
        found,
        kind="basis",
        ranks=tuple(sorted({layer.u.shape[1] for layer in basis.values()})),
        base_fingerprint=basis.base_fingerprint,
        basis_fingerprint=basis.fingerprint(),
        options={"layers": len(basis), "spec": basis.spec.token()},
    )


def _summary(
    path: Path, kind: str, state: str, mine: dict, everything: dict, total: int, about: dict[str, Any]
) -> Inspection:
    def count(tensors: dict) -> tuple[int, int]:
        sizes = [math.prod(shape) for _, shape in tensors.values()]
        widths = [np.dtype(dict(_SAFETENSORS.values())[dtype]).itemsize for dtype, _ in tensors.values()]
        return sum(sizes), sum(n * w for n, w in zip(sizes, widths, strict=True))

    values, value_bytes = count(mine)
    all_values, all_bytes = count(everything)
    return Inspection(
        path=path,
        kind=kind,
        state=state,
        dtypes=tuple(sorted({dtype for dtype, _ in everything.values()})),
        tensors=len(mine),
        values=values,
        head_values=all_values - values,
        ranks=_ranks((name, shape) for name, (_, shape) in mine.items()),
        bytes=total,
        value_bytes=value_bytes,
        head_bytes=all_bytes - value_bytes,
        container_bytes=total - all_bytes,
        **about,
    )


def _read_safetensors(path: Path) -> tuple[dict[str, tuple[str, tuple[int, ...]]], str]:
    """Name -> (type, shape) of a safetensors file, and `ok` or what is wrong with it."""
    data = path.read_bytes()
    try:
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        header.pop("__metadata__", None)
        found, broken, end = {}, [], 8 + length
        for name, spec in header.items():
            dtype, kind = _SAFETENSORS[spec["dtype"]]
            start, stop = (8 + length + offset for offset in spec["data_offsets"])
            raw = np.frombuffer(data[start:stop], kind)
            if raw.size != math.prod(spec["shape"]):
                raise ValueError(f"{name} is cut short")  # noqa: TRY301 - one place words the error
            found[name], end = (dtype, tuple(spec["shape"])), max(end, stop)
            if not finite(raw, dtype):
                broken.append(name)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return {}, f"{path.name} is damaged ({error}); get the file again"
    if end != len(data):
        return found, f"{path.name} is damaged ({len(data)} bytes instead of {end}); get the file again"
    return found, f"NaN or infinite values in {listing(broken)}" if broken else OK


def _ranks(tensors: Any) -> tuple[int, ...]:
    """Ranks in use: a core is r×r or r long, a LoRA factor is r wide."""
    found = set()
    for name, shape in tensors:
        if len(shape) == 2:
            found.add(min(shape))
        elif name.endswith(".R"):
            found.add(shape[0])
    return tuple(sorted(found))
