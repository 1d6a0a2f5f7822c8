"""How versions, the log and differences are shown on a terminal."""

import json
from typing import Any

from modicum.cli._common import size, table
from modicum.cli._store._shared import moment, number, plain, rows


def versions(found: dict[str, Any]) -> list[Any]:
    """The table of `ls`."""
    shown = [
        [
            plain(version),
            version.method,
            version.dtype,
            size(version.bytes),
            plain(", ".join(version.aliases)),
            plain(", ".join(version.tags)),
            plain(", ".join(f"{name} {number(value)}" for name, value in version.metrics.items())),
            moment(version.created),
        ]
        for version in found["versions"]
    ]
    columns = ["version", "method", "type", "size", "aliases", "tags", "metrics", "put"]
    return [table(f"versions: {len(shown):,}", columns, shown)]


def version(one: Any, about: dict[str, Any]) -> list[Any]:
    """The tables of `show`."""
    basis = about["basis"]
    found = [
        ("digest", one.digest), ("method", one.method), ("numbers", f"{about['values']:,} {one.dtype}"),
        ("size", f"{one.bytes:,} bytes"), ("task", one.task_type),
        ("base model", about["config"].get("base_model_name_or_path")),
        ("base fingerprint", one.base_fingerprint), ("basis fingerprint", one.basis_fingerprint),
        ("basis", None if basis is None else basis.stored or "NOT IN THIS STORE"),
        ("to have it here", None if basis is None else basis.command),
        ("put", f"{moment(one.created)} by {one.actor}"), ("parent", one.parent), ("recipe", about["recipe_digest"]),
        ("data", one.data_digest), ("seed", one.seed), ("aliases", ", ".join(one.aliases)),
        ("tags", ", ".join(one.tags)), ("note", one.note),
        *((f"metric {name}", number(value)) for name, value in one.metrics.items()),
        *((name, json.dumps(value)) for name, value in about["config"].items() if name != "base_model_name_or_path"),
        *((f"metadata {name}", json.dumps(value)) for name, value in about["metadata"].items()),
    ]  # fmt: skip
    return [rows(str(one), found)]


def log(found: dict[str, Any]) -> list[Any]:
    """The table of `log`."""
    shown = []
    for entry in found["entries"]:
        about = {key: value for key, value in entry.detail.items() if key != "kind"}
        what = "" if entry.name is None else entry.name
        what += "" if entry.version is None else f"@{entry.version}"
        detail = "(erased)" if entry.redacted else " ".join(f"{k}={_short(v)}" for k, v in about.items())
        shown.append(
            [entry.seq, moment(entry.at), plain(entry.actor), entry.action, plain(what), plain(detail)]
        )
    columns = ["entry", "at", "who", "what", "version", "details"]
    return [table("log", columns, shown), f"head {found['head']}"]


def difference(found: Any) -> list[Any]:
    """The tables of `diff`."""
    changes = [("", change) for change in found.facts] + [
        ("option", change) for change in found.configuration
    ]
    changed = [
        [f"{what} {plain(change.name)}".strip(), plain(_short(change.a)), plain(_short(change.b))]
        for what, change in changes
    ]
    measured = [
        [
            plain(change.name),
            number(change.a),
            number(change.b),
            "" if change.a is None or change.b is None else f"{change.b - change.a:+.6g}",
        ]
        for change in found.metrics
    ]
    layers = [
        [
            plain(one.layer),
            f"{one.values[0]:,}"
            if one.values[0] == one.values[1]
            else f"{one.values[0]:,} / {one.values[1]:,}",
            *(number(value) for value in (*one.norms, one.distance, one.relative, one.cosine)),
        ]
        for one in (found.total, *found.layers)
    ]
    same = "The records are equal to the last bit." if found.same_record else ""
    columns = ["layer", "numbers", "|a|", "|b|", "|a - b|", "relative", "cosine"]
    return [
        *([table("differs", ["", found.a, found.b], changed)] if changed else []),
        *([table("metrics", ["metric", found.a, found.b, "b - a"], measured)] if measured else []),
        table("distance of the numbers", columns, layers),
        *(line for line in (same, *(f"Note: {note}." for note in found.notes)) if line),
    ]


def _short(value: Any) -> str:
    text = "" if value is None else value if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:57]}…"
