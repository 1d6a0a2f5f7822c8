"""Which adapter each row of the current batch wants.

One `Routing` object is shared by all layers of a model. The host sets it around a forward pass that was given
`adapter_names`; the layers read it. Beam search and several returned sequences repeat every row n times in
place, so a batch of n times as many rows as names is routed by repeating each name n times.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from modicum.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from torch import Tensor

#: PEFT's name for "no adapter on this row"
BASE = "__base__"


class Routing:
    """The adapters of the running batch, or nothing (`active` is False)."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self._rows: list[int] = []
        self._index: dict[tuple[int, torch.device], Tensor] = {}

    @property
    def active(self) -> bool:
        """Whether the running forward pass mixes adapters."""
        return bool(self._rows)

    def rows(self, batch: int, device: torch.device) -> Tensor:
        """Index into `names` for each of `batch` rows, −1 for the base model; shape (batch,).

        Raises:
            ConfigError: the batch is no multiple of the number of names given.
        """
        key = (batch, device)
        if key not in self._index:
            repeats, rest = divmod(batch, len(self._rows))
            if rest:
                raise ConfigError(
                    f"adapter_names has {len(self._rows)} names for a batch of {batch} rows; give one name per row"
                )
            rows = torch.tensor(self._rows, device=device)
            self._index[key] = rows.repeat_interleave(repeats) if repeats > 1 else rows
        return self._index[key]

    @contextmanager
    def batch(self, adapter_names: Sequence[str], known: Iterable[str]) -> Iterator[None]:
        """While open, rows are routed by `adapter_names`, one of `known` or `__base__` each.

        Raises:
            ConfigError: names that no layer knows; all of them, with the nearest right ones.
        """
        known = sorted(known)
        names = sorted(set(adapter_names) - {BASE})
        unknown = [f"{name!r}{did_you_mean(name, known)}" for name in names if name not in known]
        if unknown:
            raise ConfigError(
                f"no adapter named {'; '.join(unknown)}; loaded: {', '.join(known)} (or {BASE!r})"
            )
        saved = self.names, self._rows, self._index
        position = {name: index for index, name in enumerate(names)} | {BASE: -1}
        self.names, self._rows, self._index = names, [position[name] for name in adapter_names], {}
        try:
            yield
        finally:
            self.names, self._rows, self._index = saved
