"""Dense weights: `nn.Linear` and the transposed `Conv1D` of GPT-2."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast, final

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from modicum.quant.base import BaseFormat

if TYPE_CHECKING:
    from torch.nn import Parameter


@final
class Dense(BaseFormat):
    """`nn.Linear` with a floating weight stored as (out, in)."""

    name = "dense"
    mergeable = True

    def matches(self, module: nn.Module) -> bool:
        """Whether `module` is a linear layer whose weight is a plain floating tensor."""
        return isinstance(module, nn.Linear) and module.weight.is_floating_point()

    def shape(self, module: nn.Module) -> tuple[int, int]:
        """(out_features, in_features)."""
        linear = cast("nn.Linear", module)
        return linear.out_features, linear.in_features

    def weight(self, module: nn.Module) -> Tensor:
        """The weight itself, (out, in), detached."""
        return cast("Parameter", module.weight).detach()

    def write(self, module: nn.Module, weight: Tensor) -> None:
        """Put `weight` in place; tied parameters follow."""
        cast("Parameter", module.weight).data = weight


@final
class DenseConv1D(BaseFormat):
    """The `Conv1D` of GPT-2: a linear layer whose weight is stored as (in, out)."""

    name = "dense (Conv1D)"
    mergeable = True

    def matches(self, module: nn.Module) -> bool:
        """Whether `module` is GPT-2's `Conv1D`."""
        return isinstance(module, Conv1D)

    def shape(self, module: nn.Module) -> tuple[int, int]:
        """(out_features, in_features)."""
        rows, columns = cast("Parameter", module.weight).shape
        return columns, rows

    def weight(self, module: nn.Module) -> Tensor:
        """The weight as a transposed view, (out, in), detached."""
        return cast("Parameter", module.weight).detach().T

    def write(self, module: nn.Module, weight: Tensor) -> None:
        """Put `weight` in place, stored as (in, out)."""
        cast("Parameter", module.weight).data = weight.T.contiguous()
