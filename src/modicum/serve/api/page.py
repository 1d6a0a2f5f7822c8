"""The web page of a server, what its plots draw, and `/metrics` for Prometheus."""

from __future__ import annotations

import importlib.resources
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Response

from modicum.serve.api.access import Caller, Watcher
from modicum.serve.api.errors import ApiError
from modicum.serve.costs import largest
from modicum.serve.exposition import Exposition

if TYPE_CHECKING:
    from modicum.serve.costs import Usage
    from modicum.serve.service import Service

#: file of the page -> its type; nothing else is served
_FILES = {
    "style.css": "text/css; charset=utf-8",
    "icon.svg": "image/svg+xml",
    **dict.fromkeys(
        ("app.js", "dom.js", "live.js", "plots.js", "adapters.js", "experiments.js", "tenants.js"),
        "text/javascript; charset=utf-8",
    ),
}
#: tenants that the page lists one by one
_SHOWN = 200
_HEADERS = {
    # nothing but these files runs, is shown or is asked for, and no other page may frame this one
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    # a newer server has a newer page
    "Cache-Control": "no-cache",
}


def router(service: Service) -> APIRouter:
    """The routes of the page and of the metrics; those with data ask for a key, the page itself has none."""
    routes = APIRouter()
    exposition = Exposition(service.metrics)
    folder = importlib.resources.files("modicum.serve") / "page"
    files = {name: (folder / name).read_bytes() for name in ("index.html", *_FILES)}

    @routes.get("/", include_in_schema=False)
    async def page() -> Response:
        return Response(files["index.html"], media_type="text/html; charset=utf-8", headers=_HEADERS)

    @routes.get("/page/live")
    def live(key: Caller, after: float = 0.0, coarse: bool = False) -> dict[str, Any]:
        """What is going on, to whoever may see it; to all others what they used themselves."""
        sees_all = key.admin or key.metrics
        you = {"name": key.name, "admin": key.admin, "sees_all": sees_all}
        about = {"you": you, "at": time.time(), "started": service.metrics.started}
        if sees_all:
            return about | _server(service, after, coarse=coarse)
        return about | _priced(service, {key.name: service.metrics.usage_of(key.name)})

    @routes.get("/page/{name}", include_in_schema=False)
    async def file(name: str) -> Response:
        if name not in _FILES:
            raise ApiError(404, "the page has no such file", code="not_found")
        return Response(files[name], media_type=_FILES[name], headers=_HEADERS)

    @routes.get("/metrics", include_in_schema=False)
    def metrics(_: Watcher) -> Response:
        text, kind = exposition.text()
        return Response(text, headers={"Content-Type": kind})

    return routes


def _server(service: Service, after: float, *, coarse: bool) -> dict[str, Any]:
    stats, metrics = service.metrics.stats, service.metrics
    limits = service.settings.engine
    return {
        "model": {
            "name": service.settings.base_name,
            "max_batch": limits.max_batch,
            "slots": stats.pool.slots,
        },
        "now": {
            "running": stats.running,
            "waiting": stats.waiting,
            "cache_used": stats.cache_used,
            "pool": asdict(stats.pool),
            "memory": metrics.memory(),
        },
        "frames": metrics.timeline.since(after, coarse=coarse),
        **_priced(service, metrics.usage()),
        "idle_cost": metrics.idle_cost,
    }


def _priced(service: Service, usage: dict[str, Usage]) -> dict[str, Any]:
    tenants = [{"name": name, **asdict(used)} for name, used in largest(usage, _SHOWN).items()]
    return {"currency": service.metrics.tariff.currency or None, "tenants": tenants}
