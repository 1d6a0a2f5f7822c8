"""Names and shapes of the tensors of one adapter, as short text.

A model repeats one block of layers many times. The text names the block once and the range of indices it
covers: 224 LLaMA-2-7B projections take seven names instead of 224. Names that repeat nothing are kept as
they are, so every list of names can be written.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import re
from dataclasses import dataclass

import numpy as np

from modicum.errors import CorruptAdapterError
from modicum.store.low_bit import block_lengths

_NUMBER = re.compile(r"(\d+)", re.ASCII)
#: the first component of a dotted name that is a plain index, without leading zeros
_INDEX = re.compile(r"^(.*?\.)(0|[1-9]\d{0,8})(\..*)$", re.ASCII | re.DOTALL)
#: a sane ceiling: no known model has a thousandth of it, and a damaged range must not eat the memory
MAX_TENSORS = 1 << 22
_MAX_VALUES = 1 << 60


@dataclass(frozen=True)
class Layout:
    """Where each tensor lies: `values[offsets[i]:offsets[i + 1]]` is tensor `i`, of shape `shapes[i]`."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    #: (tensors + 1,) int64, starting with 0
    offsets: np.ndarray

    @functools.cached_property
    def blocks(self) -> np.ndarray:
        """(blocks,) int64: how many values share each scale, if the values are low-bit ones."""
        return block_lengths(self.offsets[1:] - self.offsets[:-1])

    @property
    def size(self) -> int:
        """How many values the tensors hold together."""
        return int(self.offsets[-1])


def natural(name: str) -> tuple[str | int, ...]:
    """The canonical sorting key of a name: `layers.2` comes before `layers.10`."""
    return tuple(int(part) if place % 2 else part for place, part in enumerate(_NUMBER.split(name)))


def layout(names: tuple[str, ...], shapes: tuple[tuple[int, ...], ...]) -> Layout:
    """The layout of tensors that follow each other in the given order."""
    sizes = np.fromiter((math.prod(shape) for shape in shapes), dtype=np.int64, count=len(shapes))
    offsets = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(sizes)])
    offsets.setflags(write=False)  # layouts are shared
    return Layout(names, shapes, offsets)


@functools.lru_cache(maxsize=64)
def to_text(names: tuple[str, ...], shapes: tuple[tuple[int, ...], ...]) -> str:
    """The layout as one line of JSON: `[[before, first, last, [[after, shape], …]], …]`; cached like `from_text`."""
    runs: list[list] = []
    tensors = [(*_split(name), list(shape)) for name, shape in zip(names, shapes, strict=True)]
    for (before, index), members in itertools.groupby(tensors, key=lambda t: (t[0], t[1])):
        block = [[after, shape] for _, _, after, shape in members]
        last = runs[-1] if runs else None
        if last and index >= 0 and last[0] == before and last[2] == index - 1 and last[3] == block:
            last[2] = index
        else:
            runs.append([before, index, index, block])
    return json.dumps(runs, separators=(",", ":"))


@functools.lru_cache(maxsize=64)
def from_text(text: str, most: int = MAX_TENSORS) -> Layout:
    """The layout written in `text`, of `most` tensors at most; cached, since adapters of one base model share it.

    Raises:
        CorruptAdapterError: the text is no layout.
    """
    try:
        names, shapes = _expand(json.loads(text), min(most, MAX_TENSORS))
        if sum(map(math.prod, shapes)) > _MAX_VALUES:
            raise ValueError("more values than any file holds")  # noqa: TRY301 - one place words the error
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        raise CorruptAdapterError(
            f"the list of tensors cannot be read ({error}); get the file again"
        ) from error
    if len(set(names)) != len(names):
        raise CorruptAdapterError("the list of tensors names one of them twice; get the file again")
    return layout(tuple(names), tuple(shapes))


def _split(name: str) -> tuple[str, int, str]:
    match = _INDEX.match(name)
    return (match[1], int(match[2]), match[3]) if match else ("", -1, name)


def _expand(runs: list, most: int) -> tuple[list[str], list[tuple[int, ...]]]:
    names: list[str] = []
    shapes: list[tuple[int, ...]] = []
    for before, first, last, block in runs:
        if not (-1 <= first <= last) or len(names) + (last - first + 1) * max(len(block), 1) > most:
            raise ValueError(f"range {first} to {last} of {len(block)} tensors")
        afters = [after for after, _ in block]
        sizes = [tuple(shape) for _, shape in block]
        if any(type(side) is not int or side < 0 for shape in sizes for side in shape):
            raise ValueError("a size that is none")
        for index in range(first, last + 1):
            start = f"{before}{index}" if index >= 0 else ""
            names += [start + after for after in afters]
            shapes += sizes
    return names, shapes
