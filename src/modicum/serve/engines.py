"""The engine that settings ask for."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from modicum.serve.engine.interface import Engine, Observer
    from modicum.serve.settings import EngineSettings
    from modicum.serve.source import Source
    from modicum.store import Store


def open_engine(
    settings: EngineSettings, store: Store | Source | None, observer: Observer | None = None
) -> tuple[Engine, Any]:
    """The engine, not started, and the model's tokenizer.

    Raises:
        ConfigError: no such model or tokenizer, or settings that do not fit it.
        MissingExtraError: it needs vLLM or Ray, which is not installed.
    """
    if settings.replicas == 1 and not _apart(settings):
        return open_local(settings, store, observer)
    from modicum.models.loading import load_tokenizer

    tokenizer = load_tokenizer(settings.model)
    if settings.replicas == 1:
        from modicum.serve.process.engine import ProcessEngine

        return ProcessEngine(settings, store, observer=observer), tokenizer
    from modicum.serve.ray.engine import RayEngine

    return RayEngine(settings, store, observer=observer), tokenizer


def _apart(settings: EngineSettings) -> bool:
    """Whether the engine has a process of its own."""
    if settings.kind == "vllm":
        # it has one in any case
        return False
    if settings.own_process is not None:
        return settings.own_process
    if sys.platform == "win32" or settings.device not in {"auto", "cpu"}:
        return False
    import torch

    # what a GPU costs is known in the process that uses it
    return settings.device == "cpu" or not torch.cuda.is_available()


def open_local(
    settings: EngineSettings, store: Store | Source | None, observer: Observer | None = None
) -> tuple[Engine, Any]:
    """The same in this process, without replicas."""
    if settings.kind == "vllm":
        from modicum.serve.vllm.engine import open_engine as open_vllm

        return open_vllm(settings, store, observer)
    from modicum.serve.engine.embedded import open_engine as open_embedded

    return open_embedded(settings, store, observer)
