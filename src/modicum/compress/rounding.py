"""One weight on its grid, as the options of a quantization want it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from modicum.ops.affine import Grid, encode, fit_grid, left_over, residuals
from modicum.ops.gptq import gptq
from modicum.quant.spec import DTYPES

if TYPE_CHECKING:
    from torch import Tensor

    from modicum.compress.quantize_report import QuantizeOptions


class Rounded(NamedTuple):
    """A quantized weight."""

    #: (out, in) uint8
    codes: Tensor
    grid: Grid
    #: (out, in) int8, where they are kept
    residuals: Tensor | None


def rounded(weight: Tensor, hessian: Tensor | None, options: QuantizeOptions) -> Rounded:
    """The (out, in) `weight` with codes; by GPTQ for inputs with the `hessian` where there is one, else to nearest.

    Raises:
        ConfigError: the Hessian cannot be factored.
    """
    spec, wanted = options.spec, options.spec.residuals
    fitting: dict[str, Any] = {
        "zero_point": spec.zero_point,
        "clip": options.fitting,
        "scale_dtype": DTYPES[spec.scale_dtype],
        "offset_dtype": DTYPES[spec.offset_dtype],
    }
    mask = weight != 0 if options.keep_zeros else None
    if hessian is not None:
        fitting |= {"act_order": options.act_order, "damping": options.damping}
        fitting |= {"mask": mask, "keep_residuals": wanted}
        found = gptq(weight, hessian, spec.bits, spec.block, **fitting)
        return Rounded(found.codes, found.grid, found.residuals)
    # rounding to nearest keeps zeros wherever 0 is on the grid
    grid = fit_grid(weight, spec.bits, spec.block, **fitting)
    codes = encode(weight, grid, spec.bits, spec.block)
    left = residuals(left_over(weight, codes, grid, spec.bits, spec.block), mask) if wanted else None
    return Rounded(codes, grid, left)
