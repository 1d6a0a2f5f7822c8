"""Whether a server lives and can take requests: for load balancers, without a key, and without any secret."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from modicum.errors import StoreError

if TYPE_CHECKING:
    from modicum.serve.service import Service

#: seconds that an answer of the store is good for, and that it may take
_FRESH, _PATIENCE = 1.0, 5.0


def router(service: Service) -> APIRouter:
    """`/health` and `/ready`."""
    routes = APIRouter()
    store = _StoreWatch(service)

    @routes.get("/health")
    async def health() -> dict[str, str]:
        """The process answers."""
        return {"status": "alive"}

    @routes.get("/ready")
    async def ready(request: Request) -> JSONResponse:
        """The model is loaded and takes requests, and the store can be read; 503 if not."""
        found = {
            "engine": service.engine.alive,
            "store": await store.reachable(),
            "stopping": request.app.state.closing,
        }
        good = found["engine"] and found["store"] and not found["stopping"]
        return JSONResponse({"ready": good, **found}, 200 if good else 503)

    return routes


class _StoreWatch:
    """Asks the store now and then, however often it is asked."""

    def __init__(self, service: Service) -> None:
        self._store = service.store
        self._asked, self._good = float("-inf"), True
        self._lock = asyncio.Lock()

    async def reachable(self) -> bool:
        if self._store is None:
            return True
        async with self._lock:
            if time.monotonic() - self._asked > _FRESH:
                try:
                    async with asyncio.timeout(_PATIENCE):
                        await asyncio.to_thread(self._store.head)
                    self._good = True
                except (StoreError, TimeoutError):
                    self._good = False
                self._asked = time.monotonic()
        return self._good
