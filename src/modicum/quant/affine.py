"""Our own low-bit linear layer: codes on an affine grid, float offsets, exact folding of block-constant updates."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple, cast, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modicum.errors import ConfigError, InexactMergeError
from modicum.ops.affine import Grid, decode, pack, packed_width, spread, unpack
from modicum.quant import int4pack
from modicum.quant.base import BaseFormat
from modicum.quant.matmul import linear
from modicum.quant.spec import DTYPES, AffineSpec
from modicum.quant.steps import Steps

if TYPE_CHECKING:
    from collections.abc import Callable

_NO_ASSIGNMENT = (
    "a quantized weight cannot be assigned: what `weight` returns is a copy. Merge with `modicum merge`, which "
    "folds what can be folded exactly and says what the rest costs"
)


@final
class AffineLinear(nn.Linear):
    """A linear layer with the frozen weight ŵ = s (c − 2^(bits−1)) + o; gradients pass to its input only.

    Buffers: `codes`, `scales`, `offsets`, `block_offsets`, `residuals` (absent ones None). The number type of the
    layer's input decides the one it computes in; `.to(dtype)` leaves the buffers as they are.
    """

    codes: Tensor
    scales: Tensor
    offsets: Tensor | None
    block_offsets: Tensor | None
    residuals: Tensor | None
    _like: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        spec: AffineSpec,
        bias: bool = True,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        nn.Module.__init__(self)
        faults = spec.faults(out_features, in_features)
        if faults:
            raise ConfigError(f"a {(out_features, in_features)} layer: " + "; ".join(faults))
        self.in_features, self.out_features, self.spec = in_features, out_features, spec
        #: whether the buffers are in the layout of the packed int4 kernel
        self.packed = False
        q, p = spec.block
        grid = (out_features // q, in_features // p)
        shape = (out_features, packed_width(in_features, spec.bits))
        self.register_buffer("codes", torch.zeros(shape, dtype=torch.uint8, device=device))
        self.register_buffer("scales", torch.ones(grid, dtype=DTYPES[spec.scale_dtype], device=device))
        zero = None
        if spec.zero_point != "none":
            zero = torch.zeros(grid, dtype=DTYPES[spec.offset_dtype], device=device)
        self.register_buffer("offsets", zero)
        extra = None
        if spec.offset_block is not None:
            rows, columns = spec.offset_block
            extra = torch.zeros(out_features // rows, in_features // columns, device=device)
        self.register_buffer("block_offsets", extra)
        left = None
        if spec.residuals:
            left = torch.zeros(out_features, in_features, dtype=torch.int8, device=device)
        self.register_buffer("residuals", left)
        # follows `.to(dtype)` like a weight would
        self.register_buffer(
            "_like", torch.empty(0, dtype=dtype or torch.get_default_dtype(), device=device), persistent=False
        )
        self.bias = nn.Parameter(torch.zeros(out_features, dtype=dtype, device=device)) if bias else None
        # nothing for Transformers to initialise
        self._is_hf_initialized = True

    @classmethod
    def from_quantized(
        cls,
        codes: Tensor,
        grid: Grid,
        spec: AffineSpec,
        bias: Tensor | None = None,
        dtype: torch.dtype | None = None,
        residuals: Tensor | None = None,
    ) -> AffineLinear:
        """A layer of unpacked codes (out, in) uint8, their grid, and the residuals where the spec has them."""
        layer = cls(codes.shape[1], codes.shape[0], spec, bias is not None, dtype, "meta")
        layer.codes = pack(codes, spec.bits)
        layer.set_grid(grid)
        layer.residuals = residuals
        layer._like = torch.empty(0, dtype=layer._like.dtype, device=codes.device)
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach().to(layer._like.dtype).clone(), requires_grad=False)
        return layer

    @property
    def dtype(self) -> torch.dtype:
        """The number type the layer computes in, as far as its module was told."""
        return self._like.dtype

    @property
    def weight(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The dequantized weight (out, in), made anew on each access; it cannot be assigned."""
        if self.codes.is_meta:
            return torch.empty(self.out_features, self.in_features, dtype=self.dtype, device="meta")
        return _ReadOnly.of(self.dequantized().to(self.dtype))

    @weight.setter
    def weight(self, value: Tensor) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        # PEFT hands a layer's own weight back to it when it unloads adapters
        if not isinstance(value, _ReadOnly):
            raise InexactMergeError(_NO_ASSIGNMENT)

    def dequantized(self) -> Tensor:
        """The weight (out, in) in float32."""
        grid = self.grid()
        weight = decode(self.unpacked_codes(), grid, self.spec.bits, self.spec.block)
        if self.block_offsets is not None and self.spec.offset_block is not None:
            weight += spread(self.block_offsets, self.spec.offset_block)
        return weight

    def unpacked_codes(self) -> Tensor:
        """The codes (out, in), uint8."""
        if self.packed:
            return int4pack.unpacked(self.codes)
        return unpack(self.codes, self.spec.bits, self.in_features)

    def grid(self) -> Grid:
        """Scales and offsets, (out/q, in/p), whatever the layout."""
        if not self.packed:
            return Grid(self.scales, self.offsets)
        grid = int4pack.grid_of(self.scales, self.offsets)
        if self.spec.zero_point == "none":
            return Grid(grid.scales, None)
        assert grid.offsets is not None
        return Grid(grid.scales, grid.offsets.to(DTYPES[self.spec.offset_dtype]))

    def set_grid(self, grid: Grid) -> None:
        """Take other scales and offsets in place, in the number types of the spec."""
        self.unpack_layout()
        self.scales = grid.scales.to(DTYPES[self.spec.scale_dtype])
        self.offsets = None if grid.offsets is None else grid.offsets.to(DTYPES[self.spec.offset_dtype])

    def drop_residuals(self) -> None:
        """Forget what rounding took away, in place: it was for training, and means nothing once codes have moved."""
        self.residuals, self.spec = None, replace(self.spec, residuals=False)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - nn.Linear's name for it
        """The product of the input with ŵᵀ, plus the bias; shape (*batch, out)."""
        x = input
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        if not self.packed and not torch.is_grad_enabled() and self._wants_kernel(x):
            self.pack_layout()
        bias = self.bias
        trains = bias is not None and bias.requires_grad
        y = linear(
            x,
            self.codes,
            self.scales,
            self.offsets,
            None if trains else bias,
            self.spec.bits,
            self.spec.block,
            self.packed,
        )
        if trains:
            assert bias is not None
            y = y + bias.to(y.dtype)
        if self.block_offsets is not None and self.spec.offset_block is not None:
            y = y + block_product(x, self.block_offsets, self.spec.offset_block).to(y.dtype)
        return y

    def pack_layout(self) -> None:
        """Change to the layout of the packed int4 kernel in place, if the layer fits it."""
        if self.packed or not self._fits_kernel():
            return
        codes = int4pack.packed(self.unpacked_codes())
        self.scales, self.offsets = int4pack.kernel_grid(self.grid())
        self.codes, self.packed = codes, True

    def unpack_layout(self) -> None:
        """Change back to the layout on disk in place, bit for bit."""
        if self.packed:
            codes, grid = pack(self.unpacked_codes(), self.spec.bits), self.grid()
            self.codes, (self.scales, self.offsets), self.packed = codes, grid, False

    def _fits_kernel(self) -> bool:
        spec, shape = self.spec, (self.out_features, self.in_features)
        return int4pack.fits(*shape, spec.bits, spec.block, DTYPES[spec.scale_dtype], self.codes.device)

    def _wants_kernel(self, x: Tensor) -> bool:
        few = x.numel() <= int4pack.FEW_ROWS * self.in_features
        return few and x.dtype == torch.bfloat16 and not torch.compiler.is_compiling() and self._fits_kernel()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AffineLinear:
        """Move to a device; number types of the stored values never change."""
        self.unpack_layout()
        before = {name: getattr(self, name) for name in ("scales", "offsets", "block_offsets")}
        super()._apply(fn, recurse)
        for name, value in before.items():
            after = getattr(self, name)
            if value is not None and after.dtype != value.dtype:
                setattr(self, name, value.to(after.device))
        return self

    def __getstate__(self) -> dict[str, Any]:
        # what is pickled may be loaded on another device, whose kernel has another layout
        self.unpack_layout()
        return super().__getstate__()  # pyright: ignore[reportReturnType]

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        # on disk there is one layout only
        self.unpack_layout()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.unpack_layout()
        super()._load_from_state_dict(*args, **kwargs)

    def extra_repr(self) -> str:
        """Shape and grid."""
        spec = self.spec
        return (
            f"{self.in_features}, {self.out_features}, bits={spec.bits}, block={spec.block}, "
            f"zero_point={spec.zero_point}, bias={self.bias is not None}"
        )


