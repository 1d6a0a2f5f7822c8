"""Putting a method on a base model: ours through the registry, the baselines through PEFT, or none at all.

The options of a method are the fields of its own config dataclass; nothing is declared a second time here.
"""

from __future__ import annotations

import dataclasses
import typing
import warnings
from typing import TYPE_CHECKING, Any

from modicum.errors import ConfigError, did_you_mean
from modicum.models.loading import head_names

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import nn

FULL = "full"
#: baseline -> (PEFT config class, what makes it that baseline)
BASELINES: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("LoraConfig", {}),
    "dora": ("LoraConfig", {"use_dora": True}),
    "vera": ("VeraConfig", {}),
    "tiny_lora": ("TinyLoraConfig", {}),
    "psoft": ("PsoftConfig", {}),
}
#: fields that PEFT or the recipe sets
_RESERVED = (
    "peft_type",
    "task_type",
    "inference_mode",
    "base_model_name_or_path",
    "revision",
    "peft_version",
)
_TASK_TYPES = {"causal_lm": "CAUSAL_LM", "seq_cls": "SEQ_CLS", "regression": "SEQ_CLS"}


def method_names() -> list[str]:
    """Every method a recipe may name: ours, the baselines, and `full`."""
    from modicum.adapters import registry

    return sorted({*registry.names(), *BASELINES, FULL})


def config_class(name: str) -> type:
    """The PEFT config class of a method.

    Raises:
        ConfigError: no such method, or `full`, which has no config.
    """
    from modicum.adapters import registry

    if name in registry.names():
        return registry.config_class(name)
    if name in BASELINES:
        import peft

        return getattr(peft, BASELINES[name][0])
    raise ConfigError(
        f"no method {name!r}{did_you_mean(name, method_names())}; known: {', '.join(method_names())}"
    )


def option_names(name: str) -> list[str]:
    """The options a recipe may set for the method `name`, sorted."""
    if name == FULL:
        return []
    fixed = BASELINES[name][1] if name in BASELINES else {}
    fields = dataclasses.fields(config_class(name))
    return sorted(f.name for f in fields if f.init and f.name not in (*_RESERVED, *fixed))


def option_faults(name: str, options: Mapping[str, Any]) -> dict[str, str]:
    """What is wrong with the options of a method, by option (`name` itself for an unknown method); empty if fine."""
    known = method_names()
    if name not in known:
        return {"name": f"no method {name!r}{did_you_mean(name, known)}; known: {', '.join(known)}"}
    allowed = option_names(name)
    faults = {
        key: f"{name} has no option {key!r}{did_you_mean(key, allowed)}"
        for key in options
        if key not in allowed
    }
    if name == FULL or faults:
        return faults
    hints = _type_hints(config_class(name))
    for key, value in options.items():
        fault = _type_fault(hints.get(key), value)
        if fault:
            faults[key] = f"{key} = {value!r}: {fault}"
    if not faults:
        try:
            # what PEFT warns about, it warns about again when the method is applied
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                make_config(name, options, "causal_lm")
        except (ConfigError, ValueError, TypeError) as error:
            faults["name"] = str(error)
    return faults


def make_config(name: str, options: Mapping[str, Any], task: str, seed: int | None = None) -> Any:
    """The PEFT config of a method; `seed` is used where the method draws numbers and the options name none."""
    cls = config_class(name)
    fixed = BASELINES[name][1] if name in BASELINES else {}
    # the same targets for every method, so that a comparison changes one word
    values = {"target_modules": "all-linear", **options, **fixed, "task_type": _TASK_TYPES[task]}
    if seed is not None and name not in BASELINES and "seed" in option_names(name):
        values.setdefault("seed", seed)
    return cls(**values)


def apply_method(model: Any, method: Any, task: str, seed: int | None = None) -> Any:
    """`model` ready to train: wrapped in PEFT with one adapter, or itself with all weights trainable.

    `method` is the recipe's method section (`name` and `options`). The classification head trains along.

    Raises:
        ConfigError: unknown method or option. TargetError: targets that do not fit the model.
    """
    name, options = method.name, method.options
    faults = option_faults(name, options)
    if faults:
        raise ConfigError("; ".join(faults.values()))
    if name == FULL:
        return model.requires_grad_(True)
    import peft

    from modicum.adapters import registry

    if name in registry.names():
        registry.register()
    config = make_config(name, options, task, seed)
    return peft.get_peft_model(model, config)


def trained_values(model: nn.Module) -> dict[str, int]:
    """How many numbers train: `adapter` (all weights but the head for `full`), `head`, `total`."""
    head = {id(p) for _, p in head_parameters(model)}
    trained = {id(p): p.numel() for p in model.parameters() if p.requires_grad}
    in_head = sum(count for key, count in trained.items() if key in head)
    return {"adapter": sum(trained.values()) - in_head, "head": in_head, "total": sum(trained.values())}


def head_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Names and parameters of the classification head that train."""
    is_peft = hasattr(model, "peft_config")
    prefixes = tuple(f"{name}." for name in head_names(model)) if not is_peft else ()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and (".modules_to_save." in name or name.startswith(prefixes or "\0")):
            yield name, parameter


def _type_hints(cls: type) -> dict[str, Any]:
    try:
        return typing.get_type_hints(cls)
    except (NameError, TypeError):  # some PEFT configs name types that only exist while type checking
        return {}


def _type_fault(hint: Any, value: Any) -> str | None:
    from pydantic import PydanticSchemaGenerationError, PydanticUserError, TypeAdapter, ValidationError

    if hint is None:
        return None
    try:
        TypeAdapter(hint).validate_python(value)
    except ValidationError as error:
        return " or ".join(dict.fromkeys(fault["msg"] for fault in error.errors()))
    except (PydanticSchemaGenerationError, PydanticUserError):
        return None
    return None
