"""What the tests of experiments share: an engine that says what its version is told to, and users who ask it."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3

from modicum.serve.engine.interface import Engine, EngineStats, GenerationError, Request, Sampling, Step
from modicum.serve.names import Choice


class Speaking(Engine):
    """Says the same tokens for each version; those in `failing` break after the first token."""

    max_length = 64

    def __init__(self, **said: list[int]) -> None:
        self.said, self.failing, self.asked, self.waiting = said, set(), [], 0

    def start(self) -> None:
        """Nothing to start."""

    async def close(self, grace: float = 0.0) -> None:
        """Nothing to close."""

    @property
    def alive(self) -> bool:
        return True

    async def generate(self, request: Request):
        self.asked.append(request)
        tokens = self.said.get(request.version.replace("@", "_"), [1, 2, 3]) if request.version else [0, 0, 0]
        for place, token in enumerate(tokens):
            if place and request.version in self.failing:
                raise GenerationError("not a number")
            await asyncio.sleep(0)
            yield Step(token, finish="length" if place == len(tokens) - 1 else None)

    async def load(self, version: str, *, pin: bool = False):
        raise NotImplementedError

    async def unpin(self, version: str) -> None:
        raise NotImplementedError

    async def unload(self, version: str) -> bool:
        raise NotImplementedError

    def residents(self) -> list:
        return []

    def stats(self) -> EngineStats:
        return EngineStats(waiting=self.waiting)


class Clock:
    """A clock that goes when it is told to."""

    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@contextlib.contextmanager
def locked(store):
    """Another process is changing the store meanwhile."""
    with contextlib.closing(sqlite3.connect(store / "index.sqlite", isolation_level=None)) as db:
        db.execute("BEGIN IMMEDIATE")
        yield
        db.execute("ROLLBACK")


async def ask(experiments, engine, name, user, *, response=None, tenant="team", most=None):
    """(arm, tokens) of the answer that `user` gets; after `most` tokens the client has enough."""
    one = experiments.get(name)
    route = experiments.route(one, user)
    choice = Choice(route.version, "ada", name, route.arm, route.shadow)
    request = Request((1, 2), Sampling(8, temperature=0), route.version)
    tokens = []
    steps = experiments.generate(
        engine, request, choice, tenant=tenant, user=user, response=response or f"r-{user}"
    )
    with contextlib.suppress(GenerationError):
        async with contextlib.aclosing(steps):
            async for step in steps:
                tokens.append(step.token)
                if len(tokens) == most:
                    break
    return route.arm, tokens


def flushed(experiments) -> None:
    """Returns when what nobody waits for is on the disk too."""
    experiments._ledger.do(lambda db: None)


def arms_of(report):
    """The arms of a report by label."""
    return {arm.label: arm for arm in report.arms}
