"""How adapters of a running server are shown."""

from typing import Any

from modicum.cli._common import size, table
from modicum.cli._store._shared import plain


def residents(found: dict[str, Any]) -> Any:
    """A table of the adapters in memory."""
    rows = [
        [
            plain(one["version"]),
            one["method"],
            one["rank"],
            size(one["bytes"]),
            one["requests"],
            "yes" if one["pinned"] else "",
        ]
        for one in found["adapters"]
    ]
    return table("in memory", ["version", "method", "rank", "size", "requests", "pinned"], rows)


def described(found: dict[str, Any]) -> list[Any]:
    """Tables of the versions of an adapter and of what happened to it."""
    versions = [
        [
            one["version"],
            ", ".join(one["aliases"]),
            one["method"],
            size(one["bytes"]),
            one["created"],
            plain(one["actor"]),
        ]
        for one in found["versions"]
    ]
    history = [
        [one["at"], plain(one["actor"]), one["action"], "" if one["version"] is None else one["version"]]
        for one in found["history"]
    ]
    return [
        table(found["name"], ["version", "aliases", "method", "size", "stored", "by"], versions),
        table("what happened, the last first", ["when", "who", "what", "version"], history),
    ]
