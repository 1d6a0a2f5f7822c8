"""Records of a store in the form that vLLM loads, after the checks that loading into a model of ours makes.

LoRA-XS adapters of the model's own basis become r×r cores: what vLLM calls A is the core, and B has no numbers. All
others with low-rank updates become plain LoRA. vLLM may hold its weights in any layout; digests, bases and the input
factors A = Uᵀ W are therefore taken from the checkpoint that it was started with.
"""

# vLLM is in another environment than the one that is checked
# pyright: reportMissingImports=false
from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn

from modicum.adapters import registry
from modicum.adapters.basis import BasisSpec
from modicum.adapters.check import check_base, check_basis, check_state
from modicum.adapters.config import AdapterConfig
from modicum.adapters.elastic import ElasticConfig
from modicum.adapters.site import LayerBasis, Site
from modicum.errors import ConfigError, listing
from modicum.methods.lora_xs import LoraXSConfig
from modicum.models.checkpoint import iter_weights
from modicum.store.state import config_from, state_from

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

    from modicum.store.record import Record

#: kinds of adapters whose checks are remembered
_KINDS = 64
_PEFT_LORA = "peft:LORA"


@dataclass(frozen=True)
class LayerUpdate:
    """One layer of an adapter: scaled core (r, r), or A (r, in) and scaled B (out, r)."""

    a: Tensor
    b: Tensor | None = None


@dataclass(frozen=True)
class _Kind:
    """What adapters of one configuration have in common, checked once."""

    config: Any
    #: whether the cores alone are needed
    common: bool
    #: layer -> scaling of its update
    scalings: Mapping[str, float]


