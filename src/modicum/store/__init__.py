"""Adapters on disk: the compact record, PEFT folders, export and import, and the store of many versions.

`Store` and what belongs to it load on first use, so that the rest of the package stays light.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from modicum.store.archive import export_archive, import_archive
    from modicum.store.bases import basis_of, basis_state, missing_bases, put_basis
    from modicum.store.bulk import put_folders
    from modicum.store.catalogue.listing import Filter
    from modicum.store.catalogue.publish import Put
    from modicum.store.difference import diff
    from modicum.store.sources import read_source
    from modicum.store.store import Store
    from modicum.store.sync import pull, push

#: public name -> module that defines it
_PUBLIC = {
    "Filter": "modicum.store.catalogue.listing",
    "Put": "modicum.store.catalogue.publish",
    "Store": "modicum.store.store",
    "basis_of": "modicum.store.bases",
    "basis_state": "modicum.store.bases",
    "diff": "modicum.store.difference",
    "export_archive": "modicum.store.archive",
    "import_archive": "modicum.store.archive",
    "missing_bases": "modicum.store.bases",
    "pull": "modicum.store.sync",
    "push": "modicum.store.sync",
    "put_basis": "modicum.store.bases",
    "put_folders": "modicum.store.bulk",
    "read_source": "modicum.store.sources",
}

__all__ = [
    "Filter",
    "Put",
    "Store",
    "basis_of",
    "basis_state",
    "diff",
    "export_archive",
    "import_archive",
    "missing_bases",
    "pull",
    "push",
    "put_basis",
    "put_folders",
    "read_source",
]


def __getattr__(name: str) -> Any:
    """The public object `name`, imported on first use."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'modicum.store' has no attribute {name!r}")
    value = getattr(importlib.import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value
