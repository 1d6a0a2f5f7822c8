"""Looking through a store: versions that meet conditions, page by page, and what it holds in all."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from modicum.errors import ConfigError
from modicum.store.catalogue.lookup import Found

if TYPE_CHECKING:
    from collections.abc import Iterator
    from datetime import datetime

    from modicum.store.engine.interface import Snapshot

_COLUMNS = (
    "SELECT n.id, n.name, v.version, v.object, v.size, v.kind, v.entry "
    "FROM versions v JOIN names n ON n.id = v.name "
)
_WILD = "*?["
_LARGEST = 1.7e308
#: names looked at in a search for those that match a pattern, in one query and in all
_SCAN, _SCANNED = 1000, 200_000


@dataclass(frozen=True)
class Filter:
    """Which versions are meant; every condition that is given has to hold."""

    #: a name, or a pattern with `*`, `?` and `[…]`, in which `*` stands for `/` too
    name: str | None = None
    alias: str | None = None
    tag: str | None = None
    method: str | None = None
    base_fingerprint: str | None = None
    #: put at this time or later, and before that
    since: datetime | None = None
    before: datetime | None = None
    #: metric -> (lowest, highest) value, None for no limit
    metrics: dict[str, tuple[float | None, float | None]] | None = None
    #: only the newest version of every name
    newest: bool = False

    def where(self, after: str = "") -> tuple[str, list[Any]]:
        """The conditions as SQL, and their values, for names from `after` on."""
        found = [*self._names(after), *self._labels(), *self._times()]
        if self.newest:
            found.append(("v.version = (SELECT max(w.version) FROM versions w WHERE w.name = v.name)", []))
        return " AND ".join(said for said, _ in found), [value for _, values in found for value in values]

    def _names(self, after: str) -> Iterator[tuple[str, list[Any]]]:
        # one lower limit, and the part before the first wild card as both: the index of names then does most of the
        # work. A purged name is NULL, and above nothing
        start = self.name or ""
        fixed = start[: min((start.find(c) for c in _WILD if c in start), default=len(start))]
        yield "n.name >= ?", [max(after, fixed)]
        if self.name is not None and fixed == self.name:
            yield "n.name = ?", [self.name]
        elif fixed:
            yield "n.name < ?", [fixed[:-1] + chr(ord(fixed[-1]) + 1)]

    def _labels(self) -> Iterator[tuple[str, list[Any]]]:
        # asked of each version in turn: a page then ends with its last version, however many others have the label
        labelled = "EXISTS (SELECT 1 FROM {} x WHERE x.name = v.name AND x.version = v.version AND x.{} = ?"
        for table, column, value in (("aliases", "alias", self.alias), ("tags", "tag", self.tag)):
            if value is not None:
                yield f"{labelled.format(table, column)})", [value]
        for metric, (low, high) in (self.metrics or {}).items():
            limits = [-_LARGEST if low is None else low, _LARGEST if high is None else high]
            yield f"{labelled.format('metrics', 'metric')} AND x.value BETWEEN ? AND ?)", [metric, *limits]
        for column, value in (("method", self.method), ("base", self.base_fingerprint)):
            if value is not None:
                yield f"v.kind IN (SELECT id FROM kinds WHERE {column} = ?)", [value]  # noqa: S608 - our own words

    def _times(self) -> Iterator[tuple[str, list[Any]]]:
        for sign, moment in ((">=", self.since), ("<", self.before)):
            if moment is not None:
                said = f"(SELECT at FROM audit WHERE seq = v.entry) {sign} ?"  # noqa: S608 - our own words
                yield said, [int(moment.timestamp() * 1e6)]

    def matches(self, name: str) -> bool:
        """Whether the pattern of names holds."""
        return self.name is None or fnmatchcase(name, self.name)


@dataclass(frozen=True)
class Stats:
    """What a store holds."""

    names: int
    versions: int
    objects: int
    aliases: int
    entries: int
    #: bytes of all records that versions name, and of those kept, where equal ones count once
    record_bytes: int
    kept_bytes: int
    #: bytes on the disk by part
    disk: dict[str, int]
    #: (method, dtype, base fingerprint) -> versions and bytes
    kinds: tuple[tuple[str, str, str | None, int, int], ...]
    #: names with the most bytes: name, versions, bytes
    largest: tuple[tuple[str, int, int], ...]


def page(
    view: Snapshot, wanted: Filter, after: tuple[str, int], size: int
) -> tuple[list[Found], tuple[str, int] | None]:
    """Up to `size` versions by name and version behind `after`, and where the next page begins (None: nowhere)."""
    where, values = wanted.where(after[0])
    query = f"{_COLUMNS} WHERE {where} AND (n.name > ? OR v.version > ?) ORDER BY n.name, v.version LIMIT ?"
    rows = [Found(*row) for row in view.rows(query, *values, *after, size)]
    following = (rows[-1].name, rows[-1].version) if len(rows) == size else None
    return [found for found in rows if wanted.matches(found.name)], following


def names(view: Snapshot, pattern: str, after: str, size: int) -> list[str]:
    """Up to `size` names that match the pattern and have a version, in order, behind `after`.

    Only the next 200,000 names that begin like the pattern are looked at, so that `*x` does not read millions.
    """
    wanted, found, seen = Filter(name=pattern), list[str](), 0
    query = (
        "SELECT n.name FROM names n WHERE {} AND n.name > ? "
        "AND EXISTS (SELECT 1 FROM versions v WHERE v.name = n.id) ORDER BY n.name LIMIT ?"
    )
    while len(found) < size and seen < _SCANNED:
        where, values = wanted.where(after)
        page = [name for (name,) in view.rows(query.format(where), *values, after, max(size, _SCAN))]
        found += [name for name in page if wanted.matches(name)]
        seen += len(page)
        if len(page) < max(size, _SCAN):
            break
        after = page[-1]
    return found[:size]


def stats(view: Snapshot, disk: dict[str, int], largest: int) -> Stats:
    """What a store holds; `largest`: how many names with the most bytes are listed."""

    def one(query: str) -> Any:
        return view.rows(query)[0][0]

    kinds = view.rows(
        "SELECT k.method, k.dtype, k.base, count(*), sum(v.size) FROM versions v JOIN kinds k ON k.id = v.kind "
        "GROUP BY k.method, k.dtype, k.base ORDER BY sum(v.size) DESC"
    )
    top = view.rows(
        "SELECT n.name, x.n, x.bytes FROM (SELECT name, count(*) AS n, sum(size) AS bytes FROM versions "
        "GROUP BY name ORDER BY sum(size) DESC, name LIMIT ?) AS x JOIN names n ON n.id = x.name "
        "ORDER BY x.bytes DESC, n.name",
        largest,
    )
    return Stats(
        names=one("SELECT count(*) FROM names WHERE name IS NOT NULL"),
        versions=one("SELECT count(*) FROM versions"),
        objects=one("SELECT count(*) FROM objects"),
        aliases=one("SELECT count(*) FROM aliases"),
        entries=one("SELECT coalesce(max(seq), 0) FROM audit"),
        record_bytes=one("SELECT coalesce(sum(size), 0) FROM versions"),
        kept_bytes=one("SELECT coalesce(sum(size), 0) FROM objects"),
        disk=disk,
        kinds=tuple(kinds),
        largest=tuple(top),
    )


def check_filter(wanted: Filter) -> Filter:
    """`wanted`, if its conditions make sense.

    Raises:
        ConfigError: limits of a metric are upside down, or a time has no time zone.
    """
    faults = [
        f"{metric} from {low} to {high}"
        for metric, (low, high) in (wanted.metrics or {}).items()
        if low is not None and high is not None and low > high
    ]
    faults += [
        f"{at} has no time zone"
        for at in (wanted.since, wanted.before)
        if at is not None and at.tzinfo is None
    ]
    if faults:
        raise ConfigError(f"nothing can meet these conditions: {', '.join(faults)}")
    return wanted
