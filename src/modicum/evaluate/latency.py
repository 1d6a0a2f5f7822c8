"""How fast models answer, side by side: prefill and decode apart, always against a baseline in the same run.

The models take turns (A B A B …), so that whatever else the machine does slows all of them alike. One turn reads
the prompt (prefill) and then feeds token after token with the cache of that prompt (decode), greedily. The loop is
our own: `generate` does not tell prefill from decode, and it spends some tenths of a millisecond of bookkeeping on
every token, the same for every model, which hides differences between small ones. The prompt is random: its values
do not change the work.
"""

from __future__ import annotations

import gc
import inspect
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer

from modicum.errors import ConfigError, did_you_mean
from modicum.evaluate.conditions import Machine, load, machine
from modicum.evaluate.intervals import Measure, bootstrap
from modicum.evaluate.memory import Peak, weight_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from torch import Tensor

#: with fewer repeats the bootstrap has next to nothing to draw from
LEAST_REPEATS = 3


@dataclass(frozen=True)
class Spread:
    """Seconds over the repeats: the median and the quartiles."""

    median: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Spread:
        """Median and quartiles of `seconds`."""
        low, middle, high = np.quantile(seconds, [0.25, 0.5, 0.75])
        return cls(float(middle), float(low), float(high), len(seconds))


@dataclass(frozen=True)
class ModelLatency:
    """One model's times, and what it takes in memory."""

    name: str
    #: how it runs: dense, quantized, with an adapter that is not merged
    kind: str
    dtype: str
    #: seconds for the whole prompt
    prefill: Spread
    #: seconds for one more token of every sequence; None without a cache
    decode: Spread | None
    #: times as fast as the baseline: its median over this one, with a paired bootstrap interval; None for the baseline
    prefill_ratio: Measure | None
    decode_ratio: Measure | None
    #: parameters and buffers as they lie in memory
    weight_bytes: int
    #: the peak of cache and activations beside them
    working_bytes: int
    prefill_seconds: tuple[float, ...]
    decode_seconds: tuple[float, ...]


@dataclass(frozen=True)
class Latency:
    """The times of several models from one run."""

    baseline: str
    prompt: int
    generate: int
    batch: int
    repeats: int
    warm_up: int
    models: tuple[ModelLatency, ...]
    machine: Machine
    #: what the ratios say, and against which baseline
    sentences: tuple[str, ...]
    #: what to mind when reading them
    notes: tuple[str, ...]


def measure(
    models: Mapping[str, Any],
    *,
    baseline: str,
    prompt: int = 128,
    generate: int = 32,
    batch: int = 1,
    repeats: int = 9,
    warm_up: int = 2,
    threads: int | None = None,
    seed: int = 0,
    advance: Callable[[], None] | None = None,
) -> Latency:
    """The times of `models`, each against the one called `baseline`, from `repeats` interleaved turns.

    A prompt of (batch, prompt) tokens is read, then `generate` tokens are decoded one by one. Models without a cache
    (encoders, classifiers) are timed on the prompt alone. Models stay where they are and as they are; `threads` holds
    during the measurement only. `advance()` is called after every turn.

    Raises:
        ConfigError: no second model, no such baseline, impossible numbers, sequences longer than a model takes; all
            at once.
    """
    faults = _faults(models, baseline, prompt, generate, batch, repeats, warm_up, threads)
    if faults:
        raise ConfigError("cannot measure: " + "; ".join(faults))
    ids = _tokens(models, batch, prompt, seed)
    decodes = {name: generate if _has_cache(model) else 0 for name, model in models.items()}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    working: dict[str, int] = {}
    before = load()
    with torch.no_grad(), _undisturbed(models, threads):
        used = torch.get_num_threads()
        for turn in range(warm_up + repeats):
            for name, model in models.items():
                if turn == 0:
                    # what is made once (packed weights, compiled kernels) is made before memory is looked at
                    _turn(model, ids, min(1, decodes[name]))
                    with Peak(ids.device) as peak:
                        _turn(model, ids, decodes[name])
                    working[name] = peak.bytes
                taken = _turn(model, ids, decodes[name])
                if turn >= warm_up:
                    times[name].append(taken)
                if advance is not None:
                    advance()
    results = tuple(
        _result(name, model, times, baseline, working[name], decodes) for name, model in models.items()
    )
    where = machine(str(ids.device), used, before)
    return Latency(
        baseline=baseline,
        prompt=prompt,
        generate=generate,
        batch=batch,
        repeats=repeats,
        warm_up=warm_up,
        models=results,
        machine=where,
        sentences=_sentences(results, baseline),
        notes=_notes(results, baseline, where, generate),
    )


