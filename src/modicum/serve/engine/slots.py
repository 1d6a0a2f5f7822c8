"""The pool: adapters in memory, who uses them, and which one leaves when another one comes.

A slot that requests use is never written to; what was read under one generation of it is never served under
another. Loading happens in the caller's thread and stops nobody else's.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast, final

import torch

from modicum.errors import ConfigError
from modicum.quant.base import format_of
from modicum.serve.engine import native
from modicum.serve.engine.families import Packing
from modicum.serve.engine.interface import (
    AdapterUnavailableError,
    InUseError,
    Observer,
    OverloadedError,
    PoolStats,
    Resident,
)
from modicum.serve.engine.layers import Batch, Directions, Part, ServedLinear
from modicum.serve.engine.loader import Loader
from modicum.serve.engine.shelves import Row, Shelves

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import nn

    from modicum.serve.engine.families import Family
    from modicum.store.record import Record


@dataclass(frozen=True)
class Lease:
    """The right to use a version until `Slots.release`."""

    version: str
    slot: int
    generation: int


@dataclass(eq=False)
class _Held:
    """A version in a slot, or on its way there."""

    version: str
    slot: int = -1
    #: leases, given out or waited for
    uses: int = 1
    pinned: bool = False
    #: no new leases; the slot is freed with the last one
    retired: bool = False
    #: its record was read; before, there is nothing to unload, and who wants it gone has it read again
    read: bool = False
    again: bool = False
    family: Family | None = None
    row: Row | None = None
    error: BaseException | None = None
    ready: threading.Event = field(default_factory=threading.Event)

    def resident(self) -> Resident:
        assert self.family is not None
        assert self.row is not None
        about = self.family.method, self.family.rank, self.row.bytes
        return Resident(self.version, *about, self.pinned, self.uses)


@final
class Slots:
    """Adapters in memory, at most `slots`, on the linear layers of a model.

    Layers are replaced in place by `ServedLinear` when the first adapter of a family needs them.
    """

    def __init__(
        self,
        model: nn.Module,
        read: Callable[[str], Record],
        *,
        slots: int,
        max_rank: int,
        observer: Observer | None = None,
    ) -> None:
        """`read("ada@3")` gives a record, from any thread.

        Raises:
            ConfigError: the model carries adapters already, or has no linear layers.
        """
        dtype, device = _numbers(model)
        self._dtype = dtype
        self._model, self._read, self._observer = model, read, observer or Observer()
        use_native = native.takes(dtype, device)
        # the kernel multiplies two neighbours of 16 bits at once
        packing = Packing(4 // dtype.itemsize if use_native else 1)
        self._directions = Directions(dtype, packing)
        self._loader = Loader(model, self._directions, max_rank)
        self._shelves = Shelves(slots, dtype, device)
        self._batch = Batch(self._directions, self._loader.shapes, dtype, use_native=use_native)
        self._served: dict[str, ServedLinear] = {}
        self._lock = threading.Lock()
        #: the last used last; retired versions are not in it
        self._by_version: OrderedDict[str, _Held] = OrderedDict()
        self._slots: list[_Held | None] = [None] * slots
        self._empty = list(range(slots - 1, -1, -1))
        self._generations = [0] * slots
        self._hits = self._misses = self._evictions = self._failures = 0
        #: of the running step
        self._running: frozenset[_Held] = frozenset()
        self._last: tuple[list[_Held | None], list[int]] = ([], [])

    def acquire(self, version: str) -> Lease:
        """The right to use `version`, which is loaded if it is not in memory; blocks, any thread.

        Raises:
            InUseError: every slot is pinned or in use.
            OverloadedError: every slot is pinned.
            AdapterUnavailableError: it cannot be had; the cause says why.
        """
        with self._lock:
            held = self._by_version.get(version)
            mine = held is None
            if held is None:
                self._room()
                held = self._by_version[version] = _Held(version)
                self._misses += 1
            else:
                held.uses += 1
                self._by_version.move_to_end(version)
                self._hits += held.ready.is_set()
                self._misses += not held.ready.is_set()
        if mine:
            self._load(held)
        held.ready.wait()
        if isinstance(held.error, OverloadedError):
            raise held.error
        if held.error is not None:
            raise AdapterUnavailableError(f"{version} cannot be served: {held.error}") from held.error
        return Lease(version, held.slot, self._generations[held.slot])

    def release(self, lease: Lease) -> None:
        """Returns when the lease no longer counts; one that is over already is ignored."""
        with self._lock:
            held = self._slots[lease.slot]
            if held is None or lease.generation != self._generations[lease.slot]:
                return
            held.uses -= 1
            self._free_retired(held)

    def load(self, version: str, *, pin: bool = False) -> Resident:
        """The version, in memory now, pinned if asked for; see `acquire` for errors."""
        lease = self.acquire(version)
        with self._lock:
            held = cast("_Held", self._slots[lease.slot])
            held.pinned = held.pinned or pin
            held.uses -= 1
            resident = held.resident()
            self._free_retired(held)
        return resident

    def unpin(self, version: str) -> None:
        """Returns when the version may be evicted again."""
        with self._lock:
            held = self._by_version.get(version)
            if held is not None:
                held.pinned = False

    def unload(self, version: str) -> bool:
        """Whether it was in memory and is no longer, or will not be when the last request under it has ended.

        What is only being read is not in memory yet: it is read again, and will be what the store has by now.
        """
        with self._lock:
            held = self._by_version.get(version)
            if held is None or not held.read:
                if held is not None:
                    held.again = True
                return False
            del self._by_version[version]
            held.retired, held.pinned = True, False
            self._free_retired(held)
            return True

    def residents(self) -> list[Resident]:
        """All adapters in memory, the last used first."""
        with self._lock:
            return [held.resident() for held in reversed(self._by_version.values()) if held.row is not None]

    def stats(self) -> PoolStats:
        """What is in memory, and how often it was there."""
        with self._lock:
            held = [one for one in self._slots if one is not None]
            return PoolStats(
                slots=len(self._slots),
                used=len(held),
                pinned=sum(one.pinned for one in held),
                hits=self._hits,
                misses=self._misses,
                evictions=self._evictions,
                failures=self._failures,
                bytes=self._shelves.bytes + self._directions.bytes + self._loader.bytes,
            )

    def step(self, leases: Sequence[Lease | None], lengths: Sequence[int]) -> list[int]:
        """The places of leases that are no longer valid; their tokens run on the base model and must not be served.

        Sets the adapter of every token for the forward pass that follows: `lengths[i]` tokens under `leases[i]`, one
        after the other. Generation thread only.
        """
        held, stale = [], []
        with self._lock:
            for place, lease in enumerate(leases):
                one = None if lease is None else self._slots[lease.slot]
                if lease is not None and (
                    one is None or one.row is None or self._generations[lease.slot] != lease.generation
                ):
                    stale.append(place)
                    one = None
                held.append(one)
            self._running = frozenset(one for one in held if one is not None)
        lengths = list(lengths)
        # while nothing changes, neither does what was prepared for the layers
        if (held, lengths) != self._last:
            self._batch.set(_parts(held, lengths), sum(lengths))
            self._last = held, lengths
        self._batch.active = bool(self._running)
        return stale

    def end_step(self) -> None:
        """Ends the step: forward passes are the base model's again."""
        self._batch.active = False
        with self._lock:
            over, self._running = self._running, frozenset()
            for held in over:
                self._free_retired(held)

    def remove(self) -> None:
        """Puts the base layers back and frees all memory; nothing may run any more."""
        with self._lock:
            self._batch.active = False
            for name, layer in self._served.items():
                _replace(self._model, name, layer.base)
            self._served.clear()

    def _room(self) -> _Held | None:
        """What has to leave for another one, None where there is an empty slot; called with the lock."""
        if self._empty:
            return None
        old = next((one for one in self._by_version.values() if self._idle(one)), None)
        if old is not None:
            return old
        places = f"all {len(self._slots)} places for adapters"
        if all(one is not None and one.pinned for one in self._slots):
            raise OverloadedError(f"{places} are pinned; unpin one, or start the server with more slots")
        raise InUseError(f"{places} are pinned or in use; try again, or start the server with more slots")

    def _claim(self, held: _Held, family: Family) -> Row:
        """A row for a version in a slot of its own; nobody else sees it yet."""
        with self._lock:
            if (old := self._room()) is not None:
                del self._by_version[old.version]
                self._free(old)
                self._evictions += 1
            row = self._shelves.take(family.width)
            held.slot = slot = self._empty.pop()
            self._slots[slot] = held
            self._generations[slot] += 1
            return row

    def _idle(self, held: _Held) -> bool:
        return not held.uses and not held.pinned and held.ready.is_set() and held not in self._running

    def _load(self, held: _Held) -> None:
        began = time.perf_counter()
        family = row = None
        try:
            record = self._record(held)
            # what the caller's thread is in must not stick to memory that others write to later
            with torch.inference_mode(mode=False), torch.no_grad():
                family = self._loader.family(record)
                self._serve(family)
                # what is broken makes nobody leave
                numbers = family.row(record, self._dtype)
                row = self._claim(held, family)
                row.values.copy_(numbers)
        except BaseException as error:  # noqa: BLE001 - those who wait for it must learn of it, whatever it is
            held.error = error
        # who waits for a place has not failed, and tries again
        failed = held.error is not None and not isinstance(held.error, OverloadedError)
        with self._lock:
            held.row = row
            self._failures += failed
            if held.error is None:
                self._generations[held.slot] += 1
                held.family = family
            else:
                if self._by_version.get(held.version) is held:
                    del self._by_version[held.version]
                if row is not None:
                    self._free(held)
            held.ready.set()
        if failed or held.error is None:
            self._observer.load(time.perf_counter() - began, failed=failed)

    def _record(self, held: _Held) -> Record:
        """The record of a version as the store has it after the last `unload`."""
        while True:
            record = self._read(held.version)
            with self._lock:
                held.read, held.again = not held.again, False
                if held.read:
                    return record

    def _free_retired(self, held: _Held) -> None:
        if held.retired and self._idle(held) and self._slots[held.slot] is held:
            self._free(held)

    def _free(self, held: _Held) -> None:
        self._slots[held.slot] = None
        self._empty.append(held.slot)
        self._generations[held.slot] += 1
        self._shelves.give_back(cast("Row", held.row))

    def _serve(self, family: Family) -> None:
        """Replaces the layers that the family adapts and no earlier one did."""
        with self._lock:
            for layer in family.places:
                name = self._loader.names[layer]
                if name not in self._served:
                    served = ServedLinear(self._loader.sites[layer].module, layer, self._batch)
                    self._served[name] = served.train(self._loader.sites[layer].module.training)
                    _replace(self._model, name, served)


def _parts(held: Sequence[_Held | None], lengths: Sequence[int]) -> list[Part]:
    """The tokens of every adapter; several sequences under one are one part."""
    runs: dict[_Held, list[tuple[int, int]]] = {}
    start = 0
    for one, length in zip(held, lengths, strict=True):
        if one is not None:
            runs.setdefault(one, []).append((start, length))
        start += length
    return [Part(cast("Family", one.family), cast("Row", one.row), found) for one, found in runs.items()]


def _numbers(model: nn.Module) -> tuple[torch.dtype, torch.device]:
    """The number type that the model computes in, and where."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            return parameter.dtype, parameter.device
    for module in model.modules():
        fmt = format_of(module)
        if fmt is not None:
            return fmt.dtype(module), fmt.device(module)
    raise ConfigError(f"a {type(model).__name__} without linear layers cannot carry adapters")


def _replace(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)
