"""Every error modicum raises on purpose, under one root.

An error says what was wrong, all of it at once, and what would be right. Helpers that put that in words
(`nearest`, `listing`, `too_low`) live here too, so that every floor words its errors alike.
"""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence


class ModicumError(Exception):
    """Root of all errors raised on purpose."""


class ConfigError(ModicumError, ValueError):
    """A configuration, recipe or option is wrong."""


class TargetError(ModicumError, ValueError):
    """A target names no layer, or a layer that cannot be adapted."""


class BaseMismatchError(ModicumError, RuntimeError):
    """An adapter meets a base model it was not trained on."""


class BasisMismatchError(ModicumError, RuntimeError):
    """An adapter meets a basis it was not trained in, or none at all."""


class CorruptAdapterError(ModicumError, RuntimeError):
    """Adapter numbers are missing, misshapen, not finite, or a file is damaged."""


class InexactMergeError(ModicumError, RuntimeError):
    """A merge would not reproduce the unmerged model."""


class DataError(ModicumError, ValueError):
    """Training or evaluation data is missing, empty or lacks a column."""


class StoreError(ModicumError, RuntimeError):
    """A store is missing, busy, full, damaged or of another format."""


class NotStoredError(StoreError, LookupError):
    """A store has no such name, version, alias or tag."""


class ConflictError(StoreError):
    """Somebody else changed first what was to be changed."""


class MissingExtraError(ModicumError, ImportError):
    """An optional dependency is not installed; the message names the extra."""


def nearest(wanted: str, known: Iterable[str], count: int = 3) -> list[str]:
    """The `count` names of `known` most alike `wanted`, best first; may be empty."""
    return difflib.get_close_matches(wanted, list(known), n=count, cutoff=0.5)


def listing(names: Sequence[str], limit: int = 5) -> str:
    """`names` joined for a message, cut after `limit` with the count of the rest."""
    shown = ", ".join(names[:limit])
    rest = len(names) - limit
    return f"{shown} and {rest} more" if rest > 0 else shown


def did_you_mean(wanted: str, known: Iterable[str]) -> str:
    """` (did you mean 'x' or 'y'?)` for the nearest known names, or an empty string."""
    near = nearest(wanted, known)
    return f" (did you mean {' or '.join(repr(name) for name in near)}?)" if near else ""


def not_among(name: str, value: object, known: Sequence[str]) -> list[str]:
    """The fault that the option `name` is none of the `known` words, with the nearest; empty if it is one."""
    if value in known:
        return []
    return [f"{name} = {value!r}{did_you_mean(str(value), known)}, must be one of {', '.join(known)}"]


def too_low(options: object, least: Mapping[str, float]) -> list[str]:
    """The faults that attributes of `options` are below the `least` they must be; empty if none is."""
    values = {name: getattr(options, name) for name in least}
    return [
        f"{name} = {values[name]}, must be at least {low}"
        for name, low in least.items()
        if values[name] < low
    ]
