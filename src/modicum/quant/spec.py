"""How the weight of one quantized layer is stored."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from modicum.ops.affine import BITS, ZeroPoint, packed_width

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class AffineSpec:
    """How the weight of one layer is stored; see `docs/design/quantized-bases.md`."""

    bits: int = 4
    #: (q, p): rows and columns that share a scale; (1, g) is a row group of g inputs
    block: tuple[int, int] = (1, 128)
    #: "float" and "integer" grids have offsets, "none" is symmetric
    zero_point: ZeroPoint = "float"
    scale_dtype: str = "bfloat16"
    offset_dtype: str = "bfloat16"
    #: (q', p') of the additional offsets that a merge has left, None without
    offset_block: tuple[int, int] | None = None
    #: whether what rounding took away of each weight is kept beside the codes, one byte each
    residuals: bool = False

    def faults(self, out_features: int, in_features: int) -> list[str]:
        """What is wrong with storing an (out, in) weight this way; empty if fine."""
        faults = []
        if self.bits not in BITS:
            faults.append(f"bits = {self.bits!r}, must be one of {', '.join(map(str, BITS))}")
        if self.zero_point not in ("float", "integer", "none"):
            faults.append(f"zero_point = {self.zero_point!r}, must be float, integer or none")
        faults += [
            f"{name} = {getattr(self, name)!r}, must be one of {', '.join(DTYPES)}"
            for name in ("scale_dtype", "offset_dtype")
            if getattr(self, name) not in DTYPES
        ]
        if self.zero_point == "integer" and self.offset_dtype != "float32":
            # s · z has more digits than 16 bits hold
            faults.append(f"zero_point = 'integer' needs offset_dtype = 'float32', not {self.offset_dtype!r}")
        if self.residuals and self.zero_point == "float":
            faults.append("residuals need 0 on the grid: zero_point = 'integer' or 'none', not 'float'")
        for block in (self.block, self.offset_block or (1, 1)):
            faults += [
                f"blocks of {size} {what} do not divide {features}; sizes that do: {divisors(features)}"
                for size, features, what in (
                    (block[0], out_features, "outputs"),
                    (block[1], in_features, "inputs"),
                )
                if size < 1 or features % size
            ]
        return faults

    def bits_per_weight(self, out_features: int, in_features: int) -> float:
        """Bits stored for each weight: codes, scales, offsets and residuals."""
        total = 8 * out_features * packed_width(in_features, self.bits)
        blocks = out_features * in_features // math.prod(self.block)
        total += blocks * 8 * DTYPES[self.scale_dtype].itemsize
        if self.zero_point != "none":
            total += blocks * 8 * DTYPES[self.offset_dtype].itemsize
        if self.offset_block is not None:
            total += out_features * in_features // math.prod(self.offset_block) * 32
        if self.residuals:
            total += 8 * out_features * in_features
        return total / (out_features * in_features)


def divisors(number: int) -> str:
    """The twelve largest divisors of `number` up to 256, for a message: sizes that a block may have."""
    found = [size for size in range(1, min(number, 256) + 1) if number % size == 0]
    return ", ".join(map(str, found[-12:]))
