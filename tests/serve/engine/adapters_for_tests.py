"""Small adapters as records, and what they do offline."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import peft
import torch
from transformers.pytorch_utils import Conv1D

from modicum.adapters import registry
from modicum.store.files import install, to_record
from modicum.store.state import config_from, state_from

if TYPE_CHECKING:
    from modicum.store.record import Record


def record_of(base: torch.nn.Module, method: str, *, dtype: str = "float32", **options: Any) -> Record:
    """A random adapter on a copy of `base`, `peft:LORA` or a method of ours, as saved."""
    options = {"target_modules": "all-linear", **options}
    torch.manual_seed(options.get("seed", 0))
    if method == "peft:LORA":
        options.pop("seed", None)
        options["fan_in_fan_out"] = any(isinstance(module, Conv1D) for module in base.modules())
        config: Any = peft.LoraConfig(**{"init_lora_weights": False, **options})
    else:
        config = registry.config_class(method)(**{"init_weights": False, **options})
    model = peft.get_peft_model(copy.deepcopy(base), config)
    return to_record(model, dtype=dtype)[0]


def offline(base: torch.nn.Module, record: Record | None) -> torch.nn.Module:
    """A copy of `base` with the adapter of a record on it, loaded as from a file."""
    model = copy.deepcopy(base)
    if record is None:
        return model.eval()
    config = config_from(record)
    config.inference_mode = True
    return install(model, config, state_from(record)).eval()
