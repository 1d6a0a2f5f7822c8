"""Quantized models as normal `from_pretrained` folders: our quantization config and quantizer for Transformers."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer, get_keys_to_not_convert
from transformers.utils.quantization_config import QuantizationConfigMixin

from modicum.errors import ConfigError, CorruptAdapterError, did_you_mean, listing
from modicum.ops.affine import encode, fit_grid, left_over, residuals
from modicum.quant.affine import AffineLinear
from modicum.quant.spec import DTYPES, AffineSpec

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

METHOD = "modicum"
#: version of the tensors on disk; a reader refuses newer ones
VERSION = 1
_SPEC = tuple(field.name for field in fields(AffineSpec))


class AffineConfig(QuantizationConfigMixin):
    """How the linear layers of a model are quantized: one rule, and what differs layer by layer.

    Args:
        bits: 8, 4, 3 or 2.
        group_size: inputs of a row that share a scale.
        block: [q, p] for blocks of q outputs and p inputs that share a scale, in place of `group_size`.
        zero_point: "float", "integer" or "none" (symmetric).
        scale_dtype: number type of the scales.
        offset_dtype: number type of the offsets; float32 for integer zero-points, else bfloat16, when unset.
        offset_block: blocks of additional offsets, which merges leave behind.
        residuals: whether what rounding took away of each weight is kept, for `qa_sparse_peft`; 8 bits per weight.
        algorithm: how the codes were found; information only.
        modules_to_not_convert: names of linear layers that stay as they are.
        layers: layer name -> options that differ from the above.
        version: version of the stored form.

    Raises:
        ConfigError: options that do not exist or contradict each other.
    """

    def __init__(
        self,
        bits: int = 4,
        group_size: int | None = 128,
        block: Sequence[int] | None = None,
        zero_point: str = "float",
        scale_dtype: str = "bfloat16",
        offset_dtype: str | None = None,
        offset_block: Sequence[int] | None = None,
        residuals: bool = False,
        algorithm: str = "rtn",
        modules_to_not_convert: Sequence[str] | None = None,
        layers: Mapping[str, Mapping[str, Any]] | None = None,
        version: int = VERSION,
        **others: Any,
    ) -> None:
        others.pop("quant_method", None)
        if others:
            known = ["bits", "group_size", "block", "zero_point", "scale_dtype", "offset_dtype", "layers"]
            known += ["offset_block", "residuals", "algorithm", "modules_to_not_convert"]
            raise ConfigError(
                "quantization_config has no option "
                + "; ".join(f"{name!r}{did_you_mean(name, known)}" for name in others)
            )
        if version > VERSION:
            raise ConfigError(
                f"this model was quantized by a newer modicum (version {version} of the stored form, this one reads "
                f"up to {VERSION}); upgrade modicum"
            )
        self.quant_method = cast("Any", METHOD)
        self.version = version
        self.bits, self.zero_point, self.scale_dtype = bits, zero_point, scale_dtype
        self.block = [1, group_size] if block is None else list(block)
        self.offset_dtype = offset_dtype or ("float32" if zero_point == "integer" else "bfloat16")
        self.offset_block = None if offset_block is None else list(offset_block)
        self.residuals, self.algorithm = residuals, algorithm
        self.modules_to_not_convert = None if modules_to_not_convert is None else list(modules_to_not_convert)
        self.layers = {name: dict(options) for name, options in (layers or {}).items()}
        wrong = sorted({key for options in self.layers.values() for key in options} - set(_SPEC))
        if wrong:
            raise ConfigError(f"layers of a quantization_config have no option {listing(wrong)}")

    def spec(self, name: str = "") -> AffineSpec:
        """How the layer `name` is stored."""
        values = {key: getattr(self, key) for key in _SPEC} | self.layers.get(name, {})
        for key in ("block", "offset_block"):
            values[key] = None if values[key] is None else tuple(values[key])
        return AffineSpec(**values)

    @classmethod
    def of(cls, model: nn.Module, algorithm: str = "rtn") -> AffineConfig:
        """The configuration that describes the quantized layers of `model` as they are now."""
        specs = {name: m.spec for name, m in model.named_modules() if isinstance(m, AffineLinear)}
        if not specs:
            raise ConfigError(f"{type(model).__name__} has no quantized layer")
        usual = asdict(Counter(specs.values()).most_common(1)[0][0])
        layers = {}
        for name, spec in specs.items():
            differing = {key: value for key, value in asdict(spec).items() if value != usual[key]}
            if differing:
                layers[name] = {k: list(v) if isinstance(v, tuple) else v for k, v in differing.items()}
        dense = [
            name
            for name, m in model.named_modules()
            if isinstance(m, nn.Linear) and not isinstance(m, AffineLinear)
        ]
        return cls(**usual, algorithm=algorithm, modules_to_not_convert=dense, layers=layers)


class AffineQuantizer(HfQuantizer):
    """Builds the quantized layers of a checkpoint before its weights are loaded, or quantizes what was loaded."""

    quantization_config: AffineConfig

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        if not self.pre_quantized:
            return
        stored = _stored_layers(kwargs.get("checkpoint_files"))
        names = _linear_names(model, self.quantization_config, stored)
        for name, stored_name in names.items():
            linear = model.get_submodule(name)
            spec = self.quantization_config.spec(stored_name)
            with torch.device("meta"):
                layer = AffineLinear(
                    linear.in_features,
                    linear.out_features,
                    spec,
                    linear.bias is not None,
                    linear.weight.dtype,
                )
            model.set_submodule(name, layer.requires_grad_(False))

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        del kwargs
        if not self.pre_quantized:
            quantize_linears(model, self.quantization_config)
            self.pre_quantized = True
        for module in model.modules():
            if isinstance(module, AffineLinear) and module._like.is_meta:  # noqa: SLF001 - same floor
                module._like = torch.empty(0, dtype=module._like.dtype, device=module.codes.device)  # noqa: SLF001
        model.config.quantization_config = self.quantization_config
        return model

    def get_new_dtype(self, converter: Any, param: Any, dtype: Any) -> Any:
        """None for our own tensors, whose number types are part of the format."""
        sources = " ".join(str(name) for name in getattr(converter, "source_patterns", ()))
        if any(sources.endswith(end) for end in (".scales", ".offsets", ".block_offsets")):
            return None
        return super().get_new_dtype(converter, param, dtype)

    def get_state_dict_and_metadata(self, model: Any) -> tuple[None, dict[str, str]]:
        """Called on saving: brings the configuration up to date with the layers, which merges change."""
        model.config.quantization_config = AffineConfig.of(model, self.quantization_config.algorithm)
        self.quantization_config = model.config.quantization_config
        return None, {}

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        for name, module in list(model.named_modules()):
            if isinstance(module, AffineLinear):
                model.set_submodule(name, dense_linear(module, dtype or module.dtype))
        return model

    def is_serializable(self) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Whether it can be saved: yes."""
        return True

    @property
    def is_trainable(self) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Whether adapters on it can be trained: yes."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Whether `torch.compile` takes it: yes."""
        return True


