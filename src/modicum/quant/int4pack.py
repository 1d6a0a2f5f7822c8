"""PyTorch's packed int4 kernels for few rows, and their layouts read back for many.

They compute x ŵᵀ for bfloat16 x with ŵ = s (c − 8) + o, s and o bfloat16: on x86 processors at three times the speed
of a dense bfloat16 product for one row and half of it for 64. Each device has a layout of its own for codes, (out,
in/2) bytes in both cases (`KERNELS`); all else is shared. Both directions are exact, so a layer is kept in one
layout at a time. Offsets need more than bfloat16: what the kernels cannot take is a float32 remainder, o = hi + lo,
applied to the sums of each group of inputs.

On processors the layout holds runs of 64 rows: byte j < 32 of column k holds the codes of rows j (low bits) and j + 32.
`tinygemm` describes that of NVIDIA GPUs.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from modicum.ops.affine import Grid, decode
from modicum.quant import native, tinygemm

if TYPE_CHECKING:
    from collections.abc import Callable

#: rows (tokens) up to which the kernel beats dequantizing and a dense product: measured on a processor, see the
#: benchmarks; on a GPU, not measured, the height of one tile, for which codes are read once
FEW_ROWS = 16
GROUPS = (32, 64, 128, 256)
_RUN = 64


class Kernel(NamedTuple):
    """What differs from device to device."""

    #: rows whose codes lie together; the outputs of a layer are a multiple of it
    run: int
    #: codes (out, in) uint8 to bytes (out, in/2) and back
    packed: Callable[[Tensor], Tensor]
    unpacked: Callable[[Tensor], Tensor]
    #: x (rows, in) contiguous, packed codes, group, scales and offsets (in/g, out, 2) to (rows, out)
    product: Callable[[Tensor, Tensor, int, Tensor], Tensor]
    #: whether this machine's kernel does what is written here
    available: Callable[[torch.device], bool]


def _cpu_packed(codes: Tensor) -> Tensor:
    return torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 2)  # noqa: SLF001 - no public name


def _cpu_unpacked(packed: Tensor) -> Tensor:
    out, columns = packed.shape[0], packed.shape[1] * 2
    runs = packed.view(out // _RUN, columns, _RUN // 2)
    return torch.cat([runs & 15, runs >> 4], -1).transpose(1, 2).reshape(out, columns)


def _cpu_product(x: Tensor, codes: Tensor, group: int, pair: Tensor) -> Tensor:
    return torch.ops.aten._weight_int4pack_mm_for_cpu(x, codes, group, pair)  # noqa: SLF001 - no public name


@functools.cache
def _cpu_available(device: torch.device) -> bool:
    """Whether this processor's kernel uses the layout described above (AVX-512 does)."""
    codes = torch.arange(_RUN * 32, dtype=torch.uint8, device=device).view(_RUN, 32) * 7 % 16
    try:
        packed = _cpu_packed(codes)
    except (RuntimeError, AttributeError):
        return False
    return packed.shape == (_RUN, 16) and torch.equal(_cpu_unpacked(packed), codes)


#: by type of device
KERNELS = {
    "cpu": Kernel(_RUN, _cpu_packed, _cpu_unpacked, _cpu_product, _cpu_available),
    "cuda": Kernel(tinygemm.RUN, tinygemm.packed, tinygemm.unpacked, tinygemm.product, tinygemm.available),
}


def available(device: torch.device | str = "cpu") -> bool:
    """Whether there is a kernel on `device` that uses the layout it should."""
    device = torch.device(device)
    return device.type in KERNELS and KERNELS[device.type].available(device)


def suits(
    device: str, out_features: int, in_features: int, bits: int, block: tuple[int, int], scales: torch.dtype
) -> bool:
    """Whether the kernel for a type of device takes layers of this shape and grid without a loss."""
    if device not in KERNELS:
        return False
    rows, group = block
    shape = rows == 1 and group in GROUPS and in_features % group == 0
    return shape and out_features % KERNELS[device].run == 0 and bits == 4 and scales == torch.bfloat16


def fits(
    out_features: int,
    in_features: int,
    bits: int,
    block: tuple[int, int],
    scale_dtype: torch.dtype,
    device: torch.device,
) -> bool:
    """Whether a layer can be held in its kernel's layout on this machine: `suits`, and there is a kernel."""
    return suits(device.type, out_features, in_features, bits, block, scale_dtype) and available(device)


def takes(rows: int, dtype: torch.dtype) -> bool:
    """Whether the kernels compute, and fastest, this many rows of this number type."""
    return 0 < rows <= FEW_ROWS and dtype == torch.bfloat16


def packed(codes: Tensor) -> Tensor:
    """Codes (out, in) in the layout of the kernel where they are, (out, in/2) uint8."""
    return KERNELS[codes.device.type].packed(codes)


def unpacked(packed: Tensor) -> Tensor:
    """Codes (out, in) uint8 of the layout of the kernel where they are."""
    return KERNELS[packed.device.type].unpacked(packed)


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
    x, group = x.contiguous(), x.shape[1] // pair.shape[0]
    y = KERNELS[x.device.type].product(x, codes, group, pair)
    if rest is None or (native.takes(rest, y) and native.add_remainder(y, x, rest)):
        return y
    sums = x.view(x.shape[0], -1, group).sum(-1, dtype=torch.float32)
    return y.add_(F.linear(sums, rest))


def dequantize(codes: Tensor, pair: Tensor, rest: Tensor | None, start: int, out: Tensor) -> None:
    """Writes the weight (rows, in) of the rows from `start`, a multiple of the kernel's run, into `out`."""
    stop = start + len(out)
    grid = grid_of(pair[:, start:stop], None if rest is None else rest[start:stop])
    out.copy_(decode(unpacked(codes[start:stop]), grid, 4, (1, out.shape[1] // pair.shape[0])))