def block_product(x: Tensor, values: Tensor, block: tuple[int, int]) -> Tensor:
    """X Δᵀ for the weight Δ = spread(values, block), without making Δ; float32, shape (*batch, out)."""
    q, p = block
    sums = x.float().unflatten(-1, (-1, p)).sum(-1)
    return F.linear(sums, values).repeat_interleave(q, -1) if q > 1 else F.linear(sums, values)


class _ReadOnly(Tensor):
    """A tensor whose data cannot be assigned: who merges into it would lose the update without a word."""

    @staticmethod
    def of(tensor: Tensor) -> Tensor:
        return tensor.as_subclass(_ReadOnly)

    # results of operations are plain tensors
    __torch_function__ = torch._C._disabled_torch_function_impl  # noqa: SLF001  # pyright: ignore[reportAssignmentType]

    @property
    def data(self) -> Tensor:
        """The values."""
        return self.detach().as_subclass(Tensor)

    @data.setter
    def data(self, value: Tensor) -> None:
        del value
        raise InexactMergeError(_NO_ASSIGNMENT)


@final
class Affine(BaseFormat):
    """`AffineLinear`: our own codes, scales and offsets."""

    name = "affine"
    foldable = True
    recodable = True

    def matches(self, module: nn.Module) -> bool:
        """Whether `module` is an `AffineLinear`."""
        return isinstance(module, AffineLinear)

    def shape(self, module: nn.Module) -> tuple[int, int]:
        """(out_features, in_features)."""
        layer = cast("AffineLinear", module)
        return layer.out_features, layer.in_features

    def weight(self, module: nn.Module) -> Tensor:
        """The dequantized weight, (out, in), float32, a new tensor."""
        return cast("AffineLinear", module).dequantized()

    def dtype(self, module: nn.Module) -> torch.dtype:
        """The number type the layer computes in."""
        return cast("AffineLinear", module).dtype

    def device(self, module: nn.Module) -> torch.device:
        """Where the codes live."""
        return cast("AffineLinear", module).codes.device

    def fold(self, module: nn.Module, values: Tensor, block: tuple[int, int]) -> None:
        """Add the update to the offsets; codes and scales stay. Exact up to one float32 rounding of the offset."""
        fold(cast("AffineLinear", module), values, block)

    def grid_fault(self, module: nn.Module) -> str | None:
        """Why the weight is not whole steps of grids through 0: offsets that are no multiples of the scales."""
        spec = cast("AffineLinear", module).spec
        if spec.offset_block is not None:
            return "a merge has left it offsets of its own"
        return "its zero-points are no whole numbers" if spec.zero_point == "float" else None

    def steps(self, module: nn.Module, saved: _Saved | None = None) -> Steps:
        """The weight as whole steps; decodes nothing yet."""
        layer = cast("AffineLinear", module)
        spec, residuals = (layer.spec, layer.residuals) if saved is None else (saved.spec, saved.residuals)
        if saved is None or saved.codes is None:
            codes, packed = layer.codes, layer.packed
        else:
            codes, packed = saved.codes, False
        grid = layer.grid() if saved is None else Grid(layer.grid().scales, saved.offsets)
        return Steps(codes, grid, spec.bits, spec.block, residuals, packed=packed)

    def recode(self, module: nn.Module, moved: Tensor) -> None:
        """Move the codes; scales and offsets stay bit for bit, residuals are dropped."""
        layer = cast("AffineLinear", module)
        codes = layer.unpacked_codes().to(torch.int16) + moved.to(torch.int16)
        if int(codes.min()) < 0 or int(codes.max()) >= 2**layer.spec.bits:
            raise InexactMergeError("together the updates lead beyond the grid; merge one adapter alone")
        layer.unpack_layout()
        layer.codes = pack(codes.to(torch.uint8), layer.spec.bits)
        layer.drop_residuals()

    def snapshot(self, module: nn.Module, *, codes: bool = False) -> _Saved:
        """All that `fold` changes, and the codes if they are going to change too."""
        layer = cast("AffineLinear", module)
        if codes:
            layer.unpack_layout()
        kept = layer.codes if codes else None
        return _Saved(layer.spec, layer.grid().offsets, layer.block_offsets, layer.residuals, kept)

    def restore(self, module: nn.Module, saved: _Saved) -> None:
        """Put everything back."""
        layer = cast("AffineLinear", module)
        layer.unpack_layout()
        layer.spec, layer.offsets, layer.block_offsets, layer.residuals = saved[:4]
        if saved.codes is not None:
            layer.codes = saved.codes

    def saved_weight(self, module: nn.Module, saved: _Saved) -> Tensor:
        """The weight with the offsets, and the codes, of the snapshot."""
        layer, spec = cast("AffineLinear", module), saved.spec
        codes = (
            layer.unpacked_codes()
            if saved.codes is None
            else unpack(saved.codes, spec.bits, layer.in_features)
        )
        weight = decode(codes, Grid(layer.grid().scales, saved.offsets), spec.bits, spec.block)
        if saved.block_offsets is not None and spec.offset_block is not None:
            weight += spread(saved.block_offsets, spec.offset_block)
        return weight


