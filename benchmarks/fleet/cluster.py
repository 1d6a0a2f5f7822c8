"""A discrete-event simulation of a fleet that many machines train into a store of many shards.

Machines take cohorts in turn. A cohort is trained, its adapters are put into the shard they belong to (one put at a
time in a shard, as in the store), and only then it is marked as finished and the machine takes the next one. A machine
fails at random moments; what it was at is trained again by another one. Killed between put and mark, a cohort is put
twice, and the store keeps it once. A lost shard comes back as of its last backup; cohorts that are newer are trained
again, and puts wait meanwhile.

The standard library's heap is the calendar: a run for 10⁸ users is a million events.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, final

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

#: kinds of events; at the same moment a put counts before a failure
_TRAINED, _PUT, _FAILS, _BACK, _LOST, _RESTORED = range(6)
#: what a machine does
_IDLE, _TRAINS, _PUTS, _DOWN = range(4)
#: times a cohort is drawn that many at once
_DRAWN = 1 << 14


@dataclass(frozen=True)
class Cluster:
    """Who trains what, and how often what fails; times in seconds."""

    cohorts: int
    machines: int
    #: of a cohort, without its put
    seconds: float
    shards: int = 1
    #: in which a shard takes the adapters of a cohort
    put: float = 0.0
    #: mean time between failures of a machine, and from a failure until it trains again
    mtbf: float = math.inf
    repair: float = 0.0
    #: factors of `seconds`, one drawn for each cohort; and of machines that are always slower
    noise: Sequence[float] = (1.0,)
    slow_share: float = 0.0
    slow_factor: float = 1.0
    #: shards that are lost, in the second half of equal parts of the whole time
    losses: int = 0
    #: between backups of a shard, and until a full one is restored
    backup: float = math.inf
    restore: float = 0.0


@dataclass
class Outcome:
    """What happened; times in seconds, those of machines added up."""

    #: until every cohort is in the store and marked
    seconds: float = 0.0
    #: cohorts that were begun, machines that failed
    attempts: int = 0
    failures: int = 0
    #: of training: what ended in the store, and what was lost with a machine or a shard, or was there already
    useful: float = 0.0
    wasted: float = 0.0
    #: machines with nothing to do, machines that wait for a shard, machines that are down
    idle: float = 0.0
    putting: float = 0.0
    down: float = 0.0
    #: cohorts trained again for a lost shard; puts of what the store had
    relearnt: int = 0
    known: int = 0
    #: of every put, from asking to committed; and when, in which shard
    waits: list[float] = field(default_factory=list)
    commits: list[tuple[float, int]] = field(default_factory=list)
    #: cohort -> how often the store has its adapters at the end
    stored: list[int] = field(default_factory=list)


def simulate(cluster: Cluster, seed: int = 0) -> Outcome:
    """What happens, the same for the same seed."""
    return _Run(cluster, seed).run()


@final
class _Run:
    def __init__(self, cluster: Cluster, seed: int) -> None:
        self.c, self.out = cluster, Outcome(stored=[0] * cluster.cohorts)
        # shards are lost at the same moments, whatever else happens
        self.rng, self.noise_rng, self.loss_rng = (np.random.default_rng([seed, n]) for n in range(3))
        self.events: list[tuple[float, int, int, tuple]] = []
        self.number = 0
        # cohorts of one shard are as far apart as can be, so that its puts are
        self.ready = deque(range(cluster.cohorts))
        self.marked = bytearray(cluster.cohorts)
        self.left = cluster.cohorts
        #: cohort -> when it came into its shard, and what training it took
        self.since, self.spent = [0.0] * cluster.cohorts, [0.0] * cluster.cohorts
        n = cluster.machines
        self.state, self.cohort, self.began = [_IDLE] * n, [0] * n, [0.0] * n
        #: counted up when a machine fails or a shard is lost, so that what it had begun is void
        self.life, self.epoch = [0] * n, [0] * cluster.shards
        self.idle = dict.fromkeys(range(n))
        slow = self.rng.random(n) < cluster.slow_share
        self.speed = np.where(slow, cluster.slow_factor, 1.0).tolist()
        #: shard -> when its queue ends; while it is down: cohorts not begun, and puts that wait
        self.free, self.is_down = [0.0] * cluster.shards, [False] * cluster.shards
        self.parked: list[list[int]] = [[] for _ in self.free]
        self.waiting: list[list[tuple]] = [[] for _ in self.free]
        self.factors: list[float] = []

    def run(self) -> Outcome:
        c, out, now = self.c, self.out, 0.0
        for machine in range(c.machines):
            self._fails_later(0.0, machine)
        for n in range(c.losses):
            when = (n + self.loss_rng.uniform(0.5, 1.0)) / c.losses * c.cohorts * c.seconds / c.machines
            self._at(when, _LOST, (int(self.loss_rng.integers(c.shards)),))
        self._wake(0.0)
        handlers = (self._trained, self._put, self._fails, self._back, self._lost, self._restored)
        while self.left:
            now, _, kind, what = heapq.heappop(self.events)
            handlers[kind](now, *what)
        out.seconds = now
        # what died on its way into a shard was trained all the same
        out.wasted += sum(what[3] for _, _, kind, what in self.events if kind == _PUT)
        out.wasted += sum(put[3] for shard in self.waiting for put in shard)
        for machine in range(c.machines):
            self._leaves(now, machine)
        return out

    def _at(self, when: float, kind: int, what: tuple) -> None:
        self.number += 1
        heapq.heappush(self.events, (when, self.number, kind, what))

    def _fails_later(self, now: float, machine: int) -> None:
        if self.c.mtbf < math.inf:
            self._at(now + self.rng.exponential(self.c.mtbf), _FAILS, (machine,))

    def _leaves(self, now: float, machine: int) -> None:
        """Count what a machine did until now, unless it trained, which counts when it is known what became of it."""
        took, state = now - self.began[machine], self.state[machine]
        if state == _IDLE:
            self.out.idle += took
        elif state == _PUTS:
            self.out.putting += took
        elif state == _DOWN:
            self.out.down += took
        self.began[machine] = now

    def _wake(self, now: float) -> None:
        """Give idle machines what is ready."""
        while self.ready and self.idle:
            self._take(now, next(iter(self.idle)))

    def _take(self, now: float, machine: int) -> None:
        """The machine begins the next cohort, or is idle."""
        self._leaves(now, machine)
        while self.ready:
            cohort = self.ready.popleft()
            shard = cohort % self.c.shards
            if self.is_down[shard]:
                self.parked[shard].append(cohort)
                continue
            self.idle.pop(machine, None)
            self.state[machine], self.cohort[machine] = _TRAINS, cohort
            self.out.attempts += 1
            if not self.factors:
                self.factors = self.noise_rng.choice(np.asarray(self.c.noise), _DRAWN).tolist()
            took = self.c.seconds * self.speed[machine] * self.factors.pop()
            self._at(now + took, _TRAINED, (machine, self.life[machine], cohort, took))
            return
        self.state[machine] = _IDLE
        self.idle[machine] = None

    def _trained(self, now: float, machine: int, life: int, cohort: int, took: float) -> None:
        if life == self.life[machine]:
            self.state[machine], self.began[machine] = _PUTS, now
            self._ask(now, (machine, life, cohort, took, now))

    def _ask(self, now: float, put: tuple) -> None:
        shard = put[2] % self.c.shards
        if self.is_down[shard]:
            self.waiting[shard].append(put)
            return
        self.free[shard] = max(now, self.free[shard]) + self.c.put
        self._at(self.free[shard], _PUT, (*put, self.epoch[shard]))

    def _put(
        self, now: float, machine: int, life: int, cohort: int, took: float, asked: float, epoch: int
    ) -> None:
        shard, out, alive = cohort % self.c.shards, self.out, life == self.life[machine]
        if epoch != self.epoch[shard]:
            # what was under way when the shard was lost is asked for again by who is still there
            if alive:
                self._ask(now, (machine, life, cohort, took, asked))
            else:
                out.wasted += took
            return
        out.waits.append(now - asked)
        out.commits.append((now, shard))
        if out.stored[cohort]:
            out.known += 1
            out.wasted += took
        else:
            out.stored[cohort] = 1
            out.useful += took
            self.since[cohort], self.spent[cohort] = now, took
        # who died meanwhile has not marked it
        if alive:
            self._mark(cohort)
            self._take(now, machine)

    def _mark(self, cohort: int) -> None:
        if not self.marked[cohort]:
            self.marked[cohort] = 1
            self.left -= 1

    def _fails(self, now: float, machine: int) -> None:
        self.out.failures += 1
        state = self.state[machine]
        if state == _TRAINS:
            self.out.wasted += now - self.began[machine]
        self._leaves(now, machine)
        self.life[machine] += 1
        self.idle.pop(machine, None)
        self.state[machine] = _DOWN
        self._at(now + self.c.repair, _BACK, (machine,))
        if state in (_TRAINS, _PUTS):
            self.ready.appendleft(self.cohort[machine])
            self._wake(now)

    def _back(self, now: float, machine: int) -> None:
        self._fails_later(now, machine)
        self._take(now, machine)

    def _lost(self, now: float, shard: int) -> None:
        """A shard is gone: what came after its last backup has to be trained again."""
        if self.is_down[shard]:
            return
        self.is_down[shard] = True
        self.epoch[shard] += 1
        kept = math.floor(now / self.c.backup) * self.c.backup if self.c.backup < math.inf else -1.0
        whole = 0
        for cohort in range(shard, self.c.cohorts, self.c.shards):
            if not self.out.stored[cohort]:
                continue
            if self.since[cohort] <= kept:
                whole += 1
                continue
            self.out.stored[cohort] = 0
            self.out.useful -= self.spent[cohort]
            self.out.wasted += self.spent[cohort]
            # whose machine has died is in the queue already
            if self.marked[cohort]:
                self.marked[cohort] = 0
                self.left += 1
                self.out.relearnt += 1
                self.parked[shard].append(cohort)
        share = whole / len(range(shard, self.c.cohorts, self.c.shards))
        self._at(now + share * self.c.restore, _RESTORED, (shard,))

    def _restored(self, now: float, shard: int) -> None:
        self.is_down[shard], self.free[shard] = False, now
        self.ready.extend(self.parked[shard])
        waiting, self.parked[shard], self.waiting[shard] = self.waiting[shard], [], []
        for put in waiting:
            # of who has died meanwhile nothing is left to put
            if put[1] == self.life[put[0]]:
                self._ask(now, put)
            else:
                self.out.wasted += put[3]
        self._wake(now)
