"""What a server writes down: one line of JSON (or text) per event, and never a prompt unless it was asked for.

Names of adapters appear where the tenant may see them (`Observed.model`); paths of requests are cut before the first
part that somebody chose, so that no name or key is in an access log.
"""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal, final

if TYPE_CHECKING:
    from modicum.serve.metrics import Observed

Format = Literal["json", "text"]
#: loggers: of requests that have ended, and of everything else of ours
REQUESTS, SERVER = "modicum.serve.requests", "modicum.serve"
#: parts of a path that are ours: /v1/chat/completions, /admin/adapters
_PARTS = {"v1": 3, "admin": 2, "page": 2}
_ACCESS = "uvicorn.access"


@final
class Lines(logging.Formatter):
    """One line per record: an object of JSON, or time, level and text with what else is known as `name=value`."""

    def __init__(self, kind: Format = "json") -> None:
        super().__init__()
        self._kind = kind

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line; line breaks in it are escaped."""
        at = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        known = _access(record) if record.name == _ACCESS else {"message": record.getMessage()}
        known |= getattr(record, "about", {})
        if record.exc_info:
            known["exception"] = self.formatException(record.exc_info)
        if self._kind == "json":
            entry = {"at": at, "level": record.levelname.lower(), "logger": record.name, **known}
            return json.dumps(entry, ensure_ascii=False, default=str)
        message, exception = known.pop("message"), known.pop("exception", None)
        rest = "".join(f" {name}={_word(value)}" for name, value in known.items())
        line = f"{at} {record.levelname.lower():7} {message}".replace("\r", "\\r").replace("\n", "\\n")
        return f"{line}{rest}" + (f"\n{exception}" if exception else "")


def configuration(kind: Format = "json", *, level: str = "INFO", access: bool = False) -> dict[str, Any]:
    """The logging of a server in the words of `logging.config.dictConfig`: lines to stderr.

    `access`: also one line per HTTP request, besides the one per request to the model.
    """
    shown = {"handlers": ["lines"], "level": level, "propagate": False}
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"lines": {"()": Lines, "kind": kind}},
        "handlers": {"lines": {"class": "logging.StreamHandler", "formatter": "lines", "stream": sys.stderr}},
        "loggers": {
            SERVER: shown,
            "uvicorn": shown,
            _ACCESS: shown | {"level": level if access else "WARNING"},
        },
    }


@final
class RequestLog:
    """Writes one line about every request that has ended; `prompts`: with the prompt, which is off by default."""

    def __init__(self, *, prompts: bool = False) -> None:
        self._prompts, self._logger = prompts, logging.getLogger(REQUESTS)

    def __call__(self, seen: Observed) -> None:
        """Returns when it is written down."""
        failed = seen.outcome in {"error", "timeout"}
        self._logger.log(
            logging.WARNING if failed else logging.INFO,
            "request",
            extra={"about": about(seen, prompts=self._prompts)},
        )


def about(seen: Observed, *, prompts: bool = False) -> dict[str, Any]:
    """What a log says of a request, without what is not known; seconds to the microsecond."""
    said = {
        "request": seen.request_id or None,
        "tenant": seen.tenant,
        "model": seen.model,
        "version": seen.version,
        "outcome": seen.outcome,
        "error": seen.error,
        "prompt_tokens": seen.prompt_tokens,
        "cached_tokens": seen.cached_tokens,
        "generated_tokens": seen.generated_tokens,
        "seconds": round(seen.seconds, 6),
        "first_token_seconds": None if seen.first_token is None else round(seen.first_token, 6),
        "load_seconds": None if seen.load is None else round(seen.load[1] - seen.load[0], 6),
        "prompt": seen.prompt if prompts else None,
    }
    return {name: value for name, value in said.items() if value is not None}


def route(path: str) -> str:
    """The path of a request without its query and without what a client chose in it: `/v1/models/*`."""
    parts = path.partition("?")[0].strip("/").split("/")
    ours = _PARTS.get(parts[0], 1)
    if parts[:2] == ["v1", "models"]:
        ours = 2
    return "/" + "/".join(parts[:ours]) + ("/*" if len(parts) > ours else "")


def _access(record: logging.LogRecord) -> dict[str, Any]:
    """What uvicorn says of an HTTP request."""
    client, method, path, _, status = record.args  # pyright: ignore[reportAssignmentType, reportGeneralTypeIssues]
    return {"message": "http", "client": client, "method": method, "path": route(str(path)), "status": status}


def _word(value: Any) -> str:
    """A value that cannot be taken for two."""
    text = str(value)
    return text if text.isprintable() and not {" ", "=", '"'} & set(text) and text else json.dumps(text)
