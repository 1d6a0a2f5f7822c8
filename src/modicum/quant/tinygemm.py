"""PyTorch's int4 kernel for few rows on NVIDIA GPUs ("tinygemm"): its layout in plain torch, both ways, and its call.

`torch.ops.aten._weight_int4pack_mm` computes x ŵᵀ for bfloat16 x with ŵ = s (c − 8) + o, s and o bfloat16 and ŵ rounded
to it. It wants an int32 tensor (out/8, in/(16 i), 32, i/2), i = 8, 4 or 2 tiles of 16 columns. Word [n, k, 4 r + l, t]
holds, of row 8 n + r, the columns 16 i k + 32 t + 8 j + 2 l + h, at bits 4 (4 h + j), for j < 4 and h < 2.

Here that tensor is a view of bytes (out, in/2), so that eight rows are a run of bytes as in the layout for processors.
Packing and unpacking are permutations written out below, each the other's inverse on any device. The layout was read
off PyTorch's source; `available` compares it with what this machine's kernels do before anything relies on it.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

#: rows whose codes lie together
RUN = 8


def packed(codes: Tensor) -> Tensor:
    """Codes (out, in) in the kernel's layout, (out, in/2) uint8."""
    out, columns = codes.shape
    inner = tiles(columns)
    # (tile of rows, row, tiles of columns, pair of tiles, j / 2, j % 2, l, h)
    split = codes.view(out // RUN, RUN, columns // (16 * inner), inner // 2, 2, 2, 4, 2)
    nibbles = split.permute(0, 2, 1, 6, 3, 7, 4, 5)
    return (nibbles[..., 0] | (nibbles[..., 1] << 4)).reshape(out, columns // 2)


def unpacked(packed: Tensor) -> Tensor:
    """Codes (out, in) uint8 of the kernel's layout."""
    out, columns = packed.shape[0], packed.shape[1] * 2
    inner = tiles(columns)
    split = packed.view(out // RUN, columns // (16 * inner), RUN, 4, inner // 2, 2, 2)
    nibbles = torch.stack([split & 15, split >> 4], -1)
    return nibbles.permute(0, 2, 1, 4, 6, 7, 3, 5).reshape(out, columns)


def product(x: Tensor, codes: Tensor, group: int, pair: Tensor) -> Tensor:
    """The product x ŵᵀ for bfloat16 x (rows, in), contiguous, and `pair` (in/g, out, 2): scales and offsets."""
    return torch.ops.aten._weight_int4pack_mm(x, words(codes), group, pair)  # noqa: SLF001 - no public name


def words(codes: Tensor) -> Tensor:
    """The packed codes as the kernel wants them, a view."""
    inner = tiles(codes.shape[1] * 2)
    return codes.view(torch.int32).view(codes.shape[0] // RUN, -1, 32, inner // 2)


def tiles(columns: int) -> int:
    """How many tiles of 16 columns lie together: as many as divide, up to 8; `columns` a multiple of 32."""
    return next(count for count in (8, 4, 2) if columns % (16 * count) == 0)


@functools.cache
def available(device: torch.device) -> bool:
    """Whether the kernels of this GPU use the layout and the grid described above, for every number of tiles."""
    # tensor cores with bfloat16; what AMD's kernels read is arranged in another way
    if torch.version.cuda is None or not torch.cuda.is_available():
        return False
    if torch.cuda.get_device_capability(device) < (8, 0):
        return False
    try:
        return all(_agrees(columns, device) for columns in (256, 192, 160))
    except (RuntimeError, AttributeError):
        return False


def _agrees(columns: int, device: torch.device) -> bool:
    """Whether packing and a product with the identity give what this file says, bit for bit."""
    out, group = 2 * RUN, 32
    codes = (torch.arange(out * columns, device=device) * 7 % 17 % 16).to(torch.uint8).view(out, columns)
    mine = packed(codes)
    # columns in pairs, the even one in the high bits
    theirs = torch.ops.aten._convert_weight_to_int4pack(  # noqa: SLF001 - no public name
        codes[:, ::2] << 4 | codes[:, 1::2], tiles(columns)
    )
    shape = (columns // group, out)
    # different powers of two and small whole numbers: every weight is a bfloat16 number
    scales = (1 << torch.arange(shape[0] * out, device=device) % 3).view(shape)
    offsets = (torch.arange(shape[0] * out, device=device) % 11 - 5.0).view(shape)
    pair = torch.stack([scales, offsets], -1).to(torch.bfloat16)
    weight = (codes - 8.0) * scales.T.repeat_interleave(group, 1) + offsets.T.repeat_interleave(group, 1)
    found = product(torch.eye(columns, dtype=torch.bfloat16, device=device), mine, group, pair)
    return torch.equal(words(mine), theirs) and torch.equal(found.T.float(), weight)
