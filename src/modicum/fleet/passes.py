"""Rows of many adapters, cut into passes that fit into memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence


@dataclass(frozen=True)
class Pass:
    """One forward pass: K adapters, each with some rows."""

    slots: tuple[int, ...]
    #: of each slot, the numbers of its rows
    rows: tuple[tuple[int, ...], ...]

    @property
    def counts(self) -> list[int]:
        """How many rows each adapter has."""
        return [len(rows) for rows in self.rows]


def passes(
    wanted: Mapping[int, Sequence[int]],
    length: Callable[[int, int], int],
    tokens: int,
    *,
    may_split: bool = False,
) -> Iterator[Pass]:
    """Passes over all rows of `wanted` (slot → rows), of at most `tokens` tokens with padding where possible.

    `length(slot, row)` is a row's number of tokens. The rows of an adapter stay together, a step of it is one pass,
    unless it `may_split`. Adapters with as many rows, and rows as long, share a pass.
    """
    blocks = []
    for slot, rows in wanted.items():
        ordered = sorted(rows, key=lambda row, slot=slot: -length(slot, row)) if may_split else list(rows)
        longest = max(length(slot, row) for row in ordered)
        size = max(1, tokens // longest) if may_split else len(ordered)
        parts = [ordered[at : at + size] for at in range(0, len(ordered), size)]
        blocks += [(len(part), max(length(slot, row) for row in part), slot, tuple(part)) for part in parts]
    # lengths in powers of √2, so that slots next to each other, which are read without a copy, mostly stay so
    blocks.sort(key=lambda block: (block[0], (block[1] ** 2).bit_length(), block[2]))
    group: list[tuple[int, int, int, tuple[int, ...]]] = []
    for block in blocks:
        if group and not _fits(group, block, tokens):
            yield _joined(group)
            group = []
        group.append(block)
    if group:
        yield _joined(group)


def multiple_on(device: str) -> int:
    """Tokens that the longest row of a pass is padded to a multiple of, on `device` (cpu, cuda:0 …)."""
    return 8 if device.startswith("cuda") else 1


def _fits(group: Sequence[tuple], block: tuple, tokens: int) -> bool:
    longest = max(block[1], *(other[1] for other in group))
    rows = block[0] + sum(other[0] for other in group)
    # no more than half of what is padded to a full grid of rows is padding
    alike = block[0] <= 2 * group[0][0]
    twice = any(other[2] == block[2] for other in group)
    return alike and not twice and rows * longest <= tokens


def _joined(group: Sequence[tuple]) -> Pass:
    return Pass(tuple(block[2] for block in group), tuple(block[3] for block in group))
