"""Values in 8 or 4 bits: blocks of up to 128 values of one tensor share a scale, `ŵ = scale · code`.

Packed are the scales first, as bfloat16, then the codes, two's complement: int8 one byte each, int4 two to a byte,
the first in the lower half. A scale may be negative, so that a block reaches the 2^bits-th level on the side of
its largest value; it is the one, of a dozen tried, with the smallest error (as `Q4_0` of GGUF takes the sign, and
MSE clipping the rest). On trained cores this beats a zero-point at the same number of bytes; see
`benchmarks/store/low_bit_records.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from modicum.store.numbers import from_bfloat16, to_bfloat16

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

#: type -> bits of a code
BITS = {"int8": 8, "int4": 4}
#: most values that share a scale; tensors never do
BLOCK = 128
#: bits -> scales that are tried, over the one that takes the largest value to the lowest code, and to the highest one;
#: what was quantized before finds its own scale among them, so that nothing drifts
_TO_LOWEST = {4: (0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0, 1.05, 1.1), 8: (0.85, 0.9, 0.95, 1.0)}
_TO_HIGHEST = {4: (0.8, 0.9, 1.0), 8: (0.9, 1.0)}
#: blocks that are quantized at a time
_ROWS = 1 << 13


def block_lengths(sizes: Sequence[int] | np.ndarray) -> np.ndarray:
    """How many values each block of tensors with `sizes` values has, in order: 128, and what is left."""
    sizes = np.asarray(sizes, np.int64)
    counts = -(-sizes // BLOCK)
    lengths = np.full(int(counts.sum()), BLOCK, np.int64)
    filled = counts > 0
    lengths[np.cumsum(counts)[filled] - 1] = (sizes - (counts - 1) * BLOCK)[filled]
    return lengths


def packed_bytes(values: int, blocks: int, dtype: str) -> int:
    """Bytes of so many packed values in so many blocks."""
    return 2 * blocks + -(-values * BITS[dtype] // 8)


def quantize(values: np.ndarray, lengths: np.ndarray, dtype: str) -> np.ndarray:
    """float32 `values` (n,), packed: uint8."""
    scales, codes = np.empty(len(lengths), np.float32), np.empty(values.size, np.int8)
    ends = np.cumsum(lengths)
    for first in range(0, len(lengths), _ROWS):
        part = lengths[first : first + _ROWS]
        inside = np.arange(BLOCK) < part[:, None]
        rows = np.zeros(inside.shape, np.float32)
        span = slice(ends[first] - part[0], ends[first + len(part) - 1])
        rows[inside] = values[span]
        scales[first : first + _ROWS], found = _best(rows, BITS[dtype])
        codes[span] = found[inside]
    return np.concatenate([to_bfloat16(scales).view(np.uint8), _pack(codes, dtype)])


def dequantize(packed: np.ndarray, lengths: np.ndarray, dtype: str) -> np.ndarray:
    """The values as float32 (n,)."""
    scales, codes = _parts(packed, len(lengths))
    unpacked = _unpack(codes, int(lengths.sum()), dtype).astype(np.float32)
    unpacked *= np.repeat(scales, lengths)
    return unpacked


def finite(packed: np.ndarray, lengths: np.ndarray, dtype: str) -> bool:
    """Whether no value is NaN or infinite, and no bit is set behind the last value."""
    scales, codes = _parts(packed, len(lengths))
    if not bool((np.abs(scales) <= _most(BITS[dtype])).all()):
        return False
    odd = dtype == "int4" and int(lengths.sum()) % 2 == 1
    return not (odd and codes[-1] >> 4)


def _most(bits: int) -> np.float32:
    """The largest scale with which every code is finite: a power of two below that of float32, 8 bits long."""
    return np.float32((2 - 2**-7) * 2.0 ** (128 - bits))


def _parts(packed: np.ndarray, blocks: int) -> tuple[np.ndarray, np.ndarray]:
    return from_bfloat16(packed[: 2 * blocks].view("<u2")), packed[2 * blocks :]


def _pack(codes: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "int8":
        return codes.view(np.uint8)
    pairs = np.zeros((-(-codes.size // 2), 2), np.uint8)
    pairs.reshape(-1)[: codes.size] = codes.view(np.uint8) & 15
    return pairs[:, 0] | (pairs[:, 1] << 4)


def _unpack(packed: np.ndarray, count: int, dtype: str) -> np.ndarray:
    codes = packed.view(np.int8)
    if dtype == "int8":
        return codes
    pairs = np.empty((codes.size, 2), np.int8)
    np.right_shift(np.left_shift(codes, 4), 4, out=pairs[:, 0])  # sign of the lower half
    np.right_shift(codes, 4, out=pairs[:, 1])
    return pairs.reshape(-1)[:count]


def _best(rows: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Of every row (blocks, 128): the scale with the smallest error, and the codes."""
    scales, codes = np.zeros(len(rows), np.float32), np.zeros(rows.shape, np.int8)
    least = (rows.astype(np.float64) ** 2).sum(1)  # all codes 0
    for scale in _candidates(rows, bits):
        with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
            exact = np.where(scale[:, None] == 0, 0, rows / scale[:, None])
            found = np.clip(np.rint(exact), -(1 << (bits - 1)), (1 << (bits - 1)) - 1)
            error = ((found * scale[:, None] - rows).astype(np.float64) ** 2).sum(1)
        better = error < least
        scales[better], codes[better], least[better] = scale[better], found[better], error[better]
    return scales, codes


def _candidates(rows: np.ndarray, bits: int) -> Iterator[np.ndarray]:
    largest = rows[np.arange(len(rows)), np.abs(rows).argmax(1)] if rows.size else rows[:, 0]
    lowest, highest = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    steps = [np.float32(share / lowest) for share in _TO_LOWEST[bits]]
    steps += [np.float32(share / highest) for share in _TO_HIGHEST[bits]]
    for step in steps:
        yield np.clip(from_bfloat16(to_bfloat16(largest * step)), -_most(bits), _most(bits))
