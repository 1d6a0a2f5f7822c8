"""Records checked as offline loading checks them, once for each family; everything that cannot be served is refused."""

from __future__ import annotations

import dataclasses
import json
import threading
from typing import TYPE_CHECKING, Any, cast, final

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import (
    BaseTunerLayer,
    _maybe_include_all_linear_layers,
    check_target_module_exists,
)

from modicum.adapters import registry
from modicum.adapters.check import check_base, check_basis, check_targets
from modicum.adapters.config import AdapterConfig
from modicum.adapters.elastic import ElasticConfig, SubNetwork
from modicum.adapters.site import Site
from modicum.errors import ConfigError, CorruptAdapterError, TargetError, did_you_mean, listing
from modicum.methods.lora_xs import LoraXS, LoraXSConfig
from modicum.quant.affine import AffineLinear
from modicum.quant.base import format_of
from modicum.serve.engine.families import Cores, Family, OurFactors, PeftLora, Shape
from modicum.store.state import config_from

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import nn

    from modicum.adapters.contract import Adapter
    from modicum.serve.engine.layers import Directions
    from modicum.store.record import Record

#: families whose checks are remembered
_MOST_FAMILIES = 64
#: options that change nothing once an adapter is trained
_IDLE = {
    "seed", "dropout", "lora_dropout", "init_weights", "base_model_name_or_path", "revision", "search_space",
    "auto_mapping", "runtime_config", "ephemeral_gpu_offload", "megatron_config", "megatron_core",
}  # fmt: skip
#: what else a LoRA of PEFT may say and still be B A alone
_LORA_OPTIONS = {
    "r", "lora_alpha", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
    "rank_pattern", "alpha_pattern", "use_rslora", "fan_in_fan_out", "init_lora_weights", "eva_config",
}  # fmt: skip
#: starts that leave the base weights alone
_LORA_STARTS = (True, False, "gaussian", "eva", "orthogonal")


