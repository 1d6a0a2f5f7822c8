"""Weights quantized by bitsandbytes: NF4/FP4 (`Linear4bit`) and int8 (`Linear8bitLt`).

Needs the extra `modicum[quant]`; without bitsandbytes installed nothing matches.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, cast, final

import torch

from modicum.quant.allocator import keep_freed_memory
from modicum.quant.base import BaseFormat, require

if TYPE_CHECKING:
    from torch import Tensor, nn


_REMEDY = "pip install 'modicum[quant]'"


def _bnb() -> Any:
    """The bitsandbytes package if somebody has imported it: only then can a layer of it exist."""
    return sys.modules.get("bitsandbytes")


@final
class Bitsandbytes4bit(BaseFormat):
    """`Linear4bit`: NF4 or FP4 codes in blocks, no zero-point."""

    name = "bitsandbytes 4-bit"
    quant_method = "bitsandbytes"

    def matches(self, module: nn.Module) -> bool:
        """Whether `module` is a bitsandbytes `Linear4bit`."""
        return _bnb() is not None and isinstance(module, _bnb().nn.Linear4bit)

    def shape(self, module: nn.Module) -> tuple[int, int]:
        """(out_features, in_features)."""
        return cast("Any", module).out_features, cast("Any", module).in_features

    def weight(self, module: nn.Module) -> Tensor:
        """The dequantized weight, (out, in), a new tensor."""
        linear = cast("Any", module)
        return _bnb().functional.dequantize_4bit(linear.weight.data, linear.weight.quant_state).detach()

    def dtype(self, module: nn.Module) -> torch.dtype:
        """The dtype the weight had before quantization."""
        return cast("Any", module).weight.quant_state.dtype

    def prepare(self, module: nn.Module) -> None:
        """Undo and forbid the in-place repacking of weights in evaluation on AVX512-BF16 processors.

        Repacked weights lose the gradient to the input without an error, and dequantize to garbage
        (bitsandbytes #2078). Freed memory is kept from then on: see `keep_freed_memory`.
        """
        linear = cast("Any", module)
        if linear.weight.device.type == "cpu":
            keep_freed_memory()
        state = linear.weight.quant_state
        if getattr(state, "packing_format_for_cpu", False):
            unpack = _bnb().functional._convert_weight_packed_for_cpu_inverse  # noqa: SLF001 - no public inverse
            linear.weight.data, linear.weight.quant_state = unpack(linear.weight.data, state)
        linear.support_avx512bf16_for_cpu = False

    def loading_options(self) -> dict[str, Any]:
        """None; both kinds of layers are read by the same library."""
        require(("bitsandbytes",), "a checkpoint quantized by bitsandbytes", _REMEDY)
        return {}


@final
class Bitsandbytes8bit(BaseFormat):
    """`Linear8bitLt`: int8 rows with one scale each."""

    name = "bitsandbytes 8-bit"

    def matches(self, module: nn.Module) -> bool:
        """Whether `module` is a bitsandbytes `Linear8bitLt`."""
        return _bnb() is not None and isinstance(module, _bnb().nn.Linear8bitLt)

    def shape(self, module: nn.Module) -> tuple[int, int]:
        """(out_features, in_features)."""
        return cast("Any", module).out_features, cast("Any", module).in_features

    def weight(self, module: nn.Module) -> Tensor:
        """The dequantized weight, (out, in), a new tensor."""
        from peft.utils.integrations import dequantize_bnb_weight

        linear = cast("Any", module)
        return dequantize_bnb_weight(linear.weight, state=linear.state).detach()

    def dtype(self, module: nn.Module) -> torch.dtype:
        """float32: rows are dequantized with float32 scales."""
        del module
        return torch.float32

    def prepare(self, module: nn.Module) -> None:
        """Keep freed memory: a training step dequantizes the weight each time."""
        if cast("Tensor", module.weight).device.type == "cpu":
            keep_freed_memory()
