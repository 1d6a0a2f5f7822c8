"""What a base layer is made of: one small door per storage format.

A `BaseFormat` answers, for one kind of layer: is it yours, what shape, what weight (as (out, in)), and can a
merged weight be written back exactly. Methods never ask; the host does, through `format_of`.
"""

from __future__ import annotations

import abc
import functools
import importlib
import pkgutil
from typing import TYPE_CHECKING, Any, cast

from modicum.errors import InexactMergeError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


class BaseFormat(abc.ABC):
    """One way of storing the weight of a linear layer."""

    #: shown in reports
    name: str
    #: whether `write` keeps every number of the merged weight (up to rounding to the weight's dtype)
    mergeable: bool = False
    #: whether `fold` takes updates that are constant on blocks, exactly
    foldable: bool = False

    @abc.abstractmethod
    def matches(self, module: nn.Module) -> bool:
        """Whether `module` stores its weight this way."""

    @abc.abstractmethod
    def shape(self, module: nn.Module) -> tuple[int, int]:
        """(out_features, in_features) of the layer."""

    @abc.abstractmethod
    def weight(self, module: nn.Module) -> Tensor:
        """The weight as (out, in), in a floating dtype; may be a view of the layer's memory."""

    def dtype(self, module: nn.Module) -> torch.dtype:
        """The floating dtype that `weight` has."""
        return cast("Tensor", module.weight).dtype

    def device(self, module: nn.Module) -> torch.device:
        """Where the layer's numbers live."""
        return cast("Tensor", module.weight).device

    def write(self, module: nn.Module, weight: Tensor) -> None:
        """Replace the layer's weight by `weight` (out, in).

        Raises:
            InexactMergeError: this format cannot take it.
        """
        del weight
        raise InexactMergeError(
            f"a {self.name} weight ({type(module).__name__}) cannot take a merged update exactly; load the base model "
            "in float32, bfloat16 or float16 and merge there, or keep the adapter separate"
        )

    def fold(self, module: nn.Module, values: Tensor, block: tuple[int, int]) -> None:
        """Add the update with `values` (out/q, in/p) on (q, p) blocks to the layer in place, exactly.

        Raises:
            InexactMergeError: this format cannot take it.
        """
        del values, block
        raise InexactMergeError(
            f"a {self.name} weight ({type(module).__name__}) has no offsets to fold an update into"
        )

    def snapshot(self, module: nn.Module) -> Any:
        """What `restore` and `saved_weight` need to undo merges bit for bit; shares memory, costs nothing."""
        return self.weight(module)

    def restore(self, module: nn.Module, saved: Any) -> None:
        """Put the layer back to what it was at `snapshot`."""
        self.write(module, saved)

    def saved_weight(self, module: nn.Module, saved: Any) -> Tensor:
        """The weight (out, in) as it was at `snapshot`."""
        del module
        return saved

    def prepare(self, module: nn.Module) -> None:  # noqa: B027 - most formats need none
        """Called once when a layer is first adapted, before its weight is read; may change how it runs."""


@functools.cache
def formats() -> list[BaseFormat]:
    """One instance of every format in this folder, the specific before the plain ones."""
    import modicum.quant as folder

    for info in pkgutil.iter_modules(folder.__path__):
        importlib.import_module(f"modicum.quant.{info.name}")
    kinds = sorted(
        BaseFormat.__subclasses__(), key=lambda kind: (kind.__module__.endswith(".dense"), kind.__name__)
    )
    return [kind() for kind in kinds]


def format_of(module: nn.Module) -> BaseFormat | None:
    """The format of `module`, or None when it is no linear layer we know."""
    return next((fmt for fmt in formats() if fmt.matches(module)), None)
