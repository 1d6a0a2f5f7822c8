"""From files to files: an adapter in another format.

The base model is loaded for the adapter: as the task it was trained for, with as many labels as its head has.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modicum.adapters.basis import BasisCache
from modicum.adapters.elastic import SubNetwork, Switch
from modicum.errors import ConfigError, did_you_mean
from modicum.models.loading import load_base
from modicum.store.files import CONFIG_FILE, WEIGHT_FILES, install, read_adapter, save_adapter
from modicum.store.lora_export import export_lora
from modicum.store.published import apply_published, read_published
from modicum.store.record import SUFFIX
from modicum.store.state import AdapterState

if TYPE_CHECKING:
    import os

    import torch
    from peft import PeftModel
    from torch import Tensor

    from modicum.models.loading import Dtype

FORMATS = ("lora", "modicum", "peft")
#: what the last layer of a classification head is called
_HEAD_ENDS = ("score.weight", "classifier.weight", "out_proj.weight", "classifier.dense.weight")
_TASKS = {"CAUSAL_LM": "causal_lm", "SEQ_CLS": "seq_cls"}


@dataclass(frozen=True)
class Exported:
    """What an export wrote, or would have."""

    format: str
    output: Path
    values: int
    bytes: int
    dry_run: bool


@dataclass(frozen=True)
class Imported:
    """What an import wrote, or would have."""

    written: Exported
    layers: int
    #: the ranks in use, smallest first
    ranks: tuple[int, ...]
    basis_fingerprint: str
    basis_file: Path | None


def load_for(
    model: str, adapter: str | os.PathLike, *, upcast: bool = False, dtype: Dtype = "auto"
) -> tuple[PeftModel, torch.dtype]:
    """The base model `model` carrying `adapter`, and the dtype its checkpoint is stored in.

    `upcast` loads the weights exactly as stored, then computes in float32; `dtype` as in `load_base`.

    Raises:
        ConfigError: no model, no adapter, or an adapter for a task that has no loader.
        CorruptAdapterError, BaseMismatchError, BasisMismatchError: the adapter does not fit.
    """
    config, state = read_adapter(adapter)
    base = _base_for(model, config.task_type, state, dtype)
    stored = base.dtype
    config.inference_mode = True
    # quantized models refuse to be cast; ours computes in the dtype of its inputs
    upcast = upcast and not getattr(base, "is_quantized", False)
    return install(base.float() if upcast else base, config, state), stored


def activate(model: PeftModel, file: str | os.PathLike) -> None:
    """Makes the sub-network in a JSON `file` the one that runs and is exported, in place.

    The file holds what `SubNetwork.as_dict` gives, or has it as `sub_network`, as adapter_config.json does.

    Raises:
        ConfigError: no such file, something else in it, or it does not fit the adapter.
    """
    path = Path(file)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"no sub-network can be read from {path}: {error}") from error
    values = values.get("sub_network", values) if isinstance(values, dict) else values
    # choices are names for ranks: alone they would change nothing, in silence
    if not isinstance(values, dict) or not values.keys() & {"ranks", "cuts", "widths"}:
        raise ConfigError(f'{path} names no ranks; write {{"ranks": {{"LAYER": RANK, …}}}}')
    Switch(model).activate(SubNetwork.read(values))


def export_adapter(
    model: PeftModel,
    output: str | os.PathLike,
    fmt: str,
    *,
    dtype: str = "bfloat16",
    overwrite: bool = False,
    dry_run: bool = False,
) -> Exported:
    """What was written: the adapter of `model` as `lora`, `modicum` or `peft`; a dry run writes elsewhere.

    Raises:
        ConfigError: unknown format, the output exists, or the method has no LoRA form.
    """
    target = Path(output)
    if fmt not in FORMATS:
        raise ConfigError(f"no format {fmt!r}{did_you_mean(fmt, FORMATS)}; known: {', '.join(FORMATS)}")
    if fmt == "modicum" and not target.suffix:
        target = target.with_suffix(SUFFIX)
    taken = target if fmt == "modicum" else target / CONFIG_FILE
    if taken.exists() and not overwrite:
        raise ConfigError(f"{target} exists already; choose another output or pass --overwrite")
    if dry_run:
        # the real thing in a place that vanishes: every fault shows, the bytes are exact
        with tempfile.TemporaryDirectory() as folder:
            values, size = _write(model, Path(folder) / target.name, fmt, dtype, overwrite=True)
    else:
        values, size = _write(model, target, fmt, dtype, overwrite=overwrite)
    return Exported(fmt, target, values, size, dry_run)


def import_adapter(
    checkpoint: str | os.PathLike,
    model: str,
    output: str | os.PathLike,
    fmt: str = "modicum",
    *,
    dtype: str = "float32",
    basis_file: str | os.PathLike | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
) -> Imported:
    """What was written: a published LoRA-XS checkpoint as one of our adapters, and its basis.

    Raises:
        ConfigError, CorruptAdapterError: see `import_published` and `export_adapter`.
    """
    found = read_published(checkpoint)
    basis, cache = found.basis(), BasisCache()
    known = cache.get(basis.fingerprint()) is not None
    try:
        adapted = apply_published(found, _base_for(model, found.config.get("task_type"), found.full))
        written = export_adapter(adapted, output, fmt, dtype=dtype, overwrite=overwrite, dry_run=dry_run)
    finally:
        if dry_run and not known:
            cache.add(basis).unlink()
    if basis_file is not None and not dry_run:
        basis.save(Path(basis_file))
    return Imported(
        written=written,
        layers=len(found.cores),
        ranks=tuple(sorted({core.shape[0] for core in found.cores.values()})),
        basis_fingerprint=basis.fingerprint(),
        basis_file=None if basis_file is None else Path(basis_file),
    )


def _write(model: PeftModel, target: Path, fmt: str, dtype: str, *, overwrite: bool) -> tuple[int, int]:
    if fmt == "modicum":
        saved = save_adapter(model, target, dtype=dtype, overwrite=overwrite)
        return saved.values, saved.bytes
    if fmt == "lora":
        exported = export_lora(model, target, overwrite=overwrite)
        return exported.values, exported.bytes
    model.save_pretrained(str(target), save_embedding_layers=False)
    size = sum((target / n).stat().st_size for n in (CONFIG_FILE, WEIGHT_FILES[0]))
    state = AdapterState.of(model, "default")
    return sum(state.tensors[name].numel() for name in state.adapter_names), size


def _base_for(model: str, task_type: Any, state: dict[str, Tensor], dtype: Dtype = "auto") -> Any:
    """The base model for an adapter with this task and these tensors."""
    kind = str(getattr(task_type, "value", task_type) or "CAUSAL_LM")
    if kind not in _TASKS:
        raise ConfigError(
            f"adapters for {kind} load in Python only; the command line knows {', '.join(_TASKS)}"
        )
    labels = _labels(state)
    return load_base(model, "regression" if labels == 1 else _TASKS[kind], dtype=dtype, num_labels=labels)


def _labels(state: dict[str, Tensor]) -> int | None:
    heads = [
        v.shape[0] for n, v in state.items() if n.endswith(_HEAD_ENDS) and "layer" not in n and v.dim() == 2
    ]
    return heads[-1] if heads else None
