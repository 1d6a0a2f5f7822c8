"""Updates that are constant on (q, p) blocks: pooled inputs, repeated outputs, and what is trained in between.

    y = y₀ + scaling · E_q M P_p x

P_p averages p neighbouring inputs, E_q repeats each output q times in place, M (out/q, in/p) is trained, whole
or as a product. ΔW = (scaling / p) · M, each entry spread over a (q, p) block, which the offsets of a quantized
weight take exactly.
"""

from __future__ import annotations

import abc
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modicum.adapters.config import AdapterConfig, option
from modicum.adapters.contract import Adapter
from modicum.adapters.low_rank import uniform
from modicum.ops.affine import spread
from modicum.quant.spec import divisors

if TYPE_CHECKING:
    from modicum.adapters.site import Site


#: pools up to this width are spread over A instead of averaging the input
_NARROW_POOL = 4


class PooledAdapter(Adapter):
    """An adapter between pooled inputs and repeated outputs; abstract."""

    def __init__(self, site: Site, config: AdapterConfig) -> None:
        super().__init__(site, config)
        self.block = self.repeat, self.pool = self.block_of(config)

    @staticmethod
    @abc.abstractmethod
    def block_of(config: AdapterConfig) -> tuple[int, int]:
        """(q, p): how often outputs are repeated and how many inputs are averaged."""

    @classmethod
    def misfit(cls, in_features: int, out_features: int, rank: int, config: AdapterConfig) -> str | None:
        """What of the block does not divide a layer of this shape, with the sizes that would."""
        del rank
        repeat, pool = cls.block_of(config)
        faults = [
            f"{name} = {size} does not divide its {features} {ends} (sizes that do: {divisors(features)})"
            for name, size, features, ends in (
                ("pool", pool, in_features, "inputs"),
                ("repeat", repeat, out_features, "outputs"),
            )
            if features % size
        ]
        return " and ".join(faults) or None

    @abc.abstractmethod
    def matrix(self) -> Tensor:
        """The trained map M from pooled inputs to outputs before they are repeated, (out/q, in/p)."""

    def block_values(self) -> Tensor:
        """(scaling / p) · M, float32."""
        return self.matrix().float() * (self.scaling / self.pool)

    def delta_weight(self) -> Tensor:
        """ΔW = (scaling / p) · M spread over (q, p) blocks, shape (out, in), float32."""
        return spread(self.block_values(), (self.repeat, self.pool))


class PooledLowRank(PooledAdapter):
    """M = B A of a given inner rank; A (k, in/p) starts random, B (out/q, k) at zero; abstract."""

    tensors = 2

    def __init__(self, site: Site, config: AdapterConfig) -> None:
        super().__init__(site, config)
        generator, rank = self.generator(config), self.inner_rank(self.rank, config)
        inner, outer = site.in_features // self.pool, site.out_features // self.repeat
        # LoRA's start: uniform within ±1/√n of n inputs, and zero
        self.A = nn.Parameter(uniform(rank, inner, generator))
        start = torch.zeros(outer, rank) if config.init_weights else uniform(outer, rank, generator)
        self.B = nn.Parameter(start)

    @staticmethod
    @abc.abstractmethod
    def inner_rank(rank: int, config: AdapterConfig) -> int:
        """The number k of rows of A and columns of B."""

    @classmethod
    def count(cls, in_features: int, out_features: int, rank: int, config: AdapterConfig) -> int:
        """K (in/p + out/q) trained numbers per layer, k the inner rank."""
        repeat, pool = cls.block_of(config)
        return cls.inner_rank(rank, config) * (in_features // pool + out_features // repeat)

    def matrix(self) -> Tensor:
        """B A, float32."""
        return self.B.float() @ self.A.float()

    def forward(self, x: Tensor, base_output: Tensor) -> Tensor:
        """`base_output` + scaling · E_q B A P_p x, shape (*batch, out)."""
        x = (self.dropout(x) if self.dropout is not None else x).to(base_output.dtype)
        a = self.A.to(x.dtype)
        if self.pool <= _NARROW_POOL:
            # reading the input once with a wider A costs less than averaging it first
            z = F.linear(x, spread(a, (1, self.pool))) * (self.scaling / self.pool)
        else:
            z = F.linear(pooled(x, self.pool), a) * self.scaling
        b = spread(self.B.to(x.dtype), (self.repeat, 1))
        flat = torch.addmm(base_output.reshape(-1, len(b)), z.reshape(-1, b.shape[1]), b.T)
        return flat.view(base_output.shape)

    def lora_factors(self) -> tuple[Tensor, Tensor]:
        """E_q B (out, k) and A P_p (k, in), float32: the exactly equal LoRA."""
        return spread(self.B.float(), (self.repeat, 1)), spread(self.A.float(), (1, self.pool)) / self.pool


def pooled(x: Tensor, size: int) -> Tensor:
    """Means of `size` neighbours along the last axis, (*batch, n / size)."""
    if size == 1:
        return x
    # a product with a row of constants: several times faster than a mean over a short axis
    means = F.linear(x.reshape(-1, size), x.new_full((1, size), 1 / size))
    return means.view(*x.shape[:-1], -1)


def add_repeated(base: Tensor, update: Tensor, times: int) -> Tensor:
    """`base` (*batch, n) plus `update` (*batch, n / times) with each entry repeated `times` times in place."""
    if times == 1:
        return base + update
    # an outer product with ones adds and repeats in one pass
    flat = torch.addmm(base.reshape(-1, times), update.reshape(-1, 1), base.new_ones(1, times))
    return flat.view(base.shape)


def pool_option(default: int) -> int:
    """The option `pool` of a method's config."""
    return option(default, "Neighbouring inputs that are averaged (p of the paper).", minimum=1)


def repeat_option(default: int) -> int:
    """The option `repeat` of a method's config."""
    return option(default, "Times that each output is repeated in place (q of the paper).", minimum=1)
