"""A GPTQ folder, which vLLM, gptqmodel, exllama and others load.

Weights are s (c − z) with float16 s and an integer zero-point z, a code like the others: grids that were made
with `zero_point: integer` or `none` and took no update since differ by the rounding of s alone, everything else
is moved by up to s/2. All layers share one number of bits and one group size, and every layer but the head is
quantized. The format's first form stores z − 1; where some z is 0 the second (`gptq_v2`) is written, which
stores z.

Source: AutoGPTQ's and gptqmodel's `QuantLinear`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from modicum.compress.export._fit import Fit
from modicum.compress.export._integers import check_alike, integer_grid, save_folder, words
from modicum.compress.export._source import LowBit, Source
from modicum.errors import listing

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

SUFFIX = ""
PRECISION = "float16 of scales"


def check(source: Source) -> None:
    """Raise unless all layers but the head are low-bit, alike, and fill whole 32-bit words.

    Raises:
        ConfigError: the format has no place for this model.
    """
    dense = [name for name in source.linears if name not in source.low_bit and name != "lm_head"]
    faults = [f"{listing(dense)} are dense"] if dense else []
    for name in source.low_bit:
        weight = source.weight(name)
        assert isinstance(weight, LowBit)
        out, inner = weight.codes.shape
        if out * weight.bits % 32 or inner * weight.bits % 32:
            faults.append(f"{name}: {out} × {inner} codes of {weight.bits} bits fill no whole 32-bit words")
    check_alike(source, "GPTQ", faults)


def fit(source: Source, name: str, allow_inexact: bool) -> Fit:
    """The layer with integer zero-points; exact where they were integers to begin with."""
    del allow_inexact
    weight = source.weight(name)
    assert isinstance(weight, LowBit)
    grid = integer_grid(weight)
    grid = grid._replace(scales=grid.scales.half().float())
    parts = {"qweight": words(weight.codes, weight.bits).T.contiguous(), "bits": weight.bits, "grid": grid}
    return Fit("integer zero-points", grid.exact, parts, grid.decoded(weight))


def write(source: Source, target: Path, fit: Callable[[str], Fit]) -> None:
    """Write a `from_pretrained` folder."""
    fits = {name: fit(name).parts for name in source.low_bit}
    second_form = any(bool((parts["grid"].zeros == 0).any()) for parts in fits.values())
    tensors: dict[str, Tensor] = {}
    for name in source.low_bit:
        bits, grid = fits[name]["bits"], fits[name]["grid"]
        stored = grid.zeros if second_form else grid.zeros - 1
        tensors |= {
            f"{name}.qweight": fits[name]["qweight"],
            f"{name}.qzeros": words(stored.T.contiguous(), bits),
            f"{name}.scales": grid.scales.T.half().contiguous(),
            f"{name}.g_idx": torch.arange(grid.zeros.shape[1] * grid.group, dtype=torch.int32) // grid.group,
        }
    first = next(iter(fits.values()))
    quantization: dict[str, Any] = {
        "quant_method": "gptq",
        "bits": first["bits"],
        "group_size": first["grid"].group,
        "desc_act": False,
        "sym": all(parts["grid"].symmetric for parts in fits.values()),
        "lm_head": "lm_head" in source.low_bit,
        "checkpoint_format": "gptq_v2" if second_form else "gptq",
    }
    save_folder(source, target, tensors, quantization)
