"""SparsePEFT: a LoRA that leaves the zeros of a pruned weight alone, so that the merged model is as sparse as the base.

    y = y₀ + ΔW x,    ΔW = scaling · (B[:, :k] A[:k]) ⊙ M,    M = (W ≠ 0),    scaling = alpha / R

A: R × in, B: out × R, zero at the start; k is the active rank. SQFT + SparsePEFT, arXiv 2410.03750.

The masked product has no factors, so ΔW is made where it is needed, some rows at a time, and none of it is kept for
the backward pass (`adapters.panels`). Dropout acts on the input of the adapter alone. Without a zero in W this is
an elastic LoRA, only slower.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, final

from modicum.adapters import panels
from modicum.adapters.elastic import ElasticConfig
from modicum.adapters.low_rank import LowRankAdapter

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class SparsePeftConfig(ElasticConfig):
    """Configuration of SparsePEFT; every option is one that all elastic methods have."""


@final
class SparsePeft(LowRankAdapter):
    """SparsePEFT on one layer; `A` (R, in) and `B` (out, R) are all that trains."""

    config_class = SparsePeftConfig
    source = "arXiv 2410.03750"
    formula = "ΔW = scaling · (B[:, :k] A[:k]) ⊙ (W ≠ 0), scaling = alpha / R"

    def delta_weight(self) -> Tensor:
        """ΔW at the active rank, shape (out, in), float32; exactly 0 where the base weight is."""
        return panels.update(*self.scaled_factors(), self._masked)

    def forward(self, x: Tensor, base_output: Tensor) -> Tensor:
        """`base_output` + ΔW x at the active rank, shape (*batch, out)."""
        x = (self.dropout(x) if self.dropout is not None else x).to(base_output.dtype)
        return base_output + panels.product(x, *self.scaled_factors(), self._masked)

    def _masked(self, rows: slice, product: Tensor) -> tuple[Tensor, Tensor]:
        kept = self.site.mask(rows)
        return product.mul_(kept), kept
