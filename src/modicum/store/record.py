"""The compact record: one version of one adapter as one byte string, or as one `*.modicum` file.

A safetensors header that names 224 tensors takes 27 KB, as much as the numbers of a rank-8 LoRA-XS adapter.
The record spends at most 1 KiB + 2 % over the numbers themselves, and is made for stores with a million of
them: `decode` copies no value and builds no per-tensor object. The values come back as ONE flat array on the
given bytes plus offsets, and the list of names is shared between records of the same base model.

    header       128 bytes: magic, version, value type, counts, lengths, method, CRC-32 of the header,
                 BLAKE2b-256 of everything else
    description  zlib: one line of JSON about the adapter, one line with names and shapes (`layout`)
    values       little-endian, tensors in natural order of their names, no gaps
    sections     full modules such as a classification head, each in its own type

Every part starts at a multiple of 8 bytes, padded with zeros. bfloat16, which NumPy lacks, is carried as
its bit pattern in uint16.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from modicum.errors import ConfigError, CorruptAdapterError, listing
from modicum.store.layout import Layout, from_text, layout, natural, to_text
from modicum.store.numbers import DTYPES, VALUE_DTYPES, finite, to_floats, to_storage

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

MAGIC = b"\x8aMODICUM"
VERSION = 1
SUFFIX = ".modicum"
_CODES = list(DTYPES)
# magic, version, value type, flags, tensors, values, description packed / unpacked, section bytes, method
_HEADER = struct.Struct("<8sHBBIQIIQ48s")
_CRC = struct.Struct("<I")
_DIGEST_BYTES = 32
HEADER_BYTES = 128
_FRONT = HEADER_BYTES - _DIGEST_BYTES - _CRC.size
#: a description is some hundred bytes; what claims to unpack to more than this is damaged
_MAX_DESCRIPTION = 1 << 28
_AGAIN = "get the file again from where it came from, or save the adapter again"


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
class Record:
    """One version of one adapter, as stored."""

    #: method name (`lora_xs`), or `peft:` and PEFT's name for a method of PEFT (`peft:LORA`)
    method: str
    #: type of the values: float32, float16 or bfloat16
    dtype: str
    #: names, shapes and offsets of the tensors in `values`
    layout: Layout
    #: all values, flat, in the layout's order; bfloat16 as uint16 (see `floats`); read-only after `decode`
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

    def floats(self) -> np.ndarray:
        """All values as one flat float32 array."""
        return to_floats(self.values, self.dtype)

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


def build(
    method: str,
    tensors: Mapping[str, np.ndarray],
    dtype: str = "bfloat16",
    *,
    sections: tuple[Section, ...] = (),
    **about: Any,
) -> Record:
    """A record of float32 `tensors`, cast to `dtype` and put in canonical (natural) order of their names.

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
    return Record(method, dtype, layout(names, shapes), to_storage(flat, dtype), sections=sections, **about)


def encode(record: Record) -> bytes:
    """The bytes of `record`.

    Raises:
        CorruptAdapterError: values do not fill the layout, or are NaN or infinite.
        ConfigError: metadata or config cannot be written as JSON, or the method's name is too long.
    """
    _check_numbers(record)
    description = _describe(record)
    packed = zlib.compress(description, 9)
    sections = b"".join(_padded(np.ascontiguousarray(s.data).tobytes()) for s in record.sections)
    method = record.method.encode()
    if not 0 < len(method) <= 48:
        raise ConfigError(f"the method name {record.method!r} must have 1 to 48 bytes")
    front = _HEADER.pack(
        MAGIC, VERSION, _CODES.index(record.dtype), 0, len(record.layout.names), record.values.size,
        len(packed), len(description), len(sections), method,
    )  # fmt: skip
    body = _padded(packed) + _padded(record.values.tobytes()) + sections
    checked = front + bytes(_FRONT - len(front))
    digest = _digest(checked, body)
    return b"".join((checked, _CRC.pack(zlib.crc32(checked + digest)), digest, body))


def decode(data: bytes | memoryview) -> Record:
    """The record in `data`; its arrays are read-only views on `data`, no value is copied.

    Raises:
        CorruptAdapterError: any damage: not a record, a newer format, cut short, changed bits, numbers that
            are not finite.
    """
    header = _checked_header(data)
    body = memoryview(data)[HEADER_BYTES:]
    about, tensors, sections = _read_description(body[: header.packed], header)
    start = _pad(header.packed)
    values = np.frombuffer(body, VALUE_DTYPES[header.dtype], header.values, start)
    record = Record(
        header.method, header.dtype, tensors, values,
        sections=_read_sections(body[start + _pad(header.value_bytes) :], sections), **about,
    )  # fmt: skip
    _check_numbers(record)
    return record


def digest(data: bytes | memoryview) -> bytes:
    """The 32-byte digest of the record in `data`, recomputed; what the bytes mean is not looked at.

    Raises:
        CorruptAdapterError: not a record, or any bit of it changed.
    """
    return _checked_header(data).digest


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
                front += file.read(max(0, HEADER_BYTES + _read_header(front, total).packed - len(front)))
    header = _read_header(front, total)
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
    )


@dataclass(frozen=True)
class _Front:
    version: int
    dtype: str
    tensors: int
    values: int
    packed: int
    unpacked: int
    section_bytes: int
    method: str
    digest: bytes

    @property
    def value_bytes(self) -> int:
        return self.values * VALUE_DTYPES[self.dtype].itemsize


def _checked_header(data: bytes | memoryview) -> _Front:
    header = _read_header(data)
    if _digest(data[:_FRONT], memoryview(data)[HEADER_BYTES:]) != header.digest:
        raise CorruptAdapterError(f"the record is damaged: its check sum does not match; {_AGAIN}")
    return header


