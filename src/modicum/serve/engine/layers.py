"""Linear layers that read each token's adapter from the pool, and what they share during a step.

    y  = W x + b                           for every token, at once
    y += U core(token) (A x)               LoRA-XS; where y is narrower than x, A x is read off it as Uᵀ(y − b)
    y += scaling B(token) A(token) x       anything else of low rank

A step names the slot of every token once; the layers only compute.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any, NamedTuple, cast, final

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modicum.serve.engine import native
from modicum.serve.engine.families import LANES, padded

if TYPE_CHECKING:
    from collections.abc import Sequence

    from modicum.adapters.site import LayerBasis, Site
    from modicum.serve.engine.families import Family, Packing, Shape
    from modicum.serve.engine.shelves import Row


class Direction(NamedTuple):
    """The frozen directions of one layer that all cores of a basis share, packed."""

    #: what A x is read with: A (k, in), or Uᵀ (k, out) where it is read off the output
    inner: Tensor
    #: Uᵀ (k, out)
    outer: Tensor
    #: float32, Uᵀ b, which the bias adds to Uᵀ y
    shift: Tensor | None
    #: k, rounded up to whole lanes
    lanes: int
    from_output: bool

    @property
    def bytes(self) -> int:
        """What they take."""
        parts = (self.inner, self.outer, self.shift)
        return sum(part.numel() * part.element_size() for part in parts if part is not None)


@final
class Directions:
    """The shared directions of all layers, each made once for a basis and kept."""

    def __init__(self, dtype: torch.dtype, packing: Packing) -> None:
        self.packing = packing
        self.all: list[Direction] = []
        self._dtype = dtype
        #: layer and basis -> ranks, and where their directions are
        self._known: dict[tuple[int, str], list[tuple[int, int]]] = {}

    @property
    def bytes(self) -> int:
        """All of them together."""
        return sum(found.bytes for found in list(self.all))

    def add(self, layer: int, key: str, basis: LayerBasis, site: Site) -> int:
        """The number of the directions that the layer has in the basis called `key`."""
        # a basis has as many directions as were asked for; the first of more are the same ones
        known = self._known.setdefault((layer, key), [])
        for rank, number in known:
            if rank >= basis.rank:
                return number
        ut, bias, shift = basis.ut.detach(), site.bias, None
        read = ut if basis.a is None else basis.a.detach()
        if basis.a is None and bias is not None:
            shift = F.pad(ut.float() @ bias.detach().float(), (0, -len(ut) % LANES))
        inner, outer = self.packing.inner(read.to(self._dtype)), self.packing.outer(ut.to(self._dtype))
        self.all.append(Direction(inner, outer, shift, padded(len(ut), LANES), from_output=basis.a is None))
        known.append((basis.rank, len(self.all) - 1))
        return len(self.all) - 1


class Part(NamedTuple):
    """Tokens of one step under one adapter."""

    family: Family
    row: Row
    #: (first, count) of each run of tokens
    runs: list[tuple[int, int]]


def _flat(parts: Sequence[Part]) -> tuple[np.ndarray, np.ndarray]:
    """The indices of all tokens, part after part, and how many each part has; int64."""
    runs = np.array([run for part in parts for run in part.runs], np.int64).reshape(-1, 2)
    ends = runs[:, 1].cumsum()
    tokens = np.repeat(runs[:, 0] - ends + runs[:, 1], runs[:, 1]) + np.arange(runs[:, 1].sum())
    return tokens, np.array([sum(count for _, count in part.runs) for part in parts], np.int64)


@final
class _Group:
    """Tokens of adapters of one family whose rows lie in one block, for torch."""

    def __init__(self, parts: Sequence[Part], device: torch.device) -> None:
        self.family, self.block = parts[0].family, parts[0].row.block
        self.rows = torch.tensor([part.row.place for part in parts], device=device)
        tokens, counts = _flat(parts)
        self.tokens = torch.from_numpy(tokens).to(device)
        self.width = int(counts.max())
        #: where each token lies when all adapters have as many as the longest; None if they do
        self.lanes: Tensor | None = None
        if counts.min() != self.width:
            places = np.arange(len(tokens)) + np.repeat(
                np.arange(len(counts)) * self.width - counts.cumsum() + counts, counts
            )
            self.lanes = torch.from_numpy(places).to(device)
        #: of cores: those of all layers, gathered once for the step
        self.cores = self.block.index_select(0, self.rows) if self.family.shared else None

    def taken(self, start: int, count: int) -> Tensor:
        """Numbers of each adapter (adapters, count)."""
        if self.cores is not None:
            return self.cores[:, start : start + count]
        return self.block[:, start : start + count].index_select(0, self.rows)

    def times(self, x: Tensor, matrices: Tensor) -> Tensor:
        """Each token's row of x (tokens, n) times the matrix (adapters, n, m) of its adapter."""
        if self.lanes is None:
            return torch.bmm(x.view(len(matrices), self.width, -1), matrices).flatten(0, 1)
        wide = x.new_zeros(len(matrices) * self.width, x.shape[1])
        wide[self.lanes] = x
        return torch.bmm(wide.view(len(matrices), self.width, -1), matrices).flatten(0, 1)[self.lanes]


