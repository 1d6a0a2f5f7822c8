"""QA-HiRA: one full matrix between averaged inputs and repeated outputs, merged into offsets exactly.

"Q-BaRA / QA-HiRA", arXiv 2407.17029. No relation to PEFT's HIRA (Hadamard).

    y = y₀ + scaling · E_q A P_p x,    A: (out/q) × (in/p), zero at the start,  scaling = alpha / r

P_p averages p neighbouring inputs, E_q repeats every output q times. The rank is up to min(out/q, in/p): 8 × 4
blocks of a 4096 × 4096 weight are 524,288 numbers, LoRA's at rank 64. `r` only takes part in the scaling. With
pool 32 and repeat 1, as many numbers, the blocks are the row groups of 32 that many engines know.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast, final

import torch
from torch import Tensor, nn

from modicum.adapters.config import AdapterConfig
from modicum.adapters.pooled import PooledAdapter, pool_option, repeat_option

if TYPE_CHECKING:
    from modicum.adapters.site import Site


@dataclass
class QAHiraConfig(AdapterConfig):
    """Configuration of QA-HiRA; the defaults are the paper's blocks."""

    pool: int = pool_option(4)
    repeat: int = repeat_option(8)


@final
class QAHira(PooledAdapter):
    """QA-HiRA on one layer; `A` (out/q, in/p) is all that trains."""

    config_class = QAHiraConfig
    source = "arXiv 2407.17029"
    formula = "ΔW = scaling · E_q A P_p, A: (out/q)×(in/p)"

    def __init__(self, site: Site, config: QAHiraConfig) -> None:
        super().__init__(site, config)
        shape = (site.out_features // self.repeat, site.in_features // self.pool)
        start = torch.zeros(shape)
        if not config.init_weights:
            start = torch.randn(shape, generator=self.generator(config)) * shape[1] ** -0.5
        self.A = nn.Parameter(start)

    @staticmethod
    def block_of(config: AdapterConfig) -> tuple[int, int]:
        """(repeat, pool)."""
        options = cast("QAHiraConfig", config)
        return options.repeat, options.pool

    @classmethod
    def count(cls, in_features: int, out_features: int, rank: int, config: AdapterConfig) -> int:
        """(in/p) (out/q) trained numbers per layer, whatever the rank."""
        del rank
        repeat, pool = cls.block_of(config)
        return (in_features // pool) * (out_features // repeat)

    def matrix(self) -> Tensor:
        """A."""
        return self.A

    def factors(self) -> tuple[Tensor]:
        """A alone."""
        return (self.A,)
