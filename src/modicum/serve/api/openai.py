"""The routes of the OpenAI API: completions, chats and models."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from modicum.errors import NotStoredError
from modicum.serve.api.access import Caller
from modicum.serve.api.body import read_object
from modicum.serve.api.call import Call, Wanted
from modicum.serve.api.errors import ApiError
from modicum.serve.api.schemas import ChatBody, CompletionBody, parse
from modicum.serve.api.shapes import Chat, Completion, Frame, Gathered, Shape, whole
from modicum.serve.api.watched import Events, Json
from modicum.serve.engine.interface import Sampling
from modicum.serve.text import chat_prompt, text_prompt

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Sequence

    from modicum.serve.api.call import Tokens
    from modicum.serve.keys import Key
    from modicum.serve.service import Service

#: tokens of a completion where no number is asked for, as in the OpenAI API
_COMPLETION_TOKENS = 16
#: what asking for embeddings is answered with
_NO_EMBEDDINGS = "embeddings_not_supported"
#: models that are listed; all others are found by name
_MOST_LISTED = 1000

Body = ChatBody | CompletionBody


def router(service: Service) -> APIRouter:
    """`/v1/completions`, `/v1/chat/completions`, `/v1/models`, and why there is no `/v1/embeddings`."""
    routes = APIRouter(prefix="/v1")

    @routes.post("/completions")
    async def completions(request: Request, key: Caller) -> Response:
        return await _answer(service, request, key, CompletionBody)

    @routes.post("/chat/completions")
    async def chats(request: Request, key: Caller) -> Response:
        return await _answer(service, request, key, ChatBody)

    @routes.post("/embeddings")
    async def embeddings(key: Caller) -> Response:
        """There are none here; clients that ask learn why, see docs/design/serving.md."""
        service.metrics.request(key.name).done("refused", error=_NO_EMBEDDINGS)
        raise ApiError(
            404,
            "there are no embeddings here: models that generate text are served, and no hidden states are told. Ask "
            "/v1/completions or /v1/chat/completions, or a server of encoders",
            code=_NO_EMBEDDINGS,
        )

    @routes.get("/models")
    async def models(key: Caller) -> dict[str, Any]:
        base = service.settings.base_name
        names = [base] if key.base else []
        names += await service.names.visible(key.adapters, limit=_MOST_LISTED)
        return {"object": "list", "data": [_model(name) for name in names]}

    @routes.get("/models/{model:path}")
    async def model(model: str, key: Caller) -> dict[str, Any]:
        base = service.settings.base_name
        try:
            await service.names.resolve(
                model, lambda name: key.base if name == base else key.sees(name), None
            )
        except NotStoredError as error:
            raise ApiError(404, str(error), param="model", code="model_not_found") from error
        return _model(model)

    return routes


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "modicum"}


async def _answer(service: Service, request: Request, key: Key, schema: type[Body]) -> Response:
    try:
        body = parse(schema, await read_object(request))
    except ApiError as error:
        service.metrics.request(key.name).done("refused", error=error.code)
        raise
    wanted, shape = _wanted(service, body), Chat() if isinstance(body, ChatBody) else Completion()
    call = Call(service, key, replace(wanted, traceparent=request.headers.get("traceparent")), shape.kind)
    if not body.stream:
        return Json(_whole(call, shape))
    usage = body.stream_options is not None and body.stream_options.include_usage
    return Events(_events(call, shape, usage=usage))


async def _events(call: Call, shape: Shape, *, usage: bool) -> AsyncGenerator[bytes]:
    """The answer as server-sent events."""
    async with contextlib.aclosing(call.pieces()) as pieces:
        frame = None
        async for piece in pieces:
            # the version that answers is known with the first piece
            frame = frame or Frame(call, shape, usage=usage)
            if events := frame.events(piece):
                yield events
    assert frame is not None, "every answer has a last piece"
    yield frame.end(usage=usage)


async def _whole(call: Call, shape: Shape) -> dict[str, Any]:
    """The answer at once."""
    answers: defaultdict[int, Gathered] = defaultdict(Gathered)
    async with contextlib.aclosing(call.pieces()) as pieces:
        async for piece in pieces:
            answers[piece.index].add(piece)
    return whole(call, shape, [answers[index] for index in sorted(answers)])


def _wanted(service: Service, body: Body) -> Wanted:
    """What a body means."""
    sampling = Sampling(
        max_tokens=1,
        temperature=1.0 if body.temperature is None else body.temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        seed=body.seed,
        logprobs=body.alternatives(),
        ignore_eos=body.ignore_eos,
    )
    tokenizer = service.tokenizer
    if isinstance(body, ChatBody):
        messages = [message.plain() for message in body.messages]
        size, field, most = sum(len(message["content"]) for message in messages), "messages", body.most()

        def prompts() -> Sequence[Tokens]:
            return [chat_prompt(tokenizer, messages)]
    else:
        given = body.prompts()
        size, field, most = sum(map(len, given)), "prompt", body.max_tokens or _COMPLETION_TOKENS

        def prompts() -> Sequence[Tokens]:
            return [_tokens(tokenizer, prompt) for prompt in given]

    return Wanted(body.model, prompts, size, field, sampling, most, body.n or 1, body.stops(), body.user)


def _tokens(tokenizer: Any, prompt: str | list[int]) -> Tokens:
    return text_prompt(tokenizer, prompt) if isinstance(prompt, str) else tuple(prompt)
