"""Linear layers whose weight is a tensor subclass of torchao: int8, int4, float8, with or without rounded inputs."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, cast, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modicum.quant.allocator import keep_freed_memory
from modicum.quant.base import BaseFormat, require

if TYPE_CHECKING:
    from torch.autograd.function import FunctionCtx

#: attributes that hold how the input is quantized, None when it is not
_ON_INPUT = ("act_quant_kwargs", "activation_quantization")


@final
class Torchao(BaseFormat):
    """`nn.Linear` with a quantized weight of torchao."""

    name = "torchao"
    quant_method = "torchao"

    def matches(self, module: nn.Module) -> bool:
        """Whether `module` is a linear layer whose weight belongs to torchao."""
        utils = sys.modules.get("torchao.utils")
        return (
            utils is not None
            and isinstance(module, nn.Linear)
            and isinstance(module.weight, utils.TorchAOBaseTensor)
        )

    def shape(self, module: nn.Module) -> tuple[int, int]:
        """(out_features, in_features)."""
        linear = cast("nn.Linear", module)
        return linear.out_features, linear.in_features

    def weight(self, module: nn.Module) -> Tensor:
        """The dequantized weight, (out, in), a new tensor."""
        return _dequantized(cast("Tensor", module.weight))

    def prepare(self, module: nn.Module) -> None:
        """Let gradients pass to the input of layers whose kernel has none: those that round it, and packed int4.

        Freed memory is kept, because most kinds dequantize the weight on each pass.
        """
        weight = cast("Tensor", module.weight)
        rounds = any(getattr(weight, name, None) is not None for name in _ON_INPUT)
        if type(module) is nn.Linear and (rounds or _unpacked(weight) is None):
            # a class, not a function on the instance, so that copies of the layer are whole
            module.__class__ = StraightThroughLinear
        if weight.device.type == "cpu":
            keep_freed_memory()

    def loading_options(self) -> dict[str, Any]:
        """The number type the weights were quantized in: most of torchao's kernels take no other input."""
        require(("torchao",), "a checkpoint quantized by torchao", "pip install torchao")
        return {"dtype": "auto"}


@final
class StraightThroughLinear(nn.Linear):
    """A torchao layer without a derivative: forward as torchao computes it, gradient that of the dequantized weight."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - its name in torch
        """The layer's output, (*batch, out)."""
        if not (torch.is_grad_enabled() and input.requires_grad):
            return F.linear(input, self.weight, self.bias)
        y = cast("Tensor", _StraightThrough.apply(input, self.weight))
        return y if self.bias is None else y + self.bias


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.weight = weight
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Any) -> tuple[Tensor, None]:
        (grad,) = grads
        return grad @ _dequantized(cast("Any", ctx).weight).to(grad.dtype), None


def _dequantized(weight: Tensor) -> Tensor:
    found = _unpacked(weight)
    if found is not None:
        return found
    # in the layout of one kernel: what that makes of the identity is the weight
    with torch.no_grad():
        identity = torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device)
        return F.linear(identity, weight).T.contiguous()


def _unpacked(weight: Tensor) -> Tensor | None:
    """What torchao dequantizes `weight` to, None where it cannot."""
    try:
        return cast("Any", weight).dequantize().detach()
    except NotImplementedError:
        return None
