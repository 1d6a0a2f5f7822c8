"""The first 128 bytes of a record: what follows, how long it is, and the check sums of both.

    magic, format version, type of the values, flags, tensors, values, description packed / unpacked, bytes of full
    modules, method, blocks of low-bit values; CRC-32 of all this and of the digest; BLAKE2b-256 of everything else

A record of floating-point values is version 1, one of low-bit values version 2, so that whoever knows only the first
asks for an upgrade.
"""

from __future__ import annotations

import functools
import hashlib
import struct
import zlib
from dataclasses import dataclass
from typing import Self

from modicum.errors import ConfigError, CorruptAdapterError
from modicum.store import low_bit
from modicum.store.numbers import VALUE_DTYPES

MAGIC = b"\x8aMODICUM"
#: the newest format that is read
VERSION = 2
HEADER_BYTES = 128
DIGEST_BYTES = 32
#: types of the values; the position is the code in a file
TYPES = (*VALUE_DTYPES, *low_bit.BITS)
AGAIN = "get the file again from where it came from, or save the adapter again"
_FIELDS = struct.Struct("<8sHBBIQIIQ48sI")
_CRC = struct.Struct("<I")
_CHECKED = HEADER_BYTES - DIGEST_BYTES - _CRC.size
#: a description is some hundred bytes; what claims to unpack to more than this is damaged
MAX_DESCRIPTION = 1 << 24


@dataclass(frozen=True)
class Front:
    """What the first bytes say."""

    dtype: str
    tensors: int
    values: int
    #: bytes of the description, packed and unpacked
    packed: int
    unpacked: int
    section_bytes: int
    method: str
    #: scales of low-bit values, 0 for others
    blocks: int
    digest: bytes = b""

    @property
    def version(self) -> int:
        """The format that this record needs."""
        return 2 if self.dtype in low_bit.BITS else 1

    @property
    def value_bytes(self) -> int:
        """Bytes of the packed values."""
        if self.dtype in low_bit.BITS:
            return low_bit.packed_bytes(self.values, self.blocks, self.dtype)
        return self.values * VALUE_DTYPES[self.dtype].itemsize

    def lines(self, description: bytes | memoryview) -> tuple[str, str]:
        """The two lines of the packed description.

        Raises:
            ValueError, zlib.error: it does not unpack to two lines of the length that is stated.
        """
        read = _kept_lines if len(description) <= _KEPT else _lines
        return read(bytes(description), self.unpacked)

    def sealed(self, body: bytes) -> bytes:
        """The 128 bytes that stand before `body`.

        Raises:
            ConfigError: the method's name is too long.
        """
        method = self.method.encode()
        if not 0 < len(method) <= 48:
            raise ConfigError(f"the method name {self.method!r} must have 1 to 48 bytes")
        checked = _FIELDS.pack(
            MAGIC, self.version, TYPES.index(self.dtype), 0, self.tensors, self.values, self.packed,
            self.unpacked, self.section_bytes, method, self.blocks,
        )  # fmt: skip
        digest = _digest(checked, body)
        return b"".join((checked, _CRC.pack(zlib.crc32(checked + digest)), digest))

    @classmethod
    def read(cls, data: bytes | memoryview, total: int | None = None) -> Self:
        """What the beginning of a record of `total` bytes says; what follows is not looked at.

        Raises:
            CorruptAdapterError: not a record, a newer format, cut short, or damaged.
        """
        total = len(data) if total is None else total
        start = bytes(data[:HEADER_BYTES])
        _check_front(start, total)
        _, version, code, _, tensors, values, packed, unpacked, section_bytes, method, blocks = (
            _FIELDS.unpack(start[:_CHECKED])
        )
        name = method.rstrip(b"\0").decode(errors="replace")
        front = cls(
            TYPES[min(code, len(TYPES) - 1)], tensors, values, packed, unpacked, section_bytes, name, blocks,
            start[-DIGEST_BYTES:],
        )  # fmt: skip
        # nothing is unpacked or listed before it is known to be of a size that the record can have
        senseless = unpacked > MAX_DESCRIPTION or tensors > total
        if senseless or code >= len(TYPES) or version != front.version:
            raise CorruptAdapterError(
                f"the record's header makes no sense (version {version}, type {code}); {AGAIN}"
            )
        wanted = HEADER_BYTES + pad(packed) + pad(front.value_bytes) + section_bytes
        if total != wanted:
            what = "cut short" if total < wanted else "longer than it says"
            raise CorruptAdapterError(f"the record is {what}: {total} bytes instead of {wanted}; {AGAIN}")
        return front

    @classmethod
    def read_checked(cls, data: bytes | memoryview) -> Self:
        """What the beginning of a whole record says, after every bit of it was compared with the digest.

        Raises:
            CorruptAdapterError: see `read`; or any bit changed.
        """
        front = cls.read(data)
        if _digest(data[:_CHECKED], memoryview(data)[HEADER_BYTES:]) != front.digest:
            raise CorruptAdapterError(f"the record is damaged: its check sum does not match; {AGAIN}")
        return front


