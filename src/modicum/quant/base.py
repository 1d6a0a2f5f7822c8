"""What a base layer is made of: one small door per storage format.

A `BaseFormat` answers, for one kind of layer: is it yours, what shape, what weight (as (out, in)), and can a
merged weight be written back exactly. Methods never ask; the host does, through `format_of`.
"""

from __future__ import annotations

import abc
import functools
import importlib
import importlib.util
import pkgutil
from typing import TYPE_CHECKING, Any, cast

from modicum.errors import InexactMergeError, MissingExtraError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from modicum.quant.steps import Steps


class BaseFormat(abc.ABC):
    """One way of storing the weight of a linear layer."""

    #: shown in reports
    name: str
    #: whether `write` keeps every number of the merged weight (up to rounding to the weight's dtype)
    mergeable: bool = False
    #: whether `fold` takes updates that are constant on blocks, exactly
    foldable: bool = False
    #: whether `recode` takes updates of whole steps, exactly, where `grid_fault` finds nothing
    recodable: bool = False
    #: the `quant_method` that config.json of a checkpoint in this format names
    quant_method: str | None = None

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

    def grid_fault(self, module: nn.Module) -> str | None:
        """Why the weight of `module` is not whole steps of grids through 0; None if it is."""
        del module
        return f"it is stored as {self.name}"

    def steps(self, module: nn.Module, saved: Any = None) -> Steps:
        """The weight as whole steps of its grid, as it was at the snapshot `saved` if there is one.

        Raises:
            InexactMergeError: it lies on no such grid.
        """
        del saved
        raise InexactMergeError(f"a {type(module).__name__} has no codes: {self.grid_fault(module)}")

    def recode(self, module: nn.Module, moved: Tensor) -> None:
        """Move each weight by `moved` (out, in) whole steps in place, exactly; codes change and nothing else.

        Raises:
            InexactMergeError: this format cannot take it, or a weight would leave its grid; nothing was changed.
        """
        del moved
        raise InexactMergeError(f"a {type(module).__name__} has no codes: {self.grid_fault(module)}")

    def snapshot(self, module: nn.Module, *, codes: bool = False) -> Any:
        """What `restore` and `saved_weight` need to undo merges bit for bit; shares memory, costs nothing.

        `codes`: whether codes are going to change as well.
        """
        del codes
        return self.weight(module)

    def restore(self, module: nn.Module, saved: Any) -> None:
        """Put the layer back to what it was at `snapshot`."""
        self.write(module, saved)

    def saved_weight(self, module: nn.Module, saved: Any) -> Tensor:
        """The weight (out, in) as it was at `snapshot`."""
        del module
        return saved

    def prepare(self, module: nn.Module) -> None:  # noqa: B027 - most formats need none
        """Make `module` fit to be read and trained on, in place; calling it again changes nothing.

        Raises:
            TargetError: the layer runs in a way that loses gradients or has lost its weight.
        """

    def loading_options(self) -> dict[str, Any]:
        """Arguments of `from_pretrained` that load a checkpoint of this format so that it can be trained on.

        Raises:
            MissingExtraError: the library that reads it is not installed.
        """
        return {}


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


def prepare_model(model: nn.Module) -> nn.Module:
    """`model` with every layer made fit to be read and trained on, in place, whoever adapts it afterwards.

    Some libraries change packed weights for their inference kernels at the first evaluation; training after
    that loses gradients without an error. Call it after loading a quantized model that PEFT's own adapters
    will go on; our adapters do it themselves, and so does `load_base`.

    Raises:
        TargetError: a layer cannot be trained on; it names what to load instead.
    """
    for module in list(model.modules()):
        fmt = format_of(module)
        if fmt is not None:
            fmt.prepare(module)
    return model


def loading_options(quant_method: str) -> dict[str, Any]:
    """Arguments of `from_pretrained` for a checkpoint whose config.json names `quant_method`; none if unknown.

    Raises:
        MissingExtraError: the library that reads it is not installed.
    """
    fmt = next((fmt for fmt in formats() if fmt.quant_method == quant_method), None)
    return {} if fmt is None else fmt.loading_options()


def require(modules: tuple[str, ...], what: str, remedy: str) -> None:
    """Refuses to load `what` where one of `modules` is not installed; `remedy` says what to do."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingExtraError(f"{what} needs {' and '.join(missing)}, which is not installed: {remedy}")
