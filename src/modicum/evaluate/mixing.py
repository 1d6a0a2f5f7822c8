"""Several adapters on one base: which of them may share batches, putting them on and off, the order of their rows."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft import LoraConfig, PeftConfig
from peft.utils import ModulesToSaveWrapper
from torch import nn

from modicum.adapters import registry
from modicum.adapters.config import AdapterConfig
from modicum.errors import ConfigError, listing
from modicum.models.loading import adapter_folder, load_adapted, quiet_transformers
from modicum.store.files import load_adapter, read_adapter

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence

#: adapters that are on the base at the same time unless told otherwise
AT_ONCE = 16
#: options of PEFT's LoRA with which its mixed batches compute the same as one adapter alone
_PLAIN = {
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
    "inference_mode", "r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out",
    "use_rslora", "modules_to_save", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern",
}  # fmt: skip
#: names of heads that PEFT saves with every classifier, asked for or not
_HEADS = ("classifier", "score")


def adapted(base: Any, adapter: str, name: str = "default") -> Any:
    """`base` with the adapter in a compact record or a PEFT folder, called `name`; a PEFT model gets one more."""
    if Path(adapter).is_file():
        return load_adapter(base, adapter, adapter_name=name)
    return load_adapted(base, adapter, name=name)


def groups(adapters: Sequence[str], base: Any, at_once: int) -> list[list[int]]:
    """Places of the adapters that share batches on `base`, at most `at_once` together; the others are alone.

    Adapters of one method of ours share batches, and plain LoRAs of PEFT on a base that is not quantized, when
    they also train the same whole modules (heads), and these are single layers: others PEFT cannot mix. Narrower
    sub-networks are alone.
    """
    found: dict[Hashable, list[list[int]]] = {}
    for place, adapter in enumerate(adapters):
        parts = found.setdefault(_kind(_config(adapter), base) or place, [[]])
        if len(parts[-1]) == at_once:
            parts.append([])
        parts[-1].append(place)
    return sorted(part for parts in found.values() for part in parts)


def put_on(base: Any, adapters: Sequence[str]) -> tuple[Any, tuple[str, ...]]:
    """`base` with `adapters` on it, in place, and their names there where they share batches (none for one)."""
    if len(adapters) == 1:
        with quiet_transformers():
            return adapted(base, adapters[0]).eval(), ()
    names = tuple(f"a{place}" for place in range(len(adapters)))
    model = base
    with quiet_transformers():
        for name, adapter in zip(names, adapters, strict=True):
            model = adapted(model, adapter, name)
    return model.eval(), names


def taken_off(model: Any) -> Any:
    """The base of `model` without its adapters, in place, and with its own heads.

    PEFT leaves the modules that an adapter trained as a whole in the base.
    """
    inner = model.get_base_model()
    own = {n: m.original_module for n, m in inner.named_modules() if isinstance(m, ModulesToSaveWrapper)}
    base = inner if model.active_peft_config.is_prompt_learning else model.unload()
    for name, module in own.items():
        base.set_submodule(name, module)
    return base


def leaves_base(adapter: str) -> bool:
    """Whether the base is known to be the same after the adapter was on it; some of PEFT's change its weights."""
    config = _config(adapter)
    return isinstance(config, AdapterConfig) or _is_plain(config)


def check_heads(base: Any, model: str, adapters: Sequence[str]) -> None:
    """Refuse a classifier whose head (or pooler) nobody has trained: its answers would be random.

    Raises:
        ConfigError: the checkpoint lacks tensors of the head, and so do the adapters; all of them.
    """
    drawn = base.drawn_tensors
    if not drawn:
        return
    faults = [] if adapters else [f"{listing(drawn, 3)} in its checkpoint"]
    for adapter in adapters:
        names = tuple(read_adapter(_place(adapter))[1])
        lacking = [key for key in drawn if not any(f".{name}".endswith(f".{key}") for name in names)]
        if lacking:
            faults.append(f"{listing(lacking, 3)} in its checkpoint and in {adapter}")
    if faults:
        raise ConfigError(
            f"the head of {model} has not been trained, and its answers would be random; what is missing: "
            f"{'; '.join(faults)}. A head is trained and saved with an adapter (modicum tune, task: seq_cls or "
            "regression), or name a model that has one"
        )


def routed(model: Any, names: Sequence[str]) -> dict[str, list[str]]:
    """What `model` must be told with a batch whose rows belong to the adapters `names`: nothing where there are none.

    An adapter that all rows share becomes the active one, in place, which is faster than to name it for each.
    """
    if len(set(names)) > 1:
        return {"adapter_names": list(names)}
    if names and model.active_adapters != [names[0]]:
        model.set_adapter(names[0])
    return {}


def in_order(lengths: Sequence[int], owners: Sequence[Hashable] | None = None) -> list[int]:
    """Indices of rows in the order in which batches are cut: the rows of one adapter together, the longest first.

    Lengths fall for the first owner, rise for the second, fall for the third: batches are full, hold as few
    adapters as can be, and rows of similar length, also where one adapter's rows end and the next one's begin.
    """
    rows: dict[Hashable, list[int]] = {}
    for index in range(len(lengths)):
        rows.setdefault(owners[index] if owners else None, []).append(index)
    order = []
    for turn, mine in enumerate(rows.values()):
        order += sorted(mine, key=lambda index: lengths[index], reverse=turn % 2 == 0)
    return order


def _kind(config: PeftConfig, base: Any) -> Hashable | None:
    """What adapters that share batches have in common; None for one that shares with none."""
    ours = isinstance(config, AdapterConfig)
    if ours and getattr(config, "sub_network", None) is not None:
        return None
    if not ours and (not _is_plain(config) or getattr(base, "is_quantized", False)):
        return None
    saved = set(getattr(config, "modules_to_save", None) or ())
    saved |= set(_HEADS) if config.task_type == "SEQ_CLS" else set()
    whole = [module for name, module in base.named_modules() if saved and name.endswith(tuple(saved))]
    if not all(isinstance(module, (nn.Linear, nn.Embedding)) for module in whole):
        return None
    return str(config.peft_type), str(config.task_type), tuple(sorted(saved))


def _is_plain(config: PeftConfig) -> bool:
    """Whether this is LoRA as in its paper: nothing set that PEFT's mixed batches leave out or that alters the base."""
    if type(config) is not LoraConfig or config.init_lora_weights not in (True, False, "gaussian"):
        return False
    usual = LoraConfig()
    names = {field.name for field in dataclasses.fields(config)} - _PLAIN - {"init_lora_weights"}
    return all(getattr(config, name) == getattr(usual, name) for name in names)


def _config(adapter: str) -> PeftConfig:
    if Path(adapter).is_file():
        return read_adapter(adapter)[0]
    registry.register()
    return PeftConfig.from_pretrained(str(adapter_folder(adapter)))


def _place(adapter: str) -> Path:
    return Path(adapter) if Path(adapter).is_file() else adapter_folder(adapter)
