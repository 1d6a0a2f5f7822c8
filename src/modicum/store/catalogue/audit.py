"""The audit log: one entry per change and name, each hashed together with the one before; see docs/design/store.md."""

from __future__ import annotations

import hashlib
import json
import secrets
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from modicum.store.engine.interface import Change, Snapshot

#: what the first entry is hashed with
BEGINNING = bytes(32)
#: µs that the clock may be behind the log before the log tells what the clock said
_JITTER = 1_000_000
_INSERT = (
    "INSERT INTO audit(seq, at, actor, action, name, version, digest, detail, hash) "
    "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)"
)


@dataclass(frozen=True)
class Draft:
    """An entry that is about to be written."""

    action: str
    #: number and pseudonym of the name it is about
    name: int | None = None
    pseudonym: bytes | None = None
    version: int | None = None
    digest: bytes | None = None
    detail: dict[str, Any] | None = None


@dataclass(frozen=True)
class Entry:
    """One line of the log."""

    seq: int
    at: datetime
    actor: str
    #: put, alias, unalias, rollback, tag, untag, metrics, note, remove, purge, erased, compact, experiment
    action: str
    #: None where it is about the whole store; `purged:` and 12 digits after a purge
    name: str | None
    version: int | None
    digest: str | None
    detail: dict[str, Any]
    #: whether a purge took the private part away
    redacted: bool
    hash: str


@dataclass(frozen=True)
class Head:
    """The end of the chain: whoever notes it elsewhere can prove later that nothing before it was changed."""

    entries: int
    hash: str


def append(change: Change, actor: str, drafts: Sequence[Draft]) -> tuple[int, int]:
    """(number of the first entry, time of the last in µs) after the drafts were added to the log."""
    found = change.rows("SELECT seq, at, hash FROM audit ORDER BY seq DESC LIMIT 1")
    last, at, link = found[0] if found else (0, 0, BEGINNING)
    who, first = _actor(change, actor), last + 1
    clock = time.time_ns() // 1000
    # entries of one change are 1 µs apart, which is no clock that goes backwards
    behind = {"clock": clock} if at > clock + _JITTER else {}
    rows = []
    for seq, draft in enumerate(drafts, first):
        detail = {**(draft.detail or {}), **behind} or None
        at = max(clock, at + 1)
        text = None if detail is None else _text(detail)
        part = content(draft.digest, text)
        link = chained(link, seq, at, actor, draft.action, draft.pseudonym, draft.version, part)
        rows.append((seq, at, who, draft.action, draft.name, draft.version, draft.digest, text, link))
    change.run_many(_INSERT, rows)
    upsert = "INSERT INTO settings VALUES (?, ?) ON CONFLICT(key) DO UPDATE SET value = excluded.value"
    change.run(upsert, "head", link)
    change.run(upsert, "entries", last + len(rows))
    return first, at


def chained(
    before: bytes,
    seq: int,
    at: int,
    actor: str,
    action: str,
    pseudonym: bytes | None,
    version: int | None,
    part: bytes,
) -> bytes:
    """The 32-byte hash of an entry with private part `part` (see `content`), behind the one with hash `before`."""
    said = [seq, at, actor, action, pseudonym.hex() if pseudonym else None, version, part.hex()]
    return hashlib.blake2b(before + json.dumps(said).encode(), digest_size=32).digest()


def content(digest: bytes | None, detail: str | None) -> bytes:
    """The 32 bytes that stand for the private part of an entry, and stay when that is purged."""
    digest = digest or b""
    return hashlib.blake2b(bytes([len(digest)]) + digest + (detail or "").encode(), digest_size=32).digest()


def pseudonym(salt: bytes, name: str) -> bytes:
    """The 32 bytes that stand for a name, and stay when that is purged together with its salt."""
    return hashlib.blake2b(salt + name.encode(), digest_size=32).digest()


def redact(change: Change, name: int, version: int | None = None) -> None:
    """Returns when entries about a name (or one version) have lost their private part and kept what stands for it.

    Of one version these are the entries that tell of it; moves of aliases hold no more than numbers and stay.
    """
    query = "SELECT seq, digest, detail FROM audit WHERE name = ? AND content IS NULL"
    values: tuple = (name,)
    if version is not None:
        query += " AND version = ? AND action IN ('put', 'tag', 'untag', 'metrics', 'note')"
        values = (name, version)
    rows = change.rows(query, *values)
    change.run_many(
        "UPDATE audit SET digest = NULL, detail = NULL, content = ? WHERE seq = ?",
        ((content(digest, detail), seq) for seq, digest, detail in rows),
    )


def head(view: Snapshot) -> Head:
    """The end of the chain as the store has it."""
    found = dict(view.rows("SELECT key, value FROM settings WHERE key IN ('head', 'entries')"))
    return Head(int(found.get("entries", 0)), bytes(found.get("head", BEGINNING)).hex())


def entries(view: Snapshot, name: int | None, after: int, limit: int) -> list[Entry]:
    """The entries about a name, or all, that follow entry `after`; at most `limit`."""
    query = (
        "SELECT audit.seq, audit.at, actors.actor, audit.action, audit.name, names.name, names.pseudonym, "
        "audit.version, audit.digest, audit.detail, audit.content, audit.hash FROM audit "
        "JOIN actors ON actors.id = audit.actor LEFT JOIN names ON names.id = audit.name WHERE audit.seq > ? "
    )
    about = "" if name is None else "AND audit.name = ? "
    values = (after, limit) if name is None else (after, name, limit)
    return [
        Entry(
            seq=seq,
            at=moment(at),
            actor=actor,
            action=action,
            name=None if number is None else called or f"purged:{bytes(stands).hex()[:12]}",
            version=version,
            digest=digest.hex() if digest else None,
            detail={k: v for k, v in json.loads(detail or "{}").items() if k != "nonce"},
            redacted=content is not None,
            hash=hashed.hex(),
        )
        for seq, at, actor, action, number, called, stands, version, digest, detail, content, hashed in view.rows(
            f"{query}{about}ORDER BY audit.seq LIMIT ?", *values
        )
    ]


def moment(at: int) -> datetime:
    """The time of an entry."""
    return datetime.fromtimestamp(at / 1e6, UTC)


def _actor(change: Change, actor: str) -> int:
    found = change.rows("SELECT id FROM actors WHERE actor = ?", actor)
    if found:
        return found[0][0]
    number = change.rows("SELECT coalesce(max(id), 0) + 1 FROM actors")[0][0]
    change.run("INSERT INTO actors VALUES (?, ?)", number, actor)
    return number


def _text(detail: dict[str, Any]) -> str:
    if detail.keys() - {"kind"}:  # what could be guessed
        detail = {**detail, "nonce": secrets.token_hex(8)}
    return json.dumps(detail, separators=(",", ":"), sort_keys=True, ensure_ascii=False)
