"""Make PEFT know our methods, whichever of `modicum` and `peft` is imported first, without importing either.

PEFT finds no plug-ins, and importing it here would bring torch into `import modicum`. So a finder on
`sys.meta_path` waits for `peft` and registers our methods once it has been imported. It also watches our own
lower floors: when one of them is what imports PEFT, registering has to wait until that module is complete.
"""

from __future__ import annotations

import functools
import sys
import warnings
from importlib.abc import MetaPathFinder
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType

#: what `register` itself imports: none of it may be half-way through its own import at that moment
_OWN = ("modicum.adapters", "modicum.methods", "modicum.quant", "modicum.ops")


def install() -> None:
    """Register our methods with PEFT now if it is there, else as soon as it has been imported."""
    if "peft" in sys.modules:
        _register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    """Finds nothing itself; wraps the loading of the modules it watches."""

    def __init__(self) -> None:
        self._loading = 0

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """What the other finders find; for watched modules with a step after loading."""
        if fullname != "peft" and not fullname.startswith(_OWN):
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
        if not self._loading and "peft" in sys.modules and self in sys.meta_path:
            sys.meta_path.remove(self)
            _register()


def _register() -> None:
    from modicum.adapters.registry import register

    try:
        register()
    except Exception as error:  # noqa: BLE001, one faulty third-party method must not take PEFT away
        warnings.warn(
            f"modicum could not make its methods known to PEFT: {error}", RuntimeWarning, stacklevel=2
        )