def sound_like(data: bytes | memoryview, first: bytes | memoryview, packed: int) -> bool:
    """Whether every bit of `data` is as its check sums say, and it differs from the record `first` in its numbers only.

    `packed`: bytes of the description of `first`, which has been read and found whole.
    """
    data, first, end = memoryview(data), memoryview(first), HEADER_BYTES + packed
    if (
        len(data) != len(first)
        or data[:_CHECKED] != first[:_CHECKED]
        or data[HEADER_BYTES:end] != first[HEADER_BYTES:end]
    ):
        return False
    digest = data[HEADER_BYTES - DIGEST_BYTES : HEADER_BYTES]
    (crc,) = _CRC.unpack_from(data, _CHECKED)
    intact = zlib.crc32(digest, zlib.crc32(data[:_CHECKED])) == crc
    return intact and _digest(data[:_CHECKED], data[HEADER_BYTES:]) == digest


def pad(size: int) -> int:
    """`size`, up to the next multiple of 8."""
    return -(-size // 8) * 8


def _check_front(start: bytes, total: int) -> None:
    if start[:8] != MAGIC[: len(start)]:
        raise CorruptAdapterError(
            "this is no modicum record, or its first bytes are damaged; "
            f"for a PEFT folder name the folder, else {AGAIN}"
        )
    if len(start) < HEADER_BYTES:
        raise CorruptAdapterError(f"the record is cut short: {total} bytes are not even its header; {AGAIN}")
    version = int.from_bytes(start[8:10], "little")
    front, (crc,), digest = (
        start[:_CHECKED],
        _CRC.unpack(start[_CHECKED:-DIGEST_BYTES]),
        start[-DIGEST_BYTES:],
    )
    intact = zlib.crc32(front + digest) == crc
    if version > VERSION:
        # a later format may check its header in another way, so this comes before the check sum
        raise CorruptAdapterError(
            f"the record has format version {version}, this modicum reads up to {VERSION}: upgrade modicum"
            + ("" if intact else f", or, as the header's check sum is wrong too, {AGAIN}")
        )
    if not intact:
        raise CorruptAdapterError(f"the record is damaged: its header does not match its check sum; {AGAIN}")


def _digest(front: bytes | memoryview, body: bytes | memoryview) -> bytes:
    digest = hashlib.blake2b(front, digest_size=DIGEST_BYTES)
    digest.update(body)
    return digest.digest()


def _lines(packed: bytes, length: int) -> tuple[str, str]:
    unpacker = zlib.decompressobj()
    text = unpacker.decompress(packed, length + 1)
    if len(text) != length or not unpacker.eof:
        raise ValueError("its length is wrong")
    first, second = text.decode().split("\n", 1)
    return first, second


#: most adapters of one fleet have the same description, up to so many packed bytes
_KEPT = 1 << 14
_kept_lines = functools.lru_cache(maxsize=64)(_lines)
