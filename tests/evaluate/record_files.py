"""Records as an evaluation would leave them, from outcomes."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from modicum.evaluate.records import Header, Item, Records, digest_of

if TYPE_CHECKING:
    from collections.abc import Sequence

HEADER = Header(
    protocol="choices", protocol_version="1", suite="small", task="x", template="ab" * 16, model="embedded",
    adapter=None, base_fingerprint="cd" * 16, items="", decoding={"num_beams": 1}, created_with="modicum 0",
)  # fmt: skip


def records(
    correct: Sequence[float | None],
    losses: Sequence[float | None] | None = None,
    tokens: int | Sequence[int] = 4,
    *,
    task: str = "x",
    slices: Sequence[dict[str, str]] | None = None,
    backwards: bool = False,
    **header: Any,
) -> Records:
    """One item for each outcome, in order or backwards."""
    n = len(correct)
    counts = [tokens] * n if isinstance(tokens, int) else tokens
    items = [
        Item(
            f"{task}-{i}",
            correct[i],
            None if losses is None else losses[i],
            None if losses is None else counts[i],
            prediction="?" if correct[i] is None else f"{correct[i]:.0f}",
            reference="1",
            slices={} if slices is None else slices[i],
        )
        for i in range(n)
    ]
    about = {"task": task, "items": digest_of(one.item for one in items), **header}
    return Records(replace(HEADER, **about), items[::-1] if backwards else items)
