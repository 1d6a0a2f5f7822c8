"""GPTQ and AWQ checkpoints as Transformers loads them, with the kernels of gptqmodel.

gptqmodel has a dozen kernels for the same file. Some only infer; others pack the weight anew at the first
evaluation and then pass no gradient to the input, without an error; one computed wrong values for asymmetric
grids. The two plain torch kernels do none of that and are the ones adapters can go on. Where gptqmodel does
not run, `modicum import` takes the checkpoint over into our own layers.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, cast, final

import torch

from modicum.errors import TargetError
from modicum.quant.allocator import keep_freed_memory
from modicum.quant.base import BaseFormat, require
from modicum.quant.interchange import from_awq

if TYPE_CHECKING:
    from torch import Tensor, nn

_LAYERS = "gptqmodel.nn_modules.qlinear"
#: name of the buffer with the scales as the checkpoint has them
_SCALES = "checkpoint_scales"
_REMEDY = (
    "pip install gptqmodel optimum (it is built from source), or take the checkpoint over, which needs neither: "
    "`modicum import FOLDER --output NEW`"
)


def _is_layer(module: nn.Module, base: str) -> bool:
    """Whether `module` is a linear layer of gptqmodel derived from its class `base`."""
    package = sys.modules.get(_LAYERS)
    return (
        package is not None
        and isinstance(module, getattr(package, base, ()))
        and "Linear" in type(module).__name__
    )


def _refuse(module: nn.Module, right: str, option: str) -> None:
    raise TargetError(
        f"gptqmodel's {type(module).__name__} cannot be trained on: it infers only, or loses gradients after an "
        f"evaluation. Load the model with quantization_config={option} (its {right}), or take the checkpoint over "
        "with `modicum import FOLDER --output NEW`"
    )


@final
class Gptq(BaseFormat):
    """gptqmodel's layers of a GPTQ checkpoint; `TorchLinear` can be adapted."""

    name = "GPTQ"
    quant_method = "gptq"

    def matches(self, module: nn.Module) -> bool:
        """Whether `module` is one of gptqmodel's GPTQ layers."""
        return _is_layer(module, "GPTQQuantLinear") and not _is_layer(module, "AWQuantLinear")

    def shape(self, module: nn.Module) -> tuple[int, int]:
        """(out_features, in_features)."""
        return cast("Any", module).out_features, cast("Any", module).in_features

    def weight(self, module: nn.Module) -> Tensor:
        """The dequantized weight, (out, in), float32, a new tensor."""
        return cast("Any", module).dequantize_weight().detach().T.float()

    def dtype(self, module: nn.Module) -> torch.dtype:
        """float32: the layer takes inputs of any type."""
        del module
        return torch.float32

    def device(self, module: nn.Module) -> torch.device:
        """Where the codes live."""
        return cast("Any", module).qweight.device

    def prepare(self, module: nn.Module) -> None:
        """Refuse kernels that cannot be trained on; keep freed memory, because each pass dequantizes the weight."""
        if type(module).__name__ not in ("TorchLinear", "TritonV2Linear"):
            _refuse(module, "TorchLinear", 'GPTQConfig(bits=4, backend="gptq_torch")')
        if self.device(module).type == "cpu":
            keep_freed_memory()

    def loading_options(self) -> dict[str, Any]:
        """The kernel that adapters can go on."""
        require(("gptqmodel", "optimum"), "a GPTQ checkpoint", _REMEDY)
        from transformers import GPTQConfig

        return {"quantization_config": GPTQConfig(bits=4, backend="gptq_torch")}


@final
class Awq(BaseFormat):
    """gptqmodel's layers of an AWQ checkpoint; `AwqTorchLinear` can be adapted."""

    name = "AWQ"
    quant_method = "awq"

    def matches(self, module: nn.Module) -> bool:
        """Whether `module` is one of gptqmodel's AWQ layers."""
        return _is_layer(module, "AWQuantLinear")

    def shape(self, module: nn.Module) -> tuple[int, int]:
        """(out_features, in_features)."""
        return cast("Any", module).out_features, cast("Any", module).in_features

    def weight(self, module: nn.Module) -> Tensor:
        """The dequantized weight, (out, in), float32, a new tensor."""
        layer = cast("Any", module)
        tensors = {
            "qweight": layer.qweight,
            "qzeros": layer.qzeros,
            "scales": getattr(layer, _SCALES, layer.scales),
        }
        return from_awq(tensors, layer.group_size).weight()

    def dtype(self, module: nn.Module) -> torch.dtype:
        """float32: the layer takes inputs of any type."""
        del module
        return torch.float32

    def device(self, module: nn.Module) -> torch.device:
        """Where the codes live."""
        return cast("Any", module).qweight.device

    def prepare(self, module: nn.Module) -> None:
        """Refuse kernels that cannot be trained on; keep the checkpoint's scales.

        The layer rounds its scales to the type of its first input. Without a copy the weight, and with it the
        fingerprint of the base model, would depend on whether the model has run.
        """
        if type(module).__name__ != "AwqTorchLinear":
            _refuse(module, "AwqTorchLinear", 'AwqConfig(backend="torch_awq")')
        layer = cast("Any", module)
        if not hasattr(layer, _SCALES):
            layer.register_buffer(_SCALES, layer.scales.clone(), persistent=False)
        if self.device(module).type == "cpu":
            keep_freed_memory()

    def loading_options(self) -> dict[str, Any]:
        """The kernel that adapters can go on."""
        require(("gptqmodel", "accelerate"), "an AWQ checkpoint", _REMEDY)
        from transformers import AwqConfig

        return {"quantization_config": AwqConfig(backend=cast("Any", "torch_awq"))}
