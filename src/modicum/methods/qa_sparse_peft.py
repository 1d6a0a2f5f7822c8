"""QA-SparsePEFT: an adapter trained through the grid of a low-bit base, so that merging it changes codes and no more.

    y = y₀ + ΔW x,    ΔW = V̂ − Ŵ,    V̂ = s (q − z),    q = clamp(round(V/s + z), 0, 2^bits − 1)
    V = Ŵ + s ρ + scaling · (B[:, :k] A[:k]) ⊙ M,    scaling = alpha / R

A: R × in, B: out × R, zero at the start; k is the active rank. Scales s, zero-points z and codes are the base's and
frozen. ρ is what rounding took away of each weight, in steps and within ±1/2, where the base has kept it
(`modicum quantize --keep-residuals`): then q are the base's codes at the start, and yet a small update moves
those that were nearly rounded the other way. M leaves out the pruned weights, which stay exactly 0; without
residuals these are all zeros. The merged weight is V̂ bit for bit.

The gradient passes the rounding unchanged and stops where V lies beyond the grid, since V̂ does not move there. SQFT
+ QA-SparsePEFT, arXiv 2410.03750; started from codes rather than from the rounded sparse weight, which would undo
what GPTQ made up for, and dropout acts on the adapter alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, final

import torch

from modicum.adapters import panels
from modicum.adapters.elastic import ElasticConfig
from modicum.adapters.low_rank import LowRankAdapter

if TYPE_CHECKING:
    from torch import Tensor

    from modicum.quant.steps import Steps


@dataclass
class QASparsePeftConfig(ElasticConfig):
    """Configuration of QA-SparsePEFT; every option is one that all elastic methods have."""


@final
class QASparsePeft(LowRankAdapter):
    """QA-SparsePEFT on one layer; `A` (R, in) and `B` (out, R) are all that trains."""

    config_class = QASparsePeftConfig
    source = "arXiv 2410.03750"
    formula = (
        "ΔW = s · (clamp(round(W/s + ρ + scaling · (B[:, :k] A[:k]) ⊙ M / s)) − W/s), scaling = alpha / R"
    )
    on_grid = True

    def delta_weight(self) -> Tensor:
        """ΔW = V̂ − Ŵ at the active rank, shape (out, in), float32: whole steps of the base's grid."""
        return panels.update(*self.scaled_factors(), self._change())

    def forward(self, x: Tensor, base_output: Tensor) -> Tensor:
        """`base_output` + ΔW x at the active rank, shape (*batch, out)."""
        x = (self.dropout(x) if self.dropout is not None else x).to(base_output.dtype)
        return base_output + panels.product(x, *self.scaled_factors(), self._change())

    @torch.no_grad()
    def moved_steps(self) -> Tensor:
        """By how many steps of the grid each weight moves, (out, in) float32, whole numbers."""
        return panels.update(*self.scaled_factors(), self._change(in_steps=True))

    def _change(self, *, in_steps: bool = False) -> panels.Change:
        steps = self.site.steps()

        def change(rows: slice, product: Tensor) -> tuple[Tensor, Tensor]:
            moved, scale, passes = _moved(steps, rows, product)
            return (moved if in_steps else moved.mul_(scale)).view_as(product), passes.view_as(product)

        return change


def _moved(steps: Steps, rows: slice, product: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Steps that some rows move by, their scale, and where the gradient passes; grouped as in `StepRows`."""
    base = steps.rows(rows)
    wanted = (product.view_as(base.steps) / base.scale).add_(base.left).add_(base.steps).round_()
    reached = torch.minimum(torch.maximum(wanted, base.low), base.high)
    passes = (reached == wanted).logical_and_(base.kept)
    return reached.sub_(base.steps).mul_(base.kept), base.scale, passes
