"""Between PEFT folders and records, without the base model: names and types are all that differs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftConfig
from safetensors.torch import save_file

from modicum.adapters import registry
from modicum.adapters.config import AdapterConfig
from modicum.errors import ConfigError, CorruptAdapterError
from modicum.store.atomic import write_folder
from modicum.store.files import CONFIG_FILE, WEIGHT_FILES, find_weights, read_weights
from modicum.store.record import Record, build
from modicum.store.state import (
    PREFIX,
    config_from,
    config_options,
    method_name,
    section_of,
    short_name,
    state_from,
)

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping

    from torch import Tensor


def record_of_folder(folder: str | os.PathLike, dtype: str = "auto") -> Record:
    """The adapter of a PEFT folder as a record, without its base model.

    Raises:
        ConfigError: no adapter, one that has to be taken over first, or an unknown `dtype`.
        CorruptAdapterError: it is damaged, or holds numbers that are not finite.
    """
    source = Path(folder)
    weights = find_weights(source)
    try:
        config = PeftConfig.from_pretrained(str(source))
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptAdapterError(
            f"{source / CONFIG_FILE} cannot be read ({error!r}); get it again"
        ) from error
    if config.peft_type is None:
        raise CorruptAdapterError(f"{source / CONFIG_FILE} names no method (peft_type); get it again")
    read = read_weights(weights)
    if any("lora_latent_mapping" in key for key in read):
        raise ConfigError(
            f"{source} is a LoRA-XS checkpoint of the published code: take it over first with "
            f"`modicum import {source} --model MODEL --output FILE`"
        )
    tensors = {short_name(key, config): value for key, value in read.items()}
    full = _full_modules(tensors, getattr(config, "modules_to_save", None))
    numbers = {name: value for name, value in tensors.items() if name not in full}
    if dtype == "auto":
        dtypes = {value.dtype for value in numbers.values()}
        narrow = {torch.bfloat16: "bfloat16", torch.float16: "float16"}
        dtype = narrow.get(dtypes.pop(), "float32") if len(dtypes) == 1 else "float32"
    options = config_options(config)
    # PEFT's note on the class of the base model, in files alone
    options.pop("auto_mapping", None)
    return build(
        method_name(config),
        {name: value.float().numpy() for name, value in numbers.items()},
        dtype,
        sections=tuple(section_of(name, tensors[name]) for name in sorted(full)),
        config=options,
        task_type=getattr(config.task_type, "value", config.task_type),
        base_fingerprint=getattr(config, "base_fingerprint", None),
        basis_fingerprint=getattr(config, "basis_fingerprint", None),
    )


def _full_modules(tensors: Mapping[str, Tensor], saved: Any) -> set[str]:
    return {name for name in tensors for module in saved or () if f".{module}." in f".{name}"}


def folder_of_record(record: Record, folder: str | os.PathLike, *, overwrite: bool = False) -> Path:
    """The PEFT folder that was written; `PeftModel.from_pretrained` reads it, for our methods after `import modicum`.

    Raises:
        ConfigError: the folder exists and `overwrite` is False, or the method or an option is unknown here.
    """
    target = Path(folder)
    if target.exists() and (not overwrite or not (target / CONFIG_FILE).is_file()):
        way = "choose another name" if overwrite else "choose another name, or overwrite it"
        raise ConfigError(f"{target} exists already; {way}")
    config = config_from(record)
    config.inference_mode = True
    full = {section.name for section in record.sections}
    tensors = {
        PREFIX + (name if name in full else _inner(name, config)): value.contiguous()
        for name, value in state_from(record).items()
    }

    def fill(aside: Path) -> None:
        config.save_pretrained(str(aside))
        save_file(tensors, aside / WEIGHT_FILES[0], metadata={"format": "pt"})

    write_folder(target, fill)
    return target


def _inner(name: str, config: PeftConfig) -> str:
    """The name in PEFT's files of a tensor that `short_name` has shortened, without the prefix of the model."""
    if not isinstance(config, AdapterConfig):
        return name
    layer, _, part = name.rpartition(".")
    return f"{layer}.{registry.prefix(registry.method_of(config))}adapters.{part}"
