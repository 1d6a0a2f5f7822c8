"""Finding the answer in a text that a model wrote, and comparing it with the wanted one."""

from __future__ import annotations

import importlib.util
import re
import threading
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from modicum.errors import ConfigError, MissingExtraError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

#: how an answer was found: after the closing phrase (or by the pattern of choices), elsewhere, or not at all
How = Literal["literal", "fallback", "none"]

_NUMBER = re.compile(r"[-+]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:/\d+)?")


@dataclass(frozen=True)
class Found:
    """An answer and how it was found; an empty text when there is none."""

    answer: str
    how: How


NOTHING = Found("", "none")


def before(text: str, stop: Sequence[str]) -> str:
    """What stands before the first of the words `stop`, outer spaces removed; all of it where there is none."""
    return re.split("|".join(map(re.escape, stop)), text, maxsplit=1)[0].strip() if stop else text


def choice(text: str, answers: Sequence[str]) -> Found:
    """The first of `answers` in `text`, letters as they stand; where two begin alike, the first listed counts."""
    match = re.search("|".join(map(re.escape, answers)), text)
    return Found(match.group(), "literal") if match else NOTHING


def number(text: str, closing: str) -> Found:
    """The first number after the last `closing` phrase; without one, the last number of `text`."""
    if closing in text:
        match = _NUMBER.search(text.rpartition(closing)[2])
        if match:
            return Found(match.group(), "literal")
    anywhere = _NUMBER.findall(text)
    return Found(anywhere[-1], "fallback") if anywhere else NOTHING


def expression(text: str, closing: str) -> Found:
    r"""What follows the last `closing` phrase up to the end of its line; without one, the last `\boxed{…}`."""
    if closing in text:
        line = text.rpartition(closing)[2].strip().split("\n")[0].strip().removesuffix(".").strip()
        if line:
            return Found(line, "literal")
    inside = boxed(text)
    return Found(inside, "fallback") if inside else NOTHING


def boxed(text: str) -> str:
    r"""The content of the last `\boxed{…}` whose braces are closed, or an empty text."""
    for start in sorted((match.end() for match in re.finditer(r"\\f?boxed\s*\{", text)), reverse=True):
        depth = 1
        for at in range(start, len(text)):
            depth += {"{": 1, "}": -1}.get(text[at], 0) if text[at - 1] != "\\" else 0
            if not depth:
                return text[start:at].strip()
    return ""


def same_number(found: str, wanted: str) -> bool:
    """Whether two numbers are equal, thousands separators and trailing zeros aside."""
    try:
        return _value(found) == _value(wanted)
    except (ValueError, ZeroDivisionError):
        return False


def same_expression(found: str, wanted: str) -> bool:
    """Whether two mathematical expressions in LaTeX are equal as expressions (math-verify decides).

    Raises:
        MissingExtraError: math-verify is not installed.
    """
    parse, verify = _math_verify()
    if found == wanted:
        return True
    # the limits of time are signals, which only the main thread may set
    seconds = 5 if threading.current_thread() is threading.main_thread() else None
    gold, answer = (parse(f"${text}$", parsing_timeout=seconds) for text in (wanted, found))
    return bool(gold and answer and verify(gold, answer, timeout_seconds=seconds))


def function(reference: str, folder: Path | None) -> Callable[[str, dict[str, Any]], str | None]:
    """The function that `FILE.py:NAME` names, the file looked for in `folder`.

    Raises:
        ConfigError: no such file or function.
    """
    file, _, name = reference.rpartition(":")
    path = (folder or Path()) / file
    if not file.endswith(".py") or not path.is_file():
        raise ConfigError(
            f"extract = {reference!r}: no file {path}; write choice, number, math or FILE.py:FUNCTION"
        )
    spec = importlib.util.spec_from_file_location(f"modicum_suite_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found: Any = vars(module).get(name)
    if not callable(found):
        functions = [key for key, value in vars(module).items() if callable(value) and key[0] != "_"]
        raise ConfigError(f"{path} has no function {name!r}; it has {', '.join(functions) or 'none'}")
    return cast("Callable[[str, dict[str, Any]], str | None]", found)


def _value(text: str) -> Fraction:
    whole, _, below = text.replace(",", "").replace("$", "").strip().partition("/")
    return Fraction(whole) / (Fraction(below) if below else 1)


def _math_verify() -> tuple[Any, Any]:
    try:
        from math_verify import parse, verify
    except ImportError as error:
        raise MissingExtraError(
            "comparing mathematical expressions needs math-verify, which is not installed: "
            'pip install "modicum[eval]"'
        ) from error
    return parse, verify
