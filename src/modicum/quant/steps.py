"""A weight as whole steps of grids that pass through 0, some of its rows at a time.

    w = s · k,    k = c − z,    −z ≤ k ≤ 2^bits − 1 − z

with codes c, scales s and integer zero-points z: what an update that is to land on the same grid has to know.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, final

from modicum.ops.affine import PRUNED, middle, unpack, zero_points
from modicum.quant import int4pack

if TYPE_CHECKING:
    from torch import Tensor

    from modicum.ops.affine import Grid


class StepRows(NamedTuple):
    """Some rows of a weight: (rows, in/p, p) for each weight, (rows, in/p, 1) for each group; float32 but `kept`."""

    #: k, whole numbers
    steps: Tensor
    #: s
    scale: Tensor
    #: the least and the largest k
    low: Tensor
    high: Tensor
    #: what rounding took away, in steps and within ±1/2; 0 where that was not kept
    left: Tensor | float
    #: False where the weight is pruned
    kept: Tensor


@final
class Steps:
    """The whole weight, (out, in), in the storage it has; `rows` decodes a part."""

    def __init__(
        self,
        codes: Tensor,
        grid: Grid,
        bits: int,
        block: tuple[int, int],
        residuals: Tensor | None,
        *,
        packed: bool = False,
    ) -> None:
        self._codes, self._bits, self._block, self._packed = codes, bits, block, packed
        #: (out, in) int8, see `ops.affine.residuals`
        self.residuals = residuals
        self._scales = grid.scales.float()
        zero = zero_points(grid, bits).round()
        self._low, self._high, self._middle = -zero, 2**bits - 1 - zero, middle(bits) - zero

    def rows(self, part: slice) -> StepRows:
        """The rows `part`; it begins and ends with runs of 64, or with the weight."""
        scale, low, high, shift = (
            self._spread(values, part) for values in (self._scales, self._low, self._high, self._middle)
        )
        rows, groups = scale.shape[:2]
        columns = groups * self._block[1]
        codes = (
            int4pack.unpacked(self._codes[part])
            if self._packed
            else unpack(self._codes[part], self._bits, columns)
        )
        shape = rows, groups, -1
        steps = codes.float().sub_(middle(self._bits)).view(shape).add_(shift)
        if self.residuals is None:
            return StepRows(steps, scale, low, high, 0.0, steps != 0)
        left = self.residuals[part].view(shape)
        return StepRows(steps, scale, low, high, left.float().div_(256), left != PRUNED)

    def _spread(self, values: Tensor, part: slice) -> Tensor:
        """Values (out/q, in/p) of the blocks for the rows `part`, (rows, in/p, 1)."""
        q = self._block[0]
        first = part.start // q
        values = values[first : -(-part.stop // q)]
        values = values.repeat_interleave(q, 0) if q > 1 else values
        return values[part.start - first * q : part.stop - first * q].unsqueeze(-1)
