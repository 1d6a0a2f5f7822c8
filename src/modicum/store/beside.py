"""Parts of one piece of work, done side by side: neither a disk that is waited for nor a check sum holds Python up."""

from __future__ import annotations

import itertools
import os
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

T = TypeVar("T")
R = TypeVar("R")
#: most parts at a time where the disk is waited for, and where something is computed
WAITING = 8
COMPUTING = min(4, os.cpu_count() or 1)
#: by process: a forked child has none of its parent's threads
_pools: dict[int, ThreadPoolExecutor] = {}


def split(items: Sequence[T], most: int) -> list[Sequence[T]]:
    """The items in up to `most` parts of one or of neighbouring lengths, in order."""
    parts = min(most, len(items))
    ends = [len(items) * part // parts for part in range(parts + 1)] if parts else []
    return [items[start:end] for start, end in itertools.pairwise(ends)]


def side_by_side(action: Callable[[T], R], parts: Sequence[T]) -> list[R]:
    """What `action` makes of each of the parts, in their order; the first is done here, the others by threads.

    Returns, or raises what the first faulty part has raised, when no part is being worked on any more.
    """
    try:
        others = [_pool().submit(action, part) for part in parts[1:]]
    except RuntimeError:  # the interpreter is ending and starts no more threads
        return [action(part) for part in parts]
    try:
        here = [action(part) for part in parts[:1]]
    finally:
        wait(others)
    return here + [other.result() for other in others]


def _pool() -> ThreadPoolExecutor:
    process = os.getpid()
    if process not in _pools:
        _pools.setdefault(process, ThreadPoolExecutor(WAITING, "modicum-store"))
    return _pools[process]
