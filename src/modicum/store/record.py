"""The compact record: one version of one adapter as one byte string, or as one `*.modicum` file.

A safetensors header that names 224 tensors takes 27 KB, as much as the numbers of a rank-8 LoRA-XS adapter.
The record spends at most 1 KiB + 2 % over the numbers themselves, and is made for stores with a million of
them: `decode` copies no value and builds no per-tensor object. The values come back as ONE flat array on the
given bytes plus offsets, and the list of names is shared between records of the same base model.

    header       128 bytes: sizes, and check sums of itself and of everything else (`front`)
    description  zlib: one line of JSON about the adapter, one line with names and shapes (`layout`)
    values       little-endian, tensors in natural order of their names, no gaps; or 8 or 4 bits each (`low_bit`)
    sections     full modules such as a classification head, each in its own type

Every part starts at a multiple of 8 bytes, padded with zeros. bfloat16, which NumPy lacks, is carried as
its bit pattern in uint16, low-bit values as their packed bytes.
"""

from __future__ import annotations

import json
import math
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from modicum.errors import ConfigError, CorruptAdapterError, listing
from modicum.store import low_bit
from modicum.store.front import AGAIN, DIGEST_BYTES, HEADER_BYTES, MAGIC, MAX_DESCRIPTION, TYPES, Front, pad
from modicum.store.layout import Layout, from_text, layout, natural, to_text
from modicum.store.numbers import DTYPES, VALUE_DTYPES, finite, to_floats, to_storage

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

__all__ = [
    "DIGEST_BYTES", "HEADER_BYTES", "MAGIC", "SUFFIX", "TYPES", "Header", "Record", "Rounding", "Section",
    "build", "decode", "digest", "encode", "peek", "unpacked",
]  # fmt: skip
SUFFIX = ".modicum"
#: fields of a record that its description holds, beside the list of full modules
_ABOUT = {
    "config": dict, "metadata": dict, "task_type": str, "base_fingerprint": str, "recipe_digest": str,
    "basis_fingerprint": object, "rounding": list,
}  # fmt: skip


