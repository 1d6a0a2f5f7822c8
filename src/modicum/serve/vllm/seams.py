"""What of vLLM the plug-in builds upon, and whether the installed vLLM still has it.

None of it is a public interface. Every seam is compared before anything is changed, so that another vLLM is refused
when it starts, with all that differs, and never serves wrong answers.
"""

# vLLM is in another environment than the one that is checked
# pyright: reportMissingImports=false
from __future__ import annotations

import importlib
import inspect
from typing import Any

from modicum.errors import ModicumError

#: the versions whose seams were read and tested
TESTED = ("0.32",)
#: module, class and method -> its parameters
SEAMS: dict[str, tuple[str, ...]] = {
    "vllm.lora.layers.base_linear:BaseLinearLayerWithLoRA.set_lora": ("self", "index", "lora_a", "lora_b"),
    "vllm.lora.layers.base_linear:BaseLinearLayerWithLoRA.reset_lora": ("self", "index"),
    "vllm.lora.layers.base_linear:BaseLinearLayerWithLoRA._apply_lora_to_output": ("self", "x", "output"),
    "vllm.lora.layers.column_parallel_linear:MergedColumnParallelLinearWithLoRA.set_lora": (
        "self", "index", "lora_a", "lora_b",
    ),
    "vllm.lora.layers.column_parallel_linear:MergedColumnParallelLinearVariableSliceWithLoRA.set_lora": (
        "self", "index", "lora_a", "lora_b",
    ),
    "vllm.lora.punica_wrapper.punica_base:PunicaWrapperBase._update_base_metadata": (
        "self", "mapping", "lora_index_to_id", "max_loras", "vocab_size",
    ),
    "vllm.lora.model_manager:LoRAModelManager.__init__": (
        "self", "model", "max_num_seqs", "max_num_batched_tokens", "vocab_size", "lora_config", "device",
        "vllm_config",
    ),
    "vllm.lora.model_manager:LoRAModelManager.activate_adapter": ("self", "lora_id"),
    "vllm.lora.worker_manager:WorkerLoRAManager._load_adapter": ("self", "lora_request"),
    "vllm.lora.worker_manager:LRUCacheWorkerLoRAManager.add_adapter": ("self", "lora_request"),
    "vllm.lora.worker_manager:LRUCacheWorkerLoRAManager.create_lora_manager": ("self", "model", "vllm_config"),
    "vllm.lora.lora_model:LoRAModel.__init__": (
        "self", "lora_model_id", "rank", "loras", "is_3d_lora_weight", "modules_to_save",
    ),
    "vllm.lora.lora_weights:LoRALayerWeights.__init__": (
        "self", "module_name", "rank", "lora_alpha", "lora_a", "lora_b", "scaling",
    ),
    "vllm.lora.resolver:LoRAResolver.resolve_lora": ("self", "base_model_name", "lora_name"),
    "vllm.entrypoints.openai.models.serving:OpenAIServingModels.resolve_lora": ("self", "lora_name"),
}  # fmt: skip


class VllmChangedError(ModicumError, RuntimeError):
    """The installed vLLM is not the one that the plug-in was written for."""


def check_seams(seams: dict[str, tuple[str, ...]] = SEAMS) -> None:
    """Returns if the installed vLLM has all seams.

    Raises:
        VllmChangedError: some are missing or take other arguments; all of them are named.
    """
    faults = [fault for place, wanted in seams.items() if (fault := _fault(place, wanted))]
    if faults:
        raise VllmChangedError(
            f"vLLM {_version()} is not built as the plug-in of modicum expects: {'; '.join(faults)}. Tested are "
            f"{', '.join(f'{version}.*' for version in TESTED)}: install one of these, or start without "
            "MODICUM_VLLM_STORE"
        )


def _version() -> str:
    try:
        from vllm import __version__
    except ImportError:
        return "(not installed)"
    return __version__


def _fault(place: str, wanted: tuple[str, ...]) -> str | None:
    module, _, path = place.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for part in path.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        return f"there is no {path} in {module} ({error})"
    names = tuple(inspect.signature(found).parameters)
    return None if names == wanted else f"{path} takes ({', '.join(names)}), not ({', '.join(wanted)})"
