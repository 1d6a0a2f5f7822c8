"""Dequantization, and sums and copies of neighbours, by a small library in C for processors.

Several times faster than compiled torch code.

    ŵ = s · (c − 2^(bits−1)) + o

in float32 with one rounding to the type of the result: bit for bit `modicum.ops.affine.decode(…).to(dtype)`. The
library is compiled on first use (`build.py`), never on import; without a compiler `available()` is False and
`why_not()` says why. MODICUM_NATIVE=0 switches it off.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from typing import TYPE_CHECKING, Any

import torch

from modicum.quant.native import build

if TYPE_CHECKING:
    from torch import Tensor

#: number types of scales, offsets and results, and what the library calls them
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
#: weights below which waking other threads takes longer than the work
_WORTH_THREADS = 1 << 16
#: remainders below which it does not pay either
_WORTH_REMAINDER = 1 << 16
#: numbers that are summed or repeated below which it does not pay either
_WORTH_NEIGHBOURS = 1 << 16
#: MOST_NEIGHBOURS in dequantize.c
_MOST_NEIGHBOURS = 256

_lock = threading.Lock()


class _Job(ctypes.Structure):
    """`job` in dequantize.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("codes", "scales", "offsets", "out")),
        *((name, ctypes.c_int64) for name in ("start", "rows", "columns", "group", "repeat")),
        *((name, ctypes.c_int32) for name in ("bits", "scale_kind", "offset_kind", "out_kind", "threads")),
    )


def available() -> bool:
    """Whether the library is there; compiles it the first time."""
    return _library()[0] is not None


def why_not() -> str | None:
    """Why there is no library, None if there is one."""
    return _library()[1]


def takes(*tensors: Tensor | None) -> bool:
    """Whether the library computes with these scales, offsets and results, where they are and as they are."""
    return available() and all(
        tensor is None or (tensor.device.type == "cpu" and tensor.dtype in KINDS) for tensor in tensors
    )


