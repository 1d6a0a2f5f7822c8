"""Kinds of adapters: what a row of the pool holds for each, and how a record becomes one.

    cores     LoRA-XS: per layer the scaled core, transposed, (r, r rounded up to whole lanes); U and A are shared
    factors   anything of low rank: per layer A (r, in), then scaling · Bᵀ (r, out)

Records of one family differ in their numbers alone, so whatever could be wrong with them was checked once.
"""

from __future__ import annotations

import abc
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, final

import numpy as np
import torch

from modicum.errors import CorruptAdapterError, listing

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import Tensor

    from modicum.adapters.contract import Adapter
    from modicum.store.record import Record

#: columns of a core are whole registers, rows of a factor whole blocks of the kernel
LANES, ROWS = 16, 4


def padded(rank: int, unit: int) -> int:
    """`rank` rounded up to a multiple of `unit`."""
    return -(-rank // unit) * unit


class Place(NamedTuple):
    """What a family has on one layer."""

    rank: int
    #: of the layer's numbers in a row
    offset: int
    #: which of the shared directions, −1 where the row holds its own
    directions: int = -1


class Family(abc.ABC):
    """Adapters that differ in their numbers alone; abstract."""

    #: whether rows hold cores between shared directions
    shared: bool

    def __init__(self, method: str, places: Mapping[int, Place], layers: int, width: int) -> None:
        self.method, self.places, self.width = method, dict(places), width
        self.rank = max((place.rank for place in places.values()), default=0)
        #: per layer of the model: offset, rank (0 where there is no adapter), directions; for the kernel
        self.table = np.zeros((3, layers), np.int64)
        for layer, place in places.items():
            self.table[:, layer] = place.offset, place.rank, place.directions

    @property
    def bytes(self) -> int:
        """Memory that the family keeps, beside that of its adapters."""
        return self.table.nbytes

    @abc.abstractmethod
    def numbers(self, record: Record) -> Tensor:
        """The row (width,) of a record, float32."""

    def write(self, record: Record, row: Tensor) -> None:
        """Fills `row` (width,) with the record.

        Raises:
            CorruptAdapterError: a number is not finite.
        """
        row.copy_(self.numbers(record))
        if not bool(torch.isfinite(row).all()):
            raise CorruptAdapterError(
                f"{_broken(record)}: the training diverged or the record is damaged; train it again with a lower "
                "learning rate, or fetch it again"
            )


def _broken(record: Record) -> str:
    names = [name for name, values in record.tensors() if not np.isfinite(values).all()]
    kind = str(record.dtype)
    return (
        f"NaN or infinite values in {listing(names, 3)}" if names else f"values too large, stored as {kind}"
    )


@final
class Cores(Family):
    """LoRA-XS adapters between directions that all of them share."""

    shared = True

    def __init__(
        self,
        method: str,
        adapters: Mapping[int, Adapter],
        directions: Mapping[int, int],
        record: Record,
        names: Sequence[str],
    ) -> None:
        """`adapters` and `directions` by layer, `names` of all layers of the model."""
        offsets = dict(zip(record.layout.names, record.layout.offsets[:-1].tolist(), strict=True))
        places, taken, scales, width = {}, [], [], 0
        for layer, adapter in adapters.items():
            rank, start = adapter.active_rank, offsets[f"{names[layer]}.R"]
            source = np.full((rank, padded(rank, LANES)), -1, np.int64)
            steps = np.arange(rank)
            if getattr(adapter, "diagonal", False):
                source[steps, steps] = start + steps
            else:
                # transposed: a row of the place is a column of R
                source[:, :rank] = start + steps[:, None] + adapter.rank * steps[None, :]
            places[layer] = Place(rank, width, directions[layer])
            taken.append(source.ravel())
            scales.append(np.where(source.ravel() < 0, 0.0, adapter.scaling).astype(np.float32))
            width += source.size
        super().__init__(method, places, len(names), width)
        self._source = np.concatenate(taken).clip(min=0).astype(np.int32)
        self._scale = np.concatenate(scales)

    @property
    def bytes(self) -> int:
        """The table, and where each number of a row comes from."""
        return self.table.nbytes + self._source.nbytes + self._scale.nbytes

    def numbers(self, record: Record) -> Tensor:
        """The scaled, transposed cores."""
        return torch.from_numpy(np.take(record.floats(), self._source) * self._scale)


@dataclass(frozen=True)
class Shape:
    """One layer of the base model."""

    name: str
    out: int
    inputs: int


class Factors(Family):
    """Adapters of low rank with factors of their own; abstract."""

    shared = False

    def __init__(self, method: str, ranks: Mapping[int, int], shapes: Sequence[Shape]) -> None:
        places, width = {}, 0
        for layer, rank in ranks.items():
            places[layer] = Place(rank, width)
            width += padded(rank, ROWS) * shapes[layer].inputs + rank * shapes[layer].out
        super().__init__(method, places, len(shapes), width)
        self.shapes = shapes

    @abc.abstractmethod
    def factors(self, record: Record) -> Iterator[tuple[int, Tensor, Tensor, float]]:
        """(layer, B (out, r), A (r, in), scaling) of every layer."""

    @torch.no_grad()
    def numbers(self, record: Record) -> Tensor:
        """A and scaling · Bᵀ of every layer."""
        row = torch.zeros(self.width)
        for layer, b, a, scaling in self.factors(record):
            place, shape = self.places[layer], self.shapes[layer]
            middle = place.offset + padded(place.rank, ROWS) * shape.inputs
            row[place.offset :][: place.rank * shape.inputs].view(place.rank, -1).copy_(a)
            torch.mul(b.T, scaling, out=row[middle:][: place.rank * shape.out].view(place.rank, -1))
        return row


@final
class PeftLora(Factors):
    """PEFT's own LoRA."""

    def __init__(
        self, method: str, ranks: Mapping[int, int], scalings: Mapping[int, float], shapes: Sequence[Shape]
    ) -> None:
        super().__init__(method, ranks, shapes)
        self._scalings = dict(scalings)

    def factors(self, record: Record) -> Iterator[tuple[int, Tensor, Tensor, float]]:
        """As stored."""
        state = _tensors(record)
        for layer, scaling in self._scalings.items():
            name = self.shapes[layer].name
            yield layer, state[f"{name}.lora_B.weight"], state[f"{name}.lora_A.weight"], scaling


@final
class OurFactors(Factors):
    """Any method of ours whose update has `lora_factors`, through one set of its own adapters."""

    def __init__(
        self, method: str, adapters: Mapping[int, Adapter], ranks: Mapping[int, int], shapes: Sequence[Shape]
    ) -> None:
        super().__init__(method, ranks, shapes)
        self._adapters = dict(adapters)
        # one set for all threads
        self._lock = threading.Lock()

    @property
    def bytes(self) -> int:
        """The table and the numbers of the adapters."""
        parts = (p for adapter in self._adapters.values() for p in adapter.parameters())
        return self.table.nbytes + sum(p.numel() * p.element_size() for p in parts)

    def factors(self, record: Record) -> Iterator[tuple[int, Tensor, Tensor, float]]:
        """As the method gives them."""
        state = _tensors(record)
        with self._lock:
            for layer, adapter in self._adapters.items():
                for part, parameter in adapter.named_parameters():
                    parameter.copy_(state[f"{self.shapes[layer].name}.{part}"])
                pair = adapter.lora_factors()
                assert pair is not None
                yield layer, *pair, adapter.scaling


def _tensors(record: Record) -> dict[str, Tensor]:
    """The record's tensors, float32; copied where torch would warn that they cannot be written to."""
    parts = record.tensors()
    return {name: torch.from_numpy(v if v.flags.writeable else v.copy()) for name, v in parts}
