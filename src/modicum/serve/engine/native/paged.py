"""Attention of single query tokens by a small library in C for processors, over keys and values where they lie.

One call for each layer reads what a batch looks at once; Transformers' way copies all of it first, and then computes
every sequence against the keys of all. Without a compiler `available()` is False, and torch does it request by
request. MODICUM_NATIVE=0 switches it off.
"""

from __future__ import annotations

import functools
import threading
from ctypes import CDLL, c_int, c_void_p
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from modicum.quant.native import build

if TYPE_CHECKING:
    from torch import Tensor

#: number types of keys and values, and what the library calls them
KINDS = {torch.float32: 0, torch.bfloat16: 1}
#: LANES in attention.c, of which the width of a head is a multiple
_LANES = 8

_lock = threading.Lock()


def available() -> bool:
    """Whether the library is there; compiles it the first time."""
    return _library() is not None


def takes(query: Tensor, cache: Tensor) -> bool:
    """Whether the library computes with such queries and such a cache."""
    return (
        query.device.type == "cpu"
        and query.dtype in KINDS
        and query.dtype == cache.dtype
        and query.shape[-1] % _LANES == 0
        and query.shape[-1] == cache.shape[-1]
        and query.stride(-1) == 1
        and available()
    )


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    out: Tensor,
    rows: np.ndarray,
    queries: np.ndarray,
    scale: float,
) -> None:
    """Writes the attention of some tokens into `out` (tokens, heads, size).

    `query` (heads, tokens, size), any strides but the last; `keys` and `values` (any number, groups, size), the first
    groups of the rows of one cache or of two alike. Token `queries[i, 0]` looks at the keys `rows[j]`, j from
    `queries[i, 1]` on, `queries[i, 2]` of them; both int64.
    """
    library = _library()
    assert library is not None
    (heads, _, size), groups = query.shape, keys.shape[-2]
    words = np.array(
        [
            *(tensor.data_ptr() for tensor in (query, keys, values, out)),
            rows.ctypes.data,
            queries.ctypes.data,
            *(len(queries), queries[:, 2].max(), heads, groups, size),
            *(query.stride(1), query.stride(0), keys.stride(0)),
            *(KINDS[query.dtype], torch.get_num_threads(), queries[:, 2].sum()),
            np.float64(scale).view(np.int64),
        ],
        np.int64,
    )
    if library.modicum_attend(words.ctypes.data):
        raise MemoryError("no memory for the scores of attention")


@functools.cache
def _loaded() -> CDLL | None:
    try:
        library = build.load(Path(__file__).with_name("attention.c"), contract=True)
    except build.NotBuiltError:
        return None
    library.modicum_attend.argtypes = (c_void_p,)
    library.modicum_attend.restype = c_int
    return library


def _library() -> CDLL | None:
    # two threads that come first together compile once
    with _lock:
        return _loaded()
