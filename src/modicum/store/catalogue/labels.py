"""Tags, metrics and notes of versions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from modicum.errors import NotStoredError, listing
from modicum.store.catalogue.audit import Draft
from modicum.store.catalogue.names import check_label, check_text
from modicum.store.catalogue.publish import check_metrics

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from modicum.store.catalogue.lookup import Found, Name
    from modicum.store.engine.interface import Change


def tag(change: Change, name: Name, found: Found, tags: Sequence[str]) -> Draft:
    """The entry for the log after the version has the tags, whether it had them before or not."""
    wanted = sorted({check_label(one, "a tag") for one in tags})
    change.run_many(
        "INSERT INTO tags VALUES (?, ?, ?) ON CONFLICT(tag, name, version) DO NOTHING",
        ((one, name.id, found.version) for one in wanted),
    )
    return _draft("tag", name, found, {"tags": wanted})


def untag(change: Change, name: Name, found: Found, tags: Sequence[str]) -> Draft:
    """The entry for the log after the version has none of the tags.

    Raises:
        NotStoredError: it did not have one of them.
    """
    wanted = sorted(set(tags))
    query = "DELETE FROM tags WHERE tag = ? AND name = ? AND version = ?"
    absent = [one for one in wanted if not change.run(query, one, name.id, found.version)]
    if absent:
        raise NotStoredError(f"{found} has no tag {listing(absent)}")
    return _draft("untag", name, found, {"tags": wanted})


def measure(change: Change, name: Name, found: Found, metrics: Mapping[str, float]) -> Draft:
    """The entry for the log after the version has these metrics, beside those that it keeps."""
    checked = check_metrics(metrics)
    query = (
        "INSERT INTO metrics VALUES (?, ?, ?, ?) "
        "ON CONFLICT(name, version, metric) DO UPDATE SET value = excluded.value"
    )
    change.run_many(query, ((name.id, found.version, metric, value) for metric, value in checked.items()))
    return _draft("metrics", name, found, {"metrics": checked})


def note(change: Change, name: Name, found: Found, text: str | None) -> Draft:
    """The entry for the log after the version has this note, or none."""
    text = None if text is None else check_text(text, "note")
    change.run("DELETE FROM notes WHERE name = ? AND version = ?", name.id, found.version)
    if text is not None:
        change.run("INSERT INTO notes VALUES (?, ?, ?)", name.id, found.version, text)
    return _draft("note", name, found, {"note": text})


def _draft(action: str, name: Name, found: Found, detail: dict[str, Any]) -> Draft:
    return Draft(action, name.id, name.pseudonym, found.version, detail=detail)
