"""An adapter merged into its base model, as one folder, after measuring on real tokens what that costs.

A dense base takes any update, rounded once to the dtype it is written in. A quantized base takes updates that
are constant on blocks exactly, in its offsets, and such of whole steps of its grid, in its codes. Every other
update to a quantized base becomes a dense model, or is quantized again with error feedback (GPTQ) and loses
something, which is measured and said.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from modicum.adapters.layer import AdapterLinear
from modicum.adapters.merge import check_whole, exact_updates, take, way
from modicum.adapters.merge_report import MergeReport, merge_error
from modicum.errors import ConfigError, InexactMergeError, did_you_mean
from modicum.models.loading import load_tokenizer
from modicum.ops.gptq import Hessian, gptq
from modicum.quant.affine import AffineLinear
from modicum.quant.base import format_of
from modicum.quant.huggingface import AffineConfig, AffineQuantizer, effective_bits
from modicum.quant.spec import DTYPES, AffineSpec
from modicum.store.atomic import write_folder
from modicum.store.convert import load_for

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping, Sequence

    from peft import PeftModel
    from torch import Tensor

_KNOWN = ("auto", *DTYPES)
#: what a foreign low-bit base is quantized to when it has to be quantized again
_FALLBACK = AffineSpec(4, (1, 64))
#: bytes of input statistics kept at a time
_STATISTICS = 2 << 30


@dataclass(frozen=True)
class Merged:
    """What a merge wrote, or would have, and how far it is from the unmerged model."""

    output: Path
    dtype: str
    #: files written, with their bytes
    files: dict[str, int]
    report: MergeReport
    exact: bool
    dry_run: bool
    #: bits per quantized weight before and after, None for a dense base
    bits_before: float | None = None
    bits_after: float | None = None
    #: share of the update that offsets of this kind would lose; empty where nothing was folded
    coarser_offsets: dict[str, float] = field(default_factory=dict)


def merge_to_folder(
    model: str,
    adapter: str | os.PathLike,
    output: str | os.PathLike,
    *,
    texts: Sequence[str],
    dtype: str = "auto",
    allow_inexact: bool = False,
    dry_run: bool = False,
) -> Merged:
    """What was written: base model and adapter as one folder for `from_pretrained`, tokenizer included.

    `dtype` makes the result dense in this dtype; `auto` keeps what the base is: as loaded, or quantized. The
    error is measured on the tokens of `texts` before anything is written.

    Raises:
        InexactMergeError: the merged model would be further off than rounding has to cost; nothing was written.
        ConfigError: the output exists, unknown dtype, or the model cannot be loaded.
    """
    target = Path(output)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"{target} exists already; choose another output, or empty it")
    if dtype not in _KNOWN:
        raise ConfigError(f"no dtype {dtype!r}{did_you_mean(dtype, _KNOWN)}; known: {', '.join(_KNOWN)}")
    tokenizer = load_tokenizer(model)
    adapted, stored = load_for(model, adapter, upcast=True)
    batch = _tokens(tokenizer, texts)
    if _quantized(adapted):
        plan = _plan(adapted, batch, dtype, allow_inexact=allow_inexact)
    else:
        wanted = stored if dtype == "auto" else DTYPES[dtype]
        plan = _Plan(None, wanted, str(wanted).removeprefix("torch."))
    report = merge_error(adapted, batch, plan.dtype, merged_layers=plan.layers, kept=plan.kept)
    if not report.exact and not allow_inexact and not dry_run:
        raise InexactMergeError(_refusal(report))
    before = effective_bits(adapted) if _quantized(adapted) else None
    merged = _installed(adapted, plan)
    files: dict[str, int] = {}
    if not dry_run:

        def fill(folder: Path) -> None:
            merged.save_pretrained(folder)
            tokenizer.save_pretrained(folder)

        write_folder(target, fill)
        files = {path.name: path.stat().st_size for path in sorted(target.iterdir())}
    after = effective_bits(merged) if plan.dtype is None else None
    return Merged(
        target,
        report.dtype,
        files,
        report,
        report.exact,
        dry_run,
        before or None,
        after,
        plan.coarser_offsets,
    )


@dataclass(frozen=True)
class _Plan:
    """How a model is merged."""

    #: adapted layer -> what it becomes, None to merge in place
    layers: dict[str, nn.Module] | None
    #: dtype of a dense result, None for a quantized one
    dtype: torch.dtype | None
    #: the same in words
    kept: str
    coarser_offsets: dict[str, float] = field(default_factory=dict)


def _plan(adapted: PeftModel, batch: Mapping[str, Tensor], dtype: str, *, allow_inexact: bool) -> _Plan:
    """How the adapter on a quantized base is merged; makes the merged layers."""
    layers: dict[str, Any] = {n: m for n, m in adapted.named_modules() if isinstance(m, BaseTunerLayer)}
    ours = {name: layer for name, layer in layers.items() if isinstance(layer, AdapterLinear)}
    for layer in ours.values():
        check_whole(layer.site, _active(layer))
    if dtype != "auto":
        kind = DTYPES[dtype]
        return _Plan({name: _dense(layer, kind) for name, layer in layers.items()}, kind, dtype)
    exact = {n for n, layer in ours.items() if way(layer.site, _active(layer)) in {"fold", "recode"}}
    inexact = [name for name in layers if name not in exact]
    if not inexact:
        bits = sorted({layer.get_base_layer().spec.bits for layer in layers.values()})
        merged: dict[str, Any] = {name: _merged(layer) for name, layer in ours.items()}
        kept = f"{'/'.join(map(str, bits))}-bit affine"
        pairs = [(layers[name].get_base_layer(), layer) for name, layer in merged.items()]
        return _Plan(merged, None, kept, _losses(pairs))
    if not allow_inexact:
        first = inexact[0]
        raise InexactMergeError(
            f"the low-bit weight of {first.removeprefix('base_model.model.')} cannot take this adapter exactly: its "
            "update is not constant on blocks, or the format has no offsets. Merge into a dense model with --dtype "
            "bfloat16, quantize again with --allow-inexact, or train q_bara, qa_hira, qa_lora, qa_blora or "
            "qa_sparse_peft on a base from `modicum quantize`. Nothing was written"
        )
    return _Plan(_requantized(adapted, layers, batch), None, "low-bit, quantized again")


def _quantized(model: nn.Module) -> bool:
    return any(
        fmt is not None and not fmt.mergeable
        for fmt in (format_of(module) for module in model.modules() if isinstance(module, nn.Linear))
    )


def _active(layer: AdapterLinear) -> dict[str, Any]:
    return {name: layer.adapters[name] for name in layer.active_adapters if name in layer.adapters}


@torch.no_grad()
def _merged(layer: AdapterLinear) -> nn.Module:
    """A layer that shares with the base layer what the merge does not change."""
    base: Any = layer.get_base_layer()
    base.unpack_layout()
    merged = copy.copy(base)
    merged._buffers, merged._parameters = dict(base._buffers), dict(base._parameters)  # noqa: SLF001 - a copy
    adapters = _active(layer)
    chosen = way(layer.site, adapters)
    assert chosen is not None
    take(layer.site, merged, exact_updates(layer.site, adapters, chosen))
    return merged


@torch.no_grad()
def _losses(pairs: Sequence[tuple[AffineLinear, AffineLinear]]) -> dict[str, float]:
    """‖rounded − kept‖ / ‖update‖ over the offsets of all layers (before, after), if they were rounded to each kind."""
    lost: dict[str, float] = dict.fromkeys(("float16", "bfloat16", "integer"), 0.0)
    size = 0.0
    for before, after in pairs:
        scales, offsets = after.grid()
        if (
            offsets is None
            or after.offsets is before.offsets
            or after.block_offsets is not before.block_offsets
        ):
            continue
        old = before.grid().offsets
        update = offsets - (0.0 if old is None else old.float())
        step = scales.float()
        rounded = {
            "float16": offsets.half().float(),
            "bfloat16": offsets.bfloat16().float(),
            "integer": (offsets / step).round() * step,
        }
        weight = math.prod(after.spec.block)
        size += weight * float(update.double().square().sum())
        for name, values in rounded.items():
            lost[name] += weight * float((values - offsets).double().square().sum())
    return {name: math.sqrt(value / size) for name, value in lost.items()} if size else {}


@torch.no_grad()
def _merged_weight(layer: Any) -> Tensor:
    """The weight plus the update of the active adapter, (out, in) float32."""
    base = layer.get_base_layer()
    fmt = format_of(base)
    assert fmt is not None
    weight = fmt.weight(base).float()
    for name in layer.active_adapters:
        try:
            weight = weight + layer.get_delta_weight(name).to(weight)
        except (NotImplementedError, AttributeError) as error:
            raise InexactMergeError(
                f"{type(layer).__name__} layers have no additive update, which alone can be merged into a low-bit "
                "base; merge this adapter on the dense base model it came from"
            ) from error
    return weight


def _dense(layer: Any, dtype: torch.dtype) -> nn.Linear:
    """A dense layer whose weight is rounded to `dtype` but kept in float32, to be measured with."""
    return _linear(_merged_weight(layer).to(dtype), layer.get_base_layer().bias, torch.float32)


def _linear(weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().to(dtype), requires_grad=False)
    return linear


@torch.no_grad()
def _requantized(
    adapted: PeftModel, layers: Mapping[str, Any], batch: Mapping[str, Tensor]
) -> dict[str, nn.Module]:
    """The adapted layers with weight and update quantized again, errors fed back on the inputs they see."""
    result: dict[str, nn.Module] = {}
    waiting = list(layers)
    while waiting:
        chosen, size = [], 0
        while waiting and (not chosen or size < _STATISTICS):
            chosen.append(waiting.pop(0))
            size += 4 * layers[chosen[-1]].get_base_layer().in_features ** 2
        hessians = _statistics(adapted, {name: layers[name] for name in chosen}, batch)
        for name in chosen:
            base = layers[name].get_base_layer()
            spec = base.spec if isinstance(base, AffineLinear) else _FALLBACK
            spec = _fitting(
                replace(spec, offset_block=None, residuals=False), base.out_features, base.in_features
            )
            found = gptq(
                _merged_weight(layers[name]),
                hessians[name].matrix(),
                spec.bits,
                spec.block,
                zero_point=spec.zero_point,
                clip="mse",
                scale_dtype=DTYPES[spec.scale_dtype],
                offset_dtype=DTYPES[spec.offset_dtype],
            )
            result[name] = AffineLinear.from_quantized(
                found.codes, found.grid, spec, base.bias, adapted.dtype
            )
    return result


def _fitting(spec: AffineSpec, out_features: int, in_features: int) -> AffineSpec:
    """The spec with the largest row group up to its own that divides the layer, if its block does not."""
    if not spec.faults(out_features, in_features):
        return spec
    return replace(spec, block=(1, math.gcd(spec.block[1], in_features)))


def _statistics(
    adapted: PeftModel, layers: Mapping[str, Any], batch: Mapping[str, Tensor]
) -> dict[str, Hessian]:
    """The second moments of the inputs of `layers` on `batch`."""
    found = {name: Hessian(layer.get_base_layer().in_features) for name, layer in layers.items()}
    handles = [
        layer.register_forward_pre_hook(lambda _, inputs, name=name: found[name].add(inputs[0]))
        for name, layer in layers.items()
    ]
    try:
        adapted.eval().forward(**batch)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _installed(adapted: PeftModel, plan: _Plan) -> Any:
    """The model to save: merged layers in place, everything else as the plan wants it."""
    if plan.layers is None:
        return adapted.merge_and_unload().to(plan.dtype)
    for name, layer in plan.layers.items():
        adapted.set_submodule(name, layer)
    tuner: Any = adapted.base_model
    model = tuner.unload()
    for name, module in list(model.named_modules()):
        if isinstance(module, AffineLinear):
            module.drop_residuals()
        fmt = format_of(module) if isinstance(module, nn.Linear) else None
        if fmt is None or fmt.mergeable or (plan.dtype is None and isinstance(module, AffineLinear)):
            continue
        dense = _linear(fmt.weight(module), module.bias, plan.dtype or torch.bfloat16)
        model.set_submodule(name, dense)
    quantizer = getattr(model, "hf_quantizer", None)
    if not isinstance(quantizer, AffineQuantizer):
        # how a foreign format was read, which cannot be turned back and need not be
        kept = [c for c in getattr(model, "_weight_conversions", None) or () if not _of_quantizer(c)]
        model._weight_conversions = kept or None  # noqa: SLF001 - Transformers has no public name
    if plan.dtype is not None:
        if quantizer is not None:
            quantizer.remove_quantization_config(model)
        return nn.Module.to(model, plan.dtype)
    if not isinstance(quantizer, AffineQuantizer):
        model.hf_quantizer = AffineQuantizer(AffineConfig.of(model))
    model.config.quantization_config = AffineConfig.of(model)
    return model


def _of_quantizer(conversion: Any) -> bool:
    return any(getattr(step, "hf_quantizer", None) for step in getattr(conversion, "operations", ()))


def _refusal(report: MergeReport) -> str:
    return (
        f"merging into {report.dtype} changes the logits by {report.logit_error:.2%} (tolerance "
        f"{report.tolerance:.2%}) and loses {report.lost:.0%} of the adapter's effect, most in "
        f"{report.worst_layers[0].name}; merge with --dtype float32, keep the adapter separate, or pass "
        "--allow-inexact. Nothing was written"
    )


def _tokens(tokenizer: Any, texts: Sequence[str], length: int = 128) -> dict[str, Tensor]:
    encoded = tokenizer(list(texts), return_tensors="pt", padding=True, truncation=True, max_length=length)
    return {name: encoded[name] for name in ("input_ids", "attention_mask")}
