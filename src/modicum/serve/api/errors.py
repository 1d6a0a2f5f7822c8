"""Errors as the OpenAI API words them, so that its clients raise the exceptions that people know."""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, Any

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from modicum.errors import ConfigError, ConflictError, ModicumError, NotStoredError, StoreError
from modicum.serve.engine.interface import AdapterUnavailableError, GenerationError, OverloadedError
from modicum.serve.limits import QUOTA, LimitError

if TYPE_CHECKING:
    from fastapi import FastAPI, Request

log = logging.getLogger("modicum.serve")

#: what a fault of ours is called, whatever happened
_INTERNAL = "the server made a mistake; its log says more"
#: errors of the lower floors, the special ones first
_KNOWN: tuple[tuple[type[ModicumError], int, str], ...] = (
    (AdapterUnavailableError, 503, "adapter_unavailable"),
    (GenerationError, 500, "generation_failed"),
    (NotStoredError, 404, "not_found"),
    (ConflictError, 409, "conflict"),
    (StoreError, 503, "store_unavailable"),
    (ConfigError, 400, "invalid_value"),
)
_NAMES = {404: "not_found", 405: "method_not_allowed", 413: "request_too_large"}


class ApiError(ModicumError):
    """What a client is told: status, sentence, the parameter that is wrong, and a word for programs."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code
        self.headers = headers or {}

    def body(self) -> dict[str, Any]:
        """The error as JSON."""
        error = {"message": str(self), "type": _kind(self.status), "param": self.param, "code": self.code}
        return {"error": error}

    def response(self) -> JSONResponse:
        """The error as an answer."""
        return JSONResponse(self.body(), self.status, headers=self.headers)


def worded(error: Exception) -> ApiError:
    """What a client is told about any error; what nobody expected is logged and not told."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, OverloadedError):
        return _too_many(error)
    for kind, status, code in _KNOWN:
        if isinstance(error, kind):
            return ApiError(status, str(error), code=code)
    log.error("unexpected %s", type(error).__name__, exc_info=error)
    return ApiError(500, _INTERNAL, code="internal_error")


def _too_many(error: OverloadedError) -> ApiError:
    headers = {"Retry-After": str(max(1, math.ceil(error.retry_after)))}
    code = error.code if isinstance(error, LimitError) else "overloaded"
    if code == QUOTA:
        # clients of the OpenAI API would ask again at once
        headers["x-should-retry"] = "false"
    return ApiError(429, str(error), code=code, headers=headers)


def install(app: FastAPI) -> None:
    """Let `app` answer every error in this shape."""

    async def ours(_: Request, error: Exception) -> JSONResponse:
        return worded(error).response()

    async def http(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        found = ApiError(error.status_code, str(error.detail), code=_NAMES.get(error.status_code))
        return ApiError.response(found)

    async def invalid(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return invalid_fields(error.errors()).response()

    app.add_exception_handler(ModicumError, ours)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(Exception, ours)


def invalid_fields(faults: Any) -> ApiError:
    """400 for what pydantic found: all of it, and the first field as `param`."""
    said = []
    for fault in faults:
        where = ".".join(str(part) for part in fault["loc"] if part not in {"body", "query", "path"})
        said.append((where or None, f"{where}: {fault['msg']}" if where else fault["msg"]))
    return ApiError(400, "; ".join(text for _, text in said), param=said[0][0], code="invalid_value")


def _kind(status: int) -> str:
    if status == 429:
        return "rate_limit_error"
    return "server_error" if status >= 500 else "invalid_request_error"
