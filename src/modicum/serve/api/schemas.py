"""What may be asked for, by the names of the OpenAI API; all else is refused by name or, where harmless, ignored."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    model_validator,
)

from modicum.errors import did_you_mean
from modicum.serve.api.errors import ApiError

#: what there is not, and the values that ask for nothing of it
_REFUSED: dict[str, tuple[str, tuple[Any, ...]]] = {
    "audio": ("audio", ()),
    "best_of": ("choosing among answers", (1,)),
    "echo": ("repeating the prompt", (False,)),
    "frequency_penalty": ("penalties", (0,)),
    "function_call": ("calling functions", ("none", "auto")),
    "functions": ("calling functions", ([],)),
    "logit_bias": ("biases of tokens", ({},)),
    "modalities": ("anything but text", (["text"],)),
    "prediction": ("predicted answers", ()),
    "presence_penalty": ("penalties", (0,)),
    "response_format": ("anything but text", ({"type": "text"},)),
    "suffix": ("filling in", ("",)),
    "tool_choice": ("tools", ("none", "auto")),
    "tools": ("tools", ([],)),
    "web_search_options": ("search", ()),
}
#: what changes no answer here
_IGNORED = {
    "metadata", "moderation", "parallel_tool_calls", "prompt_cache_key", "prompt_cache_options",
    "prompt_cache_retention", "reasoning_effort", "safety_identifier", "service_tier", "store", "verbosity",
}  # fmt: skip
#: sequences that one request may start
MOST_SEQUENCES = 128

_FEW = Field(min_length=1, max_length=MOST_SEQUENCES, fail_fast=True)
Ids = Annotated[list[Annotated[int, Field(ge=0, lt=1 << 31)]], Field(min_length=1, fail_fast=True)]
Text = Annotated[str, StringConstraints(min_length=1, max_length=1000)]
Schema = TypeVar("Schema", bound=BaseModel)


class StreamOptions(BaseModel):
    """What a stream has besides the answer."""

    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool = False
    include_obfuscation: bool = False


class Common(BaseModel):
    """What both endpoints take."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: Annotated[str, StringConstraints(min_length=1, max_length=500)]
    max_tokens: Annotated[int, Field(ge=1, le=1 << 31)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=MOST_SEQUENCES)] | None = None
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] | None = None
    stop: Text | Annotated[list[Text], Field(max_length=16)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    #: whose request it is; in an experiment the same user always gets the same arm
    user: Annotated[str, StringConstraints(max_length=1000)] | None = None
    #: not of the OpenAI API: go on behind the end of the text, for measurements
    ignore_eos: bool = False

    def stops(self) -> tuple[str, ...]:
        """The texts before which an answer ends."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class CompletionBody(Common):
    """The body of `/v1/completions`."""

    prompt: str | Ids | Annotated[list[str], _FEW] | Annotated[list[Ids], _FEW]
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    def alternatives(self) -> int | None:
        """How many of the likeliest tokens are told; None: nothing of probabilities at all."""
        return self.logprobs

    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts, of which there may be several."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]  # pyright: ignore[reportReturnType], all are, or none
        return self.prompt  # pyright: ignore[reportReturnType], likewise


class Part(BaseModel):
    """A part of a message; only text is understood."""

    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """One message of a chat."""

    model_config = ConfigDict(extra="forbid", strict=True)

    role: str
    content: str | list[Part]
    name: str | None = None

    def plain(self) -> dict[str, str]:
        """The message as chat templates take it."""
        content = (
            self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        )
        return {"role": self.role, "content": content}


class ChatBody(Common):
    """The body of `/v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=10_000)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=1 << 31)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @model_validator(mode="after")
    def _consistent(self) -> ChatBody:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs = true")
        return self

    def alternatives(self) -> int | None:
        """How many of the likeliest tokens are told; None: nothing of probabilities at all."""
        return (self.top_logprobs or 0) if self.logprobs else None

    def most(self) -> int | None:
        """The most tokens that were asked for, by either name."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


def parse(schema: type[Schema], body: dict[str, Any]) -> Schema:
    """The body as `schema`.

    Raises:
        ApiError: 400 with everything that is wrong; `param` is the first of it.
    """
    wrong = []
    for name, (what, neutral) in _REFUSED.items():
        if body.get(name) is not None and body[name] not in neutral:
            wrong.append((name, f"{name}: there is no support for {what}"))
    known = {name: value for name, value in body.items() if name not in _REFUSED and name not in _IGNORED}
    parsed = None
    try:
        parsed = schema.model_validate(known)
    except ValidationError as error:
        wrong += [_fault(schema, fault) for fault in error.errors(include_url=False, include_input=False)]
    if wrong or parsed is None:
        # a union tells of each of its members
        said = list(dict.fromkeys(text for _, text in wrong))
        raise ApiError(400, "; ".join(said[:10]), param=wrong[0][0], code="invalid_value")
    return parsed


def _fault(schema: type[BaseModel], fault: Any) -> tuple[str | None, str]:
    """The field at the top, and what is wrong where in it."""
    # where a field may be of several types, pydantic names the type it tried, too
    where = [
        part for part in fault["loc"] if isinstance(part, int) or (part.isidentifier() and part != "str")
    ]
    if not where:
        return None, fault["msg"]
    name = str(where[0])
    if fault["type"] == "extra_forbidden" and len(where) == 1:
        names = [*schema.model_fields, *_REFUSED, *_IGNORED]
        return name, f"there is no field {name[:100]!r}{did_you_mean(name[:100], names)}"
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in where[1:])
    return name, f"{name}{path}: {fault['msg']}"