def _turn(model: Any, ids: Tensor, generate: int) -> tuple[float, float]:
    """Seconds of the prompt, and of one of `generate` tokens after it (nan without any)."""
    options: dict[str, Any] = {}
    if generate:
        options["use_cache"] = True
    if "logits_to_keep" in _forward_options(model):
        options["logits_to_keep"] = 1  # as `generate` does: the prompt's other logits are of no use
    _wait(ids)
    start = time.perf_counter()
    output = model(input_ids=ids, **options)
    _wait(ids)
    middle = time.perf_counter()
    for _ in range(generate):
        token = output.logits[:, -1:].argmax(-1)
        output = model(input_ids=token, past_key_values=output.past_key_values, use_cache=True)
    _wait(ids)
    end = time.perf_counter()
    return middle - start, (end - middle) / generate if generate else float("nan")


def _wait(ids: Tensor) -> None:
    if ids.is_cuda:
        torch.cuda.synchronize(ids.device)


def _inner(model: Any) -> Any:
    """The Transformers model inside a PEFT model, or `model` itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _forward_options(model: Any) -> Any:
    return inspect.signature(_inner(model).forward).parameters


def _has_cache(model: Any) -> bool:
    inner = _inner(model)
    return inner.can_generate() and "past_key_values" in _forward_options(model)


def _tokens(models: Mapping[str, Any], batch: int, prompt: int, seed: int) -> Tensor:
    """Random ids (batch, prompt) that every model knows, on the models' device."""
    size = min(_text_config(model).vocab_size for model in models.values())
    ids = torch.randint(0, size, (batch, prompt), generator=torch.Generator().manual_seed(seed))
    return ids.to(next(iter(models.values())).device)


def _text_config(model: Any) -> Any:
    return _inner(model).config.get_text_config()


@contextmanager
def _undisturbed(models: Mapping[str, Any], threads: int | None) -> Iterator[None]:
    """Models in evaluation mode, `threads` threads, and no garbage collection in between; all put back afterwards."""
    training, had = {name: model.training for name, model in models.items()}, torch.get_num_threads()
    collected = gc.isenabled()
    for model in models.values():
        model.eval()
    if threads is not None:
        torch.set_num_threads(threads)
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if collected:
            gc.enable()
        torch.set_num_threads(had)
        for name, model in models.items():
            model.train(training[name])


def _faults(
    models: Mapping[str, Any],
    baseline: str,
    prompt: int,
    generate: int,
    batch: int,
    repeats: int,
    warm_up: int,
    threads: int | None,
) -> list[str]:
    faults = []
    if len(models) < 2:
        faults.append(
            "a time means little alone, so at least two models are measured, one of them the baseline"
        )
    if models and baseline not in models:
        known = ", ".join(models)
        faults.append(f"no model is called {baseline!r}{did_you_mean(baseline, models)}; there are {known}")
    limits = [
        ("prompt", prompt, 1), ("generate", generate, 0), ("batch", batch, 1), ("repeats", repeats, LEAST_REPEATS),
        ("warm_up", warm_up, 0), ("threads", 1 if threads is None else threads, 1),
    ]  # fmt: skip
    faults += [
        f"{name} = {value}, must be at least {least}" for name, value, least in limits if value < least
    ]
    places = {name: str(model.device) for name, model in models.items()}
    if len(set(places.values())) > 1:
        faults.append(
            f"the models lie on different devices: {', '.join(f'{n} on {p}' for n, p in places.items())}"
        )
    for name, model in models.items():
        if _inner(model).config.is_encoder_decoder:
            faults.append(f"{name} has an encoder and a decoder, which this does not time")
            continue
        longest = getattr(_text_config(model), "max_position_embeddings", None)
        wanted = prompt + generate if _has_cache(model) else prompt
        if longest is not None and wanted > longest:
            split = f" (prompt {prompt} + generate {generate})" if wanted > prompt else ""
            faults.append(f"{name} takes sequences of up to {longest} tokens, not {wanted}{split}")
    return faults


