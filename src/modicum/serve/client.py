"""The admin's routes of a running server, asked from elsewhere."""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.parse
import urllib.request
from typing import Any, NoReturn, final

from modicum.errors import ConfigError, ConflictError, ModicumError, NotStoredError, StoreError

_TIMEOUT = 60.0
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
#: what the statuses of a server mean here
_ERRORS: dict[int, type[ModicumError]] = {400: ConfigError, 404: NotStoredError, 409: ConflictError}


@final
class Client:
    """A server that is asked with the key of an admin."""

    def __init__(self, url: str, key: str | None = None) -> None:
        """The server at `url`, e.g. `http://127.0.0.1:8000`.

        Raises:
            ConfigError: that is no address of a server.
        """
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in {"http", "https"} or not parts.hostname:
            raise ConfigError(f"{url!r} is no address of a server; one is like http://127.0.0.1:8000")
        self._url, self._key = url.rstrip("/"), key
        # what runs on this machine is not asked for elsewhere
        handlers = [urllib.request.ProxyHandler({})] if parts.hostname in _LOOPBACK else []
        self._opener = urllib.request.build_opener(*handlers)

    def get(self, *path: str) -> dict[str, Any]:
        """What the server answers to `GET`; parts of the path are names and may have slashes."""
        return self._ask("GET", path, None)

    def post(self, *path: str, **body: Any) -> dict[str, Any]:
        """What the server answers to `POST` with this body, without what is None."""
        return self.post_exactly(
            *path, body={name: value for name, value in body.items() if value is not None}
        )

    def post_exactly(self, *path: str, body: dict[str, Any]) -> dict[str, Any]:
        """The same with a body where None is said."""
        return self._ask("POST", path, body)

    def delete(self, *path: str) -> dict[str, Any]:
        """What the server answers to `DELETE`."""
        return self._ask("DELETE", path, None)

    def _ask(self, method: str, path: tuple[str, ...], body: dict[str, Any] | None) -> dict[str, Any]:
        """What the server answers.

        Raises:
            ConfigError, NotStoredError, ConflictError, StoreError: what the server says is wrong, or that none answers.
        """
        place = "/".join(urllib.parse.quote(part, safe="/") for part in ("admin", *path))
        request = urllib.request.Request(f"{self._url}/{place}", method=method)  # noqa: S310 - checked above
        request.add_header("Accept", "application/json")
        if self._key:
            request.add_header("Authorization", f"Bearer {self._key}")
        if body is not None:
            request.add_header("Content-Type", "application/json")
            request.data = json.dumps(body).encode()
        try:
            with self._opener.open(request, timeout=_TIMEOUT) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            with error:
                _raise(error)
        except (OSError, http.client.HTTPException, ValueError) as error:
            reason = getattr(error, "reason", error)
            raise StoreError(
                f"no server answers at {self._url} ({reason}): start one with `modicum serve`, or name its address "
                "with --url or $MODICUM_URL"
            ) from error


def _raise(error: urllib.error.HTTPError) -> NoReturn:
    try:
        said = json.load(error)["error"]["message"]
    except (ValueError, LookupError, TypeError):
        said = f"the server answered {error.code} {error.reason}"
    raise _ERRORS.get(error.code, StoreError)(said) from error
