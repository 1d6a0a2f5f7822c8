"""Two trained factors, A (R, in) and B (out, R), of which a sub-network uses the first k rows and columns."""

from __future__ import annotations

import abc
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from modicum.adapters.contract import Adapter

if TYPE_CHECKING:
    from modicum.adapters.config import AdapterConfig
    from modicum.adapters.site import Site


class LowRankAdapter(Adapter, abc.ABC):
    """LoRA's factors with an elastic rank: A starts random, B at zero; abstract."""

    tensors = 2
    elastic: ClassVar[bool] = True

    def __init__(self, site: Site, config: AdapterConfig) -> None:
        super().__init__(site, config)
        generator = self.generator(config)
        self.A = nn.Parameter(uniform(self.rank, site.in_features, generator))
        shape = (site.out_features, self.rank)
        start = torch.zeros(shape) if config.init_weights else uniform(*shape, generator)
        self.B = nn.Parameter(start)

    @classmethod
    def count(cls, in_features: int, out_features: int, rank: int, config: AdapterConfig) -> int:
        """R (in + out) trained numbers per layer."""
        del config
        return rank * (in_features + out_features)

    def factors(self) -> tuple[Tensor, Tensor]:
        """B (out, k) and A (k, in) of the active rank, views."""
        return self.B[:, : self.active_rank], self.A[: self.active_rank]

    def scaled_factors(self) -> tuple[Tensor, Tensor]:
        """B (out, k) times the scaling, and A (k, in), of the active rank; float32."""
        b, a = self.factors()
        return self.scaling * b.float(), a.float()


def uniform(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """(rows, columns) uniform within ±1/√columns, LoRA's start."""
    return (torch.rand(rows, columns, generator=generator) * 2 - 1) * columns**-0.5
