"""vLLM behind our interface of engines.

    generate() → queue of places → vLLM is told of the version, if it does not know it → vLLM's own scheduler

vLLM never loads or forgets a version by itself: what it knows is decided here (`registry`), so that a version is there
as long as a request needs it and no step ever waits for one.
"""

# vLLM is in another environment than the one that is checked
# pyright: reportMissingImports=false
from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
from typing import TYPE_CHECKING, Any

from modicum.errors import ConfigError, MissingExtraError
from modicum.models.checkpoint import target_shapes
from modicum.serve.engine.interface import (
    Engine,
    EngineStats,
    GenerationError,
    InUseError,
    Observer,
    OverloadedError,
    PoolStats,
    Request,
    Resident,
    Step,
)
from modicum.serve.vllm.plugin import STORE, register
from modicum.serve.vllm.registry import Entry, Registry

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Sequence

    from modicum.serve.settings import EngineSettings
    from modicum.serve.source import Source
    from modicum.store import Store

#: the ranks that vLLM makes room for
_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
#: tokens of a page; kernels on processors want a multiple of 32
_PAGE = 32
#: seconds between two tries for a slot
_RETRY = 0.01


def open_engine(
    settings: EngineSettings, store: Store | Source | None, observer: Observer | None = None
) -> tuple[VllmEngine, Any]:
    """The engine of the model that `settings` names, not started, and the model's tokenizer.

    Raises:
        ConfigError: no such model or tokenizer, or settings that vLLM cannot have.
        MissingExtraError: there is no vLLM in this environment.
        VllmChangedError: it is another vLLM than the plug-in knows.
    """
    from transformers import AutoConfig, GenerationConfig

    from modicum.models.loading import load_tokenizer, resolve

    folder = resolve(settings.model)
    tokenizer = load_tokenizer(settings.model)
    found: set[int] = set()
    configs = [AutoConfig.from_pretrained(folder).get_text_config(), tokenizer]
    with contextlib.suppress(OSError):  # not every model has one
        configs.append(GenerationConfig.from_pretrained(folder))
    for one in configs:
        ends = one.eos_token_id
        found |= set() if ends is None else {ends} if isinstance(ends, int) else set(ends)
    return VllmEngine(
        folder, settings, store=store, observer=observer, eos_token_ids=sorted(found)
    ), tokenizer