@final
class Batch:
    """What the layers share during a step: which adapter every token has."""

    def __init__(
        self, directions: Directions, shapes: Sequence[Shape], dtype: torch.dtype, *, use_native: bool
    ) -> None:
        self._directions, self._shapes, self._dtype = directions, shapes, dtype
        self._inputs = [shape.inputs for shape in shapes]
        self._sizes = np.array([[shape.out, shape.inputs] for shape in shapes], np.int64)
        #: whether a step runs in which a token has an adapter
        self.active = False
        self._tokens = 0
        self._parts: list[Part] = []
        self._groups: list[_Group] | None = None
        self._in_order = False
        self._adapt = native.adapter_function() if use_native else None
        self._step: native.Step | None = None
        self._address = 0

    def set(self, parts: Sequence[Part], tokens: int) -> None:
        """Makes the next step one of so many tokens, of which `parts` have adapters."""
        # neighbours share directions, or memory that was just read
        self._parts = sorted(parts, key=lambda part: (id(part.family), part.row.address))
        self._tokens, self._groups = tokens, None
        if self._adapt is None:
            return
        rows, counts = _flat(self._parts)
        data = np.repeat(np.array([part.row.address for part in self._parts], np.int64), counts)
        runs, start = [], 0
        for _, found in itertools.groupby(range(len(counts)), key=lambda i: id(self._parts[i].family)):
            places = list(found)
            count = int(counts[places].sum())
            runs.append(native.Run(self._parts[places[0]].family, start, count))
            start += count
        kind = native.KINDS[self._dtype]
        self._step = native.Step(runs, rows, data, self._directions.all, self._sizes, kind)
        self._address = self._step.address

    def add(self, layer: int, x: Tensor, y: Tensor) -> None:
        """Adds to y (…, out), in place, what the adapters make of x (…, in)."""
        dtype = self._dtype
        if x.numel() != self._tokens * self._inputs[layer]:
            raise RuntimeError(f"a step of {self._tokens} tokens, and a layer's input {tuple(x.shape)}")
        if (
            self._adapt is not None
            and x.dtype is dtype
            and y.dtype is dtype
            and x.is_contiguous()
            and y.is_contiguous()
        ):
            self._adapt(self._address, layer, x.data_ptr(), y.data_ptr())
            return
        self._add(layer, x.reshape(self._tokens, -1), y.view(self._tokens, -1))

    def _add(self, layer: int, x: Tensor, y: Tensor) -> None:
        for group in self._grouped(x.device):
            if layer not in group.family.places:
                continue
            whole = self._in_order
            x_own, y_own = (x, y) if whole else (x[group.tokens], y[group.tokens])
            update = (self._from_cores if group.family.shared else self._from_factors)(
                group, layer, x_own, y_own
            )
            if whole:
                y += update
            else:
                y.index_add_(0, group.tokens, update)

    def _grouped(self, device: torch.device) -> list[_Group]:
        if self._groups is None:
            found: dict[tuple[int, int], list[Part]] = {}
            for part in self._parts:
                found.setdefault((id(part.family), id(part.row.block)), []).append(part)
            self._groups = [_Group(parts, device) for parts in found.values()]
            order = torch.arange(self._tokens, device=device)
            self._in_order = len(self._groups) == 1 and torch.equal(self._groups[0].tokens, order)
        return self._groups

    def _from_cores(self, group: _Group, layer: int, x: Tensor, y: Tensor) -> Tensor:
        rank, offset, number = group.family.places[layer]
        shared, packing, out = self._directions.all[number], self._directions.packing, y.shape[1]
        read = (y if shared.from_output else x).to(shared.inner.dtype)
        z = read @ packing.inner_of(shared.inner, rank, read.shape[1])
        z = z if shared.shift is None else z - shared.shift[:rank].to(z.dtype)
        lanes = padded(rank, LANES)
        cores = packing.outer_of(group.taken(offset, packing.outer_size(rank, lanes)), rank, lanes)
        return (group.times(z, cores[..., :rank]) @ packing.outer_of(shared.outer, rank, out)).to(y.dtype)

    def _from_factors(self, group: _Group, layer: int, x: Tensor, y: Tensor) -> Tensor:
        (rank, offset, _), shape, packing = (
            group.family.places[layer],
            self._shapes[layer],
            self._directions.packing,
        )
        size = packing.inner_size(rank, shape.inputs)
        a = packing.inner_of(group.taken(offset, size), rank, shape.inputs)
        b = packing.outer_of(group.taken(offset + size, packing.outer_size(rank, shape.out)), rank, shape.out)
        return group.times(group.times(x.to(a.dtype), a), b).to(y.dtype)


@final
class ServedLinear(nn.Module):
    """A base layer, and in steps with adapters what they add to it."""

    def __init__(self, base: nn.Module, layer: int, batch: Batch) -> None:
        super().__init__()
        self.base = base
        self._layer, self._batch = layer, batch
        self._dense = type(base) is nn.Linear

    def forward(self, x: Tensor) -> Tensor:
        """The base layer's output with each token's adapter applied, shape (*batch, out)."""
        base = cast("nn.Module", self._modules["base"])
        if self._dense:
            # without a second call through nn.Module
            parts = base._parameters  # noqa: SLF001 - for every layer and token, attributes the long way take longer
            y = F.linear(x, cast("Tensor", parts["weight"]), parts["bias"])
        else:
            y = base(x)
        if self._batch.active:
            self._batch.add(self._layer, x, y)
        return y

    def __getattr__(self, name: str) -> Any:
        """What models ask of a linear layer (`weight`, `in_features`) is the base layer's."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._modules["base"], name)
