"""Answers in the shapes of the OpenAI API, whole and in pieces."""

from __future__ import annotations

import abc
import json
from typing import TYPE_CHECKING, Any, final

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from modicum.serve.api.call import Call, Piece
    from modicum.serve.engine.interface import Reason
    from modicum.serve.text import Token

DONE = b"data: [DONE]\n\n"
#: what the OpenAI API says of a token that is all but impossible; JSON has no infinity
_LOWEST = -9999.0


@final
class Gathered:
    """One answer, put together from its pieces."""

    def __init__(self) -> None:
        self._texts: list[str] = []
        self.tokens: list[Token] = []
        self.finish: Reason | None = None

    def add(self, piece: Piece) -> None:
        """Returns when the piece is in."""
        self._texts.append(piece.text)
        self.tokens += piece.tokens
        self.finish = piece.finish

    @property
    def text(self) -> str:
        """All of the text."""
        return "".join(self._texts)


class Shape(abc.ABC):
    """How an endpoint words its answers; abstract."""

    #: how ids begin, and what whole answers and pieces call themselves
    kind: str
    whole_object: str
    piece_object: str

    @abc.abstractmethod
    def choice(self, index: int, answer: Gathered) -> dict[str, Any]:
        """A whole answer."""

    @abc.abstractmethod
    def change(self, piece: Piece) -> str:
        """What a piece adds, as JSON; made by hand, because there is one for every token of every request."""

    def opening(self, index: int) -> str | None:
        """What comes before the first piece of an answer, if anything does."""
        del index
        return None


@final
class Completion(Shape):
    """`/v1/completions`."""

    kind, whole_object, piece_object = "cmpl", "text_completion", "text_completion"

    def choice(self, index: int, answer: Gathered) -> dict[str, Any]:
        """The text."""
        return {
            "index": index,
            "text": answer.text,
            "logprobs": _completion_logprobs(answer.tokens),
            "finish_reason": answer.finish,
        }

    def change(self, piece: Piece) -> str:
        """More of the text."""
        return (
            f'{{"index":{piece.index},"text":{json.dumps(piece.text)},'
            f'"logprobs":{_or_null(_completion_logprobs(piece.tokens))},"finish_reason":{_or_null(piece.finish)}}}'
        )


@final
class Chat(Shape):
    """`/v1/chat/completions`."""

    kind, whole_object, piece_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def choice(self, index: int, answer: Gathered) -> dict[str, Any]:
        """A message."""
        return {
            "index": index,
            "message": {"role": "assistant", "content": answer.text, "refusal": None},
            "logprobs": _chat_logprobs(answer.tokens),
            "finish_reason": answer.finish,
        }

    def opening(self, index: int) -> str | None:
        """Who speaks."""
        return f'{{"index":{index},"delta":{{"role":"assistant","content":""}},"logprobs":null,"finish_reason":null}}'

    def change(self, piece: Piece) -> str:
        """More of the message; the last piece may add nothing."""
        delta = f'{{"content":{json.dumps(piece.text)}}}' if piece.text or not piece.finish else "{}"
        return (
            f'{{"index":{piece.index},"delta":{delta},"logprobs":{_or_null(_chat_logprobs(piece.tokens))},'
            f'"finish_reason":{_or_null(piece.finish)}}}'
        )


@final
class Frame:
    """What is the same in all events of an answer."""

    def __init__(self, call: Call, shape: Shape, *, usage: bool) -> None:
        self._call, self._shape = call, shape
        self._head = "data: " + json.dumps(_about(call, shape.piece_object))[:-1]
        #: with `include_usage` every event has the field, and the last one has the numbers
        self._tail = ',"usage":null}\n\n' if usage else "}\n\n"
        self._opened: set[int] = set()

    def events(self, piece: Piece) -> bytes:
        """The events of a piece; empty, if it shows nothing yet."""
        if not (piece.text or piece.tokens or piece.finish):
            return b""
        events = [self._shape.change(piece)]
        if piece.index not in self._opened:
            self._opened.add(piece.index)
            events[:0] = filter(None, [self._shape.opening(piece.index)])
        return "".join(f'{self._head},"choices":[{choice}]{self._tail}' for choice in events).encode()

    def end(self, *, usage: bool) -> bytes:
        """The last events."""
        numbers = f'{self._head},"choices":[],"usage":{json.dumps(self._call.usage())}}}\n\n' if usage else ""
        return numbers.encode() + DONE


def whole(call: Call, shape: Shape, answers: Sequence[Gathered]) -> dict[str, Any]:
    """The body of an answer that is sent at once."""
    choices = [shape.choice(index, answer) for index, answer in enumerate(answers)]
    return _about(call, shape.whole_object) | {"choices": choices, "usage": call.usage()}


def _about(call: Call, what: str) -> dict[str, Any]:
    about = {"id": call.id, "object": what, "created": call.created, "model": call.model}
    return about | {"system_fingerprint": call.fingerprint}


def _completion_logprobs(tokens: Sequence[Token]) -> dict[str, Any] | None:
    if not tokens:
        return None
    return {
        "tokens": [token.text for token in tokens],
        "token_logprobs": [_told(token.logprob) for token in tokens],
        "top_logprobs": [{other.text: _told(other.logprob) for other in token.top} for token in tokens],
        "text_offset": [token.offset for token in tokens],
    }


def _chat_logprobs(tokens: Sequence[Token]) -> dict[str, Any] | None:
    if not tokens:
        return None
    return {"content": list(_chat_tokens(tokens)), "refusal": None}


def _chat_tokens(tokens: Sequence[Token]) -> Iterator[dict[str, Any]]:
    for token in tokens:
        top = [_chat_token(other) for other in token.top]
        yield _chat_token(token) | {"top_logprobs": top}


def _chat_token(token: Any) -> dict[str, Any]:
    return {"token": token.text, "logprob": _told(token.logprob), "bytes": list(token.bytes)}


def _told(logprob: float) -> float:
    return max(logprob, _LOWEST)


def _or_null(value: Any) -> str:
    return "null" if value is None else json.dumps(value)
