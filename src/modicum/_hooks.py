"""Make PEFT know our methods and Transformers our checkpoints, in whatever order things are imported.

Neither finds plug-ins, and importing them here would bring torch into `import modicum`. So a finder on
`sys.meta_path` waits for the modules that keep their registries and fills these in once they have been
imported. It also watches our own lower floors: when one of them is what imports such a module, registering
has to wait until ours is complete.
"""

from __future__ import annotations

import functools
import importlib
import sys
import warnings
from importlib.abc import MetaPathFinder
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType

#: module with a registry -> (our module whose `register` fills it, what becomes known)
_REGISTRIES = {
    "peft": ("modicum.adapters.registry", "its methods to PEFT"),
    "transformers.quantizers.auto": ("modicum.quant.huggingface", "its checkpoints to Transformers"),
    "transformers.models.auto.configuration_auto": (
        "modicum.models.subnetwork",
        "its models to Transformers",
    ),
}
#: what `register` itself imports: none of it may be half-way through its own import at that moment
_OWN = ("modicum.adapters", "modicum.methods", "modicum.models", "modicum.quant", "modicum.ops")


def install() -> None:
    """Register with what is imported already, and with the rest as soon as it has been imported."""
    waiting = [name for name in _REGISTRIES if name not in sys.modules]
    for name in _REGISTRIES:
        if name not in waiting:
            _register(name)
    if waiting and not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder(waiting))


class _Finder(MetaPathFinder):
    """Finds nothing itself; wraps the loading of the modules it watches."""

    def __init__(self, waiting: list[str]) -> None:
        #: modules with a registry that nobody has imported yet
        self.waiting = waiting
        self._loading = 0

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """What the other finders find; for watched modules with a step after loading."""
        if fullname not in self.waiting and not fullname.startswith(_OWN):
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(fullname, path, target)
            if spec is not None:
                break
        else:
            return None
        loader: Any = spec.loader
        if loader is not None:
            # on the instance: `__loader__` stays what the other finder made, for inspect and resources
            loader.exec_module = functools.partial(self._load, loader, loader.exec_module)
        return spec

    def _load(self, loader: Any, execute: Callable[[ModuleType], None], module: ModuleType) -> None:
        del loader.exec_module
        self._loading += 1
        try:
            execute(module)
        finally:
            self._loading -= 1
        if self._loading:
            return
        # one at a time: registering imports our own floors, which comes back here
        while ready := [name for name in self.waiting if name in sys.modules]:
            self.waiting.remove(ready[0])
            _register(ready[0])
        if not self.waiting and self in sys.meta_path:
            sys.meta_path.remove(self)


def _register(name: str) -> None:
    module, what = _REGISTRIES[name]
    try:
        importlib.import_module(module).register()
    except Exception as error:  # noqa: BLE001, one faulty third-party method must not take PEFT away
        warnings.warn(f"modicum could not make {what} known: {error}", RuntimeWarning, stacklevel=2)