def _read_header(data: bytes | memoryview, total: int | None = None) -> _Front:
    total = len(data) if total is None else total
    start = bytes(data[:HEADER_BYTES])
    if start[:8] != MAGIC[: len(start)]:
        raise CorruptAdapterError(
            "this is no modicum record, or its first bytes are damaged; "
            f"for a PEFT folder name the folder, else {_AGAIN}"
        )
    if len(start) < HEADER_BYTES:
        raise CorruptAdapterError(f"the record is cut short: {total} bytes are not even its header; {_AGAIN}")
    version = int.from_bytes(start[8:10], "little")
    front, (crc,), digest = start[:_FRONT], _CRC.unpack(start[_FRONT:-_DIGEST_BYTES]), start[-_DIGEST_BYTES:]
    intact = zlib.crc32(front + digest) == crc
    if version > VERSION:
        # a later format may check its header in another way, so this comes before the check sum
        raise CorruptAdapterError(
            f"the record has format version {version}, this modicum reads up to {VERSION}: upgrade modicum"
            + ("" if intact else f", or, as the header's check sum is wrong too, {_AGAIN}")
        )
    if not intact:
        raise CorruptAdapterError(f"the record is damaged: its header does not match its check sum; {_AGAIN}")
    _, _, code, _, tensors, values, packed, unpacked, section_bytes, method = _HEADER.unpack(
        front[: _HEADER.size]
    )
    if version < 1 or code >= len(VALUE_DTYPES) or unpacked > _MAX_DESCRIPTION:
        raise CorruptAdapterError(
            f"the record's header makes no sense (version {version}, type {code}); {_AGAIN}"
        )
    name = method.rstrip(b"\0").decode(errors="replace")
    header = _Front(version, _CODES[code], tensors, values, packed, unpacked, section_bytes, name, digest)
    wanted = HEADER_BYTES + _pad(packed) + _pad(header.value_bytes) + section_bytes
    if total != wanted:
        what = "cut short" if total < wanted else "longer than it says"
        raise CorruptAdapterError(f"the record is {what}: {total} bytes instead of {wanted}; {_AGAIN}")
    return header


def _describe(record: Record) -> bytes:
    about = {
        "config": record.config, "task_type": record.task_type, "base_fingerprint": record.base_fingerprint,
        "basis_fingerprint": record.basis_fingerprint, "recipe_digest": record.recipe_digest,
        "metadata": record.metadata, "sections": [[s.name, s.dtype, list(s.shape)] for s in record.sections],
    }  # fmt: skip
    try:
        text = json.dumps(
            {k: v for k, v in about.items() if v}, separators=(",", ":"), sort_keys=True, allow_nan=False
        )
    except (TypeError, ValueError) as error:
        raise ConfigError(f"config and metadata must be plain JSON values: {error}") from error
    # JSON escapes line breaks, so the first line break is the one between the two parts
    return f"{text}\n{to_text(record.layout.names, record.layout.shapes)}".encode()


def _read_description(packed: bytes | memoryview, header: _Front) -> tuple[dict[str, Any], Layout, list]:
    try:
        unpacker = zlib.decompressobj()
        text = unpacker.decompress(packed, header.unpacked + 1).decode()
        if len(text.encode()) != header.unpacked or not unpacker.eof:
            raise ValueError("its length is wrong")  # noqa: TRY301 - one place words the error
        first, second = text.split("\n", 1)
        about = json.loads(first)
        sections = [(str(n), str(d), tuple(int(i) for i in s)) for n, d, s in about.pop("sections", [])]
        known = set(Record.__dataclass_fields__) - {"method", "dtype", "layout", "values", "sections"}
        unknown = set(about) - known
        if unknown or any(d not in DTYPES for _, d, _ in sections):
            raise ValueError(f"it holds {sorted(unknown) or 'types'} that this modicum does not know")  # noqa: TRY301
    except (zlib.error, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise CorruptAdapterError(f"the record's description cannot be read ({error}); {_AGAIN}") from error
    tensors = from_text(second)
    if len(tensors.names) != header.tensors or tensors.size != header.values:
        raise CorruptAdapterError(
            f"the record lists {len(tensors.names)} tensors with {tensors.size} values, its header says "
            f"{header.tensors} with {header.values}; {_AGAIN}"
        )
    return about, tensors, sections


def _read_sections(body: memoryview, listed: list) -> tuple[Section, ...]:
    sections, start = [], 0
    for name, dtype, shape in listed:
        count = math.prod(shape)
        size = count * DTYPES[dtype].itemsize
        if start + size > len(body):
            raise CorruptAdapterError(
                f"the full module {name!r} reaches past the end of the record; {_AGAIN}"
            )
        sections.append(Section(name, dtype, shape, np.frombuffer(body, DTYPES[dtype], count, start)))
        start += _pad(size)
    return tuple(sections)


def _check_numbers(record: Record) -> None:
    faults = []
    if record.dtype not in VALUE_DTYPES:
        raise ConfigError(f"values cannot be stored as {record.dtype!r}, only as {', '.join(VALUE_DTYPES)}")
    if record.values.dtype != VALUE_DTYPES[record.dtype] or record.values.shape != (record.layout.size,):
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


def _digest(front: bytes | memoryview, body: bytes | memoryview) -> bytes:
    digest = hashlib.blake2b(front, digest_size=_DIGEST_BYTES)
    digest.update(body)
    return digest.digest()


def _pad(size: int) -> int:
    return -(-size // 8) * 8


def _padded(data: bytes) -> bytes:
    return data + bytes(_pad(len(data)) - len(data))
