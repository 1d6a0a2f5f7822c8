"""Users' rows out of a table or a folder of files, read as a stream; what is wrong with a user is the user's alone."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from modicum.data.files import files_below, stream
from modicum.errors import ConfigError, DataError, NotStoredError, did_you_mean, listing
from modicum.fleet.ledger import Outcome
from modicum.store.catalogue.names import check_name

if TYPE_CHECKING:
    from collections.abc import Iterator

    from modicum.data.files import Row
    from modicum.fleet.ledger import Ledger
    from modicum.fleet.spec import FleetSpec, UsersOptions
    from modicum.store import Store

#: rows read before they are written
_CHUNK = 20_000


def gather(spec: FleetSpec, ledger: Ledger, store: Store) -> int:
    """How many users there are, once all their rows are in the ledger.

    Raises:
        DataError: there is no such source, it has no column of users, or a table of many users is damaged.
    """
    with ledger.change():
        ledger.clear()
        for file in _files(spec.users):
            _read(file, spec.users, ledger)
        users = ledger.users()
        if not users:
            count, faults = ledger.unread(5)
            raise DataError(
                f"{spec.users.source} holds no row of any user, and {count} of nobody: {listing(faults)}. "
                "Set users.column; to null where every file is one user"
            )
        ledger.index()
        _check_names(spec, ledger, store)
        ledger.note("gathered", len(users))
    return len(users)


def name_of(user: str, template: str) -> str:
    """The name of a user's adapter: {user} as it is, {slug} with what names may not have as -, or a {digest} of it."""
    slug = re.sub(r"(^|/)[^A-Za-z0-9_]+", r"\1", re.sub(r"[^A-Za-z0-9_.+=/-]+", "-", user)).strip("/")
    digest = hashlib.blake2b(user.encode(), digest_size=12).hexdigest()
    return template.format(user=user, slug=slug, digest=digest)


def _files(users: UsersOptions) -> list[Path]:
    path = Path(users.source).expanduser()
    if path.is_dir():
        found = files_below(path)
        if not found:
            raise DataError(f"the folder {path} holds no file of rows")
        return found
    if not path.is_file():
        beside = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        raise DataError(f"no file or folder {path}{did_you_mean(path.name, beside)}")
    if users.column is None:
        raise DataError(f"{path} is one file: name the column of its users in users.column")
    return [path]


def _read(file: Path, users: UsersOptions, ledger: Ledger) -> None:
    shown = str(file.relative_to(users.source)) if Path(users.source).is_dir() else file.name
    if users.column is None:
        _read_one(file, shown, ledger)
        return
    for chunk in _chunks(stream(file)):
        # one after the other in the file, so that a user's rows keep their order
        by_user: dict[str, list[tuple[int, Row]]] = {}
        for line, row in chunk:
            if isinstance(row, str):
                ledger.add_unread(shown, line, row)
                continue
            user = row.get(users.column)
            if users.column not in row:
                near = did_you_mean(users.column, row)
                ledger.add_unread(shown, line, f"no column {users.column!r}{near}, only {listing(list(row))}")
            elif isinstance(user, bool) or not isinstance(user, (str, int)) or not str(user).strip():
                ledger.add_unread(shown, line, f"{users.column} is {user!r}, must be a name or a number")
            else:
                by_user.setdefault(str(user), []).append((line, row))
        for user, rows in by_user.items():
            ledger.add_rows(user, shown, rows)


def _read_one(file: Path, shown: str, ledger: Ledger) -> None:
    """All of a file as one user's."""
    user = shown.removesuffix("".join(file.suffixes))
    try:
        rows = list(stream(file))
    except (DataError, OSError) as error:
        ledger.add_rows(user, shown, [])
        ledger.settle([Outcome(user, "faulty", {"fault": f"the file cannot be read: {error}"})])
        return
    ledger.add_rows(user, shown, [(line, row) for line, row in rows if not isinstance(row, str)])
    for line, row in rows:
        if isinstance(row, str):
            ledger.add_unread(shown, line, row)


def _chunks(rows: Iterator[tuple[int, Row | str]]) -> Iterator[list[tuple[int, Row | str]]]:
    chunk = []
    for one in rows:
        chunk.append(one)
        if len(chunk) == _CHUNK:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _check_names(spec: FleetSpec, ledger: Ledger, store: Store) -> None:
    """Give every user the name of its adapter; those who can have none, or rows of who knows whom, are settled."""
    users = ledger.users(waiting=True)
    names = {one.id: name_of(one.user, spec.store.name) for one in users}
    often = Counter(names.values())
    faults, named = [], []
    for one in users:
        name, fault = names[one.id], None
        if one.other is not None and not spec.users.join_files:
            fault = f"the id is in {one.file} and in {one.other}: one user or two? Set users.join_files if it is one"
        elif often[name] > 1:
            fault = f"its adapter would be called {name!r} as another user's; take {{digest}} in store.name"
        else:
            try:
                check_name(name)
            except ConfigError as error:
                fault = f"{error}. Take {{slug}} or {{digest}} in store.name"
        if fault is not None:
            faults.append(Outcome(one.user, "faulty", {"fault": fault, "rows": {"given": one.rows}}))
            continue
        named.append((one.id, name, _parent(store, name, spec.store.start_from)))
    ledger.name_users(named)
    ledger.settle(faults)


def _parent(store: Store, name: str, selector: str | None) -> str | None:
    if selector is None:
        return None
    try:
        return str(store.show(f"{name}@{selector}"))
    except NotStoredError:
        return None
