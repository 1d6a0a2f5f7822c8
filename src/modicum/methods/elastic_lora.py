"""Elastic LoRA: a LoRA of which every smaller rank is an adapter too, and which can go along when its layer shrinks.

The adapter of LoNAS (LREC-COLING 2024) and of Shears (arXiv 2404.10934), trained by neural low-rank adapter search.

    y = y₀ + scaling · B[:, :k] A[:k] x,    A: R × in,  B: out × R, zero at the start,  scaling = alpha / R

k is the active rank; the scaling is that of the largest rank whatever k is. Without a search space this is LoRA.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, final

import torch
from torch.nn import functional as F

from modicum.adapters.elastic import ElasticConfig
from modicum.adapters.low_rank import LowRankAdapter

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class ElasticLoraConfig(ElasticConfig):
    """Configuration of elastic LoRA; every option is one that all elastic methods have."""


@final
class ElasticLora(LowRankAdapter):
    """Elastic LoRA on one layer; `A` (R, in) and `B` (out, R) are all that trains."""

    config_class = ElasticLoraConfig
    source = "arXiv 2404.10934"
    formula = "ΔW = scaling · B[:, :k] A[:k], scaling = alpha / R"

    def delta_weight(self) -> Tensor:
        """ΔW at the active rank, shape (out, in), float32."""
        b, a = self.factors()
        return self.scaling * (b.float() @ a.float())

    def forward(self, x: Tensor, base_output: Tensor) -> Tensor:
        """`base_output` + scaling · B A x at the active rank, shape (*batch, out)."""
        x = (self.dropout(x) if self.dropout is not None else x).to(base_output.dtype)
        b, a = (factor.to(x.dtype) for factor in self.factors())
        z = F.linear(x, a) * self.scaling
        flat = torch.addmm(base_output.reshape(-1, len(b)), z.reshape(-1, len(a)), b.T)
        return flat.view(base_output.shape)

    def lora_factors(self) -> tuple[Tensor, Tensor]:
        """B (out, k) and A (k, in) of the active rank."""
        return self.factors()