def _result(
    name: str,
    model: Any,
    times: Mapping[str, list[tuple[float, float]]],
    baseline: str,
    working: int,
    decodes: Mapping[str, int],
) -> ModelLatency:
    prefill, decode = (tuple(column) for column in zip(*times[name], strict=True))
    base_prefill, base_decode = (tuple(column) for column in zip(*times[baseline], strict=True))
    compared = name != baseline
    return ModelLatency(
        name=name,
        kind=_kind(model),
        dtype=str(_inner(model).dtype).removeprefix("torch."),
        prefill=Spread.of(prefill),
        decode=Spread.of(decode) if decodes[name] else None,
        prefill_ratio=ratio(base_prefill, prefill) if compared else None,
        decode_ratio=ratio(base_decode, decode) if compared and decodes[name] and decodes[baseline] else None,
        weight_bytes=weight_bytes(model),
        working_bytes=working,
        prefill_seconds=prefill,
        decode_seconds=decode if decodes[name] else (),
    )


def ratio(baseline: Sequence[float], seconds: Sequence[float]) -> Measure:
    """How many times as fast as the baseline: the ratio of the medians, bootstrapped over whole rounds.

    Both sides of a round are drawn together, so that a load that slowed both cancels out.
    """
    return bootstrap(
        (np.asarray(baseline), np.asarray(seconds)), lambda b, s: float(np.median(b) / np.median(s))
    )


def _kind(model: Any) -> str:
    inner = _inner(model)
    stored = getattr(inner.config, "quantization_config", None)
    method = stored.get("quant_method") if isinstance(stored, dict) else getattr(stored, "quant_method", None)
    kind = f"quantized ({getattr(method, 'value', method)})" if stored is not None else "dense"
    if getattr(inner.config, "modicum", None):
        kind = f"{kind} sub-network"
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    if any(not layer.merged and not layer.disable_adapters for layer in layers):
        kind = f"{kind} with an adapter that is not merged"
    return kind


def _sentences(results: Sequence[ModelLatency], baseline: str) -> tuple[str, ...]:
    base = next(result for result in results if result.name == baseline)
    sentences = []
    for result in results:
        if result is base:
            continue
        ratios = (("prefill", result.prefill_ratio), ("decode", result.decode_ratio))
        parts = [_speed(what, found) for what, found in ratios if found is not None]
        sentences.append(
            f"{result.name} ({result.kind}) against the baseline {base.name} ({base.kind}): {'; '.join(parts)}."
        )
    if "not merged" in base.kind:
        sentences.append(
            f"The baseline {base.name} carries an adapter that is not merged, which takes time of its own: against the "
            "merged model the same ratios would be lower."
        )
    return tuple(sentences)


def _speed(what: str, found: Measure) -> str:
    assert found.low is not None
    assert found.high is not None
    text = f"{what} {found.value:.2f} times as fast [{found.low:.2f}, {found.high:.2f}]"
    return f"{text}, no difference shown" if found.low <= 1 <= found.high else text


def _notes(results: Sequence[ModelLatency], baseline: str, where: Machine, generate: int) -> tuple[str, ...]:
    notes = []
    if where.threads > where.cores:
        notes.append(
            f"{where.threads} threads on {where.cores} cores: threads wait for each other, times are slow and uneven"
        )
    # our own threads count towards the load afterwards, not before
    if where.load_before is not None and where.load_before > where.cores / 2:
        notes.append(
            f"the machine was busy (load {where.load_before:.1f} on {where.cores} cores before the start): trust the "
            "ratios, not the seconds"
        )
    lacking = [result.name for result in results if result.decode is None]
    if generate and lacking:
        notes.append(f"no cache to decode with, so prefill only: {', '.join(lacking)}")
    base = next(result for result in results if result.name == baseline)
    other = [f"{r.name} ({r.dtype})" for r in results if r.dtype != base.dtype]
    if other:
        notes.append(f"number types differ from the baseline's {base.dtype}: {', '.join(other)}")
    return tuple(notes)
