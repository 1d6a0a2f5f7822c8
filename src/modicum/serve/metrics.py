"""What a server is doing and has done: counts, durations, the last hour, and who used what; never by adapter.

A route tells of one request (`Metrics.request`), the engine of its steps and loads (`Observer`), a thread of ours
looks at the engine once per second. When a request has ended, all that is known of it goes to log and traces.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections import Counter
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, final

import psutil

from modicum.serve.costs import OTHER, MachineCost, Tariff, Usage, merged
from modicum.serve.engine.interface import EngineStats, Observer
from modicum.serve.timeline import Gauges, Spread, Timeline, Work

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from modicum.serve.engine.interface import Engine

log = logging.getLogger("modicum.serve")
Outcome = Literal["ok", "error", "cancelled", "refused", "timeout"]
#: tenants and kinds of errors that are counted one by one; keys are made by the operator, so these are far away
_MOST_TENANTS, _MOST_KINDS = 10_000, 50
#: generated tokens that are counted together, and seconds after which they are in any case
_SOME, _SOON = 16, 0.25
#: ticks between two looks at what the machine has cost
_COST_EVERY = 10

#: the request that this task or thread works for, so that a load can be put down to it
_CURRENT: ContextVar[RequestMeter | None] = ContextVar("request", default=None)


@dataclass(frozen=True)
class Observed:
    """All that is kept of a request that has ended; times are seconds since it began."""

    tenant: str
    outcome: Outcome
    #: when it began, ns since 1970
    began: int
    seconds: float
    request_id: str = ""
    #: as asked for, where the tenant may know of it
    model: str | None = None
    version: str | None = None
    #: kind of error
    error: str | None = None
    #: (from, until) its adapter was loaded, if it had to be
    load: tuple[float, float] | None = None
    first_token: float | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    #: what a caller's own trace is called
    traceparent: str | None = None
    prompt: str | None = field(default=None, repr=False)


@dataclass
class Totals:
    """What was counted since the server started, over all tenants."""

    first_token: Spread = field(default_factory=Spread)
    per_token: Spread = field(default_factory=Spread)
    duration: Spread = field(default_factory=Spread)
    load: Spread = field(default_factory=Spread)
    step: Spread = field(default_factory=Spread)
    #: summed over steps
    sequences: int = 0
    step_tokens: int = 0
    load_failures: int = 0
    errors: Counter[str] = field(default_factory=Counter)


@final
class RequestMeter:
    """One request from its arrival to its end; made by `Metrics.request`, and `done` closes it whatever happens."""

    def __init__(self, metrics: Metrics, tenant: str, about: dict[str, Any]) -> None:
        self._metrics, self._tenant, self._about = metrics, tenant, about
        self._wall, self._began = time.time_ns(), time.perf_counter()
        self._first: float | None = None
        self._last: dict[int, float] = {}
        self._load: tuple[float, float] | None = None
        self._generated = self._untold = 0
        self._gaps: list[float] = []
        self._told = 0.0
        self._open = True

    def about(self, **known: Any) -> None:
        """Returns when more is known: any of `request_id`, `model`, `version`, `prompt`, `traceparent`."""
        self._about.update(known)

    def first_token(self) -> None:
        """The first token is there; `tokens` says so too."""
        if self._first is None:
            self._first = time.perf_counter() - self._began
            self._metrics._first_token(self._first)  # noqa: SLF001 - one thing in two classes

    def tokens(self, count: int = 1, sequence: int = 0) -> None:
        """So many tokens more of one of the request's answers."""
        now = time.perf_counter()
        before = self._last.get(sequence)
        self._last[sequence] = now
        if before is not None:
            self._gaps += [(now - before) / count] * count
        self._untold += count
        # there are thousands in a second, so what is done for each adds up
        if self._untold >= _SOME or self._first is None or now - self._told > _SOON:
            self.first_token()
            self._tell(now)

    def _tell(self, now: float) -> None:
        self._metrics._tokens(self._tenant, self._untold, self._gaps)  # noqa: SLF001
        self._generated += self._untold
        self._told, self._untold, self._gaps = now, 0, []

    def loaded(self, seconds: float) -> None:
        """Its adapter had to be loaded, which took so long and is done."""
        now = time.perf_counter() - self._began
        self._load = (max(0.0, now - seconds), now)

    def done(
        self,
        outcome: Outcome,
        prompt_tokens: int = 0,
        generated_tokens: int | None = None,
        cached_tokens: int = 0,
        *,
        error: str | None = None,
    ) -> None:
        """It has ended; what is said later is ignored. `error`: of what kind, e.g. the name of an exception's class.

        `generated_tokens`: all of them, where `tokens` was not told each.
        """
        if not self._open:
            return
        self._open = False
        if self._untold:
            self._tell(self._told)
        generated = self._generated if generated_tokens is None else generated_tokens
        seen = Observed(
            tenant=self._tenant,
            outcome=outcome,
            began=self._wall,
            seconds=time.perf_counter() - self._began,
            error=error,
            load=self._load,
            first_token=self._first,
            prompt_tokens=prompt_tokens,
            cached_tokens=min(cached_tokens, prompt_tokens),
            generated_tokens=generated,
            **self._about,
        )
        self._metrics._ended(seen, max(0, generated - self._generated))  # noqa: SLF001


