"""Fine-tune, compress, personalize and serve language models with extremely few parameters.

Public names load on first use, so that `import modicum` stays light (no torch).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from modicum._version import __version__

if TYPE_CHECKING:
    from modicum.methods.lora_xs import LoraXSConfig

#: public name -> module that defines it
_PUBLIC = {
    "LoraXSConfig": "modicum.methods.lora_xs",
}

__all__ = ["LoraXSConfig", "__version__"]


def __getattr__(name: str) -> Any:
    """The public object `name`, imported on first use."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'modicum' has no attribute {name!r}")
    value = getattr(importlib.import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """All public names, loaded or not."""
    return sorted(__all__)
