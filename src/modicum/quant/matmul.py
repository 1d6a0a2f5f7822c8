"""One door for products with a quantized weight: x ŵᵀ and its gradient to x, whatever the layout and the device.

Few rows of bfloat16 go to PyTorch's int4 kernel where there is one (`int4pack`). Otherwise the weight is dequantized,
on a processor a panel of rows at a time, into a buffer that is used again for every panel of every layer: the product
reads it from a cache, memory stays codes and scales, and no layer's worth of pages is mapped and freed on each call.
`native` dequantizes on processors, compiled torch code elsewhere, and where there is no compiler torch as it is.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import os
import threading
import types
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from modicum.ops.affine import middle, spread, unpack
from modicum.quant import int4pack, native

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

#: weights that each thread dequantizes at a time: few enough for its caches, many enough for what a product costs
#: however small it is
PANEL = 3 << 19
#: most weights of a panel; more would take more memory than they save time
LARGEST_PANEL = 1 << 24
#: layers below this many weights are not worth waiting for a compiler
_WORTH_COMPILING = 1 << 20


def linear(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    offsets: Tensor | None,
    bias: Tensor | None,
    bits: int,
    block: tuple[int, int],
    packed: bool,
) -> Tensor:
    """X ŵᵀ + bias, shape (*batch, out), in the dtype of x.

    `codes`, `scales` and `offsets` as in `AffineLinear`, or in the layout of `int4pack` if `packed`.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return _linear(x, codes, scales, offsets, bias, bits, *block, packed)
    return _forward(x, codes, scales, offsets, bias, bits, *block, packed)


def _forward(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    offsets: Tensor | None,
    bias: Tensor | None,
    bits: int,
    q: int,
    p: int,
    packed: bool,
) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    if packed and int4pack.takes(len(rows), x.dtype):
        y = int4pack.few_rows(rows, codes, scales, offsets)
        y = y if bias is None else y.add_(bias)
        return y.view(*x.shape[:-1], codes.shape[0])
    y = rows.new_empty(len(rows), codes.shape[0])
    for start, stop, weight in _panels(x.shape[-1], 0, x.dtype, codes, scales, offsets, bits, (q, p), packed):
        if bias is None:
            torch.mm(rows, weight.T, out=y[:, start:stop])
        else:
            torch.addmm(bias[start:stop].to(x.dtype), rows, weight.T, out=y[:, start:stop])
    return y.view(*x.shape[:-1], codes.shape[0])


def _input_gradient(
    grad: Tensor,
    codes: Tensor,
    scales: Tensor,
    offsets: Tensor | None,
    columns: int,
    bits: int,
    q: int,
    p: int,
    packed: bool,
) -> Tensor:
    rows = grad.reshape(-1, grad.shape[-1])
    total: Tensor | None = None
    # summing panels takes time for each row of the gradient, which few and large ones save
    least = 4 * len(rows) * columns
    for start, stop, weight in _panels(
        columns, least, grad.dtype, codes, scales, offsets, bits, (q, p), packed
    ):
        part = rows[:, start:stop]
        # sums of panels are kept in float32 where the dtype is narrower
        if total is None:
            total = part @ weight
        elif grad.dtype == torch.float32:
            total.addmm_(part, weight)
        else:
            total = total.float().add_(part @ weight)
    assert total is not None
    return total.to(grad.dtype).view(*grad.shape[:-1], columns)


_linear = torch.library.custom_op("modicum::affine_linear", _forward, mutates_args=())
_linear_input = torch.library.custom_op("modicum::affine_linear_input", _input_gradient, mutates_args=())


@_linear.register_fake
def _(x: Tensor, codes: Tensor, *_: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], codes.shape[0])


@_linear_input.register_fake
def _(grad: Tensor, codes: Tensor, scales: Tensor, offsets: Tensor | None, columns: int, *_: Any) -> Tensor:
    del codes, scales, offsets
    return grad.new_empty(*grad.shape[:-1], columns)


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    del output
    x, codes, scales, offsets, _, bits, q, p, packed = inputs
    ctx.save_for_backward(codes, scales, offsets)
    ctx.rest = (x.shape[-1], bits, q, p, packed)


def _backward(ctx: Any, grad: Tensor) -> tuple:
    gradient = _linear_input(grad, *ctx.saved_tensors, *ctx.rest) if ctx.needs_input_grad[0] else None
    return gradient, *(None,) * 8


_linear.register_autograd(_backward, setup_context=_save)


