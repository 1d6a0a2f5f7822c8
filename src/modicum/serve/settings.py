"""What a server is started with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True)
class EngineSettings:
    """The engine: model, memory, and how much it takes on at once."""

    model: str
    #: "auto": as the checkpoint says
    dtype: str = "auto"
    device: str = "auto"
    #: sequences in one step, and tokens of one step (long prompts are cut into pieces of it)
    max_batch: int = 64
    max_batch_tokens: int = 512
    #: the longest sequence; None: what the model allows
    max_length: int | None = None
    #: tokens whose keys and values are kept
    cache_tokens: int = 65536
    #: requests that wait for a place; more are refused
    max_queue: int = 1024
    #: adapters in memory, and the largest rank of them
    slots: int = 512
    max_rank: int = 64
    #: equal beginnings under the same version share keys and values
    prefix_caching: bool = True
    #: what generates: Transformers, or vLLM
    kind: Literal["embedded", "vllm"] = "embedded"
    #: the embedded engine in a process of its own, where HTTP takes nothing from it; None: for a model on a processor
    own_process: bool | None = None
    #: engines, on the machines of a Ray cluster if there are several
    replicas: int = 1


@dataclass(frozen=True)
class Settings:
    """A server."""

    engine: EngineSettings
    #: folder or address of the adapter store; None: the base model alone
    store: str | None = None
    #: folder for keys, usage, experiments and feedback; None: `state.default_state()`
    state: Path | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    #: names that the server answers to besides those of this machine, e.g. behind a proxy; nothing: see `Gate`
    hosts: tuple[str, ...] = ()
    #: seconds that one request may take, and that running ones get when the server stops
    request_timeout: float = 600.0
    grace: float = 30.0
    max_body_bytes: int = 1 << 20
    #: what the base model is called in `model`
    base_name: str = "base"
    #: "json": one object per line; "text"
    log_format: Literal["json", "text"] = "json"
    #: whether every HTTP request is written down, and what users asked
    log_access: bool = False
    log_prompts: bool = False
    #: YAML file with prices of tokens and of the machine
    prices: Path | None = None
    #: where traces go: "otlp"
    traces: str | None = None
