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
    from modicum.compress.export import export_model
    from modicum.compress.extract import extract as extract_sub_network
    from modicum.compress.merge import merge_to_folder
    from modicum.compress.quantize import quantize_model
    from modicum.compress.reorder import reorder_model
    from modicum.compress.sparsify import sparsify_model
    from modicum.methods.elastic_lora import ElasticLoraConfig
    from modicum.methods.lora_xs import LoraXSConfig
    from modicum.methods.q_bara import QBaraConfig
    from modicum.methods.qa_blora import QABloraConfig
    from modicum.methods.qa_hira import QAHiraConfig
    from modicum.methods.qa_lora import QALoraConfig
    from modicum.methods.qa_sparse_peft import QASparsePeftConfig
    from modicum.methods.sparse_peft import SparsePeftConfig
    from modicum.quant.huggingface import AffineConfig
    from modicum.store.files import load_adapter, save_adapter
    from modicum.store.lora_export import export_lora
    from modicum.store.published import import_published

#: public name -> (module that defines it, its name there)
_PUBLIC = {
    "AffineConfig": ("modicum.quant.huggingface", "AffineConfig"),
    "ElasticLoraConfig": ("modicum.methods.elastic_lora", "ElasticLoraConfig"),
    "LoraXSConfig": ("modicum.methods.lora_xs", "LoraXSConfig"),
    "QABloraConfig": ("modicum.methods.qa_blora", "QABloraConfig"),
    "QAHiraConfig": ("modicum.methods.qa_hira", "QAHiraConfig"),
    "QALoraConfig": ("modicum.methods.qa_lora", "QALoraConfig"),
    "QASparsePeftConfig": ("modicum.methods.qa_sparse_peft", "QASparsePeftConfig"),
    "QBaraConfig": ("modicum.methods.q_bara", "QBaraConfig"),
    "SparsePeftConfig": ("modicum.methods.sparse_peft", "SparsePeftConfig"),
    "export_lora": ("modicum.store.lora_export", "export_lora"),
    "export_model": ("modicum.compress.export", "export_model"),
    "extract_sub_network": ("modicum.compress.extract", "extract"),
    "get_method": ("modicum.adapters.registry", "get"),
    "import_published": ("modicum.store.published", "import_published"),
    "load_adapter": ("modicum.store.files", "load_adapter"),
    "merge_to_folder": ("modicum.compress.merge", "merge_to_folder"),
    "method_names": ("modicum.adapters.registry", "names"),
    "quantize_model": ("modicum.compress.quantize", "quantize_model"),
    "reorder_model": ("modicum.compress.reorder", "reorder_model"),
    "save_adapter": ("modicum.store.files", "save_adapter"),
    "sparsify_model": ("modicum.compress.sparsify", "sparsify_model"),
}

__all__ = [
    "AffineConfig",
    "ElasticLoraConfig",
    "LoraXSConfig",
    "ModicumError",
    "QABloraConfig",
    "QAHiraConfig",
    "QALoraConfig",
    "QASparsePeftConfig",
    "QBaraConfig",
    "SparsePeftConfig",
    "__version__",
    "export_lora",
    "export_model",
    "extract_sub_network",
    "get_method",
    "import_published",
    "load_adapter",
    "merge_to_folder",
    "method_names",
    "quantize_model",
    "reorder_model",
    "save_adapter",
    "sparsify_model",
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
