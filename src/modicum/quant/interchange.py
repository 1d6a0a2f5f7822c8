"""Layers of other tools' checkpoints as codes, scales and offsets of ours, number for number.

GPTQ, AWQ and the integer formats of compressed-tensors all store ŵ = s (c − z) with integer codes c and integer
zero-points z. On our grid that is ŵ = s (c − 2^(bits−1)) + o with o = s (2^(bits−1) − z): codes and scales are
taken as they are, and with 16-bit scales the offset and every dequantized weight are exact in float32. Only
tensors come in, so none of the libraries that wrote them is needed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from modicum.errors import ConfigError
from modicum.ops.affine import BITS, Grid, decode, middle
from modicum.quant.affine import DTYPES, AffineSpec

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

#: the columns that the nibbles of an AWQ word hold, lowest nibble first
_AWQ_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)


class Quantized(NamedTuple):
    """One layer: codes (out, in) uint8 and their grid, on blocks of the weight."""

    codes: Tensor
    grid: Grid
    bits: int
    block: tuple[int, int]

    @property
    def spec(self) -> AffineSpec:
        """How an `AffineLinear` stores it."""
        return AffineSpec(
            bits=self.bits,
            block=self.block,
            zero_point="none" if self.grid.offsets is None else "integer",
            scale_dtype=str(self.grid.scales.dtype).removeprefix("torch."),
            offset_dtype="float32",
        )

    def weight(self) -> Tensor:
        """The dequantized weight (out, in), float32."""
        return decode(self.codes, self.grid, self.bits, self.block)


def from_gptq(
    tensors: Mapping[str, Tensor], group_size: int | None = None, *, minus_one: bool = True
) -> Quantized:
    """A layer of a GPTQ checkpoint.

    Args:
        tensors: `qweight` (in · bits/32, out) and `qzeros` (in/g, out · bits/32) int32, `scales` (in/g, out),
            and `g_idx` (in,), the group of each input, if stored.
        group_size: g, where there is no `g_idx`; None or −1 for one group over all inputs.
        minus_one: whether zero-points are stored less one, as the format "gptq" does and "gptq_v2" does not.

    Raises:
        ConfigError: a number of bits other than 2, 3, 4 or 8, groups that are no runs of inputs ("act-order"), or
            tensors that contradict each other.
    """
    qweight, qzeros, scales = tensors["qweight"], tensors["qzeros"], tensors["scales"]
    groups, out = scales.shape
    bits = _bits(qzeros.shape[1], out)
    columns = qweight.shape[0] * 32 // bits
    g_idx = tensors.get("g_idx")
    if g_idx is not None:
        group_size = _run_length(g_idx, columns)
    block = _row_block(columns, groups, group_size)
    codes = unpack_words(qweight.T, bits, columns)
    if minus_one and bits != 3:
        # added to whole words: 0 is stored as −1 and has borrowed from the next field
        qzeros = qzeros + _ones(bits)
    zeros = unpack_words(qzeros, bits, out).T
    if minus_one and bits == 3:
        zeros = (zeros + 1) & 7
    return _quantized(codes, scales.T, zeros, bits, block)


def from_awq(tensors: Mapping[str, Tensor], group_size: int | None = None) -> Quantized:
    """A layer of an AWQ checkpoint in the format "gemm", 4 bits.

    Args:
        tensors: `qweight` (in, out/8) and `qzeros` (in/g, out/8) int32, whose nibbles hold the columns
            0, 2, 4, 6, 1, 3, 5, 7 of eight, and `scales` (in/g, out).
        group_size: g; None or −1 for one group over all inputs.

    Raises:
        ConfigError: not 4 bits, or tensors that contradict each other.
    """
    qweight, qzeros, scales = tensors["qweight"], tensors["qzeros"], tensors["scales"]
    groups, out = scales.shape
    if qweight.shape[1] * 8 != out:
        raise ConfigError(
            f"qweight {tuple(qweight.shape)} with scales {tuple(scales.shape)} is not the AWQ format 'gemm' with 4 bits"
        )
    block = _row_block(qweight.shape[0], groups, group_size)
    codes, zeros = (_sorted(unpack_words(words, 4, out)).T for words in (qweight, qzeros))
    return _quantized(codes, scales.T, zeros, 4, block)


def from_compressed_tensors(
    tensors: Mapping[str, Tensor], bits: int, block: tuple[int, int] | None = None
) -> Quantized:
    """A layer of a compressed-tensors checkpoint in the format "pack-quantized" or "int-quantized".

    Args:
        tensors: `weight_packed` (out, ⌈in · bits/32⌉) int32 with `weight_shape` (2,), or `weight` (out, in) int8;
            `weight_scale`, one number, (out, 1), (out, in/g) or (out/q, in/p); for asymmetric grids
            `weight_zero_point`, shaped like the scales or packed along the rows; `weight_g_idx` (in,).
        bits: the width of the codes.
        block: (q, p) of a scale, where its shape does not tell; checked where it does.

    Raises:
        ConfigError: as `from_gptq`.
    """
    _check_bits(bits)
    scales = tensors["weight_scale"]
    scales = scales.reshape(1, 1) if scales.numel() == 1 else scales
    if "weight_packed" in tensors:
        out, columns = (int(size) for size in tensors["weight_shape"])
        codes = _packed_codes(tensors["weight_packed"], bits, columns)
    else:
        codes = (tensors["weight"].to(torch.int16) + middle(bits)).to(torch.uint8)
        out, columns = codes.shape
    rows, groups = scales.shape
    if out % rows or columns % groups or (block and block != (out // rows, columns // groups)):
        raise ConfigError(
            f"scales {tuple(scales.shape)} do not fit a {(out, columns)} weight in blocks of {block or 'equal size'}"
        )
    block = (out // rows, columns // groups)
    if "weight_g_idx" in tensors and _run_length(tensors["weight_g_idx"], columns) != block[1]:
        raise ConfigError(_ACT_ORDER)
    if "weight_zero_point" not in tensors:
        return _quantized(codes, scales, None, bits, block)
    zeros = tensors["weight_zero_point"]
    if zeros.numel() == scales.numel():
        return _quantized(codes, scales, zeros.reshape(scales.shape).float() + middle(bits), bits, block)
    return _quantized(codes, scales, _packed_codes(zeros.T, bits, rows).T, bits, block)


def unpack_words(words: Tensor, bits: int, count: int) -> Tensor:
    """The first `count` fields of each row of int32 `words` (rows, n), uint8 (rows, count).

    A row is one stream of bits, lowest first: fields of 3 bits may lie across two words.
    """
    data = words.contiguous().view(torch.uint8)
    if 8 % bits == 0:
        steps = torch.arange(0, 8, bits, dtype=torch.uint8, device=words.device)
        fields = (data.unsqueeze(-1) >> steps) & (2**bits - 1)
        return fields.flatten(1)[:, :count].contiguous()
    # three bytes hold eight fields
    data = torch.nn.functional.pad(data, (0, -data.shape[1] % 3)).unflatten(1, (-1, 3)).int()
    joined = data[..., 0] | data[..., 1] << 8 | data[..., 2] << 16
    steps = torch.arange(0, 24, bits, device=words.device, dtype=torch.int32)
    return (
        ((joined.unsqueeze(-1) >> steps) & (2**bits - 1)).to(torch.uint8).flatten(1)[:, :count].contiguous()
    )


_ACT_ORDER = (
    "its groups are no runs of inputs but follow their importance (act-order, desc_act): no block of a weight stands "
    "for such a group. Adapters can be trained on such a model as it is, with gptqmodel installed; otherwise quantize "
    "the original model again"
)


def _quantized(
    codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, block: tuple[int, int]
) -> Quantized:
    if str(scales.dtype).removeprefix("torch.") not in DTYPES:
        raise ConfigError(f"scales of type {scales.dtype} are not known; {', '.join(DTYPES)} are")
    offsets = None
    if zeros is not None and bool((zeros != middle(bits)).any()):
        offsets = (scales.float() * (middle(bits) - zeros.float())).contiguous()
    return Quantized(codes, Grid(scales.contiguous(), offsets), bits, block)


def _bits(words: int, fields: int) -> int:
    """The width of `fields` fields that fill `words` int32 words."""
    bits = words * 32 // fields
    if bits * fields != words * 32:
        raise ConfigError(f"{words} words do not hold {fields} zero-points of equal width")
    _check_bits(bits)
    return bits


def _check_bits(bits: int) -> None:
    if bits not in BITS:
        raise ConfigError(f"codes of {bits} bits cannot be taken over; {', '.join(map(str, BITS))} can")


def _row_block(columns: int, groups: int, group_size: int | None) -> tuple[int, int]:
    size = columns if group_size in (None, -1) else group_size
    assert size is not None
    if size * groups != columns:
        raise ConfigError(
            f"{groups} groups of {size} do not make {columns} inputs; groups of unequal size cannot be taken over"
        )
    return 1, size


def _run_length(g_idx: Tensor, columns: int) -> int:
    """The group size when groups are runs of inputs in their order."""
    size = int((g_idx == g_idx[0]).sum())
    if g_idx.numel() != columns:
        raise ConfigError(f"g_idx names the groups of {g_idx.numel()} inputs, the layer has {columns}")
    if not torch.equal(g_idx.long(), torch.arange(columns, device=g_idx.device) // size):
        raise ConfigError(_ACT_ORDER)
    return size


def _ones(bits: int) -> int:
    """1 in every field of a word, as a signed number."""
    return sum(1 << shift for shift in range(0, 32, bits))


def _sorted(columns: Tensor) -> Tensor:
    """Columns in the order of AWQ's nibbles put back in their own, (rows, out)."""
    places = torch.tensor([_AWQ_COLUMNS.index(column) for column in range(8)], device=columns.device)
    return columns.unflatten(1, (-1, 8))[..., places].flatten(1)


def _packed_codes(words: Tensor, bits: int, count: int) -> Tensor:
    """Codes of compressed-tensors, (rows, count).

    Until compressed-tensors #732 a word held whole fields only: ten of 3 bits, and two bits of nothing.
    """
    if bits == 3 and words.shape[1] == -(-count // 10) != -(-count * 3 // 32):
        steps = torch.arange(0, 30, 3, dtype=torch.int32, device=words.device)
        return ((words.unsqueeze(-1) >> steps) & 7).to(torch.uint8).flatten(1)[:, :count].contiguous()
    return unpack_words(words, bits, count)
