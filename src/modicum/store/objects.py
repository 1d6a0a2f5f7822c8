"""What an object of a store is known by: a record by its own digest, anything else by that of its bytes."""

from __future__ import annotations

import hashlib

from modicum.errors import CorruptAdapterError
from modicum.store import record

DIGEST_BYTES = 32


def digest_of(data: bytes | memoryview) -> bytes:
    """The 32-byte digest of an object, computed from its bytes; that of a record is the one its header states.

    Raises:
        CorruptAdapterError: a record that is damaged.
    """
    if data[: len(record.MAGIC)] == record.MAGIC:
        return record.digest(data)
    return hashlib.blake2b(data, digest_size=DIGEST_BYTES).digest()


def stated_digest(data: bytes | memoryview) -> bytes:
    """What an encoded record states as its digest; for bytes that `encode` has just made, or `decode` will check."""
    return bytes(data[record.HEADER_BYTES - DIGEST_BYTES : record.HEADER_BYTES])


def intact(data: bytes | memoryview, digest: bytes) -> bool:
    """Whether `data` is the object with this digest, to the last bit."""
    try:
        return digest_of(data) == digest
    except CorruptAdapterError:
        return False
