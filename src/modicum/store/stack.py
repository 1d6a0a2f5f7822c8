"""Many records as one block of numbers, ready for a pool of served adapters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from modicum.errors import ConfigError, listing
from modicum.store import low_bit
from modicum.store.beside import COMPUTING, side_by_side, split
from modicum.store.engine.interface import ROOM
from modicum.store.front import HEADER_BYTES, Front, pad, sound_like
from modicum.store.numbers import finite, to_floats
from modicum.store.objects import stated_digest

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch

    from modicum.store.engine.interface import Data, Located
    from modicum.store.layout import Layout
    from modicum.store.record import Record

#: bytes of records from which on threads share the work
_MANY = 1 << 20


@dataclass(frozen=True)
class Stack:
    """Records of one method, layout and type, one per row."""

    #: `name@version` of every row
    versions: tuple[str, ...]
    method: str
    dtype: str
    layout: Layout
    #: (rows, layout.size) as stored, bfloat16 as uint16; of low-bit records (rows, bytes), packed
    values: np.ndarray

    def floats(self) -> np.ndarray:
        """All values, (rows, layout.size) float32."""
        if self.dtype not in low_bit.BITS:
            return to_floats(self.values, self.dtype)
        found = np.empty((len(self.values), self.layout.size), np.float32)
        for row, packed in zip(found, self.values, strict=True):
            row[:] = low_bit.dequantize(packed, self.layout.blocks, self.dtype)
        return found

    def tensor(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """All values, (rows, layout.size) in `dtype`.

        Without one, in the type they are stored in, sharing the memory of `values`; low-bit ones in float32.
        """
        import torch

        if self.dtype in low_bit.BITS:
            found = torch.empty((len(self.values), self.layout.size), dtype=dtype or torch.float32)
            for row, packed in zip(found, self.values, strict=True):
                row.copy_(torch.from_numpy(low_bit.dequantize(packed, self.layout.blocks, self.dtype)))
            return found
        found = torch.from_numpy(self.values)
        found = found.view(torch.bfloat16) if self.dtype == "bfloat16" else found
        return found if dtype is None else found.to(dtype)


def stack(
    versions: Sequence[str], located: Sequence[Located], opened: Callable[[int, Data], Record]
) -> Stack:
    """The records, one per row, in their order; every bit of them is checked.

    `opened(row, data)` is the record of a row, or says what is wrong with it. Most adapters of a fleet differ in their
    numbers only: these are taken from the bytes.

    Raises:
        ConfigError: there are none, or some differ from the first in method, type or tensors; all of them are named.
        CorruptAdapterError: see `opened`.
    """
    if not located:
        raise ConfigError("no adapters to stack; name at least one")
    like = located[0].read(None)
    first = opened(0, like)
    values = np.empty((len(located), first.values.size), first.values.dtype)
    values[0] = first.values
    parts = split(range(1, len(located)), COMPUTING if sum(one.size for one in located) > _MANY else 1)
    taken = side_by_side(lambda rows: _take(rows, located, values, first, like), parts)
    rest = {row: opened(row, located[row].read(None)) for some in taken for row in some}
    other = [
        f"{versions[row]} ({record.method}, {record.dtype}, {len(record.layout.names)} tensors)"
        for row, record in rest.items()
        # layouts are cached, so that those of one base model are mostly one object
        if (record.method, record.dtype) != (first.method, first.dtype)
        or (record.layout is not first.layout and not _same(record.layout, first.layout))
    ]
    if other:
        raise ConfigError(
            f"only adapters of one kind can be stacked. {versions[0]} is {first.method}, {first.dtype}, "
            f"{len(first.layout.names)} tensors; different are {listing(other)}"
        )
    for row, record in rest.items():
        values[row] = record.values
    return Stack(tuple(versions), first.method, first.dtype, first.layout, values)


def _take(
    rows: Sequence[int], located: Sequence[Located], values: np.ndarray, first: Record, like: Data
) -> list[int]:
    """The rows that were not filled with the numbers of their records: these are not as `first`, or are damaged.

    `like`: the bytes of `first`.
    """
    if first.sections:  # which have numbers of their own
        return list(rows)
    packed = Front.read(like).packed
    # one piece of memory for all of them: new one costs more than what is done with it
    room, rest = bytearray(ROOM + len(like)), []
    for row in rows:
        one = located[row]
        data = one.read(room) if one.size == len(like) else b""
        if sound_like(data, like, packed) and stated_digest(data) == one.digest:
            start = HEADER_BYTES + pad(packed)
            values[row] = np.frombuffer(data, values.dtype, values.shape[1], start)
        else:
            values[row] = 0
            rest.append(row)
    return rest if _finite(values[rows[0] : rows[-1] + 1], first) else list(rows)


def _finite(values: np.ndarray, like: Record) -> bool:
    if like.dtype in low_bit.BITS:
        return all(low_bit.finite(row, like.layout.blocks, like.dtype) for row in values)
    return finite(values, like.dtype)


def _same(one: Layout, other: Layout) -> bool:
    return (one.names, one.shapes) == (other.names, other.shapes)
