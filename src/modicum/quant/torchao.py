"""Linear layers whose weight is a tensor subclass of torchao: int8, int4, float8, with or without rounded inputs."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, cast, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

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
        """Let gradients pass to the input of layers that round it: torchao's kernels for those have none."""
        rounds = any(getattr(module.weight, name, None) is not None for name in _ON_INPUT)
        if rounds and type(module) is nn.Linear:
            # a class, not a function on the instance, so that copies of the layer are whole
            module.__class__ = StraightThroughLinear

    def loading_options(self) -> dict[str, Any]:
        """The number type the weights were quantized in: most of torchao's kernels take no other input."""
        require(("torchao",), "a checkpoint quantized by torchao", "pip install torchao")
        return {"dtype": "auto"}


@final
class StraightThroughLinear(nn.Linear):
    """A torchao layer that rounds its input: forward as torchao computes it, gradient as if nothing were rounded."""

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
    return cast("Any", weight).dequantize().detach()
