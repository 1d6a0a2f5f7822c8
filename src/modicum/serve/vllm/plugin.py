"""The entry point of vLLM's plug-ins: every process of vLLM calls `register` when it starts.

Nothing happens without `MODICUM_VLLM_STORE`, the folder or address of an adapter store. With it, the LoRA layers learn
cores (`layers`), and a request whose path begins with `modicum:ada@3` gets that version of the store (`library`).
"""

# vLLM is in another environment than the one that is checked
# pyright: reportMissingImports=false
from __future__ import annotations

import functools
import hashlib
import json
import os
from typing import TYPE_CHECKING, Any

import torch

from modicum.errors import ConfigError
from modicum.serve.vllm.layers import Cores, Step, add_plain
from modicum.serve.vllm.library import Library
from modicum.serve.vllm.seams import check_seams

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from modicum.store.record import Record

STORE = "MODICUM_VLLM_STORE"
#: what the path of a request to vLLM begins with if the store has the adapter
SCHEME = "modicum:"
_done = False


def register() -> None:
    """Puts cores and stores into vLLM, if a store is named; calling it again changes nothing.

    Raises:
        VllmChangedError: the installed vLLM is built otherwise.
    """
    global _done  # noqa: PLW0603 - a process has one vLLM
    if _done or not os.environ.get(STORE):
        return
    check_seams()
    from modicum.serve.vllm.resolver import bound_names, register_resolver

    _patch_layers()
    _patch_batches()
    _patch_manager()
    bound_names()
    register_resolver(os.environ[STORE])
    _done = True


def asked(version: str, record: Record) -> Any:
    """The request to vLLM for `version`, with these numbers.

    Its path ends with their digest: if a name is purged and begins anew, what vLLM keeps of the old `ada@1` (keys and
    values of prompts) is found under another path. The path also gives the number.
    """
    from vllm.lora.request import LoRARequest

    path = f"{SCHEME}{version}#{fingerprint(record)}"
    # vLLM takes requests of one name for one adapter
    return LoRARequest(path, identity(path), path)


def fingerprint(record: Record) -> str:
    """32 hexadecimal digits of what a record says and holds."""
    about = json.dumps([record.method, record.dtype, record.config, record.layout.names], sort_keys=True)
    return hashlib.blake2b(about.encode() + record.values.tobytes(), digest_size=16).hexdigest()


