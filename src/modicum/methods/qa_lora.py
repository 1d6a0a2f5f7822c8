"""QA-LoRA: LoRA on inputs averaged over the groups of a quantized weight, merged into offsets exactly.

Xu et al.: "QA-LoRA: Quantization-Aware Low-Rank Adaptation of Large Language Models", arXiv 2309.14717
(ICLR 2024).

    y = y₀ + scaling · B A P_p x,    A: r × (in/p),  B: out × r,  scaling = alpha / r

P_p averages p neighbouring inputs: with p the group size, or a multiple of it, the update changes nothing but
the zero-point of each group. B starts at zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast, final

from modicum.adapters.config import AdapterConfig
from modicum.adapters.pooled import PooledLowRank, pool_option


@dataclass
class QALoraConfig(AdapterConfig):
    """Configuration of QA-LoRA; `pool` should be the group size of the base, or a multiple of it."""

    pool: int = pool_option(32)


@final
class QALora(PooledLowRank):
    """QA-LoRA on one layer; `A` (r, in/p) and `B` (out, r) train."""

    config_class = QALoraConfig
    source = "arXiv 2309.14717"
    formula = "ΔW = scaling · B A P_p, A: r×(in/p), B: out×r"

    @staticmethod
    def block_of(config: AdapterConfig) -> tuple[int, int]:
        """(1, pool)."""
        return 1, cast("QALoraConfig", config).pool

    @staticmethod
    def inner_rank(rank: int, config: AdapterConfig) -> int:
        """The rank itself."""
        del config
        return rank
