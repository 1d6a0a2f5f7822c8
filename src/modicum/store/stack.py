"""Many records as one block of numbers, ready for a pool of served adapters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from modicum.errors import ConfigError, listing
from modicum.store import low_bit
from modicum.store.numbers import to_floats

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from modicum.store.layout import Layout
    from modicum.store.record import Record


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


def stack(versions: Sequence[str], records: Sequence[Record]) -> Stack:
    """The records, one per row, in their order.

    Raises:
        ConfigError: there are none, or some differ from the first in method, type or tensors; all of them are named.
    """
    if not records:
        raise ConfigError("no adapters to stack; name at least one")
    first = records[0]
    other = [
        f"{version} ({record.method}, {record.dtype}, {len(record.layout.names)} tensors)"
        for version, record in zip(versions, records, strict=True)
        # layouts are cached, so that those of one base model are mostly one object
        if (record.method, record.dtype) != (first.method, first.dtype)
        or (record.layout is not first.layout and not _same(record.layout, first.layout))
    ]
    if other:
        raise ConfigError(
            f"only adapters of one kind can be stacked. {versions[0]} is {first.method}, {first.dtype}, "
            f"{len(first.layout.names)} tensors; different are {listing(other)}"
        )
    values = np.empty((len(records), first.values.size), first.values.dtype)
    for row, record in zip(values, records, strict=True):
        row[:] = record.values
    return Stack(tuple(versions), first.method, first.dtype, first.layout, values)


def _same(one: Layout, other: Layout) -> bool:
    return (one.names, one.shapes) == (other.names, other.shapes)
