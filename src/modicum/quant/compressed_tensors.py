"""Checkpoints of compressed-tensors (llm-compressor, vLLM), as Transformers loads them.

The library computes on dense weights only: it decompresses the whole model at its first forward pass, and
Transformers cannot load asymmetric packed checkpoints without decompressing them. So `loading_options` asks for
dense layers straight away, and only layers that somebody else loaded are seen here. To keep the memory of the
low-bit form, import the checkpoint: `modicum import`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast, final

import torch
from torch import nn

from modicum.quant.base import BaseFormat, require

if TYPE_CHECKING:
    from torch import Tensor


@final
class CompressedTensors(BaseFormat):
    """An `nn.Linear` that compressed-tensors has compressed, or decompressed but still rounds on every pass."""

    name = "compressed-tensors"
    quant_method = "compressed-tensors"

    def matches(self, module: nn.Module) -> bool:
        """Whether `module` is a linear layer with a scheme of compressed-tensors."""
        scheme = getattr(module, "quantization_scheme", None)
        return isinstance(module, nn.Linear) and type(scheme).__module__.startswith("compressed_tensors.")

    def shape(self, module: nn.Module) -> tuple[int, int]:
        """(out_features, in_features)."""
        linear = cast("nn.Linear", module)
        return linear.out_features, linear.in_features

    def weight(self, module: nn.Module) -> Tensor:
        """The decompressed weight, (out, in), detached."""
        self.prepare(module)
        return cast("Tensor", module.weight).detach()

    def dtype(self, module: nn.Module) -> torch.dtype:
        """The dtype of the decompressed weight, that of the scales."""
        return _scale(module).dtype

    def device(self, module: nn.Module) -> torch.device:
        """Where the layer's numbers live."""
        return _scale(module).device

    def prepare(self, module: nn.Module) -> None:
        """Decompress the layer for good: what is left is a plain linear layer.

        The library would do it at the first forward pass, and keep a forward that rounds the weight, and with
        some schemes the input, again on every pass.
        """
        if not self.matches(module):
            return
        from compressed_tensors.compressors import decompress_module
        from compressed_tensors.quantization import QuantizationMetadata

        weight = getattr(module, "weight", None)
        if weight is None or not weight.is_floating_point():
            decompress_module(module, leave_decompressed=False)
        else:  # its first forward pass is over
            QuantizationMetadata.clear_quantization(module)
        module.requires_grad_(requires_grad=False)

    def loading_options(self) -> dict[str, Any]:
        """Dense layers, decompressed while loading."""
        require(
            ("compressed_tensors",),
            "a checkpoint of compressed-tensors",
            "pip install 'modicum[quant]', or take the checkpoint over with `modicum import FOLDER --output NEW`",
        )
        from transformers import CompressedTensorsConfig

        return {"quantization_config": CompressedTensorsConfig(dequantize=True)}


def _scale(module: nn.Module) -> Tensor:
    """A floating tensor that the layer has in either form."""
    scale = getattr(module, "weight_scale", None)
    return cast("Tensor", module.weight if scale is None else scale)
