"""Prompts into tokens, and tokens into text while they come.

A token need not end where a character ends, and a stop string may span several tokens. So text is told when it is
certain: whole characters only, and nothing that may turn out to begin a stop string.
"""

from __future__ import annotations

import functools
import itertools
from collections import deque
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, final

from modicum.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from modicum.serve.engine.interface import Reason, Step

ROLES = ("system", "developer", "user", "assistant")
#: tokens of the prompt that the answer may be decoded behind: whether it begins with a blank depends on them
_CONTEXT = 6
#: a character has at most four bytes; tokens after which no character is waited for any more
_PATIENCE = 8
#: tokens that are decoded again with the next one: few cost time anew every time they are cut, many at every token
_KEPT = 8
_BROKEN = "�"


@dataclass(frozen=True)
class Token:
    """A token of an answer, or one that was likely in its place."""

    #: its text; of bytes that are no character by themselves, `bytes:\\xe2\\x82`
    text: str
    bytes: bytes
    logprob: float
    #: where it begins in the answer, in characters
    offset: int = 0
    #: the likeliest in its place, best first
    top: tuple[Token, ...] = ()


@final
class Answer:
    """The text of one answer, from its steps: `push` each, and read `tokens` and `finish` after it."""

    def __init__(self, tokenizer: Any, stops: Sequence[str] = (), prompt: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._stops = [stop for stop in stops if stop]
        self._decoder = _Decoder(tokenizer, prompt)
        #: certain, but perhaps the beginning of a stop string
        self._held = ""
        self._waiting: deque[tuple[Token, int]] = deque()
        #: all that was told
        self.text = ""
        #: tokens told with the last piece of text, where their log-probabilities were asked for
        self.tokens: tuple[Token, ...] = ()
        self.finish: Reason | None = None

    def push(self, step: Step) -> str:
        """What the step adds to the text; nothing more once there is a `finish`.

        The end token has no text. A stop string, and what stands behind it, is never told.
        """
        if self.finish is not None:
            self.tokens = ()
            return ""
        start = len(self.text) + len(self._held)
        if step.finish != "stop":
            self._held += self._decoder.push(step.token)
            self._note(step, start)
        if step.finish is not None:
            self._held += self._decoder.flush()
        cut, stopped = _first(self._held, self._stops)
        if stopped:
            self.finish = "stop"
        elif step.finish is not None:
            self.finish, cut = step.finish, len(self._held)
        told, self._held = self._held[:cut], self._held[cut:]
        self.text += told
        self.tokens = tuple(self._told(stopped=stopped))
        return told

    def _note(self, step: Step, start: int) -> None:
        if step.logprob is None:
            return
        top = tuple(_token(self._tokenizer, token, logprob) for token, logprob in step.top)
        one = replace(_token(self._tokenizer, step.token, step.logprob), offset=start, top=top)
        self._waiting.append((one, len(self.text) + len(self._held)))

    def _told(self, *, stopped: bool) -> list[Token]:
        """The tokens whose text has been told, to where a stop string begins."""
        told, length = [], len(self.text)
        while self._waiting:
            token, end = self._waiting[0]
            if stopped and token.offset >= length:
                self._waiting.clear()
                break
            # bytes of a character that is not whole have no text of their own yet
            if self.finish is None and (end > length or token.offset == length):
                break
            self._waiting.popleft()
            if end > length:
                # the stop string begins inside of it
                kept = self.text[token.offset :]
                token = replace(token, text=kept, bytes=kept.encode())
            told.append(token)
        return told


class _Decoder:
    """Tokens to whole characters: what the last tokens and the new ones give together, less what the last gave."""

    def __init__(self, tokenizer: Any, prompt: Sequence[int]) -> None:
        self._decode = functools.partial(
            tokenizer.decode, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        self._tokens = self._context(list(prompt[-_CONTEXT:]))
        #: tokens whose text is certain, and that text
        self._done, self._before = len(self._tokens), self._decode(self._tokens)

    def _context(self, prompt: list[int]) -> list[int]:
        """The last tokens of the prompt that begin with a character."""
        for start in range(len(prompt) - 1, -1, -1):
            text = self._decode(prompt[start:])
            if text and not text.startswith(_BROKEN):
                return prompt[start:]
        return []

    def push(self, token: int) -> str:
        """The text that has become certain."""
        self._tokens.append(token)
        text = self._new()
        patient = len(self._tokens) - self._done < _PATIENCE
        return self._take(text) if text and not (text.endswith(_BROKEN) and patient) else ""

    def flush(self) -> str:
        """The rest, certain or not."""
        return self._take(self._new())

    def _new(self) -> str:
        return self._decode(self._tokens)[len(self._before) :]

    def _take(self, text: str) -> str:
        start, self._done = self._done, len(self._tokens)
        self._before += text
        if self._done > _KEPT:
            # the next piece is decoded behind this one, which begins where a character does
            self._tokens = self._tokens[start:]
            self._done, self._before = len(self._tokens), self._decode(self._tokens)
        return text


def _first(text: str, stops: Sequence[str]) -> tuple[int, bool]:
    """Where the stop string begins that ends first, and True; else how much of the text belongs to none, and False."""
    found = [(at + len(stop), at) for stop in stops if (at := text.find(stop)) >= 0]
    if found:
        return min(found)[1], True
    for at in range(max(0, len(text) - max(map(len, stops), default=1) + 1), len(text)):
        if any(stop.startswith(text[at:]) for stop in stops):
            return at, False
    return len(text), False


def chat_prompt(tokenizer: Any, messages: Sequence[Mapping[str, Any]]) -> tuple[int, ...]:
    """The tokens of a conversation up to where the assistant answers, by the tokenizer's chat template.

    A tokenizer without one gets lines `role: content` and, last, `assistant:`. A developer is a system here.

    Raises:
        ConfigError: no messages, an unknown role, no text, or something that the template refuses.
    """
    wrong, plain = [], []
    for place, message in enumerate(messages):
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            wrong.append(
                f"messages[{place}]: no role {role!r}{did_you_mean(str(role), ROLES)}; there are {', '.join(ROLES)}"
            )
        if not isinstance(content, str):
            wrong.append(f"messages[{place}]: its content is no text")
        plain.append({"role": "system" if role == "developer" else role, "content": content})
    if wrong or not plain:
        raise ConfigError("; ".join(wrong) or "there are no messages")
    if tokenizer.chat_template is None:
        lines = [f"{message['role']}: {message['content']}" for message in plain]
        return text_prompt(tokenizer, "\n".join([*lines, "assistant:"]))
    from jinja2 import TemplateError

    try:
        tokens = tokenizer.apply_chat_template(plain, add_generation_prompt=True, return_dict=False)
    except (TemplateError, TypeError) as error:
        raise ConfigError(f"the model's chat template refuses these messages: {error}") from error
    return tuple(tokens)


def text_prompt(tokenizer: Any, text: str) -> tuple[int, ...]:
    """The tokens of a text, with what the tokenizer puts before a text."""
    return tuple(tokenizer(text, verbose=False).input_ids)


def _token(tokenizer: Any, token: int, logprob: float) -> Token:
    data = token_bytes(tokenizer, token)
    try:
        text = data.decode()
    except UnicodeDecodeError:
        text = "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
    return Token(text, data, logprob)


@functools.lru_cache(1 << 16)
def token_bytes(tokenizer: Any, token: int) -> bytes:
    """The bytes that a token stands for, in the middle of a text."""
    name = tokenizer.convert_ids_to_tokens(token)
    if name is None:  # rows of the head that no token belongs to
        return b""
    if token in tokenizer.all_special_ids or token in tokenizer.added_tokens_decoder:
        return str(name).encode()
    if _byte_level(tokenizer):
        table: dict[str, bytes] = _byte_table()
        return b"".join(table[letter] if letter in table else letter.encode() for letter in name)
    if len(name) == 6 and name.startswith("<0x") and name.endswith(">"):
        return bytes.fromhex(name[3:5])
    return name.replace("▁", " ").encode()


@functools.lru_cache(64)
def _byte_level(tokenizer: Any) -> bool:
    return "Ġ" in tokenizer.get_vocab()


@functools.cache
def _byte_table() -> dict[str, bytes]:
    """The letters that byte-level tokenizers, from GPT-2's on, write bytes with; printable bytes are themselves."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {chr(byte): bytes([byte]) for byte in printable}
    others = (byte for byte in range(256) if byte not in printable)
    return table | {chr(256 + place): bytes([byte]) for place, byte in zip(itertools.count(), others)}
