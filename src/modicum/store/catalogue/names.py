"""Names of adapters, aliases and tags: which are allowed, and how one version is referred to."""

from __future__ import annotations

import re
from dataclasses import dataclass

from modicum.errors import ConfigError

#: the selector that means the newest version
LATEST = "latest"
_PART = r"[A-Za-z0-9_][A-Za-z0-9_.+=-]*"
_NAME = re.compile(rf"{_PART}(?:/{_PART})*", re.ASCII)
_LABEL = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}", re.ASCII)
_MOST = 200
#: longer numbers are no versions
_DIGITS = 18


@dataclass(frozen=True)
class Reference:
    """What `name`, `name@3` and `name@production` refer to."""

    name: str
    #: a version, an alias, or `latest`
    selector: int | str = LATEST

    def __str__(self) -> str:
        return f"{self.name}@{self.selector}"


def check_name(name: str) -> str:
    """`name`, if adapters may be called so.

    Raises:
        ConfigError: it could be taken for something else, such as a path that leads out of a folder.
    """
    if not isinstance(name, str) or len(name) > _MOST or not _NAME.fullmatch(name):
        raise ConfigError(
            f"no name for an adapter: {name!r}. Names have up to {_MOST} characters: letters, digits and _ . + = -, in "
            "parts separated by /, each beginning with a letter, a digit or _"
        )
    return name


def check_label(label: str, what: str) -> str:
    """`label`, if an alias or a tag (`what`) may be called so.

    Raises:
        ConfigError: it may not.
    """
    if not isinstance(label, str) or not _LABEL.fullmatch(label):
        raise ConfigError(
            f"no name for {what}: {label!r}. It has up to 64 characters: letters, digits and _ . -, beginning with a "
            "letter, a digit or _"
        )
    return label


def check_text(text: str, what: str) -> str:
    """`text`, if it can be written as UTF-8.

    Raises:
        ConfigError: it is no text, or half of a character.
    """
    if not isinstance(text, str) or text.encode(errors="ignore").decode() != text:
        raise ConfigError(f"{what} = {text!r} is no text that can be stored")
    return text


def check_alias(alias: str) -> str:
    """`alias`, if it cannot be taken for a version.

    Raises:
        ConfigError: it is a number or `latest`, or has characters that aliases may not have.
    """
    if check_label(alias, "an alias").isdigit() or alias == LATEST:
        raise ConfigError(
            f"{alias!r} cannot be an alias: numbers are versions and {LATEST!r} is the newest one"
        )
    return alias


def reference(text: str | Reference) -> Reference:
    """What `name`, `name@VERSION`, `name@ALIAS` or `name@latest` refers to.

    Raises:
        ConfigError: it is none of these.
    """
    if isinstance(text, Reference):
        return text
    name, at, selector = str(text).partition("@")
    check_name(name)
    if not at:
        return Reference(name)
    if selector.isascii() and selector.isdigit() and len(selector) < _DIGITS:
        return Reference(name, int(selector))
    return Reference(name, selector if selector == LATEST else check_alias(selector))
