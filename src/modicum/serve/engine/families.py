"""Kinds of adapters: what a row of the pool holds for each, and how a record becomes one.

    cores     LoRA-XS: per layer the scaled core, transposed (r, r); U and A are shared
    factors   anything of low rank: per layer A (r, in), then scaling · Bᵀ (r, out)

Matrices are packed as the kernel of `native` reads them, see `Packing`.

Records of one family differ in their numbers alone, so whatever could be wrong with them was checked once.
"""

from __future__ import annotations

import abc
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, final

import numpy as np
import torch
from torch.nn import functional as F

from modicum.errors import CorruptAdapterError, listing
from modicum.serve.engine import native

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import Tensor

    from modicum.adapters.contract import Adapter
    from modicum.store.record import Record

#: directions are padded to whole registers of the kernel
LANES = 16


class Packing(NamedTuple):
    """How matrices lie in memory: `group` neighbours along the summed dimension side by side, zeros at the ends.

    Of rows (k, n), `inner`, which x (n) is multiplied with, is (n / group, k up to whole lanes, group), and `outer`,
    which z (k) is multiplied with, (k / group, n, group). With a group of 1 they are the transposed rows, and the rows.
    """

    group: int = 1

    def inner_size(self, k: int, n: int) -> int:
        """Numbers of `inner`."""
        return padded(n, self.group) * padded(k, LANES)

    def outer_size(self, k: int, n: int) -> int:
        """Numbers of `outer`."""
        return padded(k, self.group) * n

    def inner(self, rows: Tensor) -> Tensor:
        """The rows (k, n) packed, flat."""
        k, n = rows.shape
        wide = F.pad(rows, (0, -n % self.group, 0, -k % LANES))
        return wide.view(len(wide), -1, self.group).transpose(0, 1).reshape(-1)

    def outer(self, rows: Tensor) -> Tensor:
        """The rows (k, n) packed, flat."""
        k, n = rows.shape
        wide = F.pad(rows, (0, 0, 0, -k % self.group))
        return wide.view(-1, self.group, n).transpose(1, 2).reshape(-1)

    def inner_of(self, packed: Tensor, k: int, n: int) -> Tensor:
        """X's factor (…, n, k) of packed rows (…, size); a view for groups of 1."""
        wide = packed.unflatten(-1, (-1, packed.shape[-1] // padded(n, self.group), self.group))
        return wide.transpose(-1, -2).flatten(-3, -2)[..., :n, :k]

    def outer_of(self, packed: Tensor, k: int, n: int) -> Tensor:
        """Z's factor (…, k, n) of packed rows (…, size); a view for groups of 1."""
        wide = packed.unflatten(-1, (-1, n, self.group))
        return wide.transpose(-1, -2).flatten(-3, -2)[..., :k, :]


def padded(count: int, unit: int) -> int:
    """`count` rounded up to a multiple of `unit`."""
    return -(-count // unit) * unit


@dataclass(frozen=True)
class Shape:
    """One layer of the base model."""

    name: str
    out: int
    inputs: int


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
    def row(self, record: Record, dtype: torch.dtype) -> Tensor:
        """The row (width,) of a record.

        Raises:
            CorruptAdapterError: a number is not finite.
        """


def _finite(row: Tensor, record: Record) -> Tensor:
    """The row of a record, if all its numbers are finite."""
    if not bool(torch.isfinite(row).all()):
        raise _diverged(record)
    return row


def _diverged(record: Record) -> CorruptAdapterError:
    return CorruptAdapterError(
        f"{_broken(record)}: the training diverged or the record is damaged; train it again with a lower learning "
        "rate, or fetch it again"
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
        shapes: Sequence[Shape],
        packing: Packing,
    ) -> None:
        """`adapters` and `directions` by layer, `shapes` of all layers of the model."""
        offsets = dict(zip(record.layout.names, record.layout.offsets[:-1].tolist(), strict=True))
        places, taken, scales, width = {}, [], [], 0
        for layer, adapter in adapters.items():
            rank, start = adapter.active_rank, offsets[f"{shapes[layer].name}.R"]
            # where the number in each place comes from, plus one; 0 is nowhere
            source, steps = torch.zeros(rank, padded(rank, LANES), dtype=torch.int64), torch.arange(rank)
            if getattr(adapter, "diagonal", False):
                source[steps, steps] = start + steps + 1
            else:
                # transposed: a row of the place is a column of R
                source[:, :rank] = start + steps[:, None] + adapter.rank * steps[None, :] + 1
            places[layer] = Place(rank, width, directions[layer])
            packed = packing.outer(source).numpy()
            taken.append(packed.clip(min=1).astype(np.int32) - 1)
            scales.append(np.where(packed > 0, adapter.scaling, 0.0).astype(np.float32))
            width += packed.size
        super().__init__(method, places, len(shapes), width)
        self._source, self._scale = np.concatenate(taken), np.concatenate(scales)

    @property
    def bytes(self) -> int:
        """The table, and where each number of a row comes from."""
        return self.table.nbytes + self._source.nbytes + self._scale.nbytes

    def row(self, record: Record, dtype: torch.dtype) -> Tensor:
        """The scaled, transposed cores."""
        if dtype not in native.KINDS or not native.available():
            taken = torch.from_numpy(np.take(record.floats(), self._source))
            return _finite((taken * torch.from_numpy(self._scale)).to(dtype), record)
        values = record.values if record.dtype == "bfloat16" else record.floats()
        row = torch.empty(self.width, dtype=dtype)
        if not native.fill(row, values, self._source, self._scale):
            raise _diverged(record)
        return row


class Factors(Family):
    """Adapters of low rank with factors of their own; abstract."""

    shared = False

    def __init__(
        self, method: str, ranks: Mapping[int, int], shapes: Sequence[Shape], packing: Packing
    ) -> None:
        places, width = {}, 0
        for layer, rank in ranks.items():
            places[layer] = Place(rank, width)
            width += packing.inner_size(rank, shapes[layer].inputs) + packing.outer_size(
                rank, shapes[layer].out
            )
        super().__init__(method, places, len(shapes), width)
        self.shapes, self.packing = shapes, packing

    @abc.abstractmethod
    def factors(self, record: Record) -> Iterator[tuple[int, Tensor, Tensor, float]]:
        """(layer, B (out, r), A (r, in), scaling) of every layer, in the order of the places."""

    def row(self, record: Record, dtype: torch.dtype) -> Tensor:
        """A and scaling · Bᵀ of every layer."""
        packed = []
        for _, b, a, scaling in self.factors(record):
            packed += [self.packing.inner(a), self.packing.outer(b.T * scaling)]
        return _finite(torch.cat(packed).to(dtype), record)


@final
class PeftLora(Factors):
    """PEFT's own LoRA."""

    def __init__(
        self, method: str, ranks: Mapping[int, int], scalings: Mapping[int, float], *about: Any
    ) -> None:
        super().__init__(method, ranks, *about)
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
        self, method: str, ranks: Mapping[int, int], adapters: Mapping[int, Adapter], *about: Any
    ) -> None:
        super().__init__(method, ranks, *about)
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
