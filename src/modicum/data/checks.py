"""Finding columns and collecting faults, so that a message names everything that is wrong at once."""

from __future__ import annotations

import string
from typing import TYPE_CHECKING, Any

from modicum.errors import DataError, did_you_mean, listing

if TYPE_CHECKING:
    from collections.abc import Sequence

    from modicum.data.files import Rows

_SHOWN = 8


class Faults:
    """Collects what is wrong with rows; the first few are shown, all are counted."""

    def __init__(self, rows: Rows) -> None:
        self._rows = rows
        self._found: list[str] = []

    def add(self, index: int, what: str) -> None:
        """Note that the row at `index` is wrong."""
        self._found.append(f"{self._rows.where(index)}: {what}")

    def finish(self, hint: str = "") -> None:
        """Raise one DataError if anything was noted."""
        if self._found:
            count = f"{len(self._found)} of {len(self._rows)} rows of {self._rows.source} cannot be used: "
            raise DataError(count + listing(self._found, _SHOWN) + (f". {hint}" if hint else ""))


def require_columns(rows: Rows, wanted: Sequence[str], purpose: str) -> None:
    """Raise a DataError that names every missing column, those present, and the nearest ones."""
    present = rows.columns
    missing = [name for name in wanted if name not in present]
    if missing:
        words = ", ".join(f"{name!r}{did_you_mean(name, present)}" for name in missing)
        raise DataError(f"{rows.source} lacks the column {words} for {purpose}; it has {', '.join(present)}")


def text_of(row: dict[str, Any], column: str, index: int, faults: Faults, *, empty: bool = False) -> str:
    """The string in `column`; anything else is noted as a fault and becomes an empty string."""
    value = row.get(column)
    if not isinstance(value, str):
        faults.add(index, f"column {column!r} holds {_shown(value)}, must be a string")
        return ""
    if not value and not empty:
        faults.add(index, f"column {column!r} is empty")
    return value


def template_columns(template: str) -> list[str]:
    """The columns that a template such as `'Q: {question}'` names.

    Raises:
        DataError: the braces of the template do not match.
    """
    try:
        names = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise DataError(
            f"template {template!r} cannot be read: {error}; write {{{{ and }}}} for braces"
        ) from error
    bad = [name for name in names if not name.isidentifier()]
    if bad:
        raise DataError(
            f"template {template!r} may name columns only, not {listing([repr(name) for name in bad])}"
        )
    return names


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
