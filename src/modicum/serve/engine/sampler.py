"""Choosing tokens: every row of a batch by the rules and the random numbers of its own request.

Random tokens are drawn by inversion, token = min {t : Σ_{i≤t} p_i > u}, with one u of the request's own generator
and tokens in the order of the vocabulary. What else is in the batch changes the p_i in their last digits, and the
token with a probability of that size; an order by size would let near ties change places.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingLogitsProcessor

from modicum.serve.engine.interface import GenerationError, Step
from modicum.serve.engine.running import tell

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor
    from transformers.generation.continuous_batching.requests import FutureRequestState

    from modicum.serve.engine.batching import Counts
    from modicum.serve.engine.interface import Reason
    from modicum.serve.engine.running import Running, Table


class Sampler(ContinuousBatchingLogitsProcessor):
    """Stands where Transformers' processors of logits stand: chooses, tells, and leaves the chosen ones largest."""

    supported_kwargs: dict[str, type] = {}  # noqa: RUF012 - as the base class has it
    ignored_kwargs: tuple[str, ...] = ()

    def __init__(self, table: Table, counts: Counts, eos_token_ids: Sequence[int]) -> None:
        self._table, self._counts = table, counts
        self._eos = frozenset(eos_token_ids)
        self._names: list[str] = []

    def fill_defaults(self, int32_tensor: Tensor) -> None:
        """Nothing is kept in tensors."""
        int32_tensor.zero_()

    def prepare_tensor_args(self, requests_with_new_token: list[FutureRequestState]) -> Tensor:
        """An empty tensor: what is needed is found by name, and whose rows come next is noted here."""
        self._names = [request.state.request_id for request in requests_with_new_token]
        return torch.zeros(0, dtype=torch.int32)

    def __call__(self, scores: Tensor, tensor_arg: Tensor) -> Tensor:  # noqa: ARG002 - as the base class has it
        """`scores` (rows, vocabulary) with each row's token the largest; rows behind ours are padding."""
        live = {i: row for i, name in enumerate(self._names) if (row := self._table.live(name)) is not None}
        if live:
            self._choose(scores[: len(self._names)], live)
        return scores

    def _choose(self, scores: Tensor, rows: dict[int, Running]) -> None:
        best, indices = scores.max(-1)
        #: tokens, or why there is none
        chosen: list[int | str] = indices.tolist()
        # a row's largest is NaN if any is; −∞ only rules tokens out
        for i, finite in enumerate(best.isfinite().tolist()):
            if not finite:
                chosen[i] = "its numbers were not finite"
        drawn = [i for i, row in rows.items() if row.generator is not None and isinstance(chosen[i], int)]
        if drawn:
            for i, found in zip(drawn, _drawn(scores[drawn], [rows[i] for i in drawn]), strict=True):
                chosen[i] = found
        self._tell(scores, rows, chosen)
        for i in drawn:
            if isinstance(token := chosen[i], int):
                scores[i, token] = torch.inf

    def _tell(self, scores: Tensor, rows: dict[int, Running], chosen: list[int | str]) -> None:
        tokens = {i: token for i in rows if isinstance(token := chosen[i], int)}
        known = _probabilities(scores, rows, tokens)
        news: list[tuple[Running, Step | GenerationError]] = []
        for i, row in rows.items():
            if i not in tokens:
                if self._table.end(row):
                    news.append((row, failure(row, str(chosen[i]))))
                continue
            row.told += 1
            finish = self._finish(row, tokens[i])
            step = Step(tokens[i], *known.get(i, (None, ())), finish, row.cached if row.told == 1 else 0)
            # one that has finished is forgotten when its pages are
            if finish is None or self._table.end(row, forget=False):
                news.append((row, step))
        self._counts.generated_tokens += len(tokens)
        tell(news)

    def _finish(self, row: Running, token: int) -> Reason | None:
        sampling = row.request.sampling
        if token in self._eos and not sampling.ignore_eos:
            return "stop"
        return "length" if row.told >= sampling.max_tokens else None


def failure(row: Running, why: str) -> GenerationError:
    """What is told of a request that cannot go on."""
    whose = "the base model" if row.request.version is None else f"the adapter {row.request.version}"
    return GenerationError(f"{whose} could not go on after {row.told} tokens: {why}")


def draw(scores: Tensor, temperatures: Tensor, top_p: Tensor, uniform: Tensor) -> Tensor:
    """Tokens (n) drawn from softmax(scores / temperature), of which the likeliest that hold `top_p` are kept.

    `scores` (n, vocabulary) float32, the others (n); `uniform` float64 in [0, 1).
    """
    # the largest is 0 before it is divided, and stays so at any temperature
    shares = torch.softmax(
        (scores - scores.amax(-1, keepdim=True)) / temperatures[:, None].clamp(min=1e-6), -1
    )
    narrow = (top_p < 1).nonzero()[:, 0]
    if len(narrow):
        some = shares[narrow]
        ordered, places = some.sort(dim=-1, descending=True, stable=True)
        # a token stays as long as those before it hold less than top_p: the likeliest always does
        before = ordered.cumsum(-1) - ordered
        gone = (before >= top_p[narrow, None]) & (before > 0)
        shares[narrow] = some.masked_fill(torch.zeros_like(gone).scatter(-1, places, gone), 0)
    sums = shares.double().cumsum(-1)
    # the largest number below the whole, so that rounding cannot lead behind the last token that has a share
    wanted = (uniform * sums[:, -1]).clamp(max=sums[:, -1] * (1 - 1e-12))
    return torch.searchsorted(sums, wanted[:, None], right=True)[:, 0]


def _drawn(scores: Tensor, rows: list[Running]) -> list[int | str]:
    """Tokens, or why there is none: what goes wrong with one request must not reach the others."""
    columns = [
        (
            row.request.sampling.temperature,
            row.request.sampling.top_p,
            torch.rand((), generator=row.generator, dtype=torch.float64).item(),
        )
        for row in rows
    ]
    temperatures, top_p, uniform = torch.tensor(columns, dtype=torch.float64, device=scores.device).unbind(-1)
    given = scores, temperatures.float(), top_p.float(), uniform
    try:
        return draw(*given).tolist()
    except Exception:  # noqa: BLE001 - whatever it is, it belongs to one of them
        return [_drawn_alone(*(part[i : i + 1] for part in given)) for i in range(len(rows))]


def _drawn_alone(*given: Tensor) -> int | str:
    try:
        return int(draw(*given))
    except Exception as error:  # noqa: BLE001 - told to the one that it belongs to
        return f"{type(error).__name__}: {error}"


def _probabilities(
    scores: Tensor, rows: dict[int, Running], tokens: dict[int, int]
) -> dict[int, tuple[float, tuple[tuple[int, float], ...]]]:
    """Of the rows that ask for them: the token's log-probability, and the likeliest tokens with theirs."""
    counts = {i: wanted for i in tokens if (wanted := rows[i].request.sampling.logprobs) is not None}
    if not counts:
        return {}
    places = list(counts)
    logs = scores[places].log_softmax(-1)
    chosen = logs.gather(-1, torch.tensor([[tokens[i]] for i in places], device=logs.device))[:, 0].tolist()
    values, indices = logs.topk(max(counts.values()), -1)
    likely = [list(zip(*pair, strict=True)) for pair in zip(indices.tolist(), values.tolist(), strict=True)]
    return {i: (one, tuple(found[: counts[i]])) for i, one, found in zip(places, chosen, likely, strict=True)}
