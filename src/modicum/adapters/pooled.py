"""Updates that are constant on (q, p) blocks: pooled inputs, repeated outputs, and what is trained in between.

    y = y₀ + scaling · E_q M P_p x

P_p averages p neighbouring inputs, E_q repeats each output q times in place, M (out/q, in/p) is trained, whole
or as a product. ΔW = (scaling / p) · M, each entry spread over a (q, p) block, which the offsets of a quantized
weight take exactly.
"""

from __future__ import annotations

import abc
import math
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from modicum.adapters.config import AdapterConfig, option
from modicum.adapters.contract import Adapter
from modicum.adapters.low_rank import uniform
from modicum.ops.affine import spread
from modicum.quant import native
from modicum.quant.spec import divisors

if TYPE_CHECKING:
    from modicum.adapters.site import Site


#: columns that products with ones have, where there is no library: a matrix product of this width costs little more
#: than reading its input, and several times less than a sum or copy along a short axis
_WIDTH = 16


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

    @abc.abstractmethod
    def factors(self) -> tuple[Tensor, ...]:
        """The trained matrices whose product is M, the one next to the input first."""

    def forward(self, x: Tensor, base_output: Tensor) -> Tensor:
        """`base_output` + scaling · E_q M P_p x, shape (*batch, out)."""
        x = (self.dropout(x) if self.dropout is not None else x).to(base_output.dtype)
        factors = [factor.to(x.dtype) for factor in self.factors()]
        arguments = x, base_output, self.scaling, self.pool, self.repeat, *factors
        if not torch.is_autocast_enabled(x.device.type):
            return cast("Tensor", _Product.apply(*arguments))
        # all is in one number type already, which has to be the same in the gradient
        with torch.autocast(x.device.type, enabled=False):
            return cast("Tensor", _Product.apply(*arguments))

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

    def factors(self) -> tuple[Tensor, Tensor]:
        """A and B."""
        return self.A, self.B

    def lora_factors(self) -> tuple[Tensor, Tensor]:
        """E_q B (out, k) and A P_p (k, in), float32: the exactly equal LoRA."""
        return spread(self.B.float(), (self.repeat, 1)), spread(self.A.float(), (1, self.pool)) / self.pool


class _Product(torch.autograd.Function):
    """`base` + scaling · E_q (… B A) P_p x for one factor or two, in the number type they all have.

    Kept for the gradient: the pooled inputs and what each factor but the last makes of them. The gradient of the
    output is pooled once, and serves all factors.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        base: Tensor,
        scaling: float,
        pool: int,
        repeat: int,
        first: Tensor,
        last: Tensor | None = None,
    ) -> Tensor:
        # no `*factors`: where no gradient is wanted torch.compile counts parameters, and drops `ctx` if there are two
        factors = (first,) if last is None else (first, last)
        rows, inputs = _sums(x.reshape(-1, x.shape[-1]), pool, 1 / pool), []
        for factor in factors:
            inputs.append(rows)
            rows = rows @ factor.t()
            # the first product is the narrowest
            rows = rows if len(inputs) > 1 or scaling == 1 else rows.mul_(scaling)
        ctx.save_for_backward(*inputs, *factors)
        ctx.rest = x.shape, scaling, pool, repeat
        return _copies(rows, repeat, 1.0, base.reshape(-1, base.shape[-1])).view(base.shape)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] - as the decorator types it
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor | None, ...]:
        (grad,), saved = grads, ctx.saved_tensors
        shape, scaling, pool, repeat = ctx.rest
        count = len(saved) // 2
        rows = _sums(grad.reshape(-1, grad.shape[-1]), repeat, 1.0)
        found: list[Tensor] = []
        for index in reversed(range(count)):
            rows = rows if index or scaling == 1 else rows * scaling
            found.insert(0, rows.t() @ saved[index])
            if index or ctx.needs_input_grad[0]:
                rows = rows @ saved[count + index]
        x_grad = _copies(rows, pool, 1 / pool).view(shape) if ctx.needs_input_grad[0] else None
        return x_grad, grad, None, None, None, *found


def _sums(rows: Tensor, size: int, factor: float) -> Tensor:
    """`factor` times the sums of `size` neighbours in each row, (rows, n / size)."""
    if size == 1:
        return rows
    if native.takes_neighbours(rows, size):
        return native.pool(rows, size, factor)
    if rows.dtype == torch.float32 and size == 2:
        return (rows[:, ::2] + rows[:, 1::2]).mul_(factor)
    # float32 is fastest with one column, narrower types with a few
    width = 1 if rows.dtype == torch.float32 else _WIDTH
    ones = _ones(rows, size, rows.shape[1] // size, factor, width)
    return F.linear(rows.reshape(-1, ones.shape[1]), ones).view(len(rows), -1)


def _copies(rows: Tensor, size: int, factor: float, base: Tensor | None = None) -> Tensor:
    """`factor` times each entry of the rows `size` times in place, (rows, n · size), plus `base`."""
    if size == 1:
        return rows if base is None else base + rows
    if native.takes_neighbours(rows, size):
        return native.repeat(rows, size, factor, base)
    ones = _ones(rows, size, rows.shape[1], factor, _WIDTH)
    flat = rows.view(-1, len(ones))
    if base is None:
        return (flat @ ones).view(len(rows), -1)
    # adds and repeats in one pass
    return torch.addmm(base.reshape(-1, ones.shape[1]), flat, ones).view(len(rows), -1)


def _ones(like: Tensor, size: int, groups: int, factor: float, width: int) -> Tensor:
    """A matrix (m, m · size) that repeats m entries `size` times each; its transpose sums. M divides `groups`."""
    count = math.gcd(groups, max(1, width // size))
    ones = torch.eye(count, dtype=like.dtype, device=like.device).mul_(factor)
    return ones.repeat_interleave(size, 1)


def pool_option(default: int) -> int:
    """The option `pool` of a method's config."""
    return option(default, "Neighbouring inputs that are averaged (p of the paper).", minimum=1)


def repeat_option(default: int) -> int:
    """The option `repeat` of a method's config."""
    return option(default, "Times that each output is repeated in place (q of the paper).", minimum=1)