def identity(path: str) -> int:
    """The number of a path in vLLM: the same in all processes and at all times, and no small one.

    62 bits of BLAKE2b; that two paths never meet under one number is checked where they are loaded.
    """
    digest = hashlib.blake2b(path.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 2 | 1 << 61


def is_core(lora_b: Tensor | list[Tensor | None] | None) -> bool:
    """Whether what vLLM passes on as B says that A is a core: a B without numbers."""
    parts = lora_b if isinstance(lora_b, list) else [lora_b]
    return all(part is None or part.numel() == 0 for part in parts)


def _patch_layers() -> None:
    from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
    from vllm.lora.layers.column_parallel_linear import (
        MergedColumnParallelLinearVariableSliceWithLoRA,
        MergedColumnParallelLinearWithLoRA,
    )

    for cls in (
        BaseLinearLayerWithLoRA,
        MergedColumnParallelLinearWithLoRA,
        MergedColumnParallelLinearVariableSliceWithLoRA,
    ):
        cls.set_lora = _set_lora(cls.set_lora)
    stock_reset = BaseLinearLayerWithLoRA.reset_lora
    stock_apply = BaseLinearLayerWithLoRA._apply_lora_to_output  # noqa: SLF001

    def reset_lora(self: Any, index: int) -> None:
        if cores := vars(self).get("modicum_cores"):
            cores.clear(index)
        stock_reset(self, index)

    def apply_lora(self: Any, x: Tensor, output: Tensor) -> Tensor:
        step = vars(self.punica_wrapper).get("modicum_step")
        if step is None:
            return stock_apply(self, x, output)
        flat, into = x.flatten(0, -2), output.flatten(0, -2)
        if step.cores and (cores := vars(self).get("modicum_cores")):
            cores.add(flat, into, step)
        if step.plain:
            if x.device.type != "cpu":
                return stock_apply(self, x, output)
            add_plain(self, flat, into, step)
        return output

    BaseLinearLayerWithLoRA.reset_lora = reset_lora
    BaseLinearLayerWithLoRA._apply_lora_to_output = apply_lora  # noqa: SLF001


def _set_lora(stock: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(stock)
    def set_lora(self: Any, index: int, lora_a: Any, lora_b: Any) -> None:
        held = vars(self.punica_wrapper).setdefault("modicum_slots", set())
        if not is_core(lora_b):
            held.discard(index)
            stock(self, index, lora_a, lora_b)
            return
        held.add(index)
        cores = vars(self)["modicum_cores"]
        cores.set(index, lora_a if isinstance(lora_a, list) else [lora_a])

    return set_lora


def _patch_batches() -> None:
    from vllm.lora.punica_wrapper.punica_base import PunicaWrapperBase

    stock = PunicaWrapperBase._update_base_metadata  # noqa: SLF001

    def update(self: Any, mapping: Any, lora_index_to_id: list, max_loras: int, vocab_size: int) -> None:
        stock(self, mapping, lora_index_to_id, max_loras, vocab_size)
        slots = self.token_lora_indices
        held = vars(self).get("modicum_slots", set())
        self.modicum_step = Step.of(slots, held)
        if self.modicum_step.cores:
            # what vLLM itself computes for plain LoRA leaves these tokens alone
            held_slots = torch.tensor(sorted(held), dtype=slots.dtype, device=slots.device)
            slots.masked_fill_(torch.isin(slots, held_slots), -1)

    PunicaWrapperBase._update_base_metadata = update  # noqa: SLF001


def _patch_manager() -> None:
    from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager, WorkerLoRAManager

    create, load = LRUCacheWorkerLoRAManager.create_lora_manager, WorkerLoRAManager._load_adapter  # noqa: SLF001
    add = LRUCacheWorkerLoRAManager.add_adapter

    def create_lora_manager(self: Any, model: Any, vllm_config: Any) -> Any:
        found = create(self, model, vllm_config)
        self.modicum_library = _attach(self._adapter_manager, vllm_config)
        return found

    def load_adapter(self: Any, lora_request: Any) -> Any:
        if not lora_request.lora_path.startswith(SCHEME):
            return load(self, lora_request)
        return _loaded(self, lora_request)

    def add_adapter(self: Any, lora_request: Any) -> bool:
        held = self._adapter_manager._registered_adapters.cache.get(lora_request.lora_int_id)  # noqa: SLF001
        path = getattr(held, "modicum_path", None)
        if path is not None and path != lora_request.lora_path:
            raise RuntimeError(f"{path} and {lora_request.lora_path} have one number in vLLM; put one anew")
        return add(self, lora_request)

    LRUCacheWorkerLoRAManager.create_lora_manager = create_lora_manager
    LRUCacheWorkerLoRAManager.add_adapter = add_adapter
    WorkerLoRAManager._load_adapter = load_adapter  # noqa: SLF001


def _attach(manager: Any, vllm_config: Any) -> Library:
    """The library of a model of vLLM, whose layers have the directions of their slices from now on."""
    from modicum.store import Store

    config = manager.lora_config
    _check_configuration(vllm_config)
    store = Store(os.environ[STORE])
    library = Library(vllm_config.model_config.model, store.get, config.max_lora_rank)
    known = set(library.layers)
    for name, module in manager.modules.items():
        parts = manager.packed_modules.get(name, [name])
        slices = getattr(module, "n_slices", 0)
        if slices != len(parts) or not known.issuperset(parts):
            continue
        found = [library.directions(part) for part in parts]
        a, u = [inward for inward, _ in found], [outward for _, outward in found]
        if module.tp_size > 1:
            # as those of plain LoRA: A is (k, in), and U stands where B (out, k) does
            a = module.slice_lora_a(a) if slices > 1 else [module.slice_lora_a(a[0])]
            u = module.slice_lora_b(u) if slices > 1 else [module.slice_lora_b(u[0])]
        like = torch.empty(0, dtype=config.lora_dtype, device=module.device)
        vars(module)["modicum_cores"] = Cores(a, u, manager.lora_slots, like)
    return library


def _check_configuration(vllm_config: Any) -> None:
    from vllm.config import CompilationMode

    faults = []
    if vllm_config.lora_config.fully_sharded_loras:
        faults.append("fully_sharded_loras computes updates where cores have no seam: leave it off")
    if vllm_config.model_config.quantization is not None:
        faults.append(
            f"the base model is quantized ({vllm_config.model_config.quantization}) and adapters belong to the weights "
            "they were trained on: serve the dense model, or the embedded engine"
        )
    compiled = vllm_config.compilation_config.mode not in (None, CompilationMode.NONE)
    if compiled and not vllm_config.model_config.enforce_eager:
        faults.append("which adapters a batch has decides what is computed: start with --enforce-eager")
    if faults:
        raise ConfigError("; ".join(faults))


def _loaded(worker: Any, request: Any) -> Any:
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.lora_weights import LoRALayerWeights

    version, _, wanted = request.lora_path.removeprefix(SCHEME).partition("#")
    if (
        request.lora_name not in (version, request.lora_path)
        or identity(request.lora_path) != request.lora_int_id
    ):
        raise ConfigError(f"{request.lora_name!r} was asked for by the path or number of another adapter")
    record = worker.modicum_library.read(version)
    if fingerprint(record) != wanted:
        raise ConfigError(
            f"{version} is not what it was when it was asked for: its name was purged and began anew"
        )
    manager, dtype = worker._adapter_manager, worker.lora_config.lora_dtype  # noqa: SLF001
    updates = worker.modicum_library.updates(version, record)
    places = {part: name for name, parts in manager.packed_modules.items() for part in parts}
    weights = {}
    for name, update in updates.items():
        module = manager.modules.get(places.get(name, name))
        if module is None or (update.b is None and "modicum_cores" not in vars(module)):
            raise ConfigError(f"{version} adapts {name}, a layer that vLLM does not let adapt")
        b = update.a.new_empty(0) if update.b is None else update.b
        rank = update.a.shape[0]
        weights[name] = LoRALayerWeights(name, rank, rank, update.a.to(dtype), b.to(dtype), 1.0)
    model = LoRAModel(request.lora_int_id, max(w.rank for w in weights.values()), weights)
    model.modicum_path = request.lora_path
    return model
