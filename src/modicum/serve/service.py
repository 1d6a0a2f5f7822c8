"""What a route of the server needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from modicum.serve.engine.interface import Engine
    from modicum.serve.experiments import Experiments
    from modicum.serve.keys import Keys
    from modicum.serve.limits import Limits
    from modicum.serve.metrics import Metrics
    from modicum.serve.names import Names
    from modicum.serve.settings import Settings
    from modicum.serve.source import Source
    from modicum.store import Store


@dataclass(frozen=True)
class Service:
    """Everything below HTTP, put together once by `server.py`."""

    settings: Settings
    engine: Engine
    #: the base model's tokenizer, with its chat template if it has one
    tokenizer: Any
    names: Names
    keys: Keys
    limits: Limits
    metrics: Metrics
    experiments: Experiments
    #: None where only the base model is served
    store: Store | None = None
    #: what the engine loads from
    source: Source | None = None
