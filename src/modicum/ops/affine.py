"""Uniform affine quantization of a matrix: a grid per block, codes on it, and how codes are packed.

    ŵ = s · (c − 2^(bits−1)) + o,    c ∈ {0, …, 2^bits − 1}

with one scale s and one offset o per (q, p) block of q rows and p columns; a row group of g inputs is the
block (1, g). The zero-point is z = 2^(bits−1) − o/s, so s (c − z) is the same grid. The offset is what is
kept, because an update that is constant on the block is added to it: no division, one rounding. Without
offsets (None) the grid is symmetric, z = 2^(bits−1).
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

BITS = (2, 3, 4, 8)
Clip = Literal["minmax", "mse"]
ZeroPoint = Literal["float", "integer", "none"]

#: the residual of a weight that is pruned
PRUNED = -128

#: widths of the bit planes that codes are cut into: 3 bits are 2 + 1; one bit is for masks
_PLANES = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 8: (8,)}
#: shrink factors that the search for the least squared error tries
_SHRINK = torch.linspace(1.0, 0.4, 25)


class Grid(NamedTuple):
    """Scales and offsets, both (out/q, in/p); offsets None for a symmetric grid."""

    scales: Tensor
    offsets: Tensor | None


def middle(bits: int) -> int:
    """2^(bits−1), the code of a symmetric grid's zero."""
    return 1 << (bits - 1)


def spread(values: Tensor, block: tuple[int, int]) -> Tensor:
    """Block values (…, m, n) repeated over their (q, p) blocks, (…, m q, n p)."""
    q, p = block
    values = values.repeat_interleave(q, -2) if q > 1 else values
    return values.repeat_interleave(p, -1) if p > 1 else values


