"""What the laws run over: every registered method with the variants it declares, on every base kind."""

from __future__ import annotations

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from modicum.adapters import registry
from modicum.quant.huggingface import quantized_linear
from modicum.quant.spec import AffineSpec

#: options that change how a method computes; methods without an entry run with their defaults
VARIANTS = {
    "lora_xs": [
        {},
        {"svd_mode": "exact"},
        {"core": "diagonal"},
        {"use_sigma": False},
        {"basis": "random"},
        {"basis": "random_kaiming", "basis_seed": 3},
        {"directions": "bottom", "svd_mode": "exact"},
        {"directions": "middle", "svd_mode": "exact"},
        {"dropout": 0.5},
    ],
    "q_bara": [{}, {"pool": 4, "repeat": 1}, {"dropout": 0.5}],
    "qa_hira": [{}, {"pool": 8, "repeat": 1}],
    "qa_lora": [{"pool": 4}],
    "qa_blora": [{"pool": 4, "repeat": 2}, {"pool": 1, "repeat": 3}],
    "sparse_peft": [{}, {"dropout": 0.5}],
    "qa_sparse_peft": [{}, {"dropout": 0.5}],
}

METHODS = [(name, variant) for name in registry.names() for variant in VARIANTS.get(name, [{}])]


def method_id(case) -> str:
    """`lora_xs-core=diagonal` and the like, for test names."""
    name, variant = case
    return "-".join([name, *(f"{key}={value}" for key, value in variant.items())])


def fitted(case, shape: dict) -> dict:
    """The drawn shape, widened to a multiple of the method's blocks; a low-bit base for methods that train codes."""
    name, variant = case
    if registry.get(name).on_grid:
        sizes = {side: -(-shape[side] // 8) * 8 for side in ("in_features", "out_features")}
        return {**shape, **sizes, "kind": "low-bit"}
    config = registry.config_class(name)(target_modules=["layer"], **variant)
    repeat, pool = getattr(config, "repeat", 1), getattr(config, "pool", 1)
    return {
        **shape,
        "in_features": -(-shape["in_features"] // pool) * pool,
        "out_features": -(-shape["out_features"] // repeat) * repeat,
    }


#: relative tolerance of a matrix product in each dtype
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 4e-2, torch.float16: 6e-3}


class OneLayer(nn.Module):
    """A model of a single base layer called `layer`."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


def base_layer(kind: str, in_features: int, out_features: int, dtype: torch.dtype, *, bias: bool, seed: int):
    """A base layer of the given kind with Gaussian weight and bias; a third of the weights are 0."""
    torch.manual_seed(seed)
    layer = (
        nn.Linear(in_features, out_features, bias=bias)
        if kind != "conv1d"
        else Conv1D(out_features, in_features)
    )
    nn.init.normal_(layer.weight, std=in_features**-0.5)
    pruned = torch.rand(layer.weight.shape) < 1 / 3
    pruned[0, 0] = False
    layer.weight.data[pruned] = 0
    if layer.bias is not None:
        nn.init.normal_(layer.bias)
    if kind == "low-bit":
        spec = AffineSpec(4, (1, 8), "integer", offset_dtype="float32", residuals=True)
        layer = quantized_linear(layer.requires_grad_(False), spec)
    return OneLayer(layer.to(dtype))


def close(
    actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype, scale: float | None = None
) -> None:
    """Assert equality within the rounding of `dtype`, relative to the size of the numbers."""
    size = scale if scale is not None else max(expected.float().abs().max().item(), 1e-6)
    error = (actual.float() - expected.float()).abs().max().item()
    assert error <= TOLERANCE[dtype] * size, f"error {error:.3g} of {size:.3g}"
