"""Fine-tune, compress, personalize and serve language models with extremely few parameters.

Public names load on first use, so that `import modicum` stays light (no torch). It also makes PEFT know our
methods, whichever of the two is imported first; from then on `get_peft_model`, `PeftModel.from_pretrained`
and the Auto classes take them like PEFT's own.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from modicum import _hooks
from modicum._version import __version__
from modicum.errors import ModicumError

if TYPE_CHECKING:
    from modicum.adapters.registry import get as get_method
    from modicum.adapters.registry import names as method_names
    from modicum.methods.lora_xs import LoraXSConfig
    from modicum.store.files import load_adapter, save_adapter
    from modicum.store.lora_export import export_lora
    from modicum.store.published import import_published

#: public name -> (module that defines it, its name there)
_PUBLIC = {
    "AffineConfig": ("modicum.quant.huggingface", "AffineConfig"),
    "LoraXSConfig": ("modicum.methods.lora_xs", "LoraXSConfig"),
    "export_lora": ("modicum.store.lora_export", "export_lora"),
    "get_method": ("modicum.adapters.registry", "get"),
    "import_published": ("modicum.store.published", "import_published"),
    "load_adapter": ("modicum.store.files", "load_adapter"),
    "method_names": ("modicum.adapters.registry", "names"),
    "save_adapter": ("modicum.store.files", "save_adapter"),
}

__all__ = [
    "AffineConfig",
    "LoraXSConfig",
    "ModicumError",
    "__version__",
    "export_lora",
    "get_method",
    "import_published",
    "load_adapter",
    "method_names",
    "save_adapter",
]


def __getattr__(name: str) -> Any:
    """The public object `name`, imported on first use."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'modicum' has no attribute {name!r}")
    module, attribute = _PUBLIC[name]
    value = getattr(importlib.import_module(module), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """All public names, loaded or not."""
    return sorted(__all__)


_hooks.install()
