"""One request to the model, from what was asked to the text that comes, whatever happens meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, final

from modicum.errors import ConfigError, NotStoredError
from modicum.serve.api.errors import ApiError, worded
from modicum.serve.engine.interface import Request
from modicum.serve.text import Answer

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence

    from modicum.serve.engine.interface import Reason, Sampling, Step
    from modicum.serve.keys import Key
    from modicum.serve.limits import Permit
    from modicum.serve.metrics import Outcome, RequestMeter
    from modicum.serve.names import Choice
    from modicum.serve.service import Service
    from modicum.serve.text import Token

Tokens = tuple[int, ...]
#: characters from which on tokens are made in a thread, so that others need not wait
_LONG = 1 << 12
#: seeds are numbers of 63 bits
_SEEDS = 1 << 63


@dataclass(frozen=True)
class Wanted:
    """What an endpoint makes of the body of a request."""

    model: str
    #: makes the prompts' tokens
    prompts: Callable[[], Sequence[Tokens]]
    #: characters in the prompts
    size: int
    #: the field that holds the prompts
    field: str
    sampling: Sampling
    #: None: as many tokens as fit
    most: int | None
    #: answers to each prompt; the j-th draws with the seed plus j
    n: int = 1
    stops: tuple[str, ...] = ()
    user: str | None = None
    traceparent: str | None = None


@dataclass(frozen=True)
class Piece:
    """What a step adds to one of the answers."""

    index: int
    text: str
    #: what is known of the tokens behind the text, where it was asked for
    tokens: Sequence[Token] = ()
    finish: Reason | None = None


@final
class Call:
    """A request that runs: iterate over `pieces` once; `usage` is right when that has ended."""

    def __init__(self, service: Service, key: Key, wanted: Wanted, kind: str) -> None:
        self._service, self._key, self._wanted = service, key, wanted
        #: of the response; `kind` is how it begins
        self.id = f"{kind}-{uuid.uuid4().hex}"
        self.created = int(time.time())
        self.choice: Choice | None = None
        self._prompt_tokens = self._cached_tokens = self._generated_tokens = 0

    @property
    def model(self) -> str:
        """The model as it was asked for."""
        return self._wanted.model

    @property
    def fingerprint(self) -> str | None:
        """The version that answers, unless that is the secret of an experiment."""
        known = self.choice is not None and self.choice.experiment is None
        return self.choice.version if known and self.choice is not None else None

    def usage(self) -> dict[str, Any]:
        """The tokens so far, as the OpenAI API tells them."""
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": self._generated_tokens,
            "total_tokens": self._prompt_tokens + self._generated_tokens,
            "prompt_tokens_details": {"cached_tokens": self._cached_tokens},
        }

    async def pieces(self) -> AsyncGenerator[Piece]:
        """The answers, piece by piece, as they come.

        Raises:
            ApiError: whatever went wrong.
        """
        about = {"request_id": self.id, "traceparent": self._wanted.traceparent}
        meter = self._service.metrics.request(self._key.name, **about)
        outcome: Outcome = "cancelled"
        kind = None
        try:
            with self._service.limits.enter(self._key) as permit:
                async with asyncio.timeout(self._service.settings.request_timeout):
                    requests = await self._requests(meter, permit)
                    answers = [self._answer(at, one, meter, permit) for at, one in enumerate(requests)]
                    merged = answers[0] if len(answers) == 1 else _merged(answers)
                    async with contextlib.aclosing(merged) as pieces:
                        async for piece in pieces:
                            yield piece
            outcome = "ok"
        except TimeoutError as error:
            outcome, limit = "timeout", self._service.settings.request_timeout
            raise ApiError(504, f"not finished within {limit:g} seconds", code="timeout") from error
        except Exception as error:
            told = worded(error)
            outcome, kind = "refused" if told.status < 500 else "error", type(error).__name__
            raise told from error
        finally:
            meter.done(outcome, self._prompt_tokens, self._generated_tokens, self._cached_tokens, error=kind)

    async def _requests(self, meter: RequestMeter, permit: Permit) -> list[Request]:
        wanted = self._wanted
        self.choice = choice = await self._resolve()
        meter.about(model=wanted.model, version=choice.version)
        await self._refresh(choice)
        try:
            prompts = await asyncio.to_thread(wanted.prompts) if wanted.size > _LONG else wanted.prompts()
        except ConfigError as error:
            raise ApiError(400, str(error), param=wanted.field, code="invalid_value") from error
        if self._service.settings.log_prompts:
            meter.about(prompt="\n".join(map(self._service.tokenizer.decode, prompts)))
        sampling = self._fitting(max(map(len, prompts)))
        self._prompt_tokens = sum(map(len, prompts))
        permit.used(prompt=self._prompt_tokens)
        return [
            Request(
                tuple(prompt), _drawn(sampling, answer), choice.version, f"{self._key.name} {choice.entry}"
            )
            for prompt in prompts
            for answer in range(wanted.n)
        ]

    async def _resolve(self) -> Choice:
        base, key = self._service.settings.base_name, self._key
        try:
            return await self._service.names.resolve(
                self._wanted.model,
                lambda name: key.base if name == base else key.sees(name),
                self._wanted.user,
            )
        except NotStoredError as error:
            raise ApiError(404, str(error), param="model", code="model_not_found") from error

    async def _refresh(self, choice: Choice) -> None:
        """Returns when nothing in memory answers for a version that was purged and put anew."""
        source, version, entry = self._service.source, choice.version, choice.entry
        if source is not None and version and entry is not None and source.outdated(version, entry):
            await self._service.engine.unload(version)
            # what is loaded from now on was read later than the entry was seen
            source.note(version, entry)

    def _fitting(self, longest: int) -> Sampling:
        """How tokens are chosen, with as many as fit where no number was asked for."""
        most = self._service.engine.max_length
        wanted = 1 if self._wanted.most is None else self._wanted.most
        if longest + wanted > most:
            raise ApiError(
                400,
                f"at most {most:,} tokens fit; the prompt has {longest:,}, and the answer may have {wanted:,}",
                param=self._wanted.field,
                code="context_length_exceeded",
            )
        return replace(self._wanted.sampling, max_tokens=self._wanted.most or most - longest)

    async def _answer(
        self, index: int, request: Request, meter: RequestMeter, permit: Permit
    ) -> AsyncGenerator[Piece]:
        answer = Answer(self._service.tokenizer, self._wanted.stops, request.prompt)
        first = index % self._wanted.n == 0
        steps: Any = self._steps(request, counts=index == 0)
        async with contextlib.aclosing(steps):
            async for step in steps:
                meter.tokens(1, index)
                permit.token()
                self._generated_tokens += 1
                # the answers to one prompt share it
                self._cached_tokens += step.cached if first else 0
                text = answer.push(step)
                yield Piece(index, text, answer.tokens, answer.finish)
                if answer.finish is not None:
                    return

    def _steps(self, request: Request, *, counts: bool) -> AsyncIterator[Step]:
        """What the engine says; of several answers the first is the one that `counts` in an experiment."""
        engine, choice = self._service.engine, self.choice
        if choice is None or choice.experiment is None or not counts:
            return engine.generate(request)
        return self._service.experiments.generate(
            engine, request, choice, tenant=self._key.name, user=self._wanted.user, response=self.id
        )


def _drawn(sampling: Sampling, answer: int) -> Sampling:
    if sampling.seed is None or not answer:
        return sampling
    return replace(sampling, seed=(sampling.seed + answer) % _SEEDS)


async def _merged(answers: Sequence[AsyncGenerator[Piece]]) -> AsyncGenerator[Piece]:
    """The pieces of all answers as they come; the first error ends all of them."""
    arrived: asyncio.Queue[Piece | Exception | None] = asyncio.Queue()

    async def follow(answer: AsyncGenerator[Piece]) -> None:
        try:
            async with contextlib.aclosing(answer) as pieces:
                async for piece in pieces:
                    arrived.put_nowait(piece)
            arrived.put_nowait(None)
        except Exception as error:  # noqa: BLE001, it is raised again below
            arrived.put_nowait(error)

    tasks = [asyncio.ensure_future(follow(answer)) for answer in answers]
    try:
        running = len(tasks)
        while running:
            what = await arrived.get()
            if isinstance(what, Exception):
                raise what
            if what is None:
                running -= 1
            else:
                yield what
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
