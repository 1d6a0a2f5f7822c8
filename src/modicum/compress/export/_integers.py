"""What formats with integer zero-points share: the nearest such grid, codes as a stream of bits, and the folder."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from modicum.compress.export._source import LowBit, Source
from modicum.errors import ConfigError, listing
from modicum.ops.affine import middle, spread

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from torch import Tensor

#: of a step; a zero-point this close to an integer is one, up to the rounding of the offset it is computed from
_SAME = 2.0**-11
_ROWS = 1024


class IntegerGrid(NamedTuple):
    """A grid s (c − z) with integer z, for the codes of a layer."""

    group: int
    #: (out, in/g) float32
    scales: Tensor
    #: (out, in/g) uint8
    zeros: Tensor
    #: whether every zero-point was an integer to begin with
    exact: bool
    #: whether every zero-point is the middle code
    symmetric: bool

    def decoded(self, weight: LowBit) -> Tensor:
        """The weight on this grid, (out, in) float32."""
        zeros = spread(self.zeros.float(), (1, self.group))
        return (weight.codes.float() - zeros) * spread(self.scales, (1, self.group))


def integer_grid(weight: LowBit) -> IntegerGrid:
    """The grid of `weight` with every zero-point z = 2^(bits−1) − o/s rounded to a code."""
    group, scales, offsets = weight.in_row_groups()
    exact_zeros = middle(weight.bits) - offsets / scales
    zeros = exact_zeros.round().clamp(0, 2**weight.bits - 1)
    same = bool(((exact_zeros - zeros).abs() <= _SAME).all())
    return IntegerGrid(group, scales, zeros.to(torch.uint8), same, bool((zeros == middle(weight.bits)).all()))


def check_alike(source: Source, fmt: str, more: Iterable[str] = ()) -> None:
    """Raise unless the model has low-bit layers, all of the same bits and group size.

    Raises:
        ConfigError: it has not, or there are `more` faults.
    """
    if not source.low_bit:
        raise ConfigError(f"{fmt} stores low-bit weights, and this model has none; quantize it first")
    faults, kinds = list(more), dict[tuple[int, int], list[str]]()
    for name in source.low_bit:
        weight = source.weight(name)
        assert isinstance(weight, LowBit)
        kinds.setdefault((weight.bits, weight.in_row_groups()[0]), []).append(name)
    if len(kinds) > 1:
        found = "; ".join(
            f"{b} bits in groups of {g}: {listing(names, 2)}" for (b, g), names in kinds.items()
        )
        faults.append(f"all layers must have the same bits and groups ({found})")
    if faults:
        raise ConfigError(f"{fmt} has no form for this model: " + "; ".join(faults[:6]))


def words(values: Tensor, bits: int) -> Tensor:
    """Rows of codes (rows, n) uint8 as streams of `bits` each, low bits first: (rows, ⌈n · bits / 32⌉) int32."""
    parts = [_words(part.numpy(), bits) for part in values.split(_ROWS)]
    return torch.from_numpy(np.concatenate(parts))


def _words(codes: np.ndarray, bits: int) -> np.ndarray:
    stream = (codes[..., None] >> np.arange(bits, dtype=np.uint8)) & 1
    stream = stream.reshape(len(codes), -1)
    stream = np.pad(stream, ((0, 0), (0, -stream.shape[1] % 32)))
    return np.packbits(stream, axis=1, bitorder="little").view("<i4")


def save_folder(
    source: Source, folder: Path, tensors: Mapping[str, Tensor], quantization: Mapping[str, Any]
) -> None:
    """Writes a `from_pretrained` folder: the low-bit layers as `tensors`, everything else as the model has it."""
    from safetensors.torch import save_file

    replaced = {f"{name}.weight" for name in source.low_bit} | ({"lm_head.weight"} if source.tied else set())
    dense = {
        name: p.detach().float().cpu() for name, p in source.model.named_parameters() if name not in replaced
    }
    dtype = shared_dtype(dense.values())
    stored = {name: value.to(dtype).contiguous() for name, value in dense.items()} | dict(tensors)
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    config = copy.deepcopy(source.config)
    config.dtype = dtype
    config.quantization_config = dict(quantization)
    config.save_pretrained(folder)
    source.tokenizer.save_pretrained(folder)


def shared_dtype(tensors: Iterable[Tensor]) -> torch.dtype:
    """The first of bfloat16, float16 and float32 that holds all numbers of the float32 `tensors` exactly."""
    values = list(tensors)
    for dtype in (torch.bfloat16, torch.float16):
        if all(torch.equal(value.to(dtype).float(), value) for value in values):
            return dtype
    return torch.float32
