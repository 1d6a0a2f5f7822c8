"""The PEFT tuner that hosts every method."""

from __future__ import annotations

import copy
import functools
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    _maybe_include_all_linear_layers,
    check_target_module_exists,
)
from peft.utils import AuxiliaryTrainingWrapper

from modicum.adapters import registry
from modicum.adapters.check import check_base, check_basis, check_state, check_targets
from modicum.adapters.elastic import ElasticConfig, SubNetwork, Switch
from modicum.adapters.layer import AdapterLinear
from modicum.adapters.mixed import Routing
from modicum.adapters.site import Site
from modicum.errors import ConfigError, InexactMergeError, TargetError
from modicum.quant.base import format_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch
    from torch import Tensor, nn

    from modicum.adapters.config import AdapterConfig


class HostModel(BaseTuner):
    """A base model whose target layers carry adapters of one method; abstract, see `host_class`."""

    method: str
    tuner_layer_cls = AdapterLinear
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012 - PEFT reads a plain class attribute

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Put an adapter on `model`; the caller's config object stays as it was."""
        if "_routing" not in self.__dict__:
            object.__setattr__(self, "_routing", _routing_of(model))
        # fingerprints are written into the config; a config reused for another model must not carry them over
        self.peft_config[adapter_name] = copy.copy(self.peft_config[adapter_name])
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        config = self.peft_config[adapter_name]
        if isinstance(config, ElasticConfig) and config.sub_network is not None:
            Switch(self, adapter_name).activate(SubNetwork.read(config.sub_network))

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict) -> Any:
        del model_config
        if peft_config.target_modules is None:
            peft_config.target_modules = "all-linear"
        return peft_config

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        """Check everything and build the bases before the first layer is touched."""
        config = cast("AdapterConfig", _maybe_include_all_linear_layers(peft_config, model))
        layers = _adaptable(model)
        targets = {
            name: module for name, module in layers.items() if check_target_module_exists(config, name)
        }
        bare = {name: _base_of(module) for name, module in targets.items()}
        known = [name for name, module in layers.items() if format_of(_base_of(module)) is not None]
        if not targets and isinstance(config.target_modules, str):
            raise TargetError(f"target_modules = {config.target_modules!r} matches no layer of this model")
        foreign = [
            n
            for n, m in targets.items()
            if isinstance(m, BaseTunerLayer) and not isinstance(m, AdapterLinear)
        ]
        if foreign:
            raise TargetError(
                f"{foreign[0]} already carries an adapter of another kind; unload or merge it first"
            )
        check_targets(bare, config, known)
        sites = {name: _site_of(name, module) for name, module in targets.items()}
        # sites of new layers are handed over to `_create_and_replace`, so nothing is computed twice
        object.__setattr__(self, "_sites", sites)
        if not sites or any(site.is_meta for site in sites.values()):
            return
        config.base_fingerprint = check_base(config, sites)
        config.basis_fingerprint = check_basis(config, sites)

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        del parameter_name
        if isinstance(target, AdapterLinear):
            target.update_layer(adapter_name, peft_config)
            return
        layer = AdapterLinear(self._sites[current_key], self.method, adapter_name, self._routing)
        layer.update_layer(adapter_name, peft_config)
        self._replace_module(parent, target_name, layer, target)

    def _replace_module(
        self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module
    ) -> None:
        if isinstance(child, AdapterLinear):
            # the base layer goes back as it is; PEFT would assign its weight to it, which packed formats refuse
            setattr(parent, child_name, new_module)
            return
        super()._replace_module(parent, child_name, new_module, child)

    def fill_bases(self) -> None:
        """Compute the bases of layers that were on the meta device when they were adapted."""
        for module in self.model.modules():
            if isinstance(module, AdapterLinear):
                module.site.fill()

    _sites: dict[str, Site]
    _routing: Routing

    def _check_merge_allowed(self) -> None:
        tied = self._get_tied_target_modules(self.model)
        if tied:
            raise InexactMergeError(
                f"{', '.join(tied)} shares its weight with the input embedding, which a merge would change too; load "
                "the base model with tie_word_embeddings=False, or keep the adapter separate"
            )

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """The checkpoint under the names of the model, after checking that nothing is missing or broken."""
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        expected: dict[str, torch.Size] = {}
        for name, module in model.named_modules():
            if isinstance(module, AdapterLinear) and adapter_name in module.adapters:
                for key, value in module.adapters[adapter_name].named_parameters():
                    expected[f"{name}.{module.adapters_attribute}.{adapter_name}.{key}"] = value.shape
        check_state(expected, remapped)
        return remapped

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """While open, batch rows go to the adapters named in `adapter_names`; PEFT calls this around forward."""
        del args
        adapter_names = kwargs.pop("adapter_names", None)
        if kwargs.pop("alora_offsets", None) is not None:
            raise ConfigError(f"alora_offsets is an option of aLoRA; {self.method} has none")
        if adapter_names is None:
            yield
            return
        if self.training:
            # recomputed activations (gradient checkpointing) would run after this context has closed
            raise ConfigError("adapter_names works in evaluation mode only; call model.eval() first")
        wrappers = [m for m in self.modules() if isinstance(m, AuxiliaryTrainingWrapper)]

        def add_names(_module: nn.Module, inputs: tuple, keywords: dict) -> tuple[tuple, dict]:
            return inputs, {**keywords, "adapter_names": adapter_names}

        handles = [module.register_forward_pre_hook(add_names, with_kwargs=True) for module in wrappers]
        try:
            with self._routing.batch(adapter_names, self.peft_config):
                yield
        finally:
            for handle in handles:
                handle.remove()


def _adaptable(model: nn.Module) -> dict[str, nn.Module]:
    """All modules of `model` by name, without what lies inside adapted layers."""
    inside: tuple[str, ...] = ()
    found = {}
    for name, module in model.named_modules():
        if name and not (inside and name.startswith(inside)):
            found[name] = module
            if isinstance(module, BaseTunerLayer):
                inside = (*inside, f"{name}.")
    return found


def _base_of(module: nn.Module) -> nn.Module:
    return module.base_layer if isinstance(module, AdapterLinear) else module


def _site_of(name: str, module: nn.Module) -> Site:
    return module.site if isinstance(module, AdapterLinear) else Site(name, module)


def _routing_of(model: nn.Module) -> Routing:
    """The routing that the layers of `model` already share, or a new one."""
    return next((m.routing for m in model.modules() if isinstance(m, AdapterLinear)), None) or Routing()


@functools.cache
def host_class(method: str) -> type[HostModel]:
    """The tuner class of the method `method`: `HostModel` with its name and state-dict prefix."""
    members = {"method": method, "prefix": registry.prefix(method), "__module__": __name__}
    return type(_host_name(method), (HostModel,), members)


def __getattr__(name: str) -> type[HostModel]:
    """The tuner class called `name`, which a pickled model asks for."""
    for method in registry.names():
        if _host_name(method) == name:
            return host_class(method)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _host_name(method: str) -> str:
    return "".join(part.capitalize() for part in method.split("_")) + "Model"
