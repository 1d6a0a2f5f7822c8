"""What may be asked of an engine: settings that fit the model, requests that fit both, and when to come back."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Any, get_args

from modicum.errors import ConfigError, did_you_mean
from modicum.models.loading import Dtype

if TYPE_CHECKING:
    from modicum.serve.engine.interface import Request
    from modicum.serve.settings import EngineSettings

#: tokens of a page of keys and values: what is shared is a whole number of them
PAGE = 16
_COUNTS = ("max_batch", "max_batch_tokens", "slots", "max_rank")


def known_dtype(name: str) -> Any:
    """`name`, if weights can be loaded as such.

    Raises:
        ConfigError: they cannot.
    """
    known = get_args(Dtype)
    if name not in known:
        raise ConfigError(f"no dtype {name!r}{did_you_mean(name, known)}; there are {', '.join(known)}")
    return name


def longest(model: Any, settings: EngineSettings) -> int:
    """The longest sequence, in tokens, that model, cache and settings allow.

    Raises:
        ConfigError: settings that do not fit the model or each other.
    """
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    cache = settings.cache_tokens // PAGE * PAGE
    wanted = settings.max_length
    wrong = [
        f"{name} is {getattr(settings, name)}, at least 1 is needed"
        for name in _COUNTS
        if getattr(settings, name) < 1
    ]
    if cache < PAGE:
        wrong.append(f"cache_tokens is {settings.cache_tokens}, at least {PAGE} are needed")
    for limit, what in ((positions, "the model allows"), (cache, "cache_tokens hold")):
        if wanted is not None and limit is not None and not 1 < wanted <= limit:
            wrong.append(f"max_length is {wanted}; from 2 to {limit} is what {what}")
    if wrong:
        raise ConfigError("; ".join(wrong))
    return min(limit for limit in (wanted, positions, cache) if limit is not None)


def check(request: Request, longest: int, vocabulary: int) -> None:
    """Returns if an engine with sequences of up to `longest` tokens of `vocabulary` can take up the request.

    Raises:
        ConfigError: it cannot, and why.
    """
    sampling, length, wrong = request.sampling, len(request.prompt), []
    if not length:
        wrong.append("the prompt is empty")
    if sampling.max_tokens < 1:
        wrong.append(f"max_tokens is {sampling.max_tokens}, at least 1 is needed")
    if length + sampling.max_tokens > longest:
        asked = f"{length} tokens of prompt and {sampling.max_tokens} of answer"
        wrong.append(f"{asked} are more than the {longest} that fit")
    if not 0 <= sampling.temperature < math.inf:
        wrong.append(f"temperature is {sampling.temperature}, which is not in [0, ∞)")
    if not 0 < sampling.top_p <= 1:
        wrong.append(f"top_p is {sampling.top_p}, which is not in (0, 1]")
    if sampling.logprobs is not None and not 0 <= sampling.logprobs <= vocabulary:
        wrong.append(f"logprobs is {sampling.logprobs}, which is not in [0, {vocabulary}]")
    strange = next((token for token in request.prompt if not 0 <= token < vocabulary), None)
    if strange is not None:
        wrong.append(f"the prompt holds {strange}, tokens are 0 … {vocabulary - 1}")
    if wrong:
        raise ConfigError("; ".join(wrong))


class Pace:
    """How fast requests end, which is how fast places become free."""

    def __init__(self) -> None:
        self._last: float | None = None
        self._mean = 0.1

    def one(self) -> None:
        """One has ended."""
        now = time.monotonic()
        if self._last is not None:
            self._mean += 0.1 * (now - self._last - self._mean)
        self._last = now

    def seconds(self, count: int) -> float:
        """About how long until so many more have ended, between a second and a minute."""
        return min(60.0, max(1.0, count * self._mean))