class Library:
    """The adapters of one base model; belongs to one thread."""

    def __init__(self, checkpoint: str, read: Callable[[str], Record], max_rank: int) -> None:
        """`checkpoint`: the folder of the base model; `read`: the record of `name@number`."""
        self.read = read
        self.max_rank = max_rank
        self._sites = {name: _site(name, weight) for name, weight in iter_weights(checkpoint)}
        self._kinds: dict[str, _Kind] = {}

    @property
    def layers(self) -> list[str]:
        """The names of all layers that adapters may change."""
        return list(self._sites)

    def directions(self, name: str) -> tuple[Tensor, Tensor]:
        """A (k, in) and U (out, k), float32, of the layer, in the basis that cores are served in."""
        site = self._sites[name]
        basis = self._common(site)
        assert basis.a is not None
        k = min(self.max_rank, basis.rank)
        return basis.a[:k], basis.ut[:k].T

    @torch.no_grad()
    def updates(self, version: str, record: Record) -> dict[str, LayerUpdate]:
        """The updates of a version by layer.

        Raises:
            CorruptAdapterError, BaseMismatchError, BasisMismatchError: see `load_adapter`.
            ConfigError: it cannot be served from here; the message says why and what to do.
        """
        if record.sections or record.config.get("modules_to_save"):
            raise ConfigError(
                f"{version} has modules of its own besides its adapters (modules_to_save), which vLLM does not serve "
                "here: use the embedded engine, or merge it and serve the merged model"
            )
        kind = self._kind(version, record)
        state = state_from(record)
        if record.method == _PEFT_LORA:
            return self._bounded(version, self._from_peft(kind, state))
        self._check_state(kind, state)
        if kind.common:
            return {
                name: LayerUpdate(scaling * (torch.diag(core) if core.ndim == 1 else core))
                for name, scaling in kind.scalings.items()
                for core in (state[f"{name}.R"],)
            }
        return self._bounded(version, self._factors(version, record, kind, state))

    def _kind(self, version: str, record: Record) -> _Kind:
        key = json.dumps(
            [
                record.method,
                record.config,
                record.task_type,
                record.base_fingerprint,
                record.basis_fingerprint,
            ],
            sort_keys=True,
        )
        if key not in self._kinds:
            found = self._checked(version, config_from(record))
            while len(self._kinds) >= _KINDS:
                self._kinds.pop(next(iter(self._kinds)))
            self._kinds[key] = found
        return self._kinds[key]

    def _checked(self, version: str, config: Any) -> _Kind:
        if config.task_type not in (None, "CAUSAL_LM"):
            raise ConfigError(f"{version} was trained for {config.task_type}, this server generates text")
        if not isinstance(config, AdapterConfig):
            if config.peft_type != "LORA":
                raise ConfigError(
                    f"{version} is {config.peft_type} of PEFT, of whose methods vLLM serves LoRA: merge it, or export "
                    "it as LoRA"
                )
            return _Kind(config, False, {})
        if isinstance(config, ElasticConfig) and config.sub_network is not None:
            raise ConfigError(
                f"{version} is a sub-network: write the smaller model with `modicum extract`, or export it as LoRA"
            )
        sites = {name: site for name, site in self._sites.items() if _targeted(config, name)}
        if not sites:
            raise ConfigError(
                f"{version} adapts no layer of this model (target_modules = {config.target_modules})"
            )
        check_base(config, sites)
        check_basis(config, sites)
        scalings = {name: config.alpha_for(name) / config.rank_for(name) for name in sites}
        return _Kind(config, self._is_common(config, sites), scalings)

    def _is_common(self, config: AdapterConfig, sites: Mapping[str, Site]) -> bool:
        if not isinstance(config, LoraXSConfig) or config.basis_spec() != BasisSpec() or not config.use_sigma:
            return False
        ranks = {name: config.rank_for(name) for name in sites}
        if max(ranks.values()) > self.max_rank:
            return False
        # a basis that was added, or some of whose columns are turned, has the same description
        return all(
            torch.equal(site.basis(config).ut[: ranks[name]], self._common(site).ut[: ranks[name]])
            for name, site in sites.items()
        )

    def _common(self, site: Site) -> LayerBasis:
        rank = min(self.max_rank, site.in_features, site.out_features)
        basis = site.basis(LoraXSConfig(r=rank))
        basis.make_input(site)
        return basis

    def _check_state(self, kind: _Kind, state: Mapping[str, Tensor]) -> None:
        config, method = kind.config, registry.get(kind.config.method)
        expected: dict[str, torch.Size] = {}
        for name in kind.scalings:
            adapter = method(self._sites[name], config)
            expected |= {f"{name}.{part}": value.shape for part, value in adapter.named_parameters()}
        check_state(expected, state)
        unexpected = [name for name in state if name not in expected]
        if unexpected:
            raise ConfigError(
                f"the record has tensors for layers that it does not adapt: {listing(unexpected)}"
            )

    def _factors(
        self, version: str, record: Record, kind: _Kind, state: Mapping[str, Tensor]
    ) -> dict[str, LayerUpdate]:
        found = {}
        for name, scaling in kind.scalings.items():
            adapter = registry.get(record.method)(self._sites[name], kind.config)
            adapter.load_state_dict({part: state[f"{name}.{part}"] for part, _ in adapter.named_parameters()})
            factors = adapter.lora_factors()
            if factors is None:
                raise ConfigError(
                    f"{version} is {record.method}, which no LoRA equals: merge it and serve that model"
                )
            found[name] = LayerUpdate(factors[1], scaling * factors[0])
        return found

    def _from_peft(self, kind: _Kind, state: Mapping[str, Tensor]) -> dict[str, LayerUpdate]:
        from vllm.lora.peft_helper import PEFTHelper

        helper = PEFTHelper.from_dict(kind.config.to_dict() | {"target_modules": "all"})
        faults = helper._validate_features()  # noqa: SLF001 - names what vLLM's LoRA lacks, whatever the rank
        if faults:
            raise ConfigError(" ".join(faults))
        layers = list(dict.fromkeys(key.rpartition(".lora_")[0] for key in state))
        unknown = [name for name in layers if name not in self._sites]
        if unknown:
            raise ConfigError(f"it adapts {listing(unknown)}, which is no linear layer that can be served")
        expected = {}
        for name in layers:
            rank, site = helper.get_rank_and_scaling(name)[0], self._sites[name]
            expected[f"{name}.lora_A.weight"] = torch.Size((rank, site.in_features))
            expected[f"{name}.lora_B.weight"] = torch.Size((site.out_features, rank))
        check_state(expected, state)
        return {
            name: LayerUpdate(
                state[f"{name}.lora_A.weight"],
                helper.get_rank_and_scaling(name)[1] * state[f"{name}.lora_B.weight"],
            )
            for name in layers
        }

    def _bounded(self, version: str, updates: dict[str, LayerUpdate]) -> dict[str, LayerUpdate]:
        rank = max(update.a.shape[0] for update in updates.values())
        if rank > self.max_rank:
            raise ConfigError(
                f"{version} has rank {rank}, the server was started with --max-lora-rank {self.max_rank}"
            )
        return updates


def _site(name: str, weight: Tensor) -> Site:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return Site(name, layer)


def _targeted(config: AdapterConfig, name: str) -> bool:
    return config.target_modules == "all-linear" or bool(
        check_target_module_exists(cast("Any", config), name)
    )