def register() -> None:
    """Make `from_pretrained` know quantized folders of ours; calling it again changes nothing."""
    AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = AffineConfig
    AUTO_QUANTIZER_MAPPING[METHOD] = AffineQuantizer


def quantize_linears(model: nn.Module, config: AffineConfig, clip: Any = "minmax") -> None:
    """Replaces the linear layers of a loaded `model` by round-to-nearest quantized ones, in place.

    Raises:
        ConfigError: a layer that the blocks do not divide, or weights that are not finite; all of them.
    """
    names, faults = _linear_names(model, config, None), []
    for name in names:
        linear = cast("nn.Linear", model.get_submodule(name))
        faults += [f"{name}: {fault}" for fault in config.spec(name).faults(*linear.weight.shape)]
        if not bool(torch.isfinite(linear.weight).all()):
            faults.append(f"{name}: NaN or infinite weights")
    if faults:
        raise ConfigError("cannot quantize: " + "; ".join(faults[:8]))
    for name in names:
        linear = cast("nn.Linear", model.get_submodule(name))
        model.set_submodule(name, quantized_linear(linear, config.spec(name), clip))


@torch.no_grad()
def quantized_linear(linear: nn.Linear, spec: AffineSpec, clip: Any = "minmax") -> AffineLinear:
    """The layer `linear` rounded to the nearest codes of its own grid; weights of 0 count as pruned in residuals."""
    grid = fit_grid(
        linear.weight,
        spec.bits,
        spec.block,
        zero_point=spec.zero_point,
        clip=clip,
        scale_dtype=DTYPES[spec.scale_dtype],
        offset_dtype=DTYPES[spec.offset_dtype],
    )
    codes = encode(linear.weight, grid, spec.bits, spec.block)
    left = None
    if spec.residuals:
        kept = linear.weight != 0
        left = residuals(left_over(linear.weight, codes, grid, spec.bits, spec.block), kept)
    return AffineLinear.from_quantized(codes, grid, spec, linear.bias, linear.weight.dtype, left)


def dense_linear(layer: AffineLinear, dtype: torch.dtype) -> nn.Linear:
    """The same layer with its weight dequantized to `dtype`."""
    linear = nn.Linear(
        layer.in_features, layer.out_features, layer.bias is not None, device="meta", dtype=dtype
    )
    linear.weight = nn.Parameter(layer.dequantized().to(dtype), requires_grad=False)
    if layer.bias is not None:
        linear.bias = nn.Parameter(layer.bias.detach().to(dtype))
    return linear


def effective_bits(model: nn.Module) -> float:
    """Bits stored for each weight of the quantized layers of `model`."""
    layers = [m for m in model.modules() if isinstance(m, AffineLinear)]
    weights = [m.in_features * m.out_features for m in layers]
    bits = [m.spec.bits_per_weight(m.out_features, m.in_features) for m in layers]
    return math.fsum(b * w for b, w in zip(bits, weights, strict=True)) / max(1, sum(weights))


def _linear_names(model: Any, config: AffineConfig, stored: set[str] | None) -> dict[str, str]:
    """Name in the model -> name in the checkpoint of the layers that are quantized."""
    linears = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    prefix = getattr(model, "base_model_prefix", "")
    if stored is not None:
        found = {}
        for name in linears:
            for key in (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}.")):
                if key in stored:
                    found[name] = key
                    break
        if not found:
            raise CorruptAdapterError(
                "the checkpoint holds no quantized layer of this model, although its config.json has a "
                "quantization_config; its files belong to different models"
            )
        return found
    skipped = config.modules_to_not_convert
    skipped = set(get_keys_to_not_convert(model) if skipped is None else skipped)
    return {name: name for name in linears if name not in skipped}


def _stored_layers(files: Any) -> set[str] | None:
    """Names of the layers that have codes in the checkpoint files, None when there are no files to look into."""
    from safetensors import safe_open

    if not files or not all(str(file).endswith(".safetensors") for file in files):
        return None
    found = set()
    for file in files:
        with safe_open(Path(file), framework="pt") as stored:
            found |= {key.removesuffix(".codes") for key in stored.keys() if key.endswith(".codes")}  # noqa: SIM118
    return found
