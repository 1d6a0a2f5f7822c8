"""What every engine can do, and what it is asked with: token ids in, token ids out.

An engine knows nothing of text, users, names or aliases. What is asked for is an immutable version (`ada@3`), so
that nothing that is cached under it can ever belong to anything else.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from modicum.errors import ModicumError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

Reason = Literal["stop", "length"]


class OverloadedError(ModicumError, RuntimeError):
    """Nothing more can be taken on now; `retry_after` seconds later it may."""

    def __init__(self, message: str, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class InUseError(OverloadedError):
    """Requests use every slot that is not pinned; one comes back with the first of them that ends."""


class AdapterUnavailableError(ModicumError, RuntimeError):
    """The adapter that a request needs cannot be had; the cause says why (not stored, damaged, of another base)."""


class GenerationError(ModicumError, RuntimeError):
    """A request began and could not be finished; others are untouched."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; names and meanings are those of the OpenAI API."""

    max_tokens: int
    #: 0 is greedy
    temperature: float = 1.0
    top_p: float = 1.0
    #: the same seed, prompt and version give the same tokens, whatever else is in the batch
    seed: int | None = None
    #: how many of the likeliest tokens are told with their log-probabilities; None: not even the chosen one's
    logprobs: int | None = None
    #: go on behind the end of the text, for measurements
    ignore_eos: bool = False


@dataclass(frozen=True)
class Request:
    """One sequence to go on with."""

    prompt: tuple[int, ...]
    sampling: Sampling
    #: `name@number`, None for the base model alone
    version: str | None = None
    #: what else must be equal for keys and values of equal prompts to be shared, e.g. the tenant
    salt: str = ""


@dataclass(frozen=True)
class Step:
    """One token more."""

    token: int
    #: natural logarithm of its probability under the model (before temperature and top_p), where asked for
    logprob: float | None = None
    #: the likeliest tokens and their log-probabilities, best first
    top: tuple[tuple[int, float], ...] = ()
    #: why it is the last one, if it is: "stop" (an end token, itself not told, but counted here), "length"
    finish: Reason | None = None
    #: how many tokens of the prompt were found in the prefix cache; told with the first token
    cached: int = 0


@dataclass(frozen=True)
class Resident:
    """An adapter that is in memory."""

    version: str
    method: str
    rank: int
    bytes: int
    pinned: bool
    #: running requests that use it
    requests: int


@dataclass(frozen=True)
class PoolStats:
    """The adapters in memory, and how often one was there when it was needed."""

    slots: int = 0
    used: int = 0
    pinned: int = 0
    hits: int = 0
    misses: int = 0
    evictions: int = 0
    failures: int = 0
    bytes: int = 0


@dataclass(frozen=True)
class EngineStats:
    """What an engine is doing, and has done since it started."""

    running: int = 0
    waiting: int = 0
    steps: int = 0
    prompt_tokens: int = 0
    #: of these, how many were found in the prefix cache
    cached_tokens: int = 0
    generated_tokens: int = 0
    #: tokens (of prompts and generated) in the last step
    last_batch: int = 0
    #: share of the key/value cache that running requests hold, 0 … 1
    cache_used: float = 0.0
    pool: PoolStats = field(default_factory=PoolStats)
    #: bytes that a process of the engine's own holds, and those on a GPU
    resident: int = 0
    gpu: int = 0


class Observer:
    """Is told what an engine does, from any of its threads; this one ignores it."""

    def step(self, sequences: int, tokens: int, seconds: float) -> None:
        """One step ran over so many sequences and tokens."""

    def load(self, seconds: float, *, failed: bool) -> None:
        """An adapter that was not in memory was loaded, or could not be."""


class Engine(abc.ABC):
    """One base model that goes on with many sequences at once, each under an adapter of its own; abstract.

    All coroutines belong to one event loop; what takes time runs in threads of the engine.
    """

    #: the longest sequence, prompt and answer, in tokens
    max_length: int

    @abc.abstractmethod
    def start(self) -> None:
        """Returns when requests can be taken."""

    @abc.abstractmethod
    async def close(self, grace: float = 0.0) -> None:
        """Returns when nothing runs any more: what has not ended after `grace` seconds fails."""

    @property
    @abc.abstractmethod
    def alive(self) -> bool:
        """Whether requests are taken and make progress."""

    @abc.abstractmethod
    def generate(self, request: Request) -> AsyncIterator[Step]:
        """The tokens as they come, the last with a `finish`; closing the iterator early cancels the request.

        The version is loaded before the request joins the batch; no other request waits for it.

        Raises:
            OverloadedError: the queue is full.
            AdapterUnavailableError: the version cannot be had.
            ConfigError: prompt and answer do not fit into `max_length`, or the prompt is empty.
            GenerationError: the request failed later on, e.g. the adapter produced NaN.
        """

    @abc.abstractmethod
    async def load(self, version: str, *, pin: bool = False) -> Resident:
        """The version, in memory now; a pinned one stays there.

        Raises:
            AdapterUnavailableError: it cannot be had.
            OverloadedError: every slot is pinned or in use.
        """

    @abc.abstractmethod
    async def unpin(self, version: str) -> None:
        """Returns when the version may leave memory again."""

    @abc.abstractmethod
    async def unload(self, version: str) -> bool:
        """Whether it was in memory and is no longer; what is running under it finishes first, on the same numbers."""

    @abc.abstractmethod
    def residents(self) -> list[Resident]:
        """All adapters in memory, the last used first."""

    @abc.abstractmethod
    def stats(self) -> EngineStats:
        """What it is doing now."""