@final
class Loader:
    """The base model's layers, and which adapters fit them."""

    def __init__(self, model: nn.Module, directions: Directions, max_rank: int) -> None:
        """Reads the names of all layers; nothing of the model is changed.

        Raises:
            ConfigError: the model carries adapters already.
        """
        self._modules = {name: module for name, module in model.named_modules() if name}
        carrying = [name for name, module in self._modules.items() if isinstance(module, BaseTunerLayer)]
        if carrying:
            raise ConfigError(
                f"{carrying[0]} carries a PEFT adapter already: serve the base model, and put adapters into the store"
            )
        _settle(model)
        self.sites = [Site(n, m) for n, m in self._modules.items() if format_of(m) is not None]
        self.names = [site.name for site in self.sites]
        self.shapes = [Shape(site.name, site.out_features, site.in_features) for site in self.sites]
        self._places = {name: place for place, name in enumerate(self.names)}
        self._linear = _all_linear(model)
        head = getattr(model, "get_output_embeddings", lambda: None)()
        self._head = next((name for name, module in self._modules.items() if module is head), None)
        self._directions, self._packing, self._max_rank = directions, directions.packing, max_rank
        self._families: dict[tuple, Family] = {}
        self._lock = threading.Lock()

    def family(self, record: Record) -> Family:
        """The family of a record; a new one is checked against the model first.

        Raises:
            ConfigError: it cannot be served, or its configuration is unknown; the message says what to do instead.
            BaseMismatchError, BasisMismatchError, TargetError: it belongs to another model.
            CorruptAdapterError: tensors are missing, unexpected or of another shape.
        """
        key = _key(record)
        # without the lock: what is known must not wait for a basis to be computed
        found = self._families.get(key)
        if found is not None:
            return found
        with self._lock:
            found = self._families.get(key)
            if found is None:
                found = self._families[key] = self._checked(record)
                while len(self._families) > _MOST_FAMILIES:
                    del self._families[next(iter(self._families))]
            return found

    @property
    def bytes(self) -> int:
        """Memory that families keep."""
        return sum(family.bytes for family in list(self._families.values()))

    def _checked(self, record: Record) -> Family:
        if record.task_type not in (None, "CAUSAL_LM"):
            raise ConfigError(
                f"it was trained for {record.task_type}, and only text generation (CAUSAL_LM) is served; run it offline"
            )
        if record.sections:
            names = [section.name for section in record.sections]
            raise ConfigError(
                f"it brings whole modules of its own ({listing(names, 3)}), which requests cannot share: merge it "
                "(`modicum merge`) and serve the merged model, or train it without modules_to_save"
            )
        config = config_from(record)
        if isinstance(config, AdapterConfig):
            return self._of_ours(record, config)
        if isinstance(config, LoraConfig):
            return self._of_peft(record, config)
        raise ConfigError(
            f"{record.method} has no factors that are served here: merge it with PEFT and serve the merged model, or "
            "train a LoRA"
        )

    def _of_ours(self, record: Record, config: AdapterConfig) -> Family:
        if config.target_modules is None:
            config.target_modules = "all-linear"
        sites = self._targets(config)
        config.base_fingerprint = check_base(config, sites)
        config.basis_fingerprint = check_basis(config, sites)
        method = registry.get(config.method)
        adapters = {self._places[name]: method(site, config) for name, site in sites.items()}
        self._activate(config, adapters)
        shapes = {
            f"{self.names[layer]}.{part}": tuple(value.shape)
            for layer, adapter in adapters.items()
            for part, value in adapter.named_parameters()
        }
        _check_tensors(shapes, record)
        ranks = {layer: adapter.active_rank for layer, adapter in adapters.items()}
        if _common(config):
            self._check_ranks(ranks)
            directions = {layer: self._shared(layer, cast("LoraXS", one)) for layer, one in adapters.items()}
            family = Cores(record.method, adapters, directions, record, self.shapes, self._packing)
            for site in sites.values():
                # what is used of them has been taken over
                site.bases.clear()
            return family
        ranks = {layer: self._factor_rank(config, adapter) for layer, adapter in adapters.items()}
        self._check_ranks(ranks)
        return OurFactors(record.method, ranks, adapters, self.shapes, self._packing)

    def _of_peft(self, record: Record, config: LoraConfig) -> Family:
        odd = [name for name in record.config if name not in _IDLE | _LORA_OPTIONS]
        if config.init_lora_weights not in _LORA_STARTS:
            odd.append(f"init_lora_weights={config.init_lora_weights!r}")
        if odd:
            raise ConfigError(
                f"its LoRA is more than a product of two factors on the base weights ({listing(odd)}): merge it with "
                "PEFT and serve the merged model, or convert it to plain LoRA"
            )
        sites = self._targets(config)
        layers = {self._places[name]: name for name in sites}
        options = AdapterConfig.rank_for, AdapterConfig.alpha_for
        view = cast(
            "Any",
            _LoraView(config.r, config.lora_alpha, config.rank_pattern or {}, config.alpha_pattern or {}),
        )
        ranks = {layer: options[0](view, name) for layer, name in layers.items()}
        shapes = {}
        for layer, rank in ranks.items():
            shape = self.shapes[layer]
            shapes[f"{shape.name}.lora_A.weight"] = (rank, shape.inputs)
            shapes[f"{shape.name}.lora_B.weight"] = (shape.out, rank)
        _check_tensors(shapes, record)
        self._check_ranks(ranks)
        power = 0.5 if config.use_rslora else 1.0
        scalings = {layer: options[1](view, name) / ranks[layer] ** power for layer, name in layers.items()}
        return PeftLora(record.method, ranks, scalings, self.shapes, self._packing)

    def _targets(self, config: Any) -> dict[str, Site]:
        """The layers that a configuration adapts."""
        if isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear":
            config.target_modules = set(self._linear)
        named = {n: m for n, m in self._modules.items() if check_target_module_exists(config, n)}
        if isinstance(config, AdapterConfig):
            check_targets(named, config, self.names)
        if not named:
            known = sorted({name.rpartition(".")[2] for name in self.names})
            wanted = config.target_modules
            hint = (
                did_you_mean(wanted, known)
                if isinstance(wanted, str)
                else f"; layers here: {listing(known, 12)}"
            )
            raise TargetError(f"target_modules = {wanted!r} matches no layer of this model{hint}")
        foreign = [f"{name} ({type(named[name]).__name__})" for name in named if name not in self._places]
        if self._head in named:
            foreign.append(f"the output head {self._head}")
        if foreign:
            raise ConfigError(
                f"it adapts {listing(foreign)}, and only the linear layers below the output head are served: merge it "
                "and serve the merged model, or train it without these layers"
            )
        return {name: self.sites[self._places[name]] for name in named}

    def _activate(self, config: AdapterConfig, adapters: Mapping[int, Adapter]) -> None:
        """Gives the adapters the ranks of the active sub-network."""
        if not isinstance(config, ElasticConfig) or config.sub_network is None:
            return
        chosen = SubNetwork.read(config.sub_network)
        if chosen.cuts or chosen.widths:
            names = [*chosen.cuts, *chosen.widths]
            raise ConfigError(
                f"its active sub-network has narrower layers ({listing(names, 3)}), which the base model has not: "
                "write the smaller model with `modicum extract` and serve that"
            )
        for name, rank in chosen.ranks.items():
            adapter = adapters.get(self._places.get(name, -1))
            if adapter is None or not 1 <= rank <= adapter.rank:
                raise ConfigError(f"its sub-network wants rank {rank} of {name}, which it does not have")
            adapter.active_rank = rank

    def _factor_rank(self, config: AdapterConfig, adapter: Adapter) -> int:
        pair = adapter.lora_factors()
        if pair is None:
            raise ConfigError(
                f"{config.method} has no low-rank update, so that requests cannot share a batch with it: merge it "
                "(`modicum merge`) and serve the merged model"
            )
        return pair[1].shape[0]

    def _check_ranks(self, ranks: Mapping[int, int]) -> None:
        largest = max(ranks.values())
        if largest > self._max_rank:
            raise ConfigError(
                f"its rank is {largest}, and adapters up to rank {self._max_rank} are served here; raise max_rank"
            )

    def _shared(self, layer: int, adapter: LoraXS) -> int:
        """Which of the shared directions the adapter's are."""
        site = self.sites[layer]
        key = next(key for key, basis in site.bases.items() if basis is adapter.basis)
        return self._directions.add(layer, key, adapter.basis, site)


