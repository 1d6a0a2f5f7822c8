"""Transformers' continuous batching, with our sampling, prefix names, adapters and attention put into it.

Its scheduler, paged cache, chunked prefill and thread do the work. What is ours hangs on five places:

    logits processor        chooses every row's token and tells it (`sampler.py`)
    forward hooks           which adapter each token of the step has (`slots.py`)
    the cache's names       pages are shared by version too (`prefix.py`)
    attention interface     attention by request on processors (`attention.py`)
    output router           learns what has ended
"""

from __future__ import annotations

import logging
import math
import time
from typing import TYPE_CHECKING, Any

from modicum.serve.engine.admission import PAGE
from modicum.serve.engine.attention import register
from modicum.serve.engine.prefix import PrefixCache
from modicum.serve.engine.sampler import Sampler, failure

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn
    from transformers.generation.continuous_batching.requests import GenerationOutput, RequestState

    from modicum.serve.engine.interface import Observer
    from modicum.serve.engine.running import Running, Table
    from modicum.serve.engine.slots import Slots
    from modicum.serve.settings import EngineSettings


class Counts:
    """What was done since the engine started, over all restarts."""

    def __init__(self) -> None:
        self.steps = 0
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.generated_tokens = 0
        self.last_batch = 0


class Batching:
    """One run of the generation thread; after an error in it a new one takes its place.

    Raises:
        ConfigError: Transformers keeps its cache otherwise than this was written for.
    """

    def __init__(
        self,
        model: Any,
        settings: EngineSettings,
        eos_token_ids: Sequence[int],
        table: Table,
        counts: Counts,
        observer: Observer,
        slots: Slots | None,
    ) -> None:
        from transformers import GenerationConfig

        self._model, self._table, self._slots, self._observer = model, table, slots, observer
        self._eos = list(eos_token_ids)
        self.counts = counts
        # warnings show tokens of prompts
        logging.getLogger("ContinuousBatchingLogger").setLevel(logging.ERROR)
        self._manager = model.init_continuous_batching(
            GenerationConfig(do_sample=False, eos_token_id=-1, max_new_tokens=1), _configuration(settings)
        )
        # between the two: Transformers knows no other names when it begins, and makes masks for those it knows
        self._attention = model.config._attn_implementation  # noqa: SLF001 - there is no other place to read it
        model.set_attn_implementation(register())
        self._manager.logit_processor = _only(Sampler(table, counts, self._eos))
        self._manager.output_router = _Router(table)
        try:
            self._manager.warmup()  # makes the cache
            self._processor = self._manager.batch_processor
            if self.cache.use_prefix_sharing:
                PrefixCache(self.cache, self._realm, self._found)
        except BaseException:
            model.set_attn_implementation(self._attention)
            raise
        self._hooks = [
            model.register_forward_pre_hook(self._before),
            model.register_forward_hook(self._after, always_call=True),
        ]
        self._began = 0.0
        self._manager.start()

    @property
    def cache(self) -> Any:
        """Transformers' cache."""
        return self._processor.cache

    @property
    def alive(self) -> bool:
        """Whether the generation thread runs."""
        status = self._manager.background_thread_status
        return self._manager.is_running() and status.can_accept_new_requests() is None

    def add(self, row: Running) -> bool:
        """Whether the sequence was taken; it is not when the thread has ended."""
        sampling = row.request.sampling
        ends = self._eos if self._eos and not sampling.ignore_eos else -1
        return self.alive and bool(
            self._manager.add_request(
                list(row.request.prompt),
                request_id=row.id,
                max_new_tokens=sampling.max_tokens,
                eos_token_id=ends,
            )
        )

    def cancel(self, name: str) -> None:
        """Takes a sequence out before the next step."""
        self._manager.cancel_request(name)

    def stop(self) -> None:
        """Ends the thread after the step it is in; what has not ended fails."""
        self._manager.stop(block=True, hard_stop=True)
        for hook in self._hooks:
            hook.remove()
        self._model.set_attn_implementation(self._attention)
        if self._slots is not None:
            self._slots.end_step()
        self._table.end_step()

    def cache_used(self) -> float:
        """Share of the cache that sequences hold; pages kept for others to come are free."""
        cache = self.cache
        kept = sum(
            len(one.ledger.cached_blocks) * one.bytes_per_block for one in cache.cache_allocators.values()
        )
        # the two are not read at the same moment
        return max(
            0.0, 1 - cache.compute_free_capacity() - kept / (cache.num_sectors * cache.bytes_per_sector)
        )

    def _realm(self, name: str) -> bytes | None:
        row = self._table.find(name)
        return None if row is None else row.realm

    def _found(self, name: str, tokens: int) -> None:
        row = self._table.find(name)
        # one that lost its pages and begins again finds its own
        if row is not None and not row.started:
            row.cached = tokens

    def _before(self, *_: object) -> None:
        batch = self._processor.inputs_and_outputs.requests_in_batch
        names = [one.state.request_id for one in batch]
        rows = self._table.begin_step(names)
        lengths = [one.query_length for one in batch]
        self._count(rows, lengths)
        for name, row in zip(names, rows, strict=True):
            if row is None:
                # it ended meanwhile, or was cancelled before it arrived, which Transformers forgets
                self._manager.cancel_request(name)
        if self._slots is not None:
            stale = self._slots.step([None if row is None else row.lease for row in rows], lengths)
            for place in stale:
                if (row := rows[place]) is not None:
                    self._table.fail(row, failure(row, "its place in memory was given to another"))
        self._began = time.perf_counter()

    def _after(self, _: nn.Module, __: object, output: object) -> None:
        if self._slots is not None:
            self._slots.end_step()
        self._table.end_step()
        if output is not None:
            batch = self._processor.inputs_and_outputs.requests_in_batch
            self._observer.step(len(batch), self.counts.last_batch, time.perf_counter() - self._began)

    def _count(self, rows: list[Running | None], lengths: list[int]) -> None:
        counts = self.counts
        counts.steps += 1
        counts.last_batch = sum(lengths)
        for row in rows:
            if row is not None and not row.started:
                row.started = True
                counts.prompt_tokens += len(row.request.prompt)
                counts.cached_tokens += row.cached


