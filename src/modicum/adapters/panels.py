"""Low-rank products that are changed weight by weight, Δ = u(B A), of which only some rows are ever in memory.

A mask or a grid makes of the product something that has no factors any more. Training through it would keep the
product, the mask and the update for the backward pass, several times the weight of the layer. Here a panel of
rows is made, multiplied, and made again in the backward pass; what is kept are the factors and the input.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    #: (rows, their part of B A) -> (their update, where the gradient passes as bool), all (rows, in)
    Change = Callable[[slice, Tensor], tuple[Tensor, Tensor]]

#: weights of a panel: few enough for the caches of a processor, enough for an accelerator to be busy
_PANEL, _LARGE_PANEL = 1 << 18, 1 << 24
#: rows of a panel are a multiple, as some layouts of codes want
_RUN = 64


def product(x: Tensor, b: Tensor, a: Tensor, change: Change) -> Tensor:
    """X Δᵀ (*batch, out) in the dtype of x, with Δ = change(B A) of float32 factors B (out, k) and A (k, in).

    The gradient of the update reaches B and A where `change` says that it passes. Panels depend on nothing but the
    shape and the device, so that Δ is the same bit for bit here and in `update`.
    """
    return _Product.apply(x, b, a, change)  # pyright: ignore[reportReturnType] - autograd is untyped


def update(b: Tensor, a: Tensor, change: Change) -> Tensor:
    """Δ = change(B A), (out, in) float32; the gradient is that of `product`."""
    return _Update.apply(b, a, change)  # pyright: ignore[reportReturnType] - autograd is untyped


def panels(b: Tensor, a: Tensor, change: Change) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """(rows, update, where the gradient passes) of all panels in order."""
    columns = a.shape[1]
    size = _PANEL if a.device.type == "cpu" else _LARGE_PANEL
    step = _RUN * max(1, size // (_RUN * columns))
    for start in range(0, len(b), step):
        part = slice(start, min(start + step, len(b)))
        yield part, *change(part, b[part] @ a)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, b: Tensor, a: Tensor, change: Change) -> Tensor:
        ctx.save_for_backward(x, b, a)
        ctx.change = change
        rows = x.reshape(-1, x.shape[-1])
        y = rows.new_empty(len(rows), len(b))
        # autocast would round the product, and with it what lands on which code
        with torch.autocast(x.device.type, enabled=False):
            for part, delta, _ in panels(b, a, change):
                torch.mm(rows, delta.to(x.dtype).T, out=y[:, part])
        return y.view(*x.shape[:-1], len(b))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, b, a = ctx.saved_tensors
        rows, grad = x.reshape(-1, x.shape[-1]), grad.reshape(-1, len(b))
        to_x = torch.zeros_like(rows, dtype=torch.float32) if ctx.needs_input_grad[0] else None
        to_b, to_a = torch.empty_like(b), torch.zeros_like(a)
        with torch.autocast(x.device.type, enabled=False):
            for part, delta, passes in panels(b, a, ctx.change):
                mine = grad[:, part]
                if to_x is not None:
                    # panels are summed in float32 also where the dtype is narrower
                    to_x += mine @ delta.to(x.dtype)
                _reach(part, (mine.T @ rows).float().mul_(passes), (b, a), (to_b, to_a))
        return None if to_x is None else to_x.to(x.dtype).view(x.shape), to_b, to_a, None


class _Update(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, b: Tensor, a: Tensor, change: Change) -> Tensor:
        ctx.save_for_backward(b, a)
        ctx.change = change
        with torch.autocast(b.device.type, enabled=False):
            return torch.cat([delta for _, delta, _ in panels(b, a, change)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        b, a = ctx.saved_tensors
        to_b, to_a = torch.empty_like(b), torch.zeros_like(a)
        with torch.autocast(b.device.type, enabled=False):
            for part, _, passes in panels(b, a, ctx.change):
                _reach(part, grad[part] * passes, (b, a), (to_b, to_a))
        return to_b, to_a, None


def _reach(
    part: slice, grad: Tensor, factors: tuple[Tensor, Tensor], gradients: tuple[Tensor, Tensor]
) -> None:
    """Adds what the gradient (rows, in) of some rows of B A gives the factors, in place."""
    (b, a), (to_b, to_a) = factors, gradients
    torch.mm(grad, a.T, out=to_b[part])
    to_a.addmm_(b[part].T, grad)
