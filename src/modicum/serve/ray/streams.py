"""Steps in lists, for where a message costs more than a step."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, TypeVar, cast

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator

T = TypeVar("T")
#: seconds between two lists
_PAUSE = 0.02


async def together(steps: AsyncIterator[T]) -> AsyncIterator[list[T]]:
    """The steps in lists: the first one alone, then whatever came since, with a pause between."""
    arrived: list[T] = []
    news = asyncio.Event()

    async def take() -> None:
        try:
            async for step in steps:
                arrived.append(step)
                news.set()
        finally:
            news.set()

    taking = asyncio.ensure_future(take())
    try:
        while not taking.done() or arrived:
            await news.wait()
            news.clear()
            if arrived:
                found, arrived[:] = arrived[:], []
                yield found
                if not taking.done():
                    await asyncio.sleep(_PAUSE)
            if taking.done():
                news.set()
        await taking
    finally:
        taking.cancel()
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await taking
        await cast("AsyncGenerator[T, None]", steps).aclose()