class _Saved(NamedTuple):
    """What undoes merges into an `AffineLinear`."""

    spec: AffineSpec
    offsets: Tensor | None
    block_offsets: Tensor | None
    residuals: Tensor | None
    #: in the layout on disk; None where merges leave the codes alone
    codes: Tensor | None


def fold(layer: AffineLinear, values: Tensor, block: tuple[int, int]) -> None:
    """Adds the weight update spread(values, block) to `layer` in place: offsets change, codes and scales do not.

    Where quantization blocks lie inside the update's blocks, their own offsets take it; otherwise it becomes (or
    joins) the additional `block_offsets`. Exact up to one float32 rounding of the offset.
    """
    layer.unpack_layout()
    layer.drop_residuals()
    spec, values = layer.spec, values.detach().float()
    (q, p), (rows, columns) = block, spec.block
    if q % rows == 0 and p % columns == 0:
        offsets = (
            torch.zeros_like(layer.scales, dtype=torch.float32)
            if layer.offsets is None
            else layer.offsets.float()
        )
        layer.offsets = offsets + spread(values, (q // rows, p // columns)).to(offsets.device)
        layer.spec = replace(spec, zero_point="float", offset_dtype="float32")
        return
    if layer.block_offsets is None or spec.offset_block is None:
        layer.block_offsets = values.clone().to(layer.scales.device)
        layer.spec = replace(spec, offset_block=block)
        return
    fine = math.gcd(q, spec.offset_block[0]), math.gcd(p, spec.offset_block[1])
    old = spread(layer.block_offsets, (spec.offset_block[0] // fine[0], spec.offset_block[1] // fine[1]))
    new = spread(values, (q // fine[0], p // fine[1])).to(old.device)
    layer.block_offsets = old + new
    layer.spec = replace(spec, offset_block=fine)
