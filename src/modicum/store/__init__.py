"""Adapters on disk: the compact record, PEFT folders, export and import, and the store of many versions.

`Store` and what belongs to it load on first use, so that the rest of the package stays light.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from modicum.store.catalogue.listing import Filter
    from modicum.store.catalogue.publish import Put
    from modicum.store.store import Store

#: public name -> module that defines it
_PUBLIC = {
    "Filter": "modicum.store.catalogue.listing",
    "Put": "modicum.store.catalogue.publish",
    "Store": "modicum.store.store",
}

__all__ = ["Filter", "Put", "Store"]


def __getattr__(name: str) -> Any:
    """The public object `name`, imported on first use."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'modicum.store' has no attribute {name!r}")
    value = getattr(importlib.import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value
