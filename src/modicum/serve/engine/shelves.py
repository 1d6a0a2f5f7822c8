"""Memory for adapters: rows of equal width in large blocks, so that loading and evicting never fragments it."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, final

import torch

if TYPE_CHECKING:
    from torch import Tensor

#: bytes of a block; allocators give memory of this size back to the system as a whole
_BLOCK = 64 << 20


class Row(NamedTuple):
    """The memory of one adapter: `block[place]`."""

    block: Tensor
    place: int
    #: of its first number
    address: int

    @property
    def values(self) -> Tensor:
        """The numbers, (width,), a view."""
        return self.block[self.place]

    @property
    def bytes(self) -> int:
        """What they take."""
        return self.block.shape[1] * self.block.element_size()


@final
class Shelves:
    """Rows of any width. A block belongs to one width, is made for the first row in it and freed with the last.

    Not thread-safe.
    """

    def __init__(self, slots: int, dtype: torch.dtype, device: torch.device) -> None:
        self._slots, self._dtype, self._device = slots, dtype, device
        #: width -> blocks with the places that are free in each
        self._blocks: dict[int, list[tuple[Tensor, list[int]]]] = {}

    @property
    def bytes(self) -> int:
        """All blocks together."""
        blocks = (block for found in self._blocks.values() for block, _ in found)
        return sum(block.numel() * block.element_size() for block in blocks)

    def take(self, width: int) -> Row:
        """A row of `width` numbers, whatever is in it."""
        blocks = self._blocks.setdefault(width, [])
        for block, free in blocks:
            if free:
                return _row(block, free.pop())
        size = self._dtype.itemsize * max(width, 1)
        count = max(1, min(self._slots, _BLOCK // size))
        block = torch.empty(count, width, dtype=self._dtype, device=self._device)
        blocks.append((block, list(range(count - 1, 0, -1))))
        return _row(block, 0)

    def give_back(self, row: Row) -> None:
        """Returns when the row may be taken again; a block without rows is freed."""
        width = row.block.shape[1]
        blocks = self._blocks[width]
        place = next(i for i, (block, _) in enumerate(blocks) if block is row.block)
        free = blocks[place][1]
        free.append(row.place)
        if len(free) == len(row.block):
            del blocks[place]
            if not blocks:
                del self._blocks[width]


def _row(block: Tensor, place: int) -> Row:
    return Row(block, place, block.data_ptr() + place * block.shape[1] * block.element_size())
