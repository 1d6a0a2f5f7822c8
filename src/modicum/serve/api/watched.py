"""Answers that are given up as soon as nobody waits for them any more."""

from __future__ import annotations

import abc
import asyncio
import contextlib
import json
from typing import TYPE_CHECKING, Any, final

from starlette.responses import Response

from modicum.serve.api.errors import worded

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Coroutine

    from starlette.types import Receive, Scope, Send

_JSON = [(b"content-type", b"application/json")]
_EVENTS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]


class Watched(Response, abc.ABC):
    """An answer whose work is cancelled when the client hangs up; abstract."""

    @final
    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers the request."""
        work = asyncio.ensure_future(self._answer(scope, receive, send))
        gone = asyncio.ensure_future(_hung_up(receive))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (work, gone):
                task.cancel()
            # what was cancelled gives back what it holds before the request counts as ended
            await asyncio.gather(work, gone, return_exceptions=True)

    @abc.abstractmethod
    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Returns when everything is sent."""


@final
class Json(Watched):
    """What `work` returns, as JSON."""

    def __init__(self, work: Coroutine[Any, Any, dict[str, Any]]) -> None:
        super().__init__()
        self._work = work

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            body = encoded(await self._work)
        except Exception as error:  # noqa: BLE001, every error is an answer
            await worded(error).response()(scope, receive, send)
            return
        length = (b"content-length", str(len(body)).encode())
        await send({"type": "http.response.start", "status": 200, "headers": [*_JSON, length]})
        await send({"type": "http.response.body", "body": body})


@final
class Events(Watched):
    """What `work` yields, as server-sent events; an error before the first is an ordinary answer, later an event."""

    def __init__(self, work: AsyncGenerator[bytes]) -> None:
        super().__init__()
        self._work = work

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun = False
        async with contextlib.aclosing(self._work) as events:
            try:
                async for event in events:
                    if not begun:
                        begun = True
                        await send({"type": "http.response.start", "status": 200, "headers": _EVENTS})
                    await send({"type": "http.response.body", "body": event, "more_body": True})
            except Exception as error:  # noqa: BLE001, every error is an answer
                told = worded(error)
                if not begun:
                    await told.response()(scope, receive, send)
                    return
                await send({"type": "http.response.body", "body": as_event(told.body()), "more_body": True})
        await send({"type": "http.response.body", "body": b""})


def encoded(value: Any) -> bytes:
    """`value` as JSON."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


def as_event(value: Any) -> bytes:
    """`value` as one server-sent event."""
    return b"data: " + encoded(value) + b"\n\n"


async def _hung_up(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
