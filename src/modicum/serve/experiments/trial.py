"""An answer under an experiment: it is timed and written down, and where there is a shadow, compared with its."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from modicum.serve.engine.interface import AdapterUnavailableError, GenerationError
from modicum.serve.experiments.tables import Exposure

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from modicum.serve.engine.interface import Engine, Request, Step
    from modicum.serve.experiments.design import Arm
    from modicum.serve.experiments.tables import Experiment

#: shadows that run at a time; further requests have none
_SHADOWS = 32


@dataclass
class Run:
    """What one generation did."""

    tokens: list[int] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)
    seconds: float = 0.0
    first: float | None = None
    #: None if nobody can be blamed: it was never taken on
    outcome: str | None = "cancelled"
    #: whether it went on to its end
    whole: bool = False

    def step(self, step: Step) -> None:
        """One token more."""
        if self.first is None:
            self.first = time.monotonic() - self.began
        self.tokens.append(step.token)
        if step.finish is not None:
            self.outcome, self.whole = "ok", True


async def observed(
    engine: Engine, request: Request, run: Run, done: Callable[[Run], None]
) -> AsyncIterator[Step]:
    """The steps of `engine.generate(request)`; `run` is told of each, and `done` when it ends."""
    try:
        async with contextlib.aclosing(engine.generate(request)) as steps:  # type: ignore[type-var]
            async for step in steps:
                run.step(step)
                yield step
    except (GenerationError, AdapterUnavailableError):
        run.outcome = "error"
        raise
    except GeneratorExit:
        # whoever reads has enough: at a stop string, or because the client hung up
        run.outcome = "ok" if run.tokens else "cancelled"
        raise
    except asyncio.CancelledError:
        raise
    except Exception:
        # a full queue, a prompt that is too long: no arm did that
        run.outcome = None
        raise
    finally:
        run.seconds = time.monotonic() - run.began
        done(run)


class Trial:
    """One answer of an experiment, and its shadow's: both are written down, the shadow's with how far it agrees."""

    def __init__(
        self,
        experiment: Experiment,
        arm: Arm,
        who: tuple[bytes, bytes],
        response: str,
        prompt: int,
        at: float,
        expose: Callable[[Experiment, Exposure], None],
    ) -> None:
        """An answer of `arm` that begins now; `who` are what tenant and user are known by, `prompt` counts tokens."""
        self.run = Run()
        self._experiment, self._arm, self._who, self._response = experiment, arm, who, response
        self._prompt, self._at, self._expose = prompt, at, expose
        self._ended = False
        self._shadow: tuple[Arm, Run] | None = None

    def ended(self, run: Run) -> None:
        """The answer has ended."""
        self._ended = True
        self._write(self._arm, run, None)
        self._compare()

    def shadowed(self, arm: Arm, run: Run) -> None:
        """The shadow has ended."""
        self._shadow = arm, run
        self._compare()

    def _compare(self) -> None:
        if not self._ended or self._shadow is None:
            return
        arm, run = self._shadow
        both = self.run.outcome == run.outcome == "ok"
        self._write(arm, run, agreement(self.run, run) if both else None)

    def _write(self, arm: Arm, run: Run, agreed: float | None) -> None:
        if run.outcome is None:
            return
        shadow = arm is not self._arm
        seen = Exposure(
            self._experiment.id, arm.label, *self._who, None if shadow else self._response, self._at, run.outcome,
            run.seconds, run.first, self._prompt, len(run.tokens), agreed, shadow,
        )  # fmt: skip
        self._expose(self._experiment, seen)


class Shadows:
    """Generations that nobody sees; what becomes of them never touches an answer."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()

    def start(
        self, engine: Engine, request: Request, version: str | None, done: Callable[[Run], None]
    ) -> None:
        """Returns at once; `done` is told how the shadow `version` ended, unless there is no room for it."""
        if len(self._tasks) >= _SHADOWS or engine.stats().waiting:
            return
        task = asyncio.create_task(_silent(engine, dataclasses.replace(request, version=version), done))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def agreement(answer: Run, shadow: Run) -> float | None:
    """The share of tokens up to the first that differs; where the answer was cut, only as far as it goes."""
    theirs = shadow.tokens if answer.whole else shadow.tokens[: len(answer.tokens)]
    longest = max(len(answer.tokens), len(theirs))
    if not longest:
        return None
    pairs = zip(answer.tokens, theirs, strict=False)
    shortest = min(len(answer.tokens), len(theirs))
    return next((i for i, (a, b) in enumerate(pairs) if a != b), shortest) / longest


async def _silent(engine: Engine, request: Request, done: Callable[[Run], None]) -> None:
    run = Run()
    # its errors are written down by `observed`
    with contextlib.suppress(Exception):
        async for _ in observed(engine, request, run, done):
            pass
