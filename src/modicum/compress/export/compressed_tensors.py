"""A compressed-tensors folder (`pack-quantized`), which vLLM and Transformers load.

Weights are s (c − z) with an integer zero-point z, a code like the others: grids that were made with
`zero_point: integer` or `none` and took no update since are exact, everything else is moved by up to s/2.
Loaders compute s (c − z) in the number type they load the model in.

Source: the `compressed_tensors` library's `pack_quantized` compressor.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from modicum.compress.export._fit import Fit
from modicum.compress.export._integers import check_alike, integer_grid, save_folder, words
from modicum.compress.export._source import LowBit, Source

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

SUFFIX = ""
PRECISION = "none: codes, scales and integer zero-points are kept bit for bit"


def check(source: Source) -> None:
    """Raise unless all low-bit layers are alike, which is what loaders take; no library is needed to write them."""
    check_alike(source, "compressed-tensors")


def fit(source: Source, name: str, allow_inexact: bool) -> Fit:
    """The layer with integer zero-points; exact where they were integers to begin with."""
    del allow_inexact
    weight = source.weight(name)
    assert isinstance(weight, LowBit)
    grid = integer_grid(weight)
    tensors = {
        "weight_packed": words(weight.codes, weight.bits),
        # loaders decode in the type of the scales, and 16 bits do not hold scale times code
        "weight_scale": grid.scales.contiguous(),
        "weight_shape": torch.tensor(weight.codes.shape),
        "weight_zero_point": words(grid.zeros.T.contiguous(), weight.bits).T.contiguous(),
    }
    parts = {"tensors": tensors, "bits": weight.bits, "group": grid.group, "symmetric": grid.symmetric}
    return Fit("integer zero-points", grid.exact, parts, grid.decoded(weight))


def write(source: Source, target: Path, fit: Callable[[str], Fit]) -> None:
    """Write a `from_pretrained` folder."""
    fits = {name: fit(name).parts for name in source.low_bit}
    symmetric = all(parts["symmetric"] for parts in fits.values())
    tensors = {
        f"{name}.{key}": value for name, parts in fits.items() for key, value in parts["tensors"].items()
    }
    if symmetric:
        tensors = {key: value for key, value in tensors.items() if not key.endswith("weight_zero_point")}
    first = next(iter(fits.values()))
    weights = {
        "num_bits": first["bits"],
        "type": "int",
        "strategy": "group",
        "group_size": first["group"],
        "symmetric": symmetric,
        "dynamic": False,
    }
    quantization = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        # a head that is the embedding is a linear layer to the loader
        "ignore": sorted({*source.linears, "lm_head"} - set(source.low_bit)),
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "format": "pack-quantized"}},
    }
    save_folder(source, target, tensors, quantization)