def blocks_of(weight: Tensor, block: tuple[int, int]) -> Tensor:
    """The (out, in) weight as (out/q, in/p, q p), one block a row."""
    q, p = block
    out, inner = weight.shape
    return weight.reshape(out // q, q, inner // p, p).transpose(1, 2).reshape(out // q, inner // p, q * p)


@torch.no_grad()
def fit_grid(
    weight: Tensor,
    bits: int,
    block: tuple[int, int],
    *,
    zero_point: ZeroPoint = "float",
    clip: Clip = "minmax",
    scale_dtype: torch.dtype = torch.bfloat16,
    offset_dtype: torch.dtype = torch.float32,
    importance: Tensor | None = None,
) -> Grid:
    """The grid of each block of the (out, in) `weight`: covering its range, or of least squared error.

    `zero_point`: "float" places the grid freely, "integer" such that 0 is on it, "none" symmetric. `clip` "mse"
    also tries narrower ranges and keeps the one with the least Σ h (w − ŵ)², h = `importance` (in,), 1 when
    absent. Values are rounded to the dtypes they are stored in before they are compared.
    """
    w = blocks_of(weight.float(), block)
    low, high = w.amin(-1), w.amax(-1)
    if clip == "minmax":
        return _grid(low, high, bits, zero_point, scale_dtype, offset_dtype)
    h = None
    if importance is not None:
        h = blocks_of(importance.float().expand_as(weight), block)
    best, kept = torch.full_like(low, math.inf), _grid(low, high, bits, zero_point, scale_dtype, offset_dtype)
    centre, half = ((low + high) / 2, (high - low) / 2) if zero_point == "float" else (None, None)
    for shrink in _SHRINK.tolist():
        # a free grid shrinks around its centre, one that holds 0 towards it
        lo, hi = (
            (low * shrink, high * shrink)
            if centre is None
            else (centre - half * shrink, centre + half * shrink)
        )
        grid = _grid(lo, hi, bits, zero_point, scale_dtype, offset_dtype)
        error = (_decoded(_encoded(w, grid, bits), grid, bits) - w).square_()
        loss = (error if h is None else error.mul_(h)).sum(-1)
        better = loss < best
        best = torch.where(better, loss, best)
        offsets = None if grid.offsets is None else torch.where(better, grid.offsets, _offsets(kept))
        kept = Grid(torch.where(better, grid.scales, kept.scales), offsets)
    return kept


@torch.no_grad()
def encode(weight: Tensor, grid: Grid, bits: int, block: tuple[int, int]) -> Tensor:
    """The nearest codes of the (out, in) `weight`, uint8."""
    scales = spread(grid.scales.float(), block)
    offsets = 0.0 if grid.offsets is None else spread(grid.offsets.float(), block)
    codes = ((weight.float() - offsets) / scales).round_().add_(middle(bits))
    return codes.clamp_(0, 2**bits - 1).to(torch.uint8)


def decode(codes: Tensor, grid: Grid, bits: int, block: tuple[int, int]) -> Tensor:
    """The (out, in) weight ŵ = s (c − 2^(bits−1)) + o, float32."""
    weight = (codes.to(torch.float32) - middle(bits)) * spread(grid.scales.float(), block)
    return weight if grid.offsets is None else weight + spread(grid.offsets.float(), block)


def zero_points(grid: Grid, bits: int) -> Tensor:
    """The zero-points 2^(bits−1) − o/s, float32, in general no integers; shape as the scales."""
    if grid.offsets is None:
        return torch.full_like(grid.scales, middle(bits), dtype=torch.float32)
    return middle(bits) - grid.offsets.float() / grid.scales.float()


@torch.no_grad()
def left_over(weight: Tensor, codes: Tensor, grid: Grid, bits: int, block: tuple[int, int]) -> Tensor:
    """What rounding the (out, in) `weight` to `codes` took away, in steps: (w − ŵ) / s, float32."""
    left = weight.float() - decode(codes, grid, bits, block)
    return left.div_(spread(grid.scales.float(), block))


@torch.no_grad()
def residuals(left: Tensor, kept: Tensor | None = None) -> Tensor:
    """What rounding took away, int8 in 1/256 of a step; `PRUNED` where `kept` is False.

    `left` is what was to be rounded minus its value on the grid, in steps. It is held within ±127/256, so that
    value and residual together round to the same code again, also where a code ran into the end of its range.
    """
    fractions = (left * 256).round_().clamp_(-127, 127).to(torch.int8)
    return fractions if kept is None else fractions.masked_fill_(~kept, PRUNED)


def packed_width(columns: int, bits: int) -> int:
    """Bytes of a packed row of `columns` codes."""
    return -(-columns // 8) * bits


@torch.no_grad()
def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes (out, in) uint8 packed into (out, ⌈in/8⌉ · bits) bytes.

    A row is one bit plane after the other (3 bits: the low two, then the high one). In a plane of b bits,
    byte j holds columns j, j + n, j + 2n, … from its low bits up, n the bytes of the plane: unpacking is a
    shift of whole runs, which compilers vectorize. Rows are padded with zeros to a multiple of 8 columns.
    """
    out, columns = codes.shape
    codes = F.pad(codes, (0, -columns % 8))
    planes, shift = [], 0
    for width in _PLANES[bits]:
        parts = ((codes >> shift) & ((1 << width) - 1)).view(out, 8 // width, -1)
        plane = parts[:, 0].clone()
        for index in range(1, 8 // width):
            plane |= parts[:, index] << (index * width)
        planes.append(plane)
        shift += width
    return torch.cat(planes, 1)


def unpack(packed: Tensor, bits: int, columns: int) -> Tensor:
    """Codes (out, in) uint8 of `packed`, the inverse of `pack`."""
    out, start, shift = packed.shape[0], 0, 0
    unit = packed.shape[1] // bits
    codes: Tensor | None = None
    for width in _PLANES[bits]:
        plane = packed[:, start : start + unit * width]
        # a tensor of shifts, so that a compiler sees one loop over a whole row
        steps = torch.arange(0, 8, width, dtype=torch.uint8, device=packed.device).view(-1, 1)
        part = ((plane.unsqueeze(1) >> steps) & ((1 << width) - 1)).view(out, -1)
        codes = part if codes is None else codes | (part << shift)
        start, shift = start + unit * width, shift + width
    assert codes is not None
    return codes[:, :columns]


def _grid(
    low: Tensor,
    high: Tensor,
    bits: int,
    zero_point: ZeroPoint,
    scale_dtype: torch.dtype,
    offset_dtype: torch.dtype,
) -> Grid:
    steps, mid = 2**bits - 1, middle(bits)
    if zero_point == "none":
        scales = _positive(2 * torch.maximum(-low, high) / steps, scale_dtype)
        return Grid(scales, None)
    if zero_point == "integer":
        low, high = low.clamp_max(0), high.clamp_min(0)
        scales = _positive((high - low) / steps, scale_dtype)
        zero = (-low / scales.float()).round().clamp(0, steps)
        return Grid(scales, (scales.float() * (mid - zero)).to(offset_dtype))
    wanted = ((high - low) / steps).to(scale_dtype)
    scales = _positive(wanted, scale_dtype)
    # centred, so that rounding the scale moves both ends alike; a constant block is its own offset
    shift = torch.where(scales == wanted, scales.float() * (mid - steps / 2), 0.0)
    return Grid(scales, ((low + high) / 2 + shift).to(offset_dtype))


def _positive(scales: Tensor, dtype: torch.dtype) -> Tensor:
    """`scales` in `dtype`, 1 where a block is constant: any step will do there."""
    scales = scales.to(dtype)
    # float16 scales of ordinary weights at 8 bits are subnormal; down to here they keep four digits
    least = 2.0**-20 if dtype == torch.float16 else torch.finfo(dtype).tiny
    return torch.where(scales > least, scales, torch.ones_like(scales))


def _offsets(grid: Grid) -> Tensor:
    assert grid.offsets is not None
    return grid.offsets


def _encoded(w: Tensor, grid: Grid, bits: int) -> Tensor:
    offsets = 0.0 if grid.offsets is None else grid.offsets.float().unsqueeze(-1)
    codes = ((w - offsets) / grid.scales.float().unsqueeze(-1)).round_().add_(middle(bits))
    return codes.clamp_(0, 2**bits - 1)


def _decoded(codes: Tensor, grid: Grid, bits: int) -> Tensor:
    weight = (codes - middle(bits)) * grid.scales.float().unsqueeze(-1)
    return weight if grid.offsets is None else weight + grid.offsets.float().unsqueeze(-1)
