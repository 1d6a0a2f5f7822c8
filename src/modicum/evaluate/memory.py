"""What a model takes in memory: its weights exactly, and the peak of what a pass holds beside them.

The resident size of the process says neither: it counts every model that is loaded, the libraries, and pages that
the allocator has not given back.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any, Self, final

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from modicum.evaluate.resources import reset_peaks

if TYPE_CHECKING:
    from torch import nn


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers of `model` as they are now; what is tied or shared is counted once."""
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


@final
class Peak:
    """Within a `with` block, the most bytes that tensors made there held at the same time: `peak.bytes`.

    On a GPU the allocator's own count. On a processor the storages of all results of operations are followed until they
    are freed; what a kernel takes and gives back inside one operation is not seen.
    """

    bytes: int = 0

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._device = device
        self._live = _Live()
        self._before = 0

    def __enter__(self) -> Self:
        if self._cuda:
            torch.cuda.synchronize(self._device)
            # not the device's own reset, which would take the peak from those who measure around this
            reset_peaks()
            self._before = torch.cuda.memory_allocated(self._device)
        else:
            self._live.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        if self._cuda:
            torch.cuda.synchronize(self._device)
            self.bytes = torch.cuda.max_memory_allocated(self._device) - self._before
        else:
            self._live.__exit__(*error)
            self.bytes = self._live.peak


@final
class _Live(TorchDispatchMode):
    """Adds up the storages of results while they live."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = self._now = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        # a view or an in-place result lives in the storage of an argument, which may be a weight
        given = {_key(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and _key(leaf) not in given | self._sizes.keys():
                self._add(leaf.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata  # noqa: SLF001 - what tells storages apart
        self._sizes[key] = storage.nbytes()
        self._now += storage.nbytes()
        self.peak = max(self.peak, self._now)
        weakref.finalize(storage, self._drop, key).atexit = False

    def _drop(self, key: int) -> None:
        self._now -= self._sizes.pop(key, 0)


def _key(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata  # noqa: SLF001
