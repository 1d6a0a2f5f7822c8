"""QA-BLoRA: low-rank and constant on blocks of rows and columns at once, merged into offsets exactly.

"Balancing trainability": the form of QA-HiRA's family in TACL 2025 (arXiv 2407.17029).

    y = y₀ + scaling · E_q B A P_p x,    A: r × (in/p),  B: (out/q) × r,  scaling = alpha / r

P_p averages p neighbouring inputs (p the group size of the base, as in QA-LoRA), E_q repeats every output q
times: for the same number of trained values the rank r is larger than QA-LoRA's. B starts at zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast, final

from modicum.adapters.config import AdapterConfig
from modicum.adapters.pooled import PooledLowRank, pool_option, repeat_option


@dataclass
class QABloraConfig(AdapterConfig):
    """Configuration of QA-BLoRA; `pool` should be the group size of the base, or a multiple of it."""

    pool: int = pool_option(32)
    repeat: int = repeat_option(4)


@final
class QABlora(PooledLowRank):
    """QA-BLoRA on one layer; `A` (r, in/p) and `B` (out/q, r) train."""

    config_class = QABloraConfig
    source = "arXiv 2407.17029"
    formula = "ΔW = scaling · E_q B A P_p, A: r×(in/p), B: (out/q)×r"

    @staticmethod
    def block_of(config: AdapterConfig) -> tuple[int, int]:
        """(repeat, pool)."""
        options = cast("QABloraConfig", config)
        return options.repeat, options.pool

    @staticmethod
    def inner_rank(rank: int, config: AdapterConfig) -> int:
        """The rank itself."""
        del config
        return rank