@dataclasses.dataclass
class _LoraView:
    """A LoRA's ranks and alphas under the names that ours have."""

    r: int
    alpha: float
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]


def _common(config: AdapterConfig) -> bool:
    """Whether adapters of the configuration are cores between directions of the model."""
    return (
        isinstance(config, LoraXSConfig)
        and (config.basis, config.directions) == ("svd", "top")
        and config.use_sigma
    )


def _key(record: Record) -> tuple:
    """What two records of one family have in common."""
    config = {name: value for name, value in record.config.items() if name not in _IDLE}
    about = config, record.task_type, record.base_fingerprint, record.basis_fingerprint
    return (
        record.method,
        record.layout.names,
        record.layout.shapes,
        json.dumps(about, sort_keys=True),
        bool(record.sections),
    )


def _check_tensors(expected: Mapping[str, Sequence[int]], record: Record) -> None:
    """Refuses a record whose tensors are not the `expected` ones; everything that is wrong is listed."""
    found = dict(zip(record.layout.names, record.layout.shapes, strict=True))
    faults = {
        "missing": [name for name in expected if name not in found],
        "unexpected": [name for name in found if name not in expected],
        "of another shape": [
            f"{name} {tuple(found[name])} instead of {tuple(shape)}"
            for name, shape in expected.items()
            if name in found and tuple(found[name]) != tuple(shape)
        ],
    }
    wrong = [f"{len(names)} tensors {what}: {listing(names, 3)}" for what, names in faults.items() if names]
    if wrong:
        raise CorruptAdapterError(
            f"the adapter does not fit this model: {'; '.join(wrong)}. Check that it was saved for this base model and "
            "configuration"
        )


def _all_linear(model: nn.Module) -> set[str]:
    """What "all-linear" means for the model."""
    config = cast("Any", _maybe_include_all_linear_layers(LoraConfig(target_modules="all-linear"), model))
    return set(config.target_modules)


def _settle(model: nn.Module) -> None:
    """Brings low-bit layers into the layout they run in, in place, before threads read them while they run."""
    for module in model.modules():
        if isinstance(module, AffineLinear) and module.dtype == torch.bfloat16:
            module.pack_layout()
