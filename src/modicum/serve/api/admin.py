"""What an admin does: adapters in memory and in production, experiments, and what tenants used.

Every change of the store is in its log, with the name of the key as actor.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict

from modicum.errors import NotStoredError
from modicum.serve.api import trials
from modicum.serve.api.access import Admin
from modicum.serve.api.errors import ApiError
from modicum.serve.api.trials import servable
from modicum.store.catalogue.names import Reference, reference
from modicum.store.catalogue.pointers import ANYTHING
from modicum.store.store import PRODUCTION

if TYPE_CHECKING:
    from modicum.serve.service import Service
    from modicum.store import Store
    from modicum.store.catalogue.pointers import Expected

#: versions and entries of the log that are shown of an adapter, the newest
_SHOWN = 100
_PAGE = 1000


class Which(BaseModel):
    """A version of the adapter in the path: a number, an alias, or `latest`."""

    model_config = ConfigDict(extra="forbid", strict=True)

    version: int | str


class Load(Which):
    """A version that is to be in memory; a pinned one stays there."""

    pin: bool = False


class Alias(BaseModel):
    """An alias, and where it must point for anything to happen; null: nowhere."""

    model_config = ConfigDict(extra="forbid", strict=True)

    alias: str = PRODUCTION
    expected: int | None = None

    def condition(self) -> Expected:
        """What `Store.alias` expects."""
        return self.expected if "expected" in self.model_fields_set else ANYTHING


class Promote(Which, Alias):
    """A version that an alias is to point at."""


def router(service: Service) -> APIRouter:
    """All routes of the admin."""
    routes = APIRouter(prefix="/admin")
    routes.include_router(trials.router(service))

    @routes.get("/usage")
    async def usage(_: Admin) -> dict[str, Any]:
        found = service.metrics.usage()
        return {"tenants": [{"name": name, **asdict(used)} for name, used in found.items()]}

    @routes.get("/adapters")
    async def residents(_: Admin) -> dict[str, Any]:
        return {"adapters": [asdict(one) for one in service.engine.residents()]}

    @routes.get("/adapters/{name:path}")
    def adapter(name: str, _: Admin) -> dict[str, Any]:
        return _described(_store(service), name)

    @routes.post("/adapters/{name:path}/load")
    async def load(name: str, body: Load, _: Admin) -> dict[str, Any]:
        return asdict(await service.engine.load(await _version(service, name, body.version), pin=body.pin))

    @routes.post("/adapters/{name:path}/unpin")
    async def unpin(name: str, body: Which, _: Admin) -> dict[str, Any]:
        version = await _version(service, name, body.version)
        await service.engine.unpin(version)
        return {"version": version, "pinned": False}

    @routes.post("/adapters/{name:path}/unload")
    async def unload(name: str, body: Which, _: Admin) -> dict[str, Any]:
        version = await _version(service, name, body.version)
        return {"version": version, "unloaded": await service.engine.unload(version)}

    @routes.post("/adapters/{name:path}/promote")
    async def promote(name: str, body: Promote, key: Admin) -> dict[str, Any]:
        """The next request gets the version; what runs goes on with the one it began with."""
        version = await _version(service, name, body.version)
        await servable(service, [version])
        store = _store(service).acting(key.name)
        await asyncio.to_thread(store.promote, version, body.alias, expected=body.condition())
        return {"name": name, "alias": body.alias, "version": reference(version).selector}

    @routes.post("/adapters/{name:path}/rollback")
    async def rollback(name: str, key: Admin, body: Alias | None = None) -> dict[str, Any]:
        wanted = body or Alias()
        store = _store(service).acting(key.name)
        number = await asyncio.to_thread(store.rollback, name, wanted.alias, expected=wanted.condition())
        return {"name": name, "alias": wanted.alias, "version": number}

    return routes


def _store(service: Service) -> Store:
    if service.store is None:
        raise ApiError(404, "this server has no adapter store", code="no_store")
    return service.store


async def _version(service: Service, name: str, selector: int | str) -> str:
    wanted = reference(f"{name}@{selector}")
    found = await asyncio.to_thread(_store(service).find, wanted)
    # what was removed from the store may still be in memory, and has to be got out of there
    resident = {one.version for one in service.engine.residents()}
    if found is None and str(wanted) not in resident:
        raise NotStoredError(f"no {str(wanted)!r} in the store")
    return found or str(wanted)


def _described(store: Store, name: str) -> dict[str, Any]:
    """The newest versions of an adapter and what happened to it, the last first."""
    newest = store.find(Reference(name))
    history: deque[Any] = deque(maxlen=_SHOWN)
    after = 0
    while entries := store.log(name, after=after, limit=_PAGE):
        history.extend(entries)
        after = entries[-1].seq
    versions = []
    for number in range(0 if newest is None else int(newest.rpartition("@")[2]), 0, -1):
        with contextlib.suppress(NotStoredError):
            versions.append(store.show(Reference(name, number)))
        if len(versions) == _SHOWN:
            break
    return {
        "name": name,
        "versions": [asdict(one) for one in versions],
        "history": [
            {
                "at": one.at,
                "actor": one.actor,
                "action": one.action,
                "version": one.version,
                "detail": one.detail,
            }
            for one in reversed(history)
        ],
    }
