"""Q-BaRA: LoRA between averaged inputs and repeated outputs, its saving spent on rank.

"Q-BaRA / QA-HiRA", arXiv 2407.17029 (TACL 2025 as Q-BLoRA / QA-BLoRA).

    y = y₀ + scaling · E_q B A P_p x,    A: (p r) × (in/p),  B: (out/q) × (p r),  scaling = alpha / r

P_p averages p neighbouring inputs, E_q repeats every output q times. With p = q there are as many trained
numbers as in LoRA of rank r, but the rank is p r: on a quantized base LoRA underfits for want of rank, not of
width. B starts at zero. The update is constant on (q, p) blocks, so it merges into offsets exactly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast, final

from modicum.adapters.config import AdapterConfig
from modicum.adapters.pooled import PooledLowRank, pool_option, repeat_option


@dataclass
class QBaraConfig(AdapterConfig):
    """Configuration of Q-BaRA; the defaults are the paper's."""

    pool: int = pool_option(2)
    repeat: int = repeat_option(2)


@final
class QBara(PooledLowRank):
    """Q-BaRA on one layer; `A` (p r, in/p) and `B` (out/q, p r) train."""

    config_class = QBaraConfig
    source = "arXiv 2407.17029"
    formula = "ΔW = scaling · E_q B A P_p, A: (p r)×(in/p), B: (out/q)×(p r)"

    @staticmethod
    def block_of(config: AdapterConfig) -> tuple[int, int]:
        """(repeat, pool)."""
        options = cast("QBaraConfig", config)
        return options.repeat, options.pool

    @staticmethod
    def inner_rank(rank: int, config: AdapterConfig) -> int:
        """P r: what pooling saves is spent on rank."""
        return rank * cast("QBaraConfig", config).pool