def _configuration(settings: EngineSettings) -> Any:
    from transformers import ContinuousBatchingConfig

    return ContinuousBatchingConfig(
        page_size=PAGE,
        num_blocks=math.ceil(settings.cache_tokens / PAGE),
        max_batch_tokens=max(settings.max_batch_tokens, settings.max_batch),
        max_requests_per_batch=settings.max_batch,
        max_memory_percent=0.9,
        allow_block_sharing=settings.prefix_caching,
        # what a step computes with is set just before it, which a graph or a second step in flight would not see
        use_async_batching=False,
        use_cuda_graph=False,
        max_blocks_per_request=0,
        auto_switch_to_flash=False,
    )


def _only(sampler: Sampler) -> Any:
    from transformers import LogitsProcessorList
    from transformers.generation.continuous_batching.cb_logits_processors import (
        ContinuousBatchingLogitsProcessorList,
    )

    processors = ContinuousBatchingLogitsProcessorList(LogitsProcessorList([sampler]))  # pyright: ignore[reportArgumentType]
    processors.tensors_required = 1
    return processors


class _Router:
    """Stands where Transformers' `OutputRouter` stands; tokens are told by the sampler, ends come here."""

    def __init__(self, table: Table) -> None:
        self._table = table

    def deliver(self, output: GenerationOutput) -> None:
        row = self._table.find(output.request_id)
        if row is not None:
            if output.error is not None:
                self._table.fail(row, failure(row, output.error))
            self._table.end(row)

    def deliver_batch(self, outputs: list[GenerationOutput]) -> None:
        for output in outputs:
            self.deliver(output)

    def fail_and_deliver(self, state: RequestState, error: Exception) -> None:
        row = self._table.find(state.request_id)
        if row is not None:
            self._table.fail(row, failure(row, f"{type(error).__name__}: {error}"))
