"""An adapter as a standard PEFT LoRA folder, for everything that serves LoRA and knows nothing of modicum."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from peft.utils import AuxiliaryTrainingWrapper

from modicum.adapters.config import AdapterConfig
from modicum.adapters.elastic import ElasticConfig
from modicum.errors import ConfigError, listing
from modicum.quant.dense import DenseConv1D
from modicum.store.files import CONFIG_FILE, WEIGHT_FILES
from modicum.store.state import PREFIX, AdapterState, adapted_layers, config_of, method_name

if TYPE_CHECKING:
    import os

    from torch import Tensor


@dataclass(frozen=True)
class ExportedLora:
    """What was written."""

    folder: Path
    bytes: int
    #: numbers of the LoRA factors, full modules not counted
    values: int
    layers: int
    #: the ranks in use, smallest first
    ranks: tuple[int, ...]


def export_lora(
    model: PeftModel,
    folder: str | os.PathLike,
    adapter_name: str = "default",
    *,
    overwrite: bool = False,
) -> ExportedLora:
    """What was written: a PEFT LoRA folder whose update is exactly that of the adapter, up to float32 rounding.

    Stock PEFT, vLLM and other LoRA servers read it without modicum. Each layer becomes factors B (out, k) and
    A (k, in) with alpha / r = scaling; layers that differ get entries in `rank_pattern` and `alpha_pattern`. Of an
    elastic adapter it is the active sub-network: a layer that runs at rank k of R gets r = k and alpha · k / R, because
    its scaling stays alpha / R.

    Raises:
        ConfigError: the method's update is not low-rank, the active sub-network has narrower layers, or the folder
            holds an adapter already.
    """
    config = config_of(model, adapter_name)
    target = Path(folder)
    if not isinstance(config, AdapterConfig):
        raise ConfigError(
            f"{method_name(config)} is PEFT's own: save the folder with format 'peft' instead of 'lora'"
        )
    if (target / CONFIG_FILE).exists() and not overwrite:
        raise ConfigError(f"{target} holds an adapter already; choose another folder or pass overwrite=True")
    narrower = [
        name for name, layer in adapted_layers(model, adapter_name) if layer.adapters[adapter_name].cut
    ]
    if isinstance(config, ElasticConfig) and config.sub_network is not None:
        # widths without cuts run at full width, which is not what was meant
        narrower = narrower or list(config.sub_network.get("widths", {}))
    if narrower:
        raise ConfigError(
            f"the active sub-network has narrower layers ({listing(narrower, 3)}), which a LoRA cannot make of the "
            "base model: write the smaller model with `modicum extract`, or activate a sub-network of full width"
        )
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    scalings: dict[str, float] = {}
    with torch.no_grad():
        for name, layer in adapted_layers(model, adapter_name):
            found = layer.adapters[adapter_name].lora_factors()
            if found is None:
                raise ConfigError(
                    f"{method_name(config)} has no low-rank update, so no LoRA equals it; merge it instead"
                )
            factors[name], scalings[name] = found, layer.adapters[adapter_name].scaling
    tensors = {}
    for name, (b, a) in factors.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = a.detach().float().cpu().contiguous()
        tensors[f"{PREFIX}{name}.lora_B.weight"] = b.detach().float().cpu().contiguous()
    values = sum(tensor.numel() for tensor in tensors.values())
    state = AdapterState.of(model, adapter_name)
    for name in state.full_names:
        tensors[state.keys[name]] = state.tensors[name].detach().cpu().contiguous()
    ranks = {name: a.shape[0] for name, (_, a) in factors.items()}
    transposed = any(isinstance(m.site.format, DenseConv1D) for _, m in adapted_layers(model, adapter_name))
    lora = _lora_config(model, config, ranks, scalings, transposed)
    target.mkdir(parents=True, exist_ok=True)
    from safetensors.torch import save_file

    save_file(tensors, target / WEIGHT_FILES[0], metadata={"format": "pt"})
    lora.save_pretrained(str(target))
    return ExportedLora(
        folder=target,
        bytes=sum((target / name).stat().st_size for name in (WEIGHT_FILES[0], CONFIG_FILE)),
        values=values,
        layers=len(factors),
        ranks=tuple(sorted(set(ranks.values()))),
    )


def _lora_config(
    model: PeftModel,
    config: AdapterConfig,
    ranks: dict[str, int],
    scalings: dict[str, float],
    transposed: bool,
) -> LoraConfig:
    """The LoRA configuration that gives each layer its rank and scaling."""
    alphas = {name: scalings[name] * ranks[name] for name in ranks}
    r = Counter(ranks.values()).most_common(1)[0][0]
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    lora = LoraConfig(
        r=r,
        lora_alpha=_whole(alpha),
        # full names, anchored: PEFT matches patterns against the end of a name
        rank_pattern={f"^{re.escape(name)}": k for name, k in ranks.items() if k != r},
        alpha_pattern={f"^{re.escape(name)}": _whole(a) for name, a in alphas.items() if a != alpha},
        target_modules=_listed(config.target_modules),
        exclude_modules=config.exclude_modules,
        layers_to_transform=config.layers_to_transform,
        layers_pattern=config.layers_pattern,
        modules_to_save=list(dict.fromkeys(config.modules_to_save)) if config.modules_to_save else None,
        task_type=config.task_type,
        base_model_name_or_path=config.base_model_name_or_path,
        revision=config.revision,
        fan_in_fan_out=transposed,
        inference_mode=True,
    )
    if _matched(model, lora) != set(ranks):
        lora.target_modules = "|".join(re.escape(name) for name in ranks)
        lora.exclude_modules = lora.layers_to_transform = lora.layers_pattern = None
    return lora


def _matched(model: PeftModel, lora: LoraConfig) -> set[str]:
    """The layers of the base model that PEFT would adapt under `lora`."""
    inside: list[str] = []
    names = set()
    for full, module in model.named_modules():
        name = full.removeprefix(PREFIX)
        if any(name.startswith(f"{outer}.") for outer in inside):
            continue
        if isinstance(module, AuxiliaryTrainingWrapper):
            inside.append(name)
            continue
        if isinstance(module, BaseTunerLayer):
            inside.append(name)
        if full.startswith(PREFIX) and check_target_module_exists(lora, name):
            names.add(name)
    return names


def _listed(targets: str | list[str] | set[str] | None) -> str | list[str] | None:
    return sorted(targets) if isinstance(targets, set) else targets


def _whole(alpha: float) -> int:
    """`alpha`, as an integer where it is one: LoraConfig declares it so, and other readers believe it."""
    return int(alpha) if float(alpha).is_integer() else cast("int", alpha)
