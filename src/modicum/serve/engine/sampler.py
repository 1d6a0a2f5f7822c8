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
        rows = [self._table.live(name) for name in self._names]
        if any(rows):
            self._choose(scores[: len(rows)], rows)
        return scores

    def _choose(self, scores: Tensor, rows: list[Running | None]) -> None:
        best, indices = scores.max(-1)
        tokens: dict[int, int] = dict(enumerate(indices.tolist()))
        # a row's largest is NaN if any is; −∞ only rules tokens out
        sound = best.isfinite().tolist()
        wrong: dict[int, str] = {}
        drawn, told = [], []
        for i, row in enumerate(rows):
            if row is None:
                continue
            if not sound[i]:
                wrong[i] = "its numbers were not finite"
            elif row.generator is not None:
                drawn.append(i)
            told.append(i)
        for i, found in zip(drawn, _draw_safely(scores, drawn, rows), strict=True):
            if isinstance(found, int):
                tokens[i] = found
            else:
                wrong[i] = found
        self._tell(scores, rows, told, tokens, wrong)
        for i in drawn:
            scores[i, tokens[i]] = torch.inf

    def _tell(
        self,
        scores: Tensor,
        rows: list[Running | None],
        told: list[int],
        tokens: dict[int, int],
        wrong: dict[int, str],
    ) -> None:
        known = _probabilities(scores, {i: rows[i] for i in told if i not in wrong}, tokens)
        news: list[tuple[Running, Step | GenerationError]] = []
        for i in told:
            row = rows[i]
            if row is None:
                continue
            if i in wrong:
                if self._table.end(row):
                    news.append((row, failure(row, wrong[i])))
                continue
            row.told += 1
            finish = self._finish(row, tokens[i])
            logprob, top = known.get(i, (None, ()))
            if finish is None or self._table.end(row, forget=False):
                news.append((row, Step(tokens[i], logprob, top, finish, row.cached if row.told == 1 else 0)))
        self._counts.generated_tokens += len(news) - len(wrong)
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


def _draw_safely(scores: Tensor, places: list[int], rows: list[Running | None]) -> list[int | str]:
    """Tokens, or why there is none: what goes wrong with one request must not reach the others."""
    if not places:
        return []
    try:
        return [*_draw(scores[places], [row for i in places if (row := rows[i]) is not None])]
    except Exception as error:  # noqa: BLE001 - whatever it is
        if len(places) == 1:
            return [f"{type(error).__name__}: {error}"]
        return [_draw_safely(scores, [i], rows)[0] for i in places]


def _draw(scores: Tensor, rows: list[Running]) -> list[int]:
    columns = [
        (
            row.request.sampling.temperature,
            row.request.sampling.top_p,
            torch.rand((), generator=row.generator, dtype=torch.float64).item(),
        )
        for row in rows
    ]
    temperatures, top_p, uniform = torch.tensor(columns, dtype=torch.float64, device=scores.device).unbind(-1)
    return draw(scores, temperatures.float(), top_p.float(), uniform).tolist()


def _probabilities(
    scores: Tensor, rows: dict[int, Running | None], tokens: dict[int, int]
) -> dict[int, tuple[float, tuple[tuple[int, float], ...]]]:
    """Of the rows that ask for them: the chosen token's log-probability, and the likeliest tokens with theirs."""
    counts = {
        i: row.request.sampling.logprobs
        for i, row in rows.items()
        if row is not None and row.request.sampling.logprobs is not None
    }
    if not counts:
        return {}
    places = list(counts)
    logs = scores[places].log_softmax(-1)
    chosen = logs.gather(-1, torch.tensor([[tokens[i]] for i in places], device=logs.device))[:, 0].tolist()
    values, indices = logs.topk(max(count or 0 for count in counts.values()), -1)
    likely = [list(zip(*pair, strict=True)) for pair in zip(indices.tolist(), values.tolist(), strict=True)]
    return {i: (one, tuple(found[: counts[i]])) for i, one, found in zip(places, chosen, likely, strict=True)}
