"""Names in vLLM's own server: `ada@3` is that version of the store, for a bounded number of names at a time.

vLLM asks once for a name it does not know and keeps the answer for ever, so only what never changes is answered:
`name@number`. Aliases and bare names are resolved before, by `modicum serve` or by whoever routes the requests.
"""

# vLLM is in another environment than the one that is checked
# pyright: reportMissingImports=false
from __future__ import annotations

import asyncio
import os
import re
from collections import OrderedDict
from typing import TYPE_CHECKING, Any, TypeVar

from modicum.errors import NotStoredError

if TYPE_CHECKING:
    from collections.abc import Callable

    from modicum.store.record import Record

T = TypeVar("T")
#: how many names the server knows at a time, where nothing else is said
NAMES = 4096
_NAMES = "MODICUM_VLLM_NAMES"
_VERSION = re.compile(r".+@[1-9][0-9]*")


class Bounded(OrderedDict[str, T]):
    """A dictionary of the entries used last, at most `most` of them."""

    def __init__(self, most: int, make: Callable[[], T] | None = None) -> None:
        """`make`: what a missing entry becomes, if it may be missing."""
        super().__init__()
        self._most, self._make = most, make

    def __getitem__(self, key: str) -> T:
        found = super().__getitem__(key)
        self.move_to_end(key)
        return found

    def __missing__(self, key: str) -> T:
        if self._make is None:
            raise KeyError(key)
        self[key] = made = self._make()
        return made

    def __setitem__(self, key: str, value: T) -> None:
        super().__setitem__(key, value)
        self.move_to_end(key)
        while len(self) > self._most:
            self.popitem(last=False)


def register_resolver(address: str) -> None:
    """Lets vLLM's own server ask the store at `address`."""
    from vllm.lora.request import LoRARequest
    from vllm.lora.resolver import LoRAResolver, LoRAResolverRegistry

    from modicum.serve.vllm.plugin import asked
    from modicum.store import Store

    class Numbered(LoRARequest):
        """A request that keeps its number: vLLM would count names, and give a forgotten one another number."""

        def __setattr__(self, name: str, value: object) -> None:
            if name != "lora_int_id":
                super().__setattr__(name, value)

    class StoreResolver(LoRAResolver):
        """Versions of a store, read and checked before vLLM hears of them."""

        def __init__(self) -> None:
            self._store: Store | None = None

        async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
            """The request for an immutable version; None for all other names."""
            del base_model_name
            if not _VERSION.fullmatch(lora_name):
                return None
            try:
                record = await asyncio.to_thread(self._read, lora_name)
            except NotStoredError:
                return None
            wanted = asked(lora_name, record)
            return Numbered(lora_name, wanted.lora_int_id, wanted.lora_path)

        def _read(self, version: str) -> Record:
            if self._store is None:
                self._store = Store(address)
            # all of it, so that the engine finds it in memory, and not between two of its steps on a disk
            return self._store.get(version)

    LoRAResolverRegistry.register_resolver("modicum", StoreResolver())


def bound_names() -> None:
    """Lets vLLM's own server forget names that have not been used for long."""
    from vllm.entrypoints.openai.models.serving import OpenAIServingModels

    start = OpenAIServingModels.__init__

    def bounded(self: Any, *args: Any, **options: Any) -> None:
        start(self, *args, **options)
        most = int(os.environ.get(_NAMES) or NAMES)
        for attribute in ("lora_requests", "lora_resolver_lock"):
            if not isinstance(vars(self)[attribute], dict):
                raise TypeError(f"vLLM keeps {attribute} in another way than modicum expects")
        self.lora_requests = Bounded(most)
        # a lock that waits for the engine is used again long before so many others
        self.lora_resolver_lock = Bounded(2 * most, asyncio.Lock)

    OpenAIServingModels.__init__ = bounded
