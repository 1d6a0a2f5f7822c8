"""From a GPTQ, AWQ or compressed-tensors checkpoint to a quantized folder of ours, number for number.

Codes and scales are taken as they are and zero-points become offsets (`quant.interchange`), so nothing is
quantized again and no library of theirs is needed. Layers go one at a time from file to file.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, final

from torch import nn

from modicum.compress.open_files import OpenFiles
from modicum.compress.source import BESIDE
from modicum.compress.work import Work
from modicum.compress.writing import write_shards
from modicum.errors import ConfigError, listing
from modicum.models.architecture import meta_model, read_config
from modicum.models.checkpoint import weight_files
from modicum.quant.affine import AffineLinear
from modicum.quant.huggingface import AffineConfig, effective_bits
from modicum.quant.interchange import Quantized, from_awq, from_compressed_tensors, from_gptq
from modicum.store.atomic import write_text

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

#: quant_method -> the tensor that every quantized layer has, and the others that describe its weight
_TENSORS = {
    "gptq": ("qweight", ("qzeros", "scales", "g_idx")),
    "awq": ("qweight", ("qzeros", "scales")),
    "compressed-tensors": (
        "weight_scale",
        ("weight", "weight_packed", "weight_shape", "weight_zero_point", "weight_g_idx"),
    ),
}
#: how activations were rounded, which weights do not depend on
_OF_ACTIVATIONS = {
    f"{side}_{what}" for side in ("input", "output") for what in ("scale", "zero_point", "global_scale")
}


@dataclass(frozen=True)
class ImportedModel:
    """What an import wrote, or would have."""

    output: Path
    #: what had quantized the checkpoint: gptq, awq or compressed-tensors
    quant_method: str
    #: quantized layers
    layers: int
    #: bits of a code -> layers
    bits: dict[int, int]
    #: bits stored for each quantized weight, scales and offsets included
    bits_per_weight: float
    #: bytes of all weights
    bytes_before: int
    bytes_after: int
    #: what is different from the checkpoint
    notes: tuple[str, ...]
    dry_run: bool


def quantization_of(folder: str | Path) -> dict[str, Any] | None:
    """The settings that a checkpoint folder was quantized with, None unless they are of a kind read here.

    They are in config.json; files of older tools have them in quantize_config.json or quant_config.json.
    """
    for name, method in (
        ("config.json", None),
        ("quantize_config.json", "gptq"),
        ("quant_config.json", "awq"),
    ):
        try:
            found = json.loads((Path(folder) / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        settings = found if method else found.get("quantization_config")
        if isinstance(settings, dict) and settings:
            settings = {"quant_method": method, **settings}
            return settings if settings["quant_method"] in _TENSORS else None
    return None


def import_quantized(
    folder: str | Path,
    output: str | Path,
    *,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Callable[[int, int, str], None] | None = None,
) -> ImportedModel:
    """The report of writing the quantized checkpoint at `folder` as a quantized folder of ours at `output`.

    `output` appears only when it is complete. With `dry_run` everything is read and checked, and nothing written.
    `progress(done, total, name)` is called after each layer.

    Raises:
        ConfigError: a format or option that cannot be taken over (all of them), or the output exists.
        CorruptAdapterError: the weights are damaged.
    """
    settings = quantization_of(folder)
    if settings is None:
        raise ConfigError(
            f"{folder} is no checkpoint quantized by {', '.join(_TENSORS)}: neither its config.json nor a "
            "quantize_config.json says so"
        )
    work = Work(Path(output))
    fault = work.fault(resume=False, overwrite=overwrite)
    if fault and not dry_run:
        raise ConfigError(fault)
    with _Checkpoint(Path(folder).expanduser(), settings) as checkpoint:
        if not dry_run:
            work.begin({"import": str(folder)}, resume=False)
        try:
            report = _convert(checkpoint, work, dry_run, progress or (lambda *_: None))
        except BaseException:
            if not dry_run:  # reading again is quick: an unfinished import is of no use
                shutil.rmtree(work.folder, ignore_errors=True)
            raise
    if not dry_run:
        work.publish()
    return report


def _convert(
    checkpoint: _Checkpoint, work: Work, dry_run: bool, progress: Callable[[int, int, str], None]
) -> ImportedModel:
    faults: dict[str, list[str]] = defaultdict(list)
    specs: dict[str, AffineLinear] = {}
    for index, name in enumerate(checkpoint.layers):
        try:
            layer = checkpoint.layer(name)
        except ConfigError as error:
            faults[str(error)].append(name)
            continue
        if not dry_run and not faults:
            tensors = {f"{name}.{key}": value for key, value in layer.state_dict().items()}
            work.save(name, tensors, None)
        specs[name] = AffineLinear(
            layer.in_features, layer.out_features, layer.spec, bias=False, device="meta"
        )
        progress(index + 1, len(checkpoint.layers), name)
    if faults:
        raise ConfigError(
            f"{checkpoint.folder} cannot be taken over: "
            + "; ".join(f"{reason} ({listing(names, 3)})" for reason, names in faults.items())
        )
    for name, layer in specs.items():
        checkpoint.model.set_submodule(checkpoint.layers[name], layer)
    config = AffineConfig.of(checkpoint.model, algorithm=checkpoint.method)
    kept = {key: checkpoint.tensor(key) for key in checkpoint.kept}
    if not dry_run:
        _write(checkpoint, work, kept, config)
    return ImportedModel(
        output=work.output,
        quant_method=checkpoint.method,
        layers=len(specs),
        bits=dict(sorted(Counter(layer.spec.bits for layer in specs.values()).items())),
        bits_per_weight=round(effective_bits(checkpoint.model), 4),
        bytes_before=sum(checkpoint.tensor(key).nbytes for key in checkpoint.files),
        bytes_after=sum(t.nbytes for t in kept.values()) + sum(_bytes(layer) for layer in specs.values()),
        notes=tuple(checkpoint.notes),
        dry_run=dry_run,
    )


def _write(checkpoint: _Checkpoint, work: Work, kept: Mapping[str, Tensor], config: AffineConfig) -> None:
    converted = {key: tensor for name in checkpoint.layers for key, tensor in work.tensors(name).items()}
    folder = work.model
    write_shards(folder, dict(sorted({**kept, **converted}.items())))
    raw = {**checkpoint.raw, "quantization_config": config.to_dict()}
    write_text(folder / "config.json", json.dumps(raw, indent=2, ensure_ascii=False) + "\n")
    for pattern in BESIDE:
        for file in checkpoint.folder.glob(pattern):
            if file.is_file():
                shutil.copyfile(file, folder / file.name)


def _bytes(layer: AffineLinear) -> int:
    bits = layer.spec.bits_per_weight(layer.out_features, layer.in_features)
    return math.ceil(bits * layer.in_features * layer.out_features / 8)


@final
class _Checkpoint:
    """A quantized checkpoint, open for reading: its layers, and what of it stays as it is."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.folder, self.settings = folder, settings
        self.method: str = settings["quant_method"]
        self.notes: list[str] = []
        _check_settings(folder, settings, self.notes)
        self.raw: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config = read_config(str(folder))
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        self.model: Any = meta_model(config)
        self.files = _files(folder)
        mark, others = _TENSORS[self.method]
        stored = [key.removesuffix(f".{mark}") for key in sorted(self.files) if key.endswith(f".{mark}")]
        #: name in the checkpoint -> name in the model
        self.layers = self._names(stored)
        parts = {f"{name}.{part}" for name in stored for part in (mark, *others)}
        dropped = {f"{name}.{part}" for name in stored for part in _OF_ACTIVATIONS} & self.files.keys()
        self.kept = [key for key in self.files if key not in parts | dropped]
        strange = [key for key in self.kept if key.endswith((".scales", ".weight_global_scale", ".qzeros"))]
        if strange:
            raise ConfigError(f"{folder} holds tensors that cannot be taken over: {listing(strange)}")
        if dropped or self._rounds_activations():
            self.notes.append("the checkpoint rounds activations too; here they stay as they are")
        self._open = OpenFiles(self.files)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def tensor(self, key: str) -> Tensor:
        """The tensor `key`, a view of its file."""
        return self._open.tensor(key)

    def layer(self, name: str) -> AffineLinear:
        """The layer `name` of the checkpoint as one of ours, without its bias."""
        mark, others = _TENSORS[self.method]
        tensors = {
            part: self.tensor(f"{name}.{part}") for part in (mark, *others) if f"{name}.{part}" in self.files
        }
        try:
            found = _read(self.method, self.settings, name, tensors)
        except KeyError as error:
            raise ConfigError(f"it lacks the tensor {error}") from error
        linear = self.model.get_submodule(self.layers[name])
        shape = (linear.out_features, linear.in_features)
        if tuple(found.codes.shape) != shape:
            raise ConfigError(f"its weight is {tuple(found.codes.shape)}, the model's {shape}")
        return AffineLinear.from_quantized(found.codes, found.grid, found.spec)

    def _names(self, stored: list[str]) -> dict[str, str]:
        linears = {name for name, module in self.model.named_modules() if type(module) is nn.Linear}
        prefix = f"{self.model.base_model_prefix}."
        found, strange = {}, []
        for name in stored:
            names = (name, name.removeprefix(prefix), prefix + name)
            match = next((other for other in names if other in linears), None)
            if match is None:
                strange.append(name)
            else:
                found[name] = match
        if strange or not stored:
            what = f"{listing(strange)} of the checkpoint" if stored else "nothing in the checkpoint"
            raise ConfigError(
                f"{self.folder}: {what} is a quantized linear layer of {type(self.model).__name__} under the same "
                "name; embeddings, experts that are stored joined, and GPT-2's layers cannot be taken over"
            )
        return found

    def _rounds_activations(self) -> bool:
        groups = (self.settings.get("config_groups") or {}).values()
        return any(group.get("input_activations") for group in groups if isinstance(group, dict))