@final
class Metrics(Observer):
    """Everything counted in one server. Safe to be told from any thread.

    `tariff`: what tokens cost; `labels`: how many tenants have a label of their own in `/metrics`, the first that
    come, and all others are `other` there; `sinks`: are told of every request that has ended.
    """

    def __init__(
        self,
        *,
        tariff: Tariff | None = None,
        labels: int = 200,
        sinks: Sequence[Callable[[Observed], None]] = (),
    ) -> None:
        self.tariff = tariff or Tariff()
        self.timeline = Timeline()
        self.totals = Totals()
        #: what the machine cost while nobody wanted anything of it
        self.idle_cost = 0.0
        self.started = time.time()
        self._labels, self._sinks = labels, tuple(sinks)
        self._lock = threading.Lock()
        self._work, self._ticked, self._ticks = Work(), time.perf_counter(), 0
        self._tenants: dict[str, Usage] = {}
        self._rest = Usage()
        self._shares: Counter[str] = Counter()
        self._running, self._owed = 0, 0.0
        self._machine = MachineCost(self.tariff.machine)
        self._engine: Engine | None = None
        self._process = psutil.Process()
        self._stop = threading.Event()
        self._sampler: threading.Thread | None = None

    def watch(self, engine: Engine) -> None:
        """Returns when the engine is looked at every second, until `close`."""
        self._engine, self._ticked = engine, time.perf_counter()
        self._sampler = threading.Thread(target=self._sample, name="modicum-metrics", daemon=True)
        self._sampler.start()

    def close(self) -> None:
        """Returns when nothing is looked at any more."""
        self._stop.set()
        if self._sampler is not None:
            self._sampler.join()
        self._machine.close()

    def request(self, tenant: str, **about: Any) -> RequestMeter:
        """The meter of a request that has just come; `about` as in `RequestMeter.about`.

        Loads in the same task or thread, and in those begun by it, are put down to this request.
        """
        meter = RequestMeter(self, tenant, about)
        _CURRENT.set(meter)
        with self._lock:
            self._running += 1
        return meter

    def step(self, sequences: int, tokens: int, seconds: float) -> None:
        """One step ran over so many sequences and tokens."""
        with self._lock:
            self.totals.step.add(seconds)
            self.totals.sequences += sequences
            self.totals.step_tokens += tokens
            self._work.steps += 1
            self._work.sequences += sequences

    def load(self, seconds: float, *, failed: bool) -> None:
        """An adapter that was not in memory was loaded, or could not be."""
        meter = _CURRENT.get()
        if meter is not None:
            meter.loaded(seconds)
        with self._lock:
            self.totals.load.add(seconds)
            self.totals.load_failures += failed

    @property
    def stats(self) -> EngineStats:
        """What the engine says of itself; nothing as long as none is watched."""
        return self._engine.stats() if self._engine is not None else EngineStats()

    def memory(self) -> dict[str, int]:
        """Bytes that the process, and one of the engine's own, hold: `resident`, and `gpu` where there is one."""
        stats = self.stats
        held = {"resident": self._process.memory_info().rss + stats.resident}
        torch: Any = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_initialized():
            held["gpu"] = torch.cuda.memory_allocated()
        if stats.gpu:
            held["gpu"] = held.get("gpu", 0) + stats.gpu
        return held

    def usage(self) -> dict[str, Usage]:
        """What every tenant had since the server started, by its name; those beyond 10,000 together as `other`."""
        with self._lock:
            found = {tenant: merged(usage) for tenant, usage in self._tenants.items()}
            if self._rest.requests:
                found[OTHER] = merged(found.get(OTHER, Usage()), self._rest)
        return found

    def usage_of(self, tenant: str) -> Usage:
        """What one tenant had since the server started."""
        with self._lock:
            return merged(self._tenants.get(tenant, Usage()))

    def labelled(self) -> dict[str, Usage]:
        """What tenants had, as few of them as `/metrics` has labels for, and the `other`s together."""
        found: dict[str, Usage] = {}
        for index, (tenant, usage) in enumerate(self.usage().items()):
            found.setdefault(tenant if index < self._labels else OTHER, Usage()).merge(usage)
        return found

    def durations(self) -> dict[str, Spread]:
        """How long things took since the server started, by the names in `Totals`."""
        with self._lock:
            now = {"first_token": self._work.first_token, "per_token": self._work.per_token}
            return {
                name: _sum(getattr(self.totals, name), now.get(name, Spread()))
                for name in ("first_token", "per_token", "duration", "load", "step")
            }

    def tick(self) -> None:
        """Returns when the time since the last call has become a frame; called every second while watching."""
        stats = self.stats
        resident = self._process.memory_info().rss + stats.resident
        self._ticks += 1
        if self._ticks % _COST_EVERY == 0:
            self.share_cost(self._machine.take())
        with self._lock:
            work, self._work = self._work, Work()
            now = time.perf_counter()
            seconds, self._ticked = max(now - self._ticked, 1e-3), now
            self.totals.first_token.merge(work.first_token)
            self.totals.per_token.merge(work.per_token)
        gauges = Gauges(stats.running, stats.waiting, stats.cache_used, stats.pool.used, resident)
        self.timeline.add(time.time(), seconds, work, gauges)

    def share_cost(self, amount: float) -> None:
        """Returns when what the machine cost stands with the tenants, by the tokens that were computed for each since.

        While requests run of which no token is known, it waits; without any, nobody is asked to pay it.
        """
        with self._lock:
            shares, self._shares = self._shares, Counter()
            amount, self._owed = amount + self._owed, 0.0
            if total := shares.total():
                for tenant, tokens in shares.items():
                    self._of(tenant).cost += amount * tokens / total
            elif self._running:
                self._owed = amount
            else:
                self.idle_cost += amount

    def _sample(self) -> None:
        while not self._stop.wait(1.0 - time.time() % 1.0):
            try:
                self.tick()
            except Exception:
                # a gap in the plots; requests go on
                log.exception("the engine cannot be looked at")

    def _of(self, tenant: str) -> Usage:
        usage = self._tenants.get(tenant)
        if usage is None:
            if len(self._tenants) >= _MOST_TENANTS:
                return self._rest
            usage = self._tenants[tenant] = Usage()
        return usage

    def _first_token(self, seconds: float) -> None:
        with self._lock:
            self._work.first_token.add(seconds)

    def _tokens(self, tenant: str, count: int, gaps: list[float]) -> None:
        with self._lock:
            self._work.generated_tokens += count
            self._work.per_token.extend(gaps)
            usage = self._of(tenant)
            usage.generated_tokens += count
            usage.cost += self.tariff.of_tokens(generated=count)
            self._shares[tenant] += count

    def _ended(self, seen: Observed, untold: int) -> None:
        """Count a request that has ended; `untold`: generated tokens that `_tokens` has not heard of."""
        with self._lock:
            self._running -= 1
            self.totals.duration.add(seen.seconds)
            if seen.error is not None:
                known = seen.error in self.totals.errors or len(self.totals.errors) < _MOST_KINDS
                self.totals.errors[seen.error if known else OTHER] += 1
            self._work.requests += 1
            self._work.errors += seen.outcome in {"error", "timeout"}
            self._work.refused += seen.outcome == "refused"
            self._work.prompt_tokens += seen.prompt_tokens
            self._work.generated_tokens += untold
            usage = self._of(seen.tenant)
            usage.requests[seen.outcome] = usage.requests.get(seen.outcome, 0) + 1
            usage.prompt_tokens += seen.prompt_tokens
            usage.cached_tokens += seen.cached_tokens
            usage.generated_tokens += untold
            usage.cost += self.tariff.of_tokens(
                prompt=seen.prompt_tokens, cached=seen.cached_tokens, generated=untold
            )
            self._shares[seen.tenant] += seen.prompt_tokens - seen.cached_tokens + untold
        for sink in self._sinks:
            sink(seen)


def _sum(*spreads: Spread) -> Spread:
    total = Spread()
    for spread in spreads:
        total.merge(spread)
    return total
