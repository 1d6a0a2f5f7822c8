"""GPTQ: the codes of a weight matrix chosen column by column, each error made up for by later columns.

The result minimizes, greedily in the order of the columns, tr((W − Ŵ) H (W − Ŵ)ᵀ) = 2/n · ‖(W − Ŵ) X‖² for the
inputs X (in, n) with H = 2 X Xᵀ / n. With H = R Rᵀ, R upper triangular, and Δ = W − Ŵ,

    ŵ_i = quantized( w_i + Σ_{j<i} Δ_j R_ji / R_ii )

which are the codes of the original formulation (its H⁻¹ = UᵀU has U = R⁻¹) without inverting anything: one
Cholesky factor, a quarter of the work, and better conditioned.

Source: Frantar et al., arXiv 2210.17323; the equivalence is theorem 6 of Chee et al., arXiv 2307.13304.
"""

from __future__ import annotations

import contextlib
import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from modicum.errors import ConfigError
from modicum.ops.affine import Clip, Grid, ZeroPoint, fit_grid, middle, residuals

if TYPE_CHECKING:
    from collections.abc import Iterator

#: side of the tiles in which the upper half of a Hessian is summed
_TILE = 1024
#: columns pulled up to date together inside a block of columns
_RUN = 32
#: times the damping grows tenfold before a Hessian is given up
_TRIES = 8


class Quantized(NamedTuple):
    """What GPTQ makes of a weight."""

    #: (out, in) uint8, in the order of the weight's columns
    codes: Tensor
    grid: Grid
    #: tr((W − Ŵ) H (W − Ŵ)ᵀ) with the damped H
    loss: float
    #: what rounding took away of the corrected weights, as `affine.residuals`; None unless asked for
    residuals: Tensor | None = None


class Hessian:
    """The sum of X Xᵀ of a layer's inputs, (in, in) float32, batch after batch."""

    def __init__(self, in_features: int, device: torch.device | str | None = None) -> None:
        self._sum = torch.zeros(in_features, in_features, device=device)
        #: rows seen
        self.rows = 0

    @torch.no_grad()
    def add(self, x: Tensor) -> None:
        """Take in the inputs x (…, in), in place."""
        x = x.reshape(-1, x.shape[-1]).float()
        self.rows += x.shape[0]
        # symmetric, so the tiles above the diagonal are enough
        for start in range(0, x.shape[1], _TILE):
            end = start + _TILE
            self._sum[start:end, start:].addmm_(x[:, start:end].T, x[:, start:])

    def matrix(self) -> Tensor:
        """H = 2 X Xᵀ / n, a new tensor; zeros before any input."""
        upper = self._sum.triu()
        upper.mul_(2 / max(self.rows, 1))
        diagonal = upper.diagonal().clone()
        upper += upper.T.clone()
        upper.diagonal().copy_(diagonal)
        return upper


@torch.no_grad()
def gptq(
    weight: Tensor,
    hessian: Tensor,
    bits: int,
    block: tuple[int, int],
    *,
    zero_point: ZeroPoint = "float",
    clip: Clip = "minmax",
    scale_dtype: torch.dtype = torch.bfloat16,
    offset_dtype: torch.dtype = torch.float32,
    act_order: bool = False,
    damping: float = 0.01,
    blocksize: int = 128,
    mask: Tensor | None = None,
    keep_residuals: bool = False,
) -> Quantized:
    """Codes and grid of the (out, in) `weight` for inputs with the `hessian` (in, in), and the loss that is left.

    The grid of a (q, p) `block` is fitted when its columns are reached, to the weights as corrected so far; the
    other options fit it as in `affine.fit_grid`. `act_order` takes the columns in descending order of the
    Hessian's diagonal; grids are then fitted first, so that columns keep their places and their blocks.
    `damping` is the part of the mean diagonal that is added to it, tenfold until the matrix is positive definite.
    Columns without any input are rounded to nearest. `mask` (out, in), True = keep, holds pruned weights at
    exactly 0 while their errors are made up for as well; 0 must be on the grid: `zero_point` "integer" with
    float32 offsets, or "none". `keep_residuals` also gives what was left over of each weight when it was rounded.

    Raises:
        ConfigError: 0 is not on the grid of a masked weight, or the Hessian cannot be factored.
    """
    if mask is not None and (
        zero_point == "float" or (zero_point == "integer" and offset_dtype != torch.float32)
    ):
        raise ConfigError(
            "a mask needs 0 on the grid: zero_point 'integer' with float32 offsets, or 'none'; "
            f"not {zero_point!r} with {offset_dtype}"
        )
    w = weight.float()
    w = w.masked_fill(~mask, 0) if mask is not None else w
    diagonal = hessian.diagonal()
    order = diagonal.argsort(descending=True, stable=True) if act_order else None
    factor = _factor(hessian, order, damping)
    fit = _Fit(bits, block, zero_point, clip, scale_dtype, offset_dtype, diagonal if clip == "mse" else None)
    columns = _Columns(w, factor, fit, order, mask)
    if keep_residuals:
        columns.residuals = torch.empty(w.T.shape, dtype=torch.int8, device=w.device)
    for start, end in _panels(w.shape[1], block[1], blocksize):
        columns.quantize(start, end)
    return columns.result()


