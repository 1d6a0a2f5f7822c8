"""One adapter between a model and a record: its configuration, its tensors, and their names.

Records name a tensor by layer and parameter alone (`model.layers.0.self_attn.q_proj.R`); PEFT's files add a
prefix and the method's container. `short_name` takes both away.
"""

from __future__ import annotations

import dataclasses
import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import AuxiliaryTrainingWrapper

from modicum.adapters import registry
from modicum.adapters.config import AdapterConfig
from modicum.adapters.layer import AdapterLinear
from modicum.errors import ConfigError, CorruptAdapterError, did_you_mean, listing
from modicum.store.record import Record, Section

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor, nn

PREFIX = "base_model.model."
#: options that a record keeps elsewhere, or that say nothing about the adapter
_NOT_CONFIG = {
    "peft_type", "task_type", "inference_mode", "peft_version", "base_fingerprint", "basis_fingerprint",
}  # fmt: skip


@dataclass(frozen=True)
class AdapterState:
    """The tensors of one adapter in a model, by short name, as views on the model's own memory."""

    model: PeftModel
    adapter_name: str
    #: short name -> tensor
    tensors: dict[str, Tensor]
    #: short name -> key in PEFT's files
    keys: dict[str, str]
    #: the names that belong to full modules
    full_names: set[str]

    @classmethod
    def of(cls, model: PeftModel, adapter_name: str) -> AdapterState:
        """The tensors of the adapter `adapter_name`."""
        config = config_of(model, adapter_name)
        if isinstance(config, AdapterConfig):
            return cls._of_ours(model, adapter_name)
        found = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
        wrapped = tuple(f"{n}." for n, m in model.named_modules() if isinstance(m, AuxiliaryTrainingWrapper))
        keys = {short_name(key, config): key for key in found}
        full = {name for name, key in keys.items() if key.startswith(wrapped)}
        return cls(model, adapter_name, {name: found[key] for name, key in keys.items()}, keys, full)

    @classmethod
    def _of_ours(cls, model: PeftModel, adapter_name: str) -> AdapterState:
        # PEFT's way takes the state of all adapters and walks all modules several times; one walk will do
        tensors, keys, full = {}, {}, set()
        for name, module in model.named_modules():
            short = name.removeprefix(PREFIX)
            if isinstance(module, AdapterLinear) and adapter_name in module.adapters:
                for part, value in module.adapters[adapter_name].named_parameters():
                    tensors[f"{short}.{part}"] = value.detach()
                    keys[f"{short}.{part}"] = f"{name}.{module.adapters_attribute}.{part}"
            elif isinstance(module, AuxiliaryTrainingWrapper):
                wrapper = cast("Any", module)  # PEFT's base class declares one argument fewer
                for part, value in wrapper.adapter_state_dict(adapter_name, module.state_dict()).items():
                    tensors[f"{short}.{part}"] = value
                    keys[f"{short}.{part}"] = f"{name}.{part}"
                    full.add(f"{short}.{part}")
        return cls(model, adapter_name, tensors, keys, full)

    @property
    def adapter_names(self) -> list[str]:
        """The names of the adapter's own numbers."""
        return [name for name in self.tensors if name not in self.full_names]

    def check(self, state: Mapping[str, Tensor]) -> None:
        """Refuse a `state` that does not fit, with everything that is wrong with it.

        Raises:
            CorruptAdapterError: tensors missing, unexpected, of another shape or not finite.
        """
        mine = self._with_base(state)
        shapes = {
            f"{name} {tuple(value.shape)} instead of {tuple(mine[name].shape)}": None
            for name, value in state.items()
            if name in mine and mine[name].shape != value.shape
        }
        broken = [n for n, v in state.items() if v.is_floating_point() and not bool(torch.isfinite(v).all())]
        found = {
            "missing": [name for name in self.tensors if name not in state],
            "unexpected": [name for name in state if name not in mine],
            "of another shape": list(shapes),
            "with NaN or infinite values": broken,
        }
        faults = [f"{len(names)} tensors {what}: {listing(names)}" for what, names in found.items() if names]
        if faults:
            raise CorruptAdapterError(
                f"the adapter does not fit this model: {'; '.join(faults)}. Check that it was saved for this "
                "base model and configuration; fetch or train it again if numbers are broken"
            )

    def copy_from(self, state: Mapping[str, Tensor]) -> None:
        """Copy checked numbers into the model, in place."""
        if isinstance(config_of(self.model, self.adapter_name), AdapterConfig):
            mine = self._with_base(state)
            with torch.no_grad():
                for name, value in state.items():
                    mine[name].copy_(value)
            return
        # PEFT's methods may keep their numbers in another form than their files do
        full = {self.keys.get(name, f"{PREFIX}{name}"): value for name, value in state.items()}
        set_peft_model_state_dict(self.model, full, adapter_name=self.adapter_name)

    def _with_base(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The adapter's tensors, and those of the base model when `state` names others than the adapter's.

        PEFT saves resized embeddings whole, under the base model's own names.
        """
        if all(name in self.tensors for name in state):
            return self.tensors
        base = {key.removeprefix(PREFIX): value for key, value in self.model.state_dict().items()}
        return {name: base[name] for name in state if name in base} | self.tensors


def adapted_layers(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, Any]]:
    """(layer name in the base model, layer) for all layers that carry the modicum adapter `adapter_name`."""
    for name, module in model.named_modules():
        if isinstance(module, AdapterLinear) and adapter_name in module.adapters:
            yield name.removeprefix(PREFIX), module


def config_of(model: PeftModel, adapter_name: str) -> PeftConfig:
    """The configuration of the adapter `adapter_name`."""
    if adapter_name not in model.peft_config:
        known = list(model.peft_config)
        near = did_you_mean(adapter_name, known)
        raise ConfigError(f"the model has no adapter {adapter_name!r}{near}; it has {listing(known)}")
    return model.peft_config[adapter_name]


def method_name(config: PeftConfig) -> str:
    """The name of the config's method in records: `lora_xs`, or `peft:LORA` for a method of PEFT."""
    if isinstance(config, AdapterConfig):
        return registry.method_of(config)
    return f"peft:{getattr(config.peft_type, 'value', config.peft_type)}"


def short_name(key: str, config: PeftConfig) -> str:
    """The name in records of the tensor that PEFT's files call `key`: the layer and the parameter alone."""
    name = key.removeprefix(PREFIX)
    if isinstance(config, AdapterConfig):
        name = name.replace(f".{registry.prefix(registry.method_of(config))}adapters.", ".")
    return name


def config_options(config: PeftConfig) -> dict[str, Any]:
    """The options of `config` that differ from the defaults of its class, in plain JSON types."""
    values = config.to_dict()
    options = {}
    for spec in dataclasses.fields(config):
        default = None if spec.default is dataclasses.MISSING else spec.default
        if spec.default_factory is not dataclasses.MISSING:
            default = spec.default_factory()
        if spec.name in values and spec.name not in _NOT_CONFIG:
            value = _plain(values[spec.name])
            if spec.name == "modules_to_save" and value:
                # PEFT adds the names of classification heads again on every load
                value = list(dict.fromkeys(value))
            if value != _plain(default):
                options[spec.name] = value
    return options


def config_from(record: Record) -> PeftConfig:
    """The configuration that `record` was saved with.

    Raises:
        ConfigError: the method or an option is unknown here.
    """
    about: dict[str, Any] = {**record.config, "task_type": record.task_type}
    if record.method.startswith("peft:"):
        kind = record.method.removeprefix("peft:")
        classes = {getattr(key, "value", key): value for key, value in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
        if kind not in classes:
            raise ConfigError(f"the adapter's method {kind!r} is unknown to the installed peft; upgrade peft")
        cls: type = classes[kind]
    else:
        cls = registry.config_class(record.method)
        about |= {"base_fingerprint": record.base_fingerprint, "basis_fingerprint": record.basis_fingerprint}
    try:
        return cls(**about)
    except TypeError as error:
        raise ConfigError(f"the adapter has options that {cls.__name__} does not know ({error})") from error


def state_from(record: Record) -> dict[str, Tensor]:
    """All tensors of `record` by short name; the adapter's own are float32 views on one block of memory."""
    flat = torch.from_numpy(record.floats().copy() if record.dtype == "float32" else record.floats())
    parts = flat.split([int(size) for size in record.layout.offsets[1:] - record.layout.offsets[:-1]])
    layout = record.layout
    state = {n: part.view(s) for n, part, s in zip(layout.names, parts, layout.shapes, strict=True)}
    for section in record.sections:
        raw = torch.from_numpy(section.data.copy())
        state[section.name] = (raw.view(torch.bfloat16) if section.dtype == "bfloat16" else raw).view(
            section.shape
        )
    return state


def section_of(name: str, tensor: Tensor) -> Section:
    """A tensor of a full module as a section of a record, in its own type."""
    value = tensor.detach().cpu().contiguous()
    dtype = str(value.dtype).removeprefix("torch.")
    raw = value.view(torch.uint16) if value.dtype == torch.bfloat16 else value
    return Section(name, dtype, tuple(value.shape), raw.reshape(-1).numpy())


def _plain(value: Any) -> Any:
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, (set, frozenset)):
        return sorted(_plain(item) for item in value)
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return {str(k): _plain(v) for k, v in value.items()} if isinstance(value, dict) else value
