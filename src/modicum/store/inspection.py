"""What a file holds, read from the file alone: no model, and torch for bases and quantized layers only.

Knows compact records, PEFT folders, safetensors files and files of bases; model folders are in `model_inspection`.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modicum.errors import ConfigError, CorruptAdapterError, listing
from modicum.store.active import ActiveSubNetwork, of_adapter, unfit
from modicum.store.model_inspection import OK, ModelInspection, inspect_model
from modicum.store.numbers import finite, to_floats
from modicum.store.record import MAGIC, Rounding, decode, peek
from modicum.store.tensor_files import DamagedFileError, StoredTensor, read_header

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    import numpy as np

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
#: what PEFT's names for our methods start with
_OURS = "MODICUM_"
#: what PEFT puts before the names of a model's modules
_PEFT = "base_model.model."


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
    #: of low-bit values: what they are off from those that were trained
    rounding: Rounding | None = None
    #: of an elastic adapter: which of its sub-networks runs on loading
    sub_network: ActiveSubNetwork | None = None
    options: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)


def inspect(path: str | Path) -> Inspection | ModelInspection:
    """What the file or folder at `path` holds, and whether it is undamaged.

    Damage is reported in `state`, not raised: a damaged file still says what can be read of it.

    Raises:
        ConfigError: nothing there, or nothing of ours.
    """
    source = Path(path)
    if source.is_dir():
        if (source / "adapter" / _CONFIG).is_file():
            source /= "adapter"
        if (source / _CONFIG).is_file():
            return _folder(source)
        if (source / "config.json").is_file():
            return inspect_model(source)
        raise ConfigError(
            f"{source} is no adapter folder, it has no {_CONFIG}, and no model folder, it has no config.json"
        )
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
    state, head_values, numbers = OK, 0, None
    try:
        record = decode(path.read_bytes())
        head_values, numbers = sum(math.prod(s.shape) for s in record.sections), record.tensors
    except CorruptAdapterError as error:
        state = str(error)
    about = dict(header.description)
    options = about.pop("config", {})
    shapes = dict(zip(header.layout.names, header.layout.shapes, strict=True))
    active, fault = _active(shapes, options, numbers)
    return Inspection(
        path=path,
        kind="compact record",
        state=fault if state == OK else state,
        method=header.method,
        dtypes=tuple(dict.fromkeys([header.dtype, *(dtype for _, dtype, _ in about.pop("sections"))])),
        tensors=header.tensors,
        values=header.values,
        head_values=head_values,
        ranks=_ranks(shapes.items()),
        bytes=header.bytes,
        value_bytes=header.value_bytes,
        head_bytes=header.section_bytes,
        container_bytes=header.container_bytes,
        base_model=options.pop("base_model_name_or_path", None),
        digest=header.digest,
        rounding=header.rounding,
        sub_network=active,
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
    if state == OK:
        part = f".{kind.lower()}_adapters"
        named = {name.removeprefix(_PEFT).replace(part, ""): tensor for name, tensor in mine.items()}
        about["sub_network"], state = _active(
            {name: tensor.shape for name, tensor in named.items()},
            config,
            lambda: ((name, to_floats(tensor.array(), tensor.dtype)) for name, tensor in named.items()),
        )
    return _summary(folder, "PEFT folder", state, mine, tensors, size + weights.stat().st_size, about)


#: what the summary shows in fields of its own
_SHOWN = {
    "peft_type", "base_model_name_or_path", "task_type", "base_fingerprint", "basis_fingerprint", "peft_version",
    "inference_mode", "auto_mapping", "sub_network",
}  # fmt: skip


def _active(
    shapes: Mapping[str, tuple[int, ...]],
    options: dict[str, Any],
    numbers: Callable[[], Iterable[tuple[str, np.ndarray]]] | None,
) -> tuple[ActiveSubNetwork | None, str]:
    """The active sub-network of an adapter with sub-networks, and `ok` or what is wrong with it.

    `numbers` reads the tensors as float32; None where they cannot be read.
    """
    saved = options.pop("sub_network", None)
    if saved is None and not options.get("search_space"):
        return None, OK
    try:
        found, faults = of_adapter(shapes, saved, None if numbers is None else dict(numbers()))
    except (TypeError, ValueError, AttributeError) as error:
        return None, unfit([repr(error)])
    return found, unfit(faults) if faults else OK


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
    path: Path,
    kind: str,
    state: str,
    mine: dict[str, StoredTensor],
    everything: dict[str, StoredTensor],
    total: int,
    about: dict[str, Any],
) -> Inspection:
    values, value_bytes = (sum(getattr(t, what) for t in mine.values()) for what in ("size", "bytes"))
    all_values, all_bytes = (sum(getattr(t, what) for t in everything.values()) for what in ("size", "bytes"))
    return Inspection(
        path=path,
        kind=kind,
        state=state,
        dtypes=tuple(sorted({tensor.dtype for tensor in everything.values()})),
        tensors=len(mine),
        values=values,
        head_values=all_values - values,
        ranks=_ranks((name, tensor.shape) for name, tensor in mine.items()),
        bytes=total,
        value_bytes=value_bytes,
        head_bytes=all_bytes - value_bytes,
        container_bytes=total - all_bytes,
        **about,
    )


def _read_safetensors(path: Path) -> tuple[dict[str, StoredTensor], str]:
    """The tensors of a safetensors file by name, and `ok` or what is wrong with it."""
    try:
        found = read_header(path)
    except DamagedFileError as error:
        return {}, str(error)
    broken = [name for name, t in found.items() if not all(finite(part, t.dtype) for part in t.parts())]
    return found, f"NaN or infinite values in {listing(broken)}" if broken else OK


def _ranks(tensors: Iterable[tuple[str, tuple[int, ...]]]) -> tuple[int, ...]:
    """Ranks in use: a core is r×r or r long, a LoRA factor is r wide."""
    found = set()
    for name, shape in tensors:
        if len(shape) == 2:
            found.add(min(shape))
        elif name.endswith(".R"):
            found.add(shape[0])
    return tuple(sorted(found))
