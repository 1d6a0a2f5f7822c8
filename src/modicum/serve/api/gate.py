"""What every request passes first: whose site it comes from, how long it is, whether the server is about to stop."""

from __future__ import annotations

import ipaddress
import logging
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from starlette.exceptions import HTTPException

from modicum.serve.api.errors import ApiError

if TYPE_CHECKING:
    from fastapi import FastAPI
    from starlette.types import Message, Receive, Scope, Send

    from modicum.serve.settings import Settings

log = logging.getLogger("modicum.serve")
#: asked of a server that stops, too
_ALWAYS = ("/health", "/ready")


class Gate:
    """The application that a server runs, around `app` with its routes."""

    def __init__(self, app: FastAPI, settings: Settings) -> None:
        self._app, self._most = app, settings.max_body_bytes
        self._hosts = _hosts(settings)

    def close(self) -> None:
        """Returns when new requests are sent away; those that run go on."""
        self._app.state.closing = True

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request, or lets it through."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        refused = self._refused(scope, headers)
        if refused is not None:
            await refused.response()(scope, receive, send)
            return
        try:
            await self._app(scope, _counted(receive, self._most), send)
        except Exception as error:  # noqa: BLE001, it was answered and logged before it came here
            log.debug("request ended by %s", type(error).__name__)

    def _refused(self, scope: Scope, headers: dict[bytes, str]) -> ApiError | None:
        host = headers.get(b"host", "")
        if self._hosts is not None and _hostname(host) not in self._hosts:
            # a page elsewhere can make its own name mean this machine, and its scripts could then read answers
            return ApiError(
                421, "this server does not answer under that name; --allow-host lets it", code="wrong_host"
            )
        origin = headers.get(b"origin")
        if origin is not None and origin.partition("://")[2] != host:
            return ApiError(403, "pages of other sites may not use this server", code="wrong_origin")
        if self._app.state.closing and scope["path"] not in _ALWAYS:
            return ApiError(
                503,
                "the server is stopping",
                code="stopping",
                headers={"Retry-After": "5", "Connection": "close"},
            )
        length = headers.get(b"content-length", "0")
        if not length.isdecimal() or len(length) > 15 or int(length) > self._most:
            return ApiError(413, _too_long(self._most), code="request_too_large")
        return None


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach what listens on `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _hostname(host: str) -> str:
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _hosts(settings: Settings) -> frozenset[str] | None:
    """The names that are answered; None: all, because keys are needed."""
    if not is_loopback(settings.host) and not settings.hosts:
        return None
    return frozenset({"localhost", "127.0.0.1", "::1", settings.host.strip("[]"), *settings.hosts})


def _counted(receive: Receive, most: int) -> Receive:
    left = most

    async def counted() -> Message:
        nonlocal left
        message: Any = await receive()
        left -= len(message.get("body", b""))
        if left < 0:
            raise HTTPException(413, _too_long(most))
        return message

    return counted


def _too_long(most: int) -> str:
    return f"the request is longer than {most:,} bytes"