class _Fit(NamedTuple):
    """How grids are fitted."""

    bits: int
    block: tuple[int, int]
    zero_point: ZeroPoint
    clip: Clip
    scale_dtype: torch.dtype
    offset_dtype: torch.dtype
    importance: Tensor | None

    def __call__(self, weight: Tensor, start: int = 0) -> Grid:
        importance = None if self.importance is None else self.importance[start : start + weight.shape[1]]
        return fit_grid(
            weight,
            self.bits,
            self.block,
            zero_point=self.zero_point,
            clip=self.clip,
            scale_dtype=self.scale_dtype,
            offset_dtype=self.offset_dtype,
            importance=importance,
        )


class _Columns:
    """The columns of a weight on their way to codes. Everything is transposed, so that a column is contiguous."""

    def __init__(
        self, w: Tensor, factor: Tensor, fit: _Fit, order: Tensor | None, mask: Tensor | None
    ) -> None:
        self.fit = fit
        self.order = order
        self.places = None if order is None else order.tolist()
        self.steps = factor.diagonal().clone()
        #: unit upper triangular: row j holds what an error of column j adds to each later column
        self.feedback = factor.div_(self.steps)
        self.original = _ordered(w.T, order)
        #: the original columns plus what earlier errors added
        self.target = self.original.clone()
        self.keep = None if mask is None else _ordered(mask.T, order)
        self.codes = torch.empty(w.T.shape, dtype=torch.uint8, device=w.device)
        #: (in, out) int8, where they are wanted
        self.residuals: Tensor | None = None
        self.loss = 0.0
        shape = (w.shape[1] // fit.block[1], w.shape[0] // fit.block[0])
        #: (in/p, out/q)
        self.scales = torch.ones(shape, dtype=fit.scale_dtype, device=w.device)
        offsets = torch.zeros(shape, dtype=fit.offset_dtype, device=w.device)
        self.offsets = None if fit.zero_point == "none" else offsets
        #: block of columns, scales and offsets of the last column
        self.current: tuple[int, Tensor, Tensor | None] = (-1, self.scales, None)
        if order is not None:
            self._set_grid(0, fit(w))

    def quantize(self, start: int, end: int) -> None:
        """Choose the codes of the columns from `start` to `end` and pass their errors on, in place."""
        error = torch.zeros(end - start, self.target.shape[1], device=self.target.device)
        left = torch.empty_like(error)
        p = self.fit.block[1]
        # a thousand small operations, which threads of other jobs can slow down a hundredfold
        with _one_thread():
            for first, last in _runs(start, end, p):
                if first > start:
                    fed = self.feedback[start:first, first:last].T
                    self.target[first:last].addmm_(fed, error[: first - start])
                if self.order is None and first % p == 0:
                    self._fit_block(first, last, error[: first - start], start)
                for column in range(first, last):
                    target = self.target[column]
                    if column > first:
                        pulled = error[first - start : column - start].T
                        target = torch.addmv(target, pulled, self.feedback[first:column, column])
                    value = self._round(column, target)
                    torch.sub(self.original[column], value, out=error[column - start])
                    torch.sub(target, value, out=left[column - start])
                    self._keep_residual(column, left[column - start])
        norms = torch.linalg.vector_norm(left, dim=1) * self.steps[start:end]
        self.loss += float(norms.double().square().sum())
        self.target[end:].addmm_(self.feedback[start:end, end:].T, error)

    def _round(self, column: int, target: Tensor) -> Tensor:
        """The value of one column on the grid, (out,); its codes are kept."""
        place = column if self.places is None else self.places[column]
        scale, offset = self._grid_of(place // self.fit.block[1])
        mid, top = middle(self.fit.bits), 2**self.fit.bits - 1
        steps = target if offset is None else target - offset
        steps = (steps / scale).round_().clamp_(-mid, top - mid)
        if self.keep is not None:
            zero = torch.zeros_like(scale) if offset is None else (-offset / scale).round_()
            steps = torch.where(self.keep[column], steps, zero)
        self.codes[place] = steps + mid
        value = steps.mul_(scale)
        return value if offset is None else value.add_(offset)

    def _keep_residual(self, column: int, left: Tensor) -> None:
        if self.residuals is not None:
            place = column if self.places is None else self.places[column]
            scale, _ = self._grid_of(place // self.fit.block[1])
            self.residuals[place] = residuals(left / scale, None if self.keep is None else self.keep[column])

    def _fit_block(self, first: int, last: int, error: Tensor, start: int) -> None:
        """Fit the grid of the block of columns that starts at `first` to the weights as they stand."""
        end = first + self.fit.block[1]
        target = self.target[first:end]
        if last < end and first > start:
            # only the columns up to `last` have the errors of this panel
            target = target.clone()
            target[last - first :].addmm_(self.feedback[start:first, last:end].T, error)
        # what is fed back assumes the original weight in between; the best answer to the errors so far is to
        # move the whole block at once, Δ_b = −(fed back) M_bb⁻¹
        moved = torch.linalg.solve_triangular(
            self.feedback[first:end, first:end].T,
            target - self.original[first:end],
            upper=False,
            unitriangular=True,
        )
        moved += self.original[first:end]
        if self.keep is not None:
            moved *= self.keep[first:end]
        self._set_grid(first // self.fit.block[1], self.fit(moved.T, first))

    def _set_grid(self, index: int, grid: Grid) -> None:
        self.scales[index : index + grid.scales.shape[1]] = grid.scales.T
        if self.offsets is not None and grid.offsets is not None:
            self.offsets[index : index + grid.scales.shape[1]] = grid.offsets.T

    def _grid_of(self, index: int) -> tuple[Tensor, Tensor | None]:
        """Scales and offsets (out,) of the block of columns `index`, float32."""
        if self.current[0] != index:
            q = self.fit.block[0]
            scale = self.scales[index].float().repeat_interleave(q)
            offset = None if self.offsets is None else self.offsets[index].float().repeat_interleave(q)
            self.current = index, scale, offset
        return self.current[1:]

    def result(self) -> Quantized:
        offsets = None if self.offsets is None else self.offsets.T.contiguous()
        grid = Grid(self.scales.T.contiguous(), offsets)
        left = None if self.residuals is None else self.residuals.T.contiguous()
        return Quantized(self.codes.T.contiguous(), grid, self.loss, left)


def _factor(hessian: Tensor, order: Tensor | None, damping: float) -> Tensor:
    """R upper triangular with R Rᵀ = the damped Hessian, its columns taken in `order`."""
    size = hessian.shape[0]
    order = torch.arange(size, device=hessian.device) if order is None else order
    # the Cholesky factor of the matrix turned end to end is R turned end to end
    turned = order.flip(0)
    h = hessian[turned.unsqueeze(1), turned]
    diagonal = h.diagonal().clone()
    mean = float(diagonal.mean())
    if not math.isfinite(float(h.sum())) or mean < 0:
        raise ConfigError("the Hessian of the calibration inputs holds NaN or infinite numbers")
    # no input, no feedback: such a column is rounded to nearest (zeroing it would fail on the first input)
    diagonal[diagonal == 0] = mean or 1.0
    tried = [damping, *(max(damping, 1e-6) * 10**power for power in range(1, _TRIES))]
    for added in tried:
        h.diagonal().copy_(diagonal + added * mean)
        factor, failed = torch.linalg.cholesky_ex(h)
        if not int(failed) and bool(torch.isfinite(factor.diagonal()).all()):
            return factor.flip(0, 1)
    raise ConfigError(
        f"the Hessian of the calibration inputs has no Cholesky factor, not even with {tried[-1]:g} damping"
    )


def _ordered(columns: Tensor, order: Tensor | None) -> Tensor:
    """The rows of `columns` (in, out) in `order`, contiguous."""
    return columns.contiguous() if order is None else columns[order]


def _panels(width: int, p: int, blocksize: int) -> Iterator[tuple[int, int]]:
    """Runs of about `blocksize` columns that begin and end with blocks, or divide one."""
    if p <= blocksize:
        step = blocksize // p * p
        yield from ((start, min(start + step, width)) for start in range(0, width, step))
        return
    for first in range(0, width, p):
        end = first + p
        yield from ((start, min(start + blocksize, end)) for start in range(first, end, blocksize))


def _runs(start: int, end: int, p: int) -> Iterator[tuple[int, int]]:
    """Runs of columns inside a panel, none across the border of a block."""
    for block in range(start, end, p):
        stop = min(block + p, end)
        yield from ((first, min(first + _RUN, stop)) for first in range(block, stop, _RUN))


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