def _check_settings(folder: Path, settings: Mapping[str, Any], notes: list[str]) -> None:
    """Refuses what the tensors alone would not tell, all of it."""
    faults = []
    method = settings["quant_method"]
    form = str(
        settings.get("checkpoint_format") or settings.get("format") or settings.get("version") or ""
    ).lower()
    known = {"gptq": ("gptq", "gptq_v2"), "awq": ("gemm",), "compressed-tensors": _CT_FORMATS}[method]
    if form and form not in known:
        faults.append(f"its format is {form!r}; {', '.join(known)} can be taken over")
    sparsity = (settings.get("sparsity_config") or {}).get("format", "dense")
    if sparsity != "dense":
        faults.append(f"its weights are stored sparse ({sparsity})")
    if (settings.get("transform_config") or {}).get("config_groups"):
        faults.append("its weights and activations are rotated (transform_config)")
    for name, group in (settings.get("config_groups") or {}).items():
        weights = group.get("weights") if isinstance(group, dict) else None
        if weights and weights.get("type", "int") != "int":
            faults.append(
                f"{name} stores {weights.get('num_bits')}-bit floating-point weights, which lie on no grid"
            )
    if faults:
        raise ConfigError(f"{folder} cannot be taken over: {'; '.join(faults)}")
    if settings.get("kv_cache_scheme"):
        notes.append("the checkpoint rounds the key-value cache too; here it stays as it is")


