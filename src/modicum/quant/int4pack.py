"""PyTorch's packed int4 kernel for few rows on x86 processors, and its layout read back for many.

`torch._weight_int4pack_mm_for_cpu` computes x ŵᵀ for bfloat16 x with ŵ = s (c − 8) + o, s and o bfloat16, at three
times the speed of a dense bfloat16 product for one row and half of it for 64. Its layout holds runs of 64
rows: byte j < 32 of column k holds the codes of rows j (low bits) and j + 32. Both directions are exact, so a
layer is kept in one layout at a time. Offsets need more than bfloat16: what the kernel cannot take is a
float32 remainder, o = hi + lo, applied to the sums of each group of inputs.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import functional as F

from modicum.ops.affine import Grid, decode
from modicum.quant import native

#: rows (tokens) up to which the kernel beats dequantizing and a dense product; measured, see the benchmarks
FEW_ROWS = 16
GROUPS = (32, 64, 128, 256)
_RUN = 64


@functools.cache
def available() -> bool:
    """Whether this processor's kernel uses the layout described above (AVX-512 does)."""
    codes = torch.arange(_RUN * 32, dtype=torch.int32).view(_RUN, 32) * 7 % 16
    try:
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 2)  # noqa: SLF001 - no public name
    except (RuntimeError, AttributeError):
        return False
    return packed.shape == (_RUN, 16) and torch.equal(unpacked(packed).int(), codes)


def fits(
    out_features: int, in_features: int, bits: int, block: tuple[int, int], scale_dtype: torch.dtype
) -> bool:
    """Whether a layer of this shape and grid can be held in the kernel's layout without a loss."""
    rows, group = block
    shape = rows == 1 and group in GROUPS and in_features % group == 0 and out_features % _RUN == 0
    return shape and bits == 4 and scale_dtype == torch.bfloat16 and available()


def packed(codes: Tensor) -> Tensor:
    """Codes (out, in) in the kernel's layout, (out, in/2) uint8."""
    return torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 2)  # noqa: SLF001 - no public name


def unpacked(packed: Tensor) -> Tensor:
    """Codes (out, in) uint8 of the kernel's layout."""
    out, columns = packed.shape[0], packed.shape[1] * 2
    runs = packed.view(out // _RUN, columns, _RUN // 2)
    return torch.cat([runs & 15, runs >> 4], -1).transpose(1, 2).reshape(out, columns)


def kernel_grid(grid: Grid) -> tuple[Tensor, Tensor | None]:
    """(scales and offsets (in/g, out, 2) bfloat16, remainder of the offsets (out, in/g) float32 or None if zero)."""
    scales = grid.scales.to(torch.bfloat16)
    offsets = torch.zeros_like(scales, dtype=torch.float32) if grid.offsets is None else grid.offsets.float()
    high = offsets.to(torch.bfloat16)
    rest = offsets - high.float()
    pair = torch.stack([scales.T, high.T], -1).contiguous()
    return pair, rest if bool(rest.any()) else None


def grid_of(pair: Tensor, rest: Tensor | None) -> Grid:
    """The grid that `kernel_grid` was given, its offsets in float32, bit for bit."""
    scales, high = pair[..., 0].T.contiguous(), pair[..., 1].T.float()
    return Grid(scales, (high if rest is None else high + rest).contiguous())


def few_rows(x: Tensor, codes: Tensor, pair: Tensor, rest: Tensor | None) -> Tensor:
    """The product x ŵᵀ for bfloat16 x (rows, in), shape (rows, out)."""
    group = x.shape[1] // pair.shape[0]
    y = torch.ops.aten._weight_int4pack_mm_for_cpu(x, codes, group, pair)  # noqa: SLF001 - no public name
    if rest is None or native.add_remainder(y, x, rest):
        return y
    sums = x.view(x.shape[0], -1, group).sum(-1, dtype=torch.float32)
    return y.add_(F.linear(sums, rest))


def dequantize(codes: Tensor, pair: Tensor, rest: Tensor | None, start: int, out: Tensor) -> None:
    """Writes the weight (rows, in) of the rows from `start`, a multiple of 64, into `out`."""
    stop = start + len(out)
    grid = grid_of(pair[:, start:stop], None if rest is None else rest[start:stop])
    out.copy_(decode(unpacked(codes[start:stop]), grid, 4, (1, out.shape[1] // pair.shape[0])))
