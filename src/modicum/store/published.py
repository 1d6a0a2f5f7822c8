"""LoRA-XS checkpoints of the authors' code (github.com/MohammadrezaBanaei/LoRA-XS), read as they are.

That code patches PEFT's LoRA: `lora_A` (r, in) and `lora_B` (out, r) are frozen and an `nn.Linear(r, r)` named
`default_lora_latent_mapping` stands between them, so ΔW = scaling · B R A with R the linear's weight as it is.
All three are in the checkpoint. Older PEFT versions cut `.default` out of the name when saving, which gives
`query_lora_latent_mapping.weight` instead of `query.default_lora_latent_mapping.weight`.

A and B come from the authors' own decomposition, with its own signs, or from random numbers; they are kept as
a stored basis, so that the adapter works exactly as trained.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modicum.adapters.basis import Basis, BasisCache, BasisSpec, LayerFactors
from modicum.errors import ConfigError, CorruptAdapterError, listing
from modicum.store.files import CONFIG_FILE, find_weights, install, read_weights
from modicum.store.state import PREFIX

if TYPE_CHECKING:
    import os

    from peft import PeftModel
    from torch import Tensor, nn

_FACTOR = re.compile(r"^(?P<layer>.+)\.lora_(?P<which>[AB])(?:\.[^.]+)?\.weight$")
_CORE = re.compile(r"^(?P<outer>.+?)\.(?P<inner>[^.]*?)_?lora_latent_mapping(?:\.[^.]+)?\.weight$")


@dataclass
class Published:
    """A published checkpoint, taken apart; all tensors float32 but those of full modules."""

    config: dict[str, Any]
    #: layer name -> (r, in)
    a: dict[str, Tensor] = field(default_factory=dict)
    #: layer name -> (out, r)
    b: dict[str, Tensor] = field(default_factory=dict)
    #: layer name -> (r, r)
    cores: dict[str, Tensor] = field(default_factory=dict)
    #: tensors of full modules such as the classification head, by name
    full: dict[str, Tensor] = field(default_factory=dict)

    def scaling(self, layer: str) -> float:
        """What multiplies B R A: alpha / r, or alpha / √r for rank-stabilized LoRA."""
        rank = self.cores[layer].shape[0]
        alpha = float(self.config.get("lora_alpha", rank))
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    def basis(self) -> Basis:
        """B and A as a stored basis."""
        layers = {name: LayerFactors(u=self.b[name], a=self.a[name]) for name in sorted(self.cores)}
        return Basis(layers, BasisSpec(kind="stored"))


def import_published(
    source: str | os.PathLike,
    base_model: nn.Module,
    *,
    adapter_name: str = "default",
    is_trainable: bool = False,
) -> PeftModel:
    """`base_model` with the published LoRA-XS adapter at `source` (folder, or its weight file) on it.

    The checkpoint's A and B go into the basis cache as a stored basis; the adapter names it by fingerprint.

    Raises:
        ConfigError: no such checkpoint, a plain LoRA, or options without a LoRA-XS counterpart.
        CorruptAdapterError: parts missing or misshapen, all of them listed.
    """
    found = read_published(source)
    return apply_published(found, base_model, adapter_name=adapter_name, is_trainable=is_trainable)


def apply_published(
    found: Published, base_model: nn.Module, *, adapter_name: str = "default", is_trainable: bool = False
) -> PeftModel:
    """`base_model` with the published adapter on it, its A and B in the basis cache."""
    from modicum.methods.lora_xs import LoraXSConfig

    basis = found.basis()
    BasisCache().add(basis)
    ranks = {name: core.shape[0] for name, core in found.cores.items()}
    alphas = {name: found.scaling(name) * rank for name, rank in ranks.items()}
    r, alpha = _most(ranks.values()), _most(alphas.values())
    heads = found.config.get("modules_to_save")
    config = LoraXSConfig(
        r=r,
        alpha=alpha,
        rank_pattern={f"^{re.escape(name)}": k for name, k in ranks.items() if k != r},
        alpha_pattern={f"^{re.escape(name)}": a for name, a in alphas.items() if a != alpha},
        dropout=float(found.config.get("lora_dropout") or 0.0),
        target_modules="|".join(re.escape(name) for name in sorted(ranks)),
        modules_to_save=list(dict.fromkeys(heads)) if heads else None,
        basis="stored",
        basis_fingerprint=basis.fingerprint(),
        task_type=found.config.get("task_type"),
        base_model_name_or_path=found.config.get("base_model_name_or_path"),
        inference_mode=not is_trainable,
    )
    state = {f"{name}.R": core for name, core in found.cores.items()} | found.full
    return install(base_model, config, state, adapter_name=adapter_name)


def read_published(source: str | os.PathLike) -> Published:
    """The published checkpoint at `source`, taken apart and checked."""
    path = Path(source)
    weights = path if path.is_file() else find_weights(path)
    described = weights.parent / CONFIG_FILE
    if not described.is_file():
        raise ConfigError(f"{weights} needs its {CONFIG_FILE} beside it, for alpha and the target modules")
    try:
        found = Published(json.loads(described.read_text(encoding="utf-8")))
    except ValueError as error:
        raise CorruptAdapterError(f"{described} is damaged ({error}); get it again") from error
    tensors = {key.removeprefix(PREFIX): value for key, value in read_weights(weights).items()}
    for key, value in tensors.items():
        if match := _FACTOR.match(key):
            (found.a if match["which"] == "A" else found.b)[match["layer"]] = value.float()
    for key, value in tensors.items():
        if match := _CORE.match(key):
            # the cut-out adapter name left `query_lora_…`: then the layer is `outer.query`
            inner = f"{match['outer']}.{match['inner']}"
            found.cores[inner if inner in found.a else match["outer"]] = value.float()
        elif not _FACTOR.match(key):
            found.full[key] = value
    _check(path, found)
    return found


def _check(path: Path, found: Published) -> None:
    if not found.cores:
        what = "a plain LoRA: load it with load_adapter" if found.a else "no LoRA-XS checkpoint"
        raise ConfigError(f"{path} holds no r×r `lora_latent_mapping`, so it is {what}")
    unfit = [name for name in ("use_dora",) if found.config.get(name)]
    if found.config.get("bias", "none") != "none":
        unfit.append("bias")
    if unfit:
        raise ConfigError(f"{path} was trained with {', '.join(unfit)}, which LoRA-XS does not have")
    faults = []
    for part, held in (("lora_A", found.a), ("lora_B", found.b), ("lora_latent_mapping", found.cores)):
        missing = sorted((found.a.keys() | found.b.keys() | found.cores.keys()) - held.keys())
        if missing:
            faults.append(f"{part} is missing in {listing(missing)}")
    for name in found.cores.keys() & found.a.keys() & found.b.keys():
        r, shapes = (
            found.cores[name].shape[0],
            (found.b[name].shape, found.cores[name].shape, found.a[name].shape),
        )
        if shapes[1] != (r, r) or shapes[0][1:] != (r,) or shapes[2][:1] != (r,):
            faults.append(f"B, R, A of {name} are {', '.join(str(tuple(s)) for s in shapes)}")
    if faults:
        raise CorruptAdapterError(
            f"{path} is incomplete: {'; '.join(sorted(faults))}; get the checkpoint again"
        )


def _most(values: Any) -> Any:
    counted = list(values)
    return max(counted, key=counted.count)
