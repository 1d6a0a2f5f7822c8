"""How much each key may ask for: requests and tokens per minute, tokens per day, requests at a time.

Requests and tokens per minute are buckets that fill evenly and hold one minute's worth. A request is taken on while
there is something in both; what it generates is taken out afterwards, down to a debt that the next requests wait for.
So nobody has to know beforehand how long an answer will be, and what has begun is finished. Days are those of UTC.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Self

from modicum.serve.engine.interface import OverloadedError
from modicum.serve.state import changing, open_database, said

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from modicum.serve.keys import Key

FILE = "usage.sqlite"
DAY = 86400
#: words of the OpenAI API; where the quota is used up, waiting a little is no use
RATE, QUOTA = "rate_limit_exceeded", "insufficient_quota"
#: generated tokens that are counted together
_SOME = 16
_TABLE = (
    "CREATE TABLE IF NOT EXISTS usage(day INTEGER NOT NULL, tenant TEXT NOT NULL, requests INTEGER NOT NULL, "
    "prompt INTEGER NOT NULL, generated INTEGER NOT NULL, PRIMARY KEY (day, tenant)) WITHOUT ROWID;"
)
_ADD = (
    "INSERT INTO usage VALUES (?, ?, ?, ?, ?) ON CONFLICT(day, tenant) DO UPDATE SET "
    "requests = requests + excluded.requests, prompt = prompt + excluded.prompt, "
    "generated = generated + excluded.generated"
)


class LimitError(OverloadedError):
    """A key has used up what it may."""

    def __init__(self, message: str, retry_after: float, *, code: str = RATE) -> None:
        super().__init__(message, retry_after)
        self.code = code


@dataclass(frozen=True)
class Usage:
    """What a tenant used on one day, in days since 1970-01-01 UTC."""

    day: int
    tenant: str
    requests: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0

    def plus(self, requests: int, prompt: int, generated: int) -> Usage:
        """The sum."""
        return Usage(
            self.day,
            self.tenant,
            self.requests + requests,
            self.prompt_tokens + prompt,
            self.generated_tokens + generated,
        )


@dataclass
class _Bucket:
    level: float
    at: float

    def refill(self, limit: int, now: float) -> float:
        """What is in it now, if it fills with `limit` per minute."""
        self.level = min(limit, self.level + (now - self.at) * limit / 60)
        self.at = now
        return self.level


@dataclass
class _Tenant:
    running: int = 0
    buckets: dict[str, _Bucket] = field(default_factory=dict)


class Limits:
    """What every key has left, kept across restarts; whoever shares the state folder shares the days."""

    def __init__(
        self,
        folder: Path,
        *,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], float] = time.time,
    ) -> None:
        self.path, self._clock, self._now = folder / FILE, clock, now
        self._lock = threading.Lock()
        self._writing = threading.Lock()
        self._db = open_database(self.path, _TABLE)
        self._tenants: defaultdict[str, _Tenant] = defaultdict(_Tenant)
        #: what is on the disk of today, and what is not yet
        self._stored: dict[tuple[int, str], Usage] = {}
        self._pending: dict[tuple[int, str], Usage] = {}
        self.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Returns when everything is on the disk."""
        try:
            self.flush()
        finally:
            self._db.close()

    def enter(self, key: Key) -> Permit:
        """The permission to run one request; to be left when it has ended.

        Raises:
            LimitError: the key has none left; it says of what, and when it is worth trying again.
        """
        now = self._clock()
        with self._lock:
            tenant = self._tenants[key.name]
            if key.concurrent is not None and tenant.running >= key.concurrent:
                raise LimitError(f"the limit of {key.concurrent} requests at a time is reached", 1.0)
            self._check_day(key)
            requests = _filled(tenant, "requests", key.requests_per_minute, now)
            tokens = _filled(tenant, "tokens", key.tokens_per_minute, now)
            for bucket, limit, what in (
                (requests, key.requests_per_minute, "requests"),
                (tokens, key.tokens_per_minute, "tokens"),
            ):
                if bucket is not None and limit is not None and bucket.level < 1:
                    raise LimitError(
                        f"the limit of {limit:,} {what} per minute is reached",
                        (1 - bucket.level) * 60 / limit,
                    )
            if requests is not None:
                requests.level -= 1
            tenant.running += 1
            self._count(key.name, 1, 0, 0)
        return Permit(self, key.name)

    def usage(self, *, days: int = 1) -> list[Usage]:
        """What every tenant used, day by day, on the last `days`, today among them."""
        first = self._today() - days + 1
        with self._writing, said(self.path):
            rows = self._db.execute("SELECT * FROM usage WHERE day >= ? ORDER BY day, tenant", (first,))
            found = {(day, tenant): Usage(day, tenant, *counts) for day, tenant, *counts in rows}
        with self._lock:
            for place, more in self._pending.items():
                found[place] = _sum(found.get(place), more)
        return [found[place] for place in sorted(found) if place[0] >= first]

    def flush(self) -> None:
        """Returns when what was used so far is on the disk; a server calls it every second.

        Raises:
            StoreError: it cannot be written; it is kept for the next time.
        """
        with self._writing, said(self.path):
            with self._lock:
                rows = list(self._pending.values())
            with changing(self._db) as db:
                db.executemany(
                    _ADD, [(u.day, u.tenant, u.requests, u.prompt_tokens, u.generated_tokens) for u in rows]
                )
                today = db.execute("SELECT * FROM usage WHERE day = ?", (self._today(),)).fetchall()
            with self._lock:
                for one in rows:
                    left = _less(self._pending.pop((one.day, one.tenant)), one)
                    if left is not None:
                        self._pending[one.day, one.tenant] = left
                self._stored = {(day, tenant): Usage(day, tenant, *counts) for day, tenant, *counts in today}

    def _left(self, name: str, prompt: int, generated: int) -> None:
        with self._lock:
            bucket = self._tenants[name].buckets.get("tokens")
            if bucket is not None:
                bucket.level -= prompt + generated
            self._count(name, 0, prompt, generated)

    def _ended(self, name: str) -> None:
        with self._lock:
            self._tenants[name].running -= 1

    def _count(self, name: str, requests: int, prompt: int, generated: int) -> None:
        place = (self._today(), name)
        self._pending[place] = self._pending.get(place, Usage(*place)).plus(requests, prompt, generated)

    def _check_day(self, key: Key) -> None:
        if key.tokens_per_day is None:
            return
        place = (self._today(), key.name)
        used = _sum(self._stored.get(place), self._pending.get(place, Usage(*place)))
        if used.prompt_tokens + used.generated_tokens >= key.tokens_per_day:
            left = DAY - self._now() % DAY
            raise LimitError(
                f"the quota of {key.tokens_per_day:,} tokens per day is used up", left, code=QUOTA
            )

    def _today(self) -> int:
        return int(self._now() // DAY)


class Permit:
    """A request that runs; leave it when it has ended."""

    def __init__(self, limits: Limits, name: str) -> None:
        self._limits, self._name = limits, name
        self._untold = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.used()
        self._limits._ended(self._name)  # noqa: SLF001, two halves of one thing

    def token(self) -> None:
        """Returns when one generated token is counted, or will be soon: there are thousands in a second."""
        self._untold += 1
        if self._untold == _SOME:
            self.used()

    def used(self, *, prompt: int = 0) -> None:
        """Returns when so many tokens of the prompt, and all that were generated so far, are counted."""
        generated, self._untold = self._untold, 0
        self._limits._left(self._name, prompt, generated)  # noqa: SLF001, likewise


def _filled(tenant: _Tenant, what: str, limit: int | None, now: float) -> _Bucket | None:
    if limit is None:
        # a key that has no limit any more owes nothing either
        tenant.buckets.pop(what, None)
        return None
    bucket = tenant.buckets.setdefault(what, _Bucket(limit, now))
    bucket.refill(limit, now)
    return bucket


def _sum(a: Usage | None, b: Usage) -> Usage:
    return b if a is None else a.plus(b.requests, b.prompt_tokens, b.generated_tokens)


def _less(a: Usage, b: Usage) -> Usage | None:
    left = a.plus(-b.requests, -b.prompt_tokens, -b.generated_tokens)
    return left if left.requests or left.prompt_tokens or left.generated_tokens else None
