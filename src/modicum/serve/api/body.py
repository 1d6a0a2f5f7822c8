"""The body of a request: JSON of a bounded size, in bounded time."""

from __future__ import annotations

import asyncio
import json
from typing import Any, NoReturn

from fastapi import Request
from starlette.requests import ClientDisconnect

from modicum.serve.api.errors import ApiError

#: seconds for a client to send it
_TIMEOUT = 60.0


async def read_object(request: Request) -> dict[str, Any]:
    """The JSON object in the body.

    Raises:
        ApiError: 400, it is none; 408, it does not come; 413, it is too long.
    """
    try:
        async with asyncio.timeout(_TIMEOUT):
            data = await request.body()
    except TimeoutError as error:
        raise ApiError(408, f"the body did not come within {_TIMEOUT:.0f} seconds") from error
    except ClientDisconnect as error:
        raise ApiError(400, "the client hung up") from error
    try:
        value = json.loads(data.decode(), parse_constant=_no_constant)
        if b"\\u" in data:
            # half of a character can be written so, and is no text
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError as error:
        raise ApiError(400, "the body is nested too deeply", code="invalid_json") from error
    except ValueError as error:
        raise ApiError(400, f"the body is no JSON: {error}", code="invalid_json") from error
    if not isinstance(value, dict):
        raise ApiError(400, "the body must be a JSON object", code="invalid_json")
    return value


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")