class VllmEngine(Engine):
    """vLLM's engine, in a process of its own.

    `folder` is the model's; adapters come from `store`, which vLLM's process opens for itself.
    """

    def __init__(
        self,
        folder: str,
        settings: EngineSettings,
        *,
        store: Store | Source | None = None,
        observer: Observer | None = None,
        eos_token_ids: Sequence[int] = (),
    ) -> None:
        if settings.max_rank > _RANKS[-1]:
            raise ConfigError(f"max_rank = {settings.max_rank}, vLLM serves ranks up to {_RANKS[-1]}")
        self._folder, self._settings, self._store = folder, settings, store
        self._observer, self._eos = observer or Observer(), tuple(eos_token_ids)
        self._numbers = itertools.count()
        self._asked = 0
        self._prompt = self._cached = self._generated = 0
        self._llm: Any = None
        self._registry: Registry | None = None
        self._closing = False
        self._monitor = Monitor(self._observer)

    def start(self) -> None:
        """Starts vLLM and returns when it has loaded the model."""
        if self._store is not None:
            os.environ[STORE] = self._store.location
        try:
            from vllm.engine.arg_utils import AsyncEngineArgs
            from vllm.v1.engine.async_llm import AsyncLLM
        except ImportError as error:
            raise MissingExtraError(
                f"the vLLM engine needs vLLM, which cannot be imported here ({error}); docs/do/scale-out.md says how "
                "its environment is made"
            ) from error
        register()
        self._llm = AsyncLLM.from_engine_args(
            AsyncEngineArgs(**self._arguments()),
            stat_loggers=[lambda *_: self._monitor.logger()],
        )
        self.max_length = self._llm.model_config.max_model_len
        if self._store is not None:
            self._registry = Registry(self._llm, self._store, self._settings.slots, self._observer)

    def _arguments(self) -> dict[str, Any]:
        settings = self._settings
        found: dict[str, Any] = {
            "model": self._folder,
            "skip_tokenizer_init": True,
            "dtype": settings.dtype,
            "max_model_len": settings.max_length,
            "max_num_seqs": settings.max_batch,
            "max_num_batched_tokens": max(settings.max_batch_tokens, settings.max_batch),
            "enable_prefix_caching": settings.prefix_caching,
            "block_size": _PAGE,
            "num_gpu_blocks_override": max(2, settings.cache_tokens // _PAGE),
            "max_logprobs": 20,
            "disable_log_stats": True,
        }
        if self._store is not None:
            found |= {
                "enforce_eager": True,
                "enable_lora": True,
                "max_loras": min(settings.max_batch, settings.slots),
                "max_cpu_loras": settings.slots,
                "max_lora_rank": next(rank for rank in _RANKS if rank >= settings.max_rank),
                # the head and the embedding have no adapters here, and vLLM would multiply by zeros
                "lora_target_modules": sorted(
                    {name.rpartition(".")[2] for name in target_shapes(self._folder)}
                ),
            }
        return found

    async def close(self, grace: float = 0.0) -> None:
        """Returns when vLLM's process has ended."""
        self._closing = True
        end = asyncio.get_running_loop().time() + grace
        while self._asked and asyncio.get_running_loop().time() < end:  # noqa: ASYNC110 - once, at the end
            await asyncio.sleep(0.02)
        if self._llm is not None:
            llm, self._llm, self._registry = self._llm, None, None
            await asyncio.to_thread(llm.shutdown)

    @property
    def alive(self) -> bool:
        """Whether vLLM's process runs and takes requests."""
        return self._llm is not None and not self._closing and not self._llm.errored

    async def generate(self, request: Request) -> AsyncIterator[Step]:
        """See `Engine.generate`."""
        self._check(request)
        self._asked += 1
        try:
            async with self._leased(request.version) as lora:
                steps = self._run(request, lora)
                try:
                    async for step in steps:
                        yield step
                finally:
                    await steps.aclose()
        finally:
            self._asked -= 1

    def _check(self, request: Request) -> None:
        if not self.alive:
            raise GenerationError("the engine takes no requests any more")
        length = len(request.prompt) + request.sampling.max_tokens
        if not request.prompt or length > self.max_length:
            raise ConfigError(
                f"prompt and answer are {length} tokens, of which {len(request.prompt)} are the prompt's; the prompt "
                f"needs at least one, and {self.max_length} fit in all"
            )
        if request.version is not None and self._registry is None:
            raise ConfigError(f"{request.version} cannot be served: the engine was started without a store")
        if self._asked >= self._settings.max_batch + self._settings.max_queue:
            raise OverloadedError(f"{self._asked} requests run or wait already; try again later")

    @contextlib.asynccontextmanager
    async def _leased(self, version: str | None) -> AsyncIterator[Any]:
        if version is None:
            yield None
            return
        assert self._registry is not None
        entry = await self._entry(self._registry, version)
        try:
            yield entry.request
        finally:
            self._registry.release(entry)

    async def _entry(self, registry: Registry, version: str) -> Entry:
        while True:
            with contextlib.suppress(InUseError):
                return await registry.acquire(version)
            await asyncio.sleep(_RETRY)

    async def _run(self, request: Request, lora: Any) -> AsyncGenerator[Step, None]:
        from vllm.inputs import TokensPrompt
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

        prompt = TokensPrompt(prompt_token_ids=list(request.prompt))
        if request.salt:
            prompt["cache_salt"] = request.salt
        stream = self._llm.generate(
            prompt, self._parameters(request), f"modicum-{next(self._numbers)}", lora_request=lora
        )
        told = 0
        try:
            async for output in stream:
                if not told:
                    self._prompt += len(request.prompt)
                    self._cached += output.num_cached_tokens or 0
                for step in _steps(output.outputs[0], request.sampling.logprobs):
                    told += 1
                    yield step
        except (EngineDeadError, EngineGenerateError) as error:
            raise GenerationError(f"vLLM failed: {error}") from error
        finally:
            self._generated += told
            await stream.aclose()

    def _parameters(self, request: Request) -> Any:
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        sampling = request.sampling
        return SamplingParams(
            max_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            seed=sampling.seed,
            logprobs=sampling.logprobs,
            # vLLM knows no tokenizer here
            ignore_eos=True,
            stop_token_ids=[] if sampling.ignore_eos else list(self._eos),
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )

    async def load(self, version: str, *, pin: bool = False) -> Resident:
        """See `Engine.load`."""
        return await self._pool().load(version, pin=pin)

    async def unpin(self, version: str) -> None:
        """See `Engine.unpin`."""
        self._pool().unpin(version)

    async def unload(self, version: str) -> bool:
        """See `Engine.unload`."""
        return await self._pool().unload(version)

    def residents(self) -> list[Resident]:
        """All versions that vLLM knows, the last used first."""
        return [] if self._registry is None else self._registry.residents()

    def stats(self) -> EngineStats:
        """What it is doing now, as vLLM said after its last step."""
        pool = PoolStats() if self._registry is None else self._registry.stats()
        now = self._monitor
        return EngineStats(
            running=now.running,
            waiting=max(0, self._asked - now.running),
            steps=now.steps,
            prompt_tokens=self._prompt,
            cached_tokens=self._cached,
            generated_tokens=self._generated,
            last_batch=now.tokens,
            cache_used=now.cache_used,
            pool=pool,
        )

    def _pool(self) -> Registry:
        if self._registry is None:
            raise ConfigError("no adapters can be served: the engine was started without a store")
        return self._registry


class Monitor:
    """What vLLM says of its steps."""

    def __init__(self, observer: Observer) -> None:
        self._observer, self._last = observer, 0.0
        self.running = self.steps = self.tokens = 0
        self.cache_used = 0.0

    def record(self, scheduled: Any, iteration: Any) -> None:
        """Takes in the counts of one step."""
        if scheduled is not None:
            self.running, self.cache_used = scheduled.num_running_reqs, scheduled.kv_cache_usage
        if iteration is None:
            return
        self.steps += 1
        self.tokens = iteration.num_generation_tokens + iteration.prompt_token_stats.computed
        seconds, self._last = (
            max(0.0, iteration.iteration_timestamp - self._last),
            iteration.iteration_timestamp,
        )
        self._observer.step(self.running, self.tokens, seconds)

    def logger(self) -> Any:
        """The same as vLLM wants it."""
        from vllm.v1.metrics.loggers import StatLoggerBase

        monitor = self

        class Logger(StatLoggerBase):
            def __init__(self) -> None:
                pass

            def record(self, scheduler_stats: Any, iteration_stats: Any, *_: Any, **__: Any) -> None:
                monitor.record(scheduler_stats, iteration_stats)

            def log_engine_initialized(self) -> None:
                pass

        return Logger()


def _steps(output: Any, logprobs: int | None) -> list[Step]:
    """The steps in what vLLM says at once."""
    found = []
    for place, token in enumerate(output.token_ids):
        last = place == len(output.token_ids) - 1
        finish = output.finish_reason if last and output.finish_reason in ("stop", "length") else None
        if logprobs is None or output.logprobs is None:
            found.append(Step(token, finish=finish))
            continue
        told = output.logprobs[place]
        ranked = sorted(told.items(), key=lambda one: one[1].rank)
        top = tuple((other, one.logprob) for other, one in ranked if one.rank <= logprobs)
        found.append(Step(token, told[token].logprob, top, finish))
    return found