@dataclass(frozen=True)
class Section:
    """One tensor of a full module, in its own type: `data` is flat, bfloat16 as uint16."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: np.ndarray

    def array(self) -> np.ndarray:
        """The tensor in its shape; float32 if it is stored as bfloat16."""
        return to_floats(self.data, self.dtype).reshape(self.shape)


@dataclass(frozen=True)
class Rounding:
    """How far low-bit values ŵ are from the float32 ones w that they were made of, measured when they were."""

    #: max |w − ŵ|
    largest: float
    #: ‖w − ŵ‖ / ‖w‖ over all values
    relative: float


@dataclass(frozen=True)
class Record:
    """One version of one adapter, as stored."""

    #: method name (`lora_xs`), or `peft:` and PEFT's name for a method of PEFT (`peft:LORA`)
    method: str
    #: type of the values: float32, float16, bfloat16, int8 or int4
    dtype: str
    #: names, shapes and offsets of the tensors in `values`
    layout: Layout
    #: all values, flat, in the layout's order; bfloat16 as uint16, low-bit ones packed in uint8 (see `floats`);
    #: read-only after `decode`
    values: np.ndarray
    #: options of the method that differ from its defaults
    config: dict[str, Any] = field(default_factory=dict)
    task_type: str | None = None
    base_fingerprint: str | None = None
    basis_fingerprint: Any = None
    recipe_digest: str | None = None
    #: whatever the author wants to say, as JSON
    metadata: dict[str, Any] = field(default_factory=dict)
    #: tensors of full modules (classification heads)
    sections: tuple[Section, ...] = ()
    #: of low-bit values: what they are off
    rounding: Rounding | None = None

    def floats(self) -> np.ndarray:
        """All values as one flat float32 array."""
        return unpacked(self.values, self.dtype, self.layout)

    def tensors(self) -> Iterator[tuple[str, np.ndarray]]:
        """(name, float32 array in its shape) for every tensor; views on one array."""
        flat, offsets = self.floats(), self.layout.offsets
        for index, (name, shape) in enumerate(zip(self.layout.names, self.layout.shapes, strict=True)):
            yield name, flat[offsets[index] : offsets[index + 1]].reshape(shape)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Record):
            return NotImplemented
        return encode(self) == encode(other)

    __hash__ = None  # pyright: ignore[reportAssignmentType]  # arrays and dictionaries inside


@dataclass(frozen=True)
class Header:
    """What a record says about itself, without its values."""

    method: str
    dtype: str
    version: int
    tensors: int
    values: int
    #: bytes in all, of the values, of the full modules, and the rest (header, description, padding)
    bytes: int
    value_bytes: int
    section_bytes: int
    container_bytes: int
    #: BLAKE2b-256 of everything but the header's own check sum, hexadecimal
    digest: str
    description: dict[str, Any]
    layout: Layout
    #: of low-bit values: what they are off
    rounding: Rounding | None = None


def build(
    method: str,
    tensors: Mapping[str, np.ndarray],
    dtype: str = "bfloat16",
    *,
    sections: tuple[Section, ...] = (),
    **about: Any,
) -> Record:
    """A record of float32 `tensors`, cast to `dtype` and put in canonical (natural) order of their names.

    int8 and int4 are quantized in blocks (`low_bit`), and what they are off is measured and kept.

    `about` takes the remaining fields of `Record`: config, task_type, base_fingerprint, basis_fingerprint,
    recipe_digest, metadata.

    Raises:
        ConfigError: unknown `dtype`, or a value too large for it.
        CorruptAdapterError: NaN or infinite values, with the names of the tensors.
    """
    names = tuple(sorted(tensors, key=natural))
    bad = [name for name in names if not np.isfinite(tensors[name]).all()]
    if bad:
        raise CorruptAdapterError(
            f"NaN or infinite values in {listing(bad)}: the training diverged; train again with a lower rate"
        )
    shapes = tuple(tuple(tensors[name].shape) for name in names)
    parts = [np.ascontiguousarray(tensors[name], dtype=np.float32).reshape(-1) for name in names]
    flat = np.concatenate(parts) if parts else np.zeros(0, dtype=np.float32)
    placed = layout(names, shapes)
    if dtype not in low_bit.BITS:
        _check_type(dtype)
        return Record(method, dtype, placed, to_storage(flat, dtype), sections=sections, **about)
    stored = low_bit.quantize(flat, placed.blocks, dtype)
    rounding = _measured(flat, low_bit.dequantize(stored, placed.blocks, dtype))
    return Record(method, dtype, placed, stored, sections=sections, rounding=rounding, **about)


def unpacked(values: np.ndarray, dtype: str, placed: Layout) -> np.ndarray:
    """Stored `values` of a layout as flat float32."""
    return (
        low_bit.dequantize(values, placed.blocks, dtype)
        if dtype in low_bit.BITS
        else to_floats(values, dtype)
    )


def encode(record: Record) -> bytes:
    """The bytes of `record`.

    Raises:
        CorruptAdapterError: values do not fill the layout, or are NaN or infinite.
        ConfigError: metadata or config cannot be written as JSON, or the method's name is too long.
    """
    _check_numbers(record)
    description = _describe(record)
    if len(description) > MAX_DESCRIPTION:
        raise ConfigError(
            f"config, metadata and names take {len(description)} bytes, at most {MAX_DESCRIPTION} fit"
        )
    packed = zlib.compress(description, 9)
    sections = b"".join(_padded(np.ascontiguousarray(s.data).tobytes()) for s in record.sections)
    front = Front(
        record.dtype, len(record.layout.names), record.layout.size, len(packed), len(description),
        len(sections), record.method, _blocks(record),
    )  # fmt: skip
    body = _padded(packed) + _padded(record.values.tobytes()) + sections
    return front.sealed(body) + body


def decode(data: bytes | memoryview) -> Record:
    """The record in `data`; its arrays are read-only views on `data`, no value is copied.

    Raises:
        CorruptAdapterError: any damage: not a record, a newer format, cut short, changed bits, numbers that
            are not finite.
    """
    header = Front.read_checked(data)
    body = memoryview(data)[HEADER_BYTES:]
    about, tensors, sections = _read_description(body[: header.packed], header)
    start = pad(header.packed)
    kind = VALUE_DTYPES.get(header.dtype, np.dtype(np.uint8))
    values = np.frombuffer(body, kind, header.value_bytes // kind.itemsize, start)
    record = Record(
        header.method, header.dtype, tensors, values,
        sections=_read_sections(body[start + pad(header.value_bytes) :], sections), **about,
    )  # fmt: skip
    _check_numbers(record)
    return record


def digest(data: bytes | memoryview) -> bytes:
    """The 32-byte digest of the record in `data`, recomputed; what the bytes mean is not looked at.

    Raises:
        CorruptAdapterError: not a record, or any bit of it changed.
    """
    return Front.read_checked(data).digest


def peek(source: bytes | str | Path) -> Header:
    """What the record says about itself; of a file only the first bytes are read, the values are not checked.

    Raises:
        CorruptAdapterError: damage in the header or the description, or a length that does not fit.
    """
    if isinstance(source, bytes):
        front, total = source, len(source)
    else:
        with Path(source).open("rb") as file:
            front = file.read(1 << 14)
            total = Path(source).stat().st_size
            if len(front) >= HEADER_BYTES:
                front += file.read(max(0, HEADER_BYTES + Front.read(front, total).packed - len(front)))
    header = Front.read(front, total)
    about, tensors, sections = _read_description(front[HEADER_BYTES : HEADER_BYTES + header.packed], header)
    about["sections"] = sections
    return Header(
        method=header.method,
        dtype=header.dtype,
        version=header.version,
        tensors=header.tensors,
        values=header.values,
        bytes=total,
        value_bytes=header.value_bytes,
        section_bytes=header.section_bytes,
        container_bytes=total - header.value_bytes - header.section_bytes,
        digest=header.digest.hex(),
        description=about,
        layout=tensors,
        rounding=about.pop("rounding", None),
    )


def _describe(record: Record) -> bytes:
    about = {
        "config": record.config, "task_type": record.task_type, "base_fingerprint": record.base_fingerprint,
        "basis_fingerprint": record.basis_fingerprint, "recipe_digest": record.recipe_digest,
        "metadata": record.metadata, "sections": [[s.name, s.dtype, list(s.shape)] for s in record.sections],
        "rounding": record.rounding and [record.rounding.largest, record.rounding.relative],
    }  # fmt: skip
    try:
        text = json.dumps(
            {k: v for k, v in about.items() if v}, separators=(",", ":"), sort_keys=True, allow_nan=False
        )
    except (TypeError, ValueError) as error:
        raise ConfigError(f"config and metadata must be plain JSON values: {error}") from error
    # JSON escapes line breaks, so the first line break is the one between the two parts
    return f"{text}\n{to_text(record.layout.names, record.layout.shapes)}".encode()


def _read_description(packed: bytes | memoryview, header: Front) -> tuple[dict[str, Any], Layout, list]:
    try:
        first, second = header.lines(packed)
        about = json.loads(first)
        sections = [_listed(*one) for one in about.pop("sections", [])]
        wrong = [name for name, value in about.items() if not isinstance(value, _ABOUT.get(name, ()))]
        if wrong:
            raise ValueError(f"it holds {sorted(wrong)} as this modicum does not know it")  # noqa: TRY301
        if "rounding" in about:
            about["rounding"] = Rounding(*map(_bound, about["rounding"]))
    except (zlib.error, ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise CorruptAdapterError(f"the record's description cannot be read ({error}); {AGAIN}") from error
    tensors = from_text(second, header.tensors)
    blocks = len(tensors.blocks) if header.dtype in low_bit.BITS else 0
    if (len(tensors.names), tensors.size, blocks) != (header.tensors, header.values, header.blocks):
        raise CorruptAdapterError(
            f"the record lists {len(tensors.names)} tensors with {tensors.size} values, its header says "
            f"{header.tensors} with {header.values}; {AGAIN}"
        )
    return about, tensors, sections


def _listed(name: str, dtype: str, shape: list[int]) -> tuple[str, str, tuple[int, ...]]:
    if not isinstance(name, str) or dtype not in DTYPES or any(type(i) is not int or i < 0 for i in shape):
        raise ValueError(f"the full module {name!r} is no tensor that this modicum knows")
    return name, dtype, tuple(shape)


def _bound(value: float) -> float:
    if not 0 <= value < math.inf:
        raise ValueError(f"a bound of {value}")
    return float(value)


def _read_sections(body: memoryview, listed: list) -> tuple[Section, ...]:
    sections, start = [], 0
    for name, dtype, shape in listed:
        count = math.prod(shape)
        size = count * DTYPES[dtype].itemsize
        if start + size > len(body):
            raise CorruptAdapterError(f"the full module {name!r} reaches past the end of the record; {AGAIN}")
        sections.append(Section(name, dtype, shape, np.frombuffer(body, DTYPES[dtype], count, start)))
        start += pad(size)
    if start != len(body):
        raise CorruptAdapterError(
            f"the record holds {len(body) - start} bytes that nothing accounts for; {AGAIN}"
        )
    return tuple(sections)


def _measured(exact: np.ndarray, rounded: np.ndarray) -> Rounding:
    wide = exact.astype(np.float64)
    off, norm = wide - rounded, float(np.linalg.norm(wide))
    relative = float(np.linalg.norm(off)) / norm if norm else 0.0
    return Rounding(float(np.abs(off).max(initial=0.0)), relative)


def _blocks(record: Record) -> int:
    return len(record.layout.blocks) if record.dtype in low_bit.BITS else 0


def _check_type(dtype: str) -> None:
    if dtype not in TYPES:
        raise ConfigError(f"values cannot be stored as {dtype!r}, only as {', '.join(TYPES)}")


def _check_numbers(record: Record) -> None:
    _check_type(record.dtype)
    faults = []
    if record.dtype in low_bit.BITS:
        faults += _faults_of_low_bit(record)
    elif record.values.dtype != VALUE_DTYPES[record.dtype] or record.values.shape != (record.layout.size,):
        kind, size = record.values.dtype, record.layout.size
        faults.append(f"{record.values.shape} values of {kind} for {size} of {record.dtype}")
    elif not finite(record.values, record.dtype):
        bounds = record.layout.offsets
        bad = [
            name
            for i, name in enumerate(record.layout.names)
            if not finite(record.values[bounds[i] : bounds[i + 1]], record.dtype)
        ]
        faults.append(f"NaN or infinite values in {listing(bad)}")
    for section in record.sections:
        if section.dtype not in DTYPES or section.data.size != math.prod(section.shape):
            faults.append(
                f"{section.data.size} {section.dtype} in {section.name!r} for shape {section.shape}"
            )
        elif not finite(section.data, section.dtype):
            faults.append(f"NaN or infinite values in {section.name!r}")
    if faults:
        raise CorruptAdapterError(
            f"the adapter's numbers are wrong: {'; '.join(faults)}; train or fetch it again"
        )


def _faults_of_low_bit(record: Record) -> list[str]:
    blocks = record.layout.blocks
    size = low_bit.packed_bytes(record.layout.size, len(blocks), record.dtype)
    if record.values.dtype != np.uint8 or record.values.shape != (size,):
        return [f"{record.values.shape} values of {record.values.dtype} for {size} bytes of {record.dtype}"]
    return [] if low_bit.finite(record.values, blocks, record.dtype) else ["NaN or infinite scales"]


def _padded(data: bytes) -> bytes:
    return data + bytes(pad(len(data)) - len(data))
