"""Evaluating a fleet: every user's adapter, out of the store, against the base model on that user's own rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from modicum.errors import DataError, NotStoredError, listing
from modicum.evaluate.metrics import LARGER_IS_BETTER
from modicum.fleet.base import load_fleet_base
from modicum.fleet.cohort import Cohort
from modicum.fleet.gather import gather
from modicum.fleet.ledger import Ledger
from modicum.fleet.report import gains
from modicum.fleet.rows import prepare_user
from modicum.fleet.sizing import free_bytes
from modicum.fleet.training import measured
from modicum.models.loading import quiet_transformers
from modicum.store import Store

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from modicum.data.encoded import Encoded
    from modicum.fleet.base import FleetBase
    from modicum.fleet.ledger import User
    from modicum.fleet.spec import FleetSpec
    from modicum.store.record import Record

#: users that are measured together, and tokens of a pass, unless the specification says
_USERS, _TOKENS = 256, 4096
#: share of the free memory that their adapters may take
_SHARE = 0.25


@dataclass(frozen=True)
class Judged:
    """One user's metrics without and with its adapter, and which version that is."""

    user: str
    version: str
    rows: int
    before: dict[str, float]
    after: dict[str, float]


def evaluate_fleet(
    spec: FleetSpec,
    folder: Path,
    *,
    part: str = "test",
    alias: str = "latest",
    advance: Callable[[int], None] = lambda _: None,
) -> dict[str, Any]:
    """How users are served by the adapters that the store has for them under `alias`, and by the base model alone.

    `part`: `test` or `held_out`, divided as in training, or `all` rows of `users.source`, for rows that are new.
    Many users' rows are in a batch. `folder` holds a temporary ledger, and nothing else is written.

    Raises:
        DataError: nobody has both rows and an adapter.
    """
    found: list[Judged] = []
    without: list[str] = []
    faults: list[str] = []
    with quiet_transformers(), Store(spec.store.path) as store, Ledger(folder) as ledger:
        base = load_fleet_base(spec)
        gather(spec, ledger, store)
        users = [one for one in ledger.users(waiting=True) if one.name is not None]
        fit = int(_SHARE * free_bytes(base.device) / (4 * base.widest.record.layout.size))
        for group in _groups(users, spec.train.cohort_size or max(1, min(_USERS, fit))):
            able = []
            for user in group:
                try:
                    able.append(
                        (user, store.show(f"{user.name}@{alias}"), _rows(user, spec, base, ledger, part))
                    )
                except NotStoredError:
                    without.append(user.user)
                except DataError as error:
                    faults.append(f"{user.user}: {error}")
            records = [store.get(str(version)) for _, version, _ in able]
            found += _judged(able, records, base, spec)
            advance(len(group))
    if not found:
        raise DataError(
            f"nobody of {len(users)} users has rows to measure on and an adapter in {spec.store.path}: "
            f"{listing(faults or without)}"
        )
    return _summary(spec, found, part, alias, without, faults)


def _groups(users: Sequence[User], size: int) -> Iterator[Sequence[User]]:
    ordered = sorted(users, key=lambda one: one.order)
    for at in range(0, len(ordered), size):
        yield ordered[at : at + size]


def _rows(user: User, spec: FleetSpec, base: FleetBase, ledger: Ledger, part: str) -> Encoded:
    if part == "all":
        shares = spec.users.model_copy(update={"held_out": 0.0, "test": 0.0})
        spec = spec.model_copy(update={"users": shares})
    how = prepare_user(ledger.rows_of(user), spec, base.tokenizer, spec.rank_of(user.rows))
    if how.learner is None:
        raise DataError(how.fault or "no rows")
    found = how.learner.train if part == "all" else getattr(how.learner, part)
    if found is None:
        raise DataError(f"users.{part} is 0, so there are no such rows")
    return found


def _judged(
    able: Sequence[tuple[User, Any, Encoded]], records: Sequence[Record], base: FleetBase, spec: FleetSpec
) -> list[Judged]:
    """The metrics of some users, whose adapters become one stack."""
    if not able:
        return []
    ranks = [
        _rank_of(record, base, str(version)) for record, (_, version, _) in zip(records, able, strict=True)
    ]
    cohort = Cohort(base, ranks)
    for row, rank, record in zip(cohort.values, ranks, records, strict=True):
        row.copy_(base.spread(rank, torch.from_numpy(record.floats().copy())))
    data = {slot: rows for slot, (_, _, rows) in enumerate(able)}
    tokens = spec.train.tokens_per_pass or _TOKENS
    before, after = measured(cohort, data, tokens, base_only=True), measured(cohort, data, tokens)
    return [
        Judged(user.user, str(version), len(rows), before[slot], after[slot])
        for slot, (user, version, rows) in enumerate(able)
    ]


def _rank_of(record: Record, base: FleetBase, version: str) -> int:
    """The rank of a record, which has to be one of this fleet."""
    for rank, kind in base.kinds.items():
        mine = kind.record
        if (record.method, record.base_fingerprint, record.basis_fingerprint, record.layout.shapes) == (
            mine.method, mine.base_fingerprint, mine.basis_fingerprint, mine.layout.shapes,
        ) and record.layout.names == mine.layout.names:  # fmt: skip
            return rank
    raise DataError(
        f"{version} is no adapter of this fleet: method, rank, base model or basis differ from the specification"
    )


def _summary(
    spec: FleetSpec,
    found: Sequence[Judged],
    part: str,
    alias: str,
    without: Sequence[str],
    faults: Sequence[str],
) -> dict[str, Any]:
    sign = 1 if LARGER_IS_BETTER[spec.metric] else -1
    users = [
        {
            "user": one.user,
            "state": "stored",
            "version": one.version,
            "rows_train": one.rows,
            "before": one.before[spec.metric],
            "after": one.after[spec.metric],
            "gain": sign * (one.after[spec.metric] - one.before[spec.metric]),
        }
        for one in found
    ]
    names = [name for name in found[0].before if name != "n"]
    return {
        "metric": spec.metric,
        "part": part,
        "alias": alias,
        "users": len(found),
        "without_adapter": len(without),
        "faults": list(faults),
        "metrics": {
            name: {
                "before": float(np.mean([one.before[name] for one in found])),
                "after": float(np.mean([one.after[name] for one in found])),
            }
            for name in names
        },
        "gains": gains(users, spec.metric),
        "table": users,
    }
