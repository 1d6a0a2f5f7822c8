"""Who asks: what routes depend on, `async def route(key: Caller)`."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Request

from modicum.serve.api.errors import ApiError
from modicum.serve.keys import PREFIX, Key


async def caller(request: Request) -> Key:
    """The key that the request bears.

    Raises:
        ApiError: 401, it bears none, or one that is not valid.
    """
    scheme, _, secret = request.headers.get("authorization", "").partition(" ")
    key = request.app.state.service.keys.find(secret.strip() if scheme.lower() == "bearer" else None)
    if key is None:
        wrong = "this API key is not valid" if secret else "no API key"
        raise ApiError(
            401,
            f"{wrong}: send the header `Authorization: Bearer {PREFIX}…`; `modicum serve keys add` makes one",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )
    return key


Caller = Annotated[Key, Depends(caller)]


async def admin(key: Caller) -> Key:
    """The admin's key that the request bears; its name is the actor in the log of the store.

    Raises:
        ApiError: 401, see `caller`; 403, it is not an admin's.
    """
    if not key.admin:
        raise ApiError(403, "this needs the key of an admin", code="insufficient_permissions")
    return key


async def watcher(key: Caller) -> Key:
    """The key that may see the metrics of all tenants: an admin's, or one that was made for it.

    Raises:
        ApiError: 401, see `caller`; 403, it may not.
    """
    if not (key.admin or key.metrics):
        raise ApiError(403, "this needs a key with the right `metrics`", code="insufficient_permissions")
    return key


Admin = Annotated[Key, Depends(admin)]
Watcher = Annotated[Key, Depends(watcher)]