_CT_FORMATS = ("pack-quantized", "int-quantized", "naive-quantized", "mixed-precision")


def _read(method: str, settings: Mapping[str, Any], name: str, tensors: Mapping[str, Tensor]) -> Quantized:
    if method == "compressed-tensors":
        scheme = _scheme(settings, name)
        block = scheme.get("block_structure")
        if isinstance(block, str):  # "128x128", as older versions wrote it
            block = [int(size) for size in block.split("x")]
        return from_compressed_tensors(tensors, scheme["num_bits"], (block[0], block[1]) if block else None)
    group = settings.get("group_size", settings.get("q_group_size"))
    if method == "awq":
        return from_awq(tensors, group)
    form = settings.get("checkpoint_format") or settings.get("format") or "gptq"
    return from_gptq(tensors, group, minus_one=str(form).lower() != "gptq_v2")


def _scheme(settings: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The weight scheme of the layer `name`: the group that targets it by name, else the one for all linear layers."""
    fallback = None
    for group in settings["config_groups"].values():
        for target in group["targets"]:
            pattern = target.removeprefix("re:")
            if target != pattern and re.match(pattern, name):
                return group["weights"]
            if name == target or name.endswith(f".{target}"):
                return group["weights"]
            if target == "Linear":
                fallback = group["weights"]
    if not fallback:
        raise ConfigError("no group of the quantization_config targets it")
    return fallback


def _files(folder: Path) -> dict[str, Path]:
    """Tensor name -> file; a folder with a single weights file may call it what it likes."""
    from safetensors import safe_open

    single = list(folder.glob("*.safetensors"))
    if len(single) == 1 and single[0].name != "model.safetensors":
        with safe_open(single[0], framework="pt") as file:
            return dict.fromkeys(file.keys(), single[0])
    return weight_files(folder)
