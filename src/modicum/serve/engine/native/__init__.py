"""What the adapters of a step add to a layer's output, by a small library in C for processors.

One call for each layer does what torch does in five or more: A x for the tokens that have an adapter, each through its
own core, and back to the output in place. Cores are read where they lie in the pool, so nothing is gathered.
Without a compiler `available()` is False, and torch does it. MODICUM_NATIVE=0 switches it off.
"""

from __future__ import annotations

import functools
import threading
from ctypes import CDLL, c_int64, c_void_p
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from modicum.quant.native import build

if TYPE_CHECKING:
    from collections.abc import Sequence

    from modicum.serve.engine.families import Family
    from modicum.serve.engine.layers import Direction

#: number types of the pool, and what the library calls them
KINDS = {torch.float32: 0, torch.bfloat16: 1}

_lock = threading.Lock()


class Run(NamedTuple):
    """Tokens under adapters of one family, next to each other in the lists of a `Step`."""

    family: Family
    start: int
    tokens: int


class Step:
    """`step` in adapters.c, and what it points to."""

    def __init__(
        self,
        runs: Sequence[Run],
        rows: np.ndarray,
        data: np.ndarray,
        directions: Sequence[Direction],
        shapes: np.ndarray,
        kind: int,
    ) -> None:
        """`rows` and `data` say where each token is, and the address of its adapter; `shapes` (layers, 2); int64."""
        listed = [
            [d.inner.data_ptr(), d.outer.data_ptr(), _address(d.shift), d.lanes, d.from_output]
            for d in directions
        ]
        known = np.array(listed, np.int64).reshape(-1, 5)
        tables = [run.family.table for run in runs]
        families = np.array(
            [
                [*(part.ctypes.data for part in table), run.family.shared, run.start, run.tokens]
                for table, run in zip(tables, runs, strict=True)
            ],
            np.int64,
        )
        pointers = [part.ctypes.data for part in (families, rows, data, known, shapes)]
        numbers = [len(shapes), len(runs), len(rows), kind, torch.get_num_threads()]
        self._words = np.array([*pointers, *numbers], np.int64)
        # what the pointers point to
        self._kept = tables, families, rows, data, known, shapes, list(directions)
        self.address = self._words.ctypes.data


def takes(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the library computes with such numbers, where they are."""
    return device.type == "cpu" and dtype in KINDS and available()


def available() -> bool:
    """Whether the library is there; compiles it the first time."""
    return _library() is not None


def fill(row: torch.Tensor, values: np.ndarray, places: np.ndarray, scales: np.ndarray) -> bool:
    """Whether all numbers of `row`, which now are `values[places] * scales`, are finite.

    `row` is of one of `KINDS` and has whole registers; `values` are float32, or bfloat16 as uint16; `places` int32,
    `scales` float32. Python's lock is kept: a dozen calls of NumPy, each of which gives it away, wait for it as often.
    """
    library = _library()
    assert library is not None
    return bool(
        library.modicum_fill(
            values.ctypes.data,
            int(values.dtype == np.uint16),
            places.ctypes.data,
            scales.ctypes.data,
            row.numel(),
            row.data_ptr(),
            KINDS[row.dtype],
        )
    )


def adapter_function():  # noqa: ANN201 - a function of ctypes
    """`modicum_adapt(step, layer, x, y)`: adds to y, at an address, what adapters make of x; None without a library."""
    library = _library()
    return None if library is None else library.modicum_adapt


def _address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


@functools.cache
def _loaded() -> CDLL | None:
    try:
        # a call takes microseconds: giving Python's lock away and waiting for it would take longer
        library = build.load(Path(__file__).with_name("adapters.c"), contract=True, keeps_lock=True)
    except build.NotBuiltError:
        return None
    library.modicum_adapt.argtypes = (c_void_p, c_int64, c_void_p, c_void_p)
    library.modicum_adapt.restype = None
    library.modicum_fill.argtypes = (c_void_p, c_int64, c_void_p, c_void_p, c_int64, c_void_p, c_int64)
    library.modicum_fill.restype = c_int64
    return library


def _library() -> CDLL | None:
    # two threads that come first together compile once
    with _lock:
        return _loaded()