def _panels(
    columns: int,
    least: int,
    dtype: torch.dtype,
    codes: Tensor,
    scales: Tensor,
    offsets: Tensor | None,
    bits: int,
    block: tuple[int, int],
    packed: bool,
) -> Iterator[tuple[int, int, Tensor]]:
    """(first row, row after the last, weight (rows, in)) of all panels; a weight is overwritten by the next.

    `least`: weights of a panel, if it would have fewer and memory allows it.
    """
    out, q = codes.shape[0], block[0]
    # threads wait for each other once per panel, and each has a cache
    size = min(max(PANEL * torch.get_num_threads(), least), LARGEST_PANEL)
    step = _panel_rows(out, columns, q, size) if codes.device.type == "cpu" else out
    for start in range(0, out, step):
        stop = min(start + step, out)
        weight = _buffer((stop - start) * columns, dtype, codes.device).view(stop - start, columns)
        if packed:
            _dequantize_packed(codes, scales, offsets, start, weight)
        else:
            part = slice(start // q, stop // q)
            _dequantize(
                codes[start:stop], scales[part], None if offsets is None else offsets[part], bits, q, weight
            )
        yield start, stop, weight


def _panel_rows(out: int, columns: int, q: int, size: int) -> int:
    """Rows of a panel of about `size` weights, whole blocks and runs; panels are about equal."""
    unit = math.lcm(64, q)
    units = -(-out // unit)
    panels = -(-units // max(1, size // columns // unit))
    return min(out, unit * -(-units // panels))


def _dequantize_packed(codes: Tensor, pair: Tensor, rest: Tensor | None, start: int, out: Tensor) -> None:
    """Writes the weight (rows, in) of the rows from `start` of codes in a kernel's layout into `out`."""
    if native.takes(pair, rest, out):
        native.dequantize_int4(codes, pair, rest, start, out)
        return
    function: Callable[..., None] = int4pack.dequantize
    if out.numel() >= _WORTH_COMPILING and can_compile(codes.device.type):
        function = _compiled(function, (codes.shape, pair.shape, rest is None, start, out.shape, out.dtype))
    function(codes, pair, rest, start, out)


def _dequantize(
    codes: Tensor, scales: Tensor, offsets: Tensor | None, bits: int, q: int, out: Tensor
) -> None:
    """Writes the weight (rows, in) of codes in bit planes into `out`, the fastest way there is here."""
    if native.takes(scales, offsets, out):
        native.dequantize(codes, scales, offsets, bits, q, out)
        return
    rows, columns = out.shape
    scales = spread(scales, (q, 1))
    offsets = None if offsets is None else spread(offsets, (q, 1))
    function: Callable[..., None] = _dequantize_rows
    if rows * columns >= _WORTH_COMPILING and can_compile(codes.device.type):
        function = _compiled(function, (rows, columns, *scales.shape, bits, out.dtype, offsets is None))
    function(codes, scales, offsets, bits, columns, out)


def _dequantize_rows(
    codes: Tensor, scales: Tensor, offsets: Tensor | None, bits: int, columns: int, out: Tensor
) -> None:
    """Writes the weight (rows, in) of packed `codes` into `out`; scales and offsets (rows, in/p)."""
    rows, groups = scales.shape
    group, parts = columns // groups, 8 // bits if bits != 3 else 8
    if columns % 8 or columns % (parts * group):
        centred = (
            unpack(codes, bits, columns).to(torch.float32).sub_(middle(bits)).view(rows, 1, groups, group)
        )
        parts = 1
    else:
        # runs of whole groups in the order of the bytes: all index arithmetic stays affine, loops vectorize
        centred = _runs(codes, bits, group).to(torch.float32) - middle(bits)
    shape = (rows, parts, groups // parts, 1)
    weight = centred * scales.to(torch.float32).view(shape)
    if offsets is not None:
        weight = weight + offsets.to(torch.float32).view(shape)
    out.view(rows, parts, groups // parts, group).copy_(weight)


def _runs(codes: Tensor, bits: int, group: int) -> Tensor:
    """Codes as (rows, parts, groups of a part, group), the columns in order."""
    rows, device = codes.shape[0], codes.device
    if bits != 3:
        steps = torch.arange(0, 8, bits, dtype=torch.uint8, device=device).view(-1, 1, 1)
        return (codes.view(rows, 1, -1, group) >> steps) & (2**bits - 1)
    eighth = codes.shape[1] // 3
    low = codes[:, : 2 * eighth].reshape(rows, 1, 2, -1, group)
    low = (low >> torch.arange(0, 8, 2, dtype=torch.uint8, device=device).view(4, 1, 1, 1)) & 3
    high = codes[:, 2 * eighth :].reshape(rows, 1, 1, -1, group)
    high = (high >> torch.arange(0, 8, dtype=torch.uint8, device=device).view(4, 2, 1, 1)) & 1
    return (low | (high << 2)).view(rows, 8, -1, group)


_kept = threading.local()


def _buffer(numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """`numel` numbers of scratch memory: this thread's own on a processor, new elsewhere (where allocators keep it)."""
    if device.type != "cpu":
        return torch.empty(numel, dtype=dtype, device=device)
    buffers = _kept.__dict__.setdefault("buffers", {})
    kept = buffers.get(dtype)
    if kept is None or kept.numel() < numel:
        # no gradient and no inference flag may stick to memory that is used again
        with torch.inference_mode(mode=False), torch.no_grad():
            kept = buffers[dtype] = torch.empty(numel, dtype=dtype)
    return kept[:numel]


@functools.cache
def can_compile(device: str) -> bool:
    """Whether `torch.compile` can make kernels for `device` here; MODICUM_COMPILE=0 says no."""
    if device == "cpu" or os.environ.get("MODICUM_COMPILE", "1") == "0":
        return False
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _compiled(function: Callable[..., None], key: tuple) -> Callable[..., None]:
    """`function` compiled for the shapes in `key`, with a code object of its own: the compiler's cache counts by it."""
    name = f"{function.__name__}_{abs(hash(key)):x}"
    own = types.FunctionType(function.__code__.replace(co_name=name), function.__globals__, name)
    return torch.compile(own, dynamic=False)
