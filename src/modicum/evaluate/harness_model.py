"""The model as lm-evaluation-harness sees it, answering for one adapter after the other."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F

from modicum.evaluate.mixing import in_order, routed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from modicum.evaluate.protocols import Subject

    #: the tokens of a context and of a continuation, behind the text of both
    Request = tuple[Any, list[int], list[int]]
    #: the summed log-likelihood of a continuation, and whether it is what the model itself would say
    Score = tuple[float, bool]


def library_model(kind: Any, subject: Subject, places: Sequence[int], batch_size: int) -> Any:
    """A model of the library's class `kind` (HFLM) with a method `answer_for(place)` that says for which adapter.

    Log-likelihoods are computed for all adapters at `places` at the first request, in batches that they share;
    what is generated is generated for one after the other. With a single adapter everything is the library's.
    """
    options = {"tokenizer": subject.tokenizer, "backend": "causal", "batch_size": batch_size}

    class OneByOne(kind):
        def answer_for(self, place: int) -> None:
            self.place = place
            if subject.routes:
                subject.model.set_adapter(subject.routes[place])

    if not subject.routes:
        return OneByOne(pretrained=subject.model, **options)

    class Shared(OneByOne):
        asked: tuple[list[tuple[list[int], list[int]]], dict[int, list[Score]]] = ([], {})

        def _loglikelihood_tokens(self, requests: list[Request], *_: Any, **__: Any) -> list[Score]:
            tokens = [(context, continuation) for _, context, continuation in requests]
            if self.asked[0] != tokens:
                self.asked = tokens, _scores(subject, places, tokens, batch_size, self.max_length)
                self.answer_for(self.place)  # the last batch may have been another adapter's
            return self.asked[1][self.place]

    return Shared(pretrained=subject.model, **options)


def _scores(
    subject: Subject,
    places: Sequence[int],
    requests: Sequence[tuple[list[int], list[int]]],
    batch_size: int,
    longest: int,
) -> dict[int, list[Score]]:
    """The scores of all requests for the adapters at `places`, as the library computes them for one.

    Input is context and continuation without its last token, cut on the left to `longest`; requests with the same
    input (single-token answers to one question) share a row.
    """
    sharing: dict[tuple[int, ...], list[int]] = {}
    for number, (context, continuation) in enumerate(requests):
        sharing.setdefault(tuple([*context, *continuation][-longest - 1 : -1]), []).append(number)
    inputs = list(sharing)
    rows = [(place, index) for place in places for index in range(len(inputs))]
    order = in_order([len(inputs[index]) for _, index in rows], [place for place, _ in rows])
    found: dict[int, list[Score]] = {place: [(0.0, False)] * len(requests) for place in places}
    for at in range(0, len(order), batch_size):
        chosen = [rows[number] for number in order[at : at + batch_size]]
        texts = [torch.tensor(inputs[index], device=subject.model.device) for _, index in chosen]
        # what stands behind a text does not change what the model says of it
        ids = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
        with torch.no_grad():
            told = routed(subject.model, subject.names(place for place, _ in chosen))
            logits = subject.model(input_ids=ids, **told).logits
        for (place, index), text, row in zip(chosen, texts, logits, strict=True):
            for number in sharing[inputs[index]]:
                wanted = torch.tensor(requests[number][1], device=row.device)
                scores = F.log_softmax(row[len(text) - len(wanted) : len(text)], dim=-1)
                said = bool((scores.argmax(-1) == wanted).all())
                found[place][number] = scores.gather(1, wanted[:, None]).sum().item(), said
    return found
