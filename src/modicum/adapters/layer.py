"""A base layer with adapters on it: the layer that PEFT sees, the same for every method."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from torch.nn import functional as F

from modicum.adapters import registry
from modicum.adapters.elastic import put_back, take
from modicum.adapters.merge import merge, unmerge
from modicum.errors import ConfigError

if TYPE_CHECKING:
    from modicum.adapters.config import AdapterConfig
    from modicum.adapters.contract import Adapter
    from modicum.adapters.mixed import Routing
    from modicum.adapters.site import Site


# PEFT finds layers for "all-linear" by the word Linear in the class name.
class AdapterLinear(nn.Module, BaseTunerLayer):
    """A base layer, its adapters by name, and the bases they share."""

    def __init__(self, site: Site, method: str, adapter_name: str, routing: Routing) -> None:
        super().__init__()
        self.base_layer = site.module
        self.site = site
        self.method = method
        # one attribute per method, so that state-dict keys name the method: PEFT strips the adapter name only
        self.adapters_attribute = f"{registry.prefix(method)}adapters"
        self.adapter_layer_names = (self.adapters_attribute,)
        self.other_param_names = ()
        setattr(self, self.adapters_attribute, nn.ModuleDict())
        self._active_adapter = adapter_name
        # registered to follow `.to(device)`; its buffers are not persistent, so nothing of it is saved
        setattr(self, f"{registry.prefix(method)}bases", self.site.bases)
        object.__setattr__(self, "routing", routing)
        self.merged_adapters = []
        self.in_features, self.out_features = self.site.in_features, self.site.out_features

    routing: Routing

    @property
    def adapters(self) -> nn.ModuleDict:
        """The adapters of this layer by name."""
        return cast("nn.ModuleDict", getattr(self, self.adapters_attribute))

    def update_layer(self, adapter_name: str, config: AdapterConfig) -> None:
        """Put a new adapter on this layer, in the dtype and on the device of the base layer."""
        self.adapters[adapter_name] = registry.get(self.method)(self.site, config)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        if self.site.is_meta or any(p.is_meta for p in self.adapters[adapter_name].parameters()):
            return
        dtype = self.site.dtype
        self.adapters[adapter_name].to(device or self.site.device, dtype if dtype.is_floating_point else None)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base layer's output with the active adapters applied, shape (*batch, out)."""
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        if self.routing.active:
            return self._forward_mixed(x, self.base_layer(x, *args, **kwargs))
        # as everywhere in PEFT, what is merged is all that runs
        active = [] if self.merged_adapters else self._active()
        for adapter in active:
            if adapter.cut is not None:
                return self._forward_cut(x, active)
        output = self.base_layer(x, *args, **kwargs)
        return self._adapted(x, output, active) if active else output

    def _active(self) -> list[Adapter]:
        # not through the properties, which look attributes up the long way: this runs for every layer and token
        adapters: Any = cast("Any", self._modules[self.adapters_attribute])._modules  # noqa: SLF001
        names = self._active_adapter
        if isinstance(names, str):
            return [adapters[names]] if names in adapters else []
        return [adapters[name] for name in names if name in adapters]

    def _adapted(self, x: Tensor, output: Tensor, active: list[Adapter]) -> Tensor:
        if len(active) == 1:
            return active[0](x, output)
        return output + sum(
            (adapter(x, output) - output for adapter in active), start=torch.zeros_like(output)
        )

    def _forward_cut(self, x: Tensor, active: list[Adapter]) -> Tensor:
        """The output of the part of the layer that the active sub-network has; takes all inputs or those only."""
        cut = active[0].cut
        if cut is None or any(adapter.cut != cut for adapter in active):
            raise ConfigError(
                f"the active adapters want different parts of {self.site.name}; activate one of them at a time"
            )
        if cut.inputs is not None and x.shape[-1] == self.in_features:
            x = take(x, cut.inputs, -1)
        factors = [adapter.lora_factors() for adapter in active] if self.site.format.mergeable else [None]
        if None in factors:
            whole = put_back(x, cut.inputs, self.in_features)
            return take(self._adapted(whole, self.base_layer(whole), active), cut.outputs, -1)
        bias = self.site.bias
        weight = take(take(self.site.weight(), cut.outputs, 0), cut.inputs, 1)
        output = F.linear(x, weight, None if bias is None else take(bias, cut.outputs, 0))
        for adapter, pair in zip(active, factors, strict=True):
            assert pair is not None
            b, a = take(pair[0], cut.outputs, 0).to(x.dtype), take(pair[1], cut.inputs, 1).to(x.dtype)
            z = F.linear(adapter.dropout(x) if adapter.dropout is not None else x, a) * adapter.scaling
            output = output + F.linear(z, b)
        return output

    def _forward_mixed(self, x: Tensor, base_output: Tensor) -> Tensor:
        if self.merged:
            raise ConfigError(
                "adapter_names cannot be used while adapters are merged; call unmerge_adapter() first"
            )
        rows = self.routing.rows(x.shape[0], x.device)
        here = [name for name in self.routing.names if name in self.adapters]
        if not here:
            return base_output
        if len(here) < len(self.routing.names):  # an adapter may leave some layers alone
            position = torch.tensor(
                [*(here.index(name) if name in here else -1 for name in self.routing.names), -1],
                device=x.device,
            )
            rows = position[rows]
        adapters = [cast("Adapter", self.adapters[name]) for name in here]
        narrower = [name for name, adapter in zip(here, adapters, strict=True) if adapter.cut is not None]
        if narrower:
            raise ConfigError(
                f"adapter_names cannot mix sub-networks of different widths ({', '.join(narrower)}); extract them"
            )
        return type(adapters[0]).forward_mixed(adapters, rows, x, base_output)

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """The dense update of one adapter, (out, in), float32."""
        return cast("Adapter", self.adapters[adapter_name]).delta_weight()

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether PEFT may turn the adapter into a LoRA: every update of ours is additive."""
        return adapter_name in self.adapters

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Fold adapters into the base layer in place; what undoes it is kept for an exact `unmerge`.

        A result that is not finite is refused whatever `safe_merge` says: looking costs little.

        Raises:
            InexactMergeError: the base format cannot take the update, or the layer runs cut.
            CorruptAdapterError: the merged weight would hold NaN or infinity; nothing was changed.
        """
        del safe_merge
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.adapters]
        if not names:
            return
        wanted = [*self.merged_adapters, *names]
        merge(self.site, {name: cast("Adapter", self.adapters[name]) for name in wanted})
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Put the original base layer back, bit for bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        unmerge(self.site)
        self.merged_adapters.clear()

    def __repr__(self) -> str:
        return f"modicum.{self.method}." + super().__repr__()