def dequantize(codes: Tensor, scales: Tensor, offsets: Tensor | None, bits: int, q: int, out: Tensor) -> None:
    """Writes the weight (rows, in) of codes in bit planes, as packed by `modicum.ops.affine.pack`, into `out`.

    `scales` and `offsets` (rows/q, in/p); `out` contiguous, in one of the types in `KINDS`.

    Raises:
        ValueError: shapes or types do not belong together.
    """
    (rows, columns), (few, groups) = out.shape, scales.shape
    group = columns // max(groups, 1)
    fits = (
        codes.shape == (rows, -(-columns // 8) * bits)
        and (few * q, group * groups) == (rows, columns)
        and (offsets is None or offsets.shape == scales.shape)
    )
    if not fits:
        raise _mismatch(codes, scales, offsets, out)
    _run("modicum_rows", codes, scales, offsets, out, start=0, group=group, repeat=q, bits=bits)


def dequantize_int4(codes: Tensor, pair: Tensor, rest: Tensor | None, start: int, out: Tensor) -> None:
    """Writes the weight (rows, in) of rows from `start`, in the layout of `modicum.quant.int4pack`, into `out`.

    All of `codes` (all rows, in/2), `pair` (in/g, all rows, 2) and `rest` (all rows, in/g) are given; `start`
    and the number of rows are multiples of 64, g of 32.

    Raises:
        ValueError: shapes or types do not belong together.
    """
    (rows, columns), (groups, total, _) = out.shape, pair.shape
    group = columns // groups
    fits = (
        codes.shape == (total, columns // 2)
        and (group % 32, start % 64, rows % 64, columns % groups) == (0, 0, 0, 0)
        and 0 <= start <= total - rows
        and pair.dtype == torch.bfloat16
        and (rest is None or (rest.dtype == torch.float32 and rest.shape == (total, groups)))
    )
    if not fits:
        raise _mismatch(codes, pair, rest, out)
    _run("modicum_runs", codes, pair, rest, out, start=start, group=group, repeat=total, bits=4)


def add_remainder(y: Tensor, x: Tensor, rest: Tensor) -> bool:
    """Adds Σ_g rest[:, g] · (sum of the inputs of group g) to y (rows, out) in place; False if it could not.

    `x` (rows, in) and `y` bfloat16, `rest` (out, groups) float32, all contiguous; one rounding of each sum.
    """
    library, _ = _library()
    rows, columns = x.shape
    out, groups = rest.shape
    usable = x.is_contiguous() and y.is_contiguous() and rest.is_contiguous()
    if library is None or not usable or rest.dtype != torch.float32:
        return False
    threads = torch.get_num_threads() if rows * rest.numel() >= _WORTH_REMAINDER else 1
    pointers = x.data_ptr(), None, rest.data_ptr(), y.data_ptr()
    job = _Job(*pointers, 0, out, columns, columns // groups, rows, 4, 0, 0, 1, threads)
    return library.modicum_remainder(ctypes.byref(job)) == 0


def takes_neighbours(x: Tensor, size: int) -> bool:
    """Whether `pool` and `repeat` take such numbers, so many at a time; nothing that is traced."""
    return (
        not torch.compiler.is_compiling()
        and type(x) is torch.Tensor
        and x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.bfloat16)
        and size <= _MOST_NEIGHBOURS
        and available()
    )


def pool(x: Tensor, size: int, factor: float) -> Tensor:
    """`factor` times the sums of `size` neighbours in the rows of x (n, in): (n, in/size), each rounded once."""
    out = x.new_empty(len(x), x.shape[1] // size)
    _neighbours("modicum_pool", x, None, out, size, factor, out.numel())
    return out


def repeat(x: Tensor, size: int, factor: float, base: Tensor | None = None) -> Tensor:
    """`factor` · x (n, out/size), each number `size` times in place, plus `base` (n, out); each rounded once."""
    out = x.new_empty(len(x), x.shape[1] * size)
    _neighbours("modicum_repeat", x, base, out, size, factor, x.numel())
    return out


def _neighbours(
    name: str, x: Tensor, base: Tensor | None, out: Tensor, size: int, factor: float, count: int
) -> None:
    functions, kind = _neighbour_functions(), KINDS[out.dtype]
    # names keep what the pointers point to
    x, base = x.contiguous(), None if base is None else base.contiguous()
    threads = torch.get_num_threads() if max(x.numel(), out.numel()) >= _WORTH_NEIGHBOURS else 1
    pointers = x.data_ptr(), None if base is None else base.data_ptr(), out.data_ptr()
    if count and (functions is None or functions[name](*pointers, count, size, factor, kind, threads)):
        raise ValueError(f"{name} takes no {size} neighbours of {out.dtype}; ask takes_neighbours first")


@functools.cache
def _neighbour_functions() -> dict[str, Any] | None:
    """The functions `neighbours` of dequantize.c by name, which know the types of their arguments."""
    library, _ = _library()
    if library is None:
        return None
    functions = {name: getattr(library, name) for name in ("modicum_pool", "modicum_repeat")}
    pointer, small = ctypes.c_void_p, ctypes.c_int32
    for function in functions.values():
        function.argtypes = (pointer,) * 3 + (ctypes.c_int64, small, ctypes.c_float, small, small)
    return functions


def _run(
    name: str,
    codes: Tensor,
    scales: Tensor,
    offsets: Tensor | None,
    out: Tensor,
    *,
    start: int,
    group: int,
    repeat: int,
    bits: int,
) -> None:
    library, reason = _library()
    if library is None:
        raise RuntimeError(f"there is no library for dequantization: {reason}; ask native.available() first")
    if codes.dtype != torch.uint8 or not out.is_contiguous():
        raise ValueError(f"codes must be uint8, not {codes.dtype}, and what is written contiguous")
    # names keep what the pointers point to
    codes, scales = codes.contiguous(), scales.contiguous()
    offsets = None if offsets is None else offsets.contiguous()
    job = _Job(
        codes.data_ptr(),
        scales.data_ptr(),
        None if offsets is None else offsets.data_ptr(),
        out.data_ptr(),
        start,
        *out.shape,
        group,
        repeat,
        bits,
        KINDS[scales.dtype],
        0 if offsets is None else KINDS[offsets.dtype],
        KINDS[out.dtype],
        torch.get_num_threads() if out.numel() >= _WORTH_THREADS else 1,
    )
    if out.numel() and getattr(library, name)(ctypes.byref(job)):
        raise ValueError(f"{bits} bits are not 2, 3, 4 or 8")


def _mismatch(codes: Tensor, scales: Tensor, offsets: Tensor | None, out: Tensor) -> ValueError:
    shapes = [tuple(tensor.shape) for tensor in (codes, scales, offsets, out) if tensor is not None]
    return ValueError(f"codes, scales, (offsets,) and result do not belong together: {shapes}")


@functools.cache
def _loaded() -> tuple[ctypes.CDLL | None, str | None]:
    try:
        return build.load(), None
    except build.NotBuiltError as error:
        return None, str(error)


def _library() -> tuple[ctypes.CDLL | None, str | None]:
    # two threads that come first together compile once
    with _lock:
        return _loaded()
