"""Adapters as files: saving one compact record, loading records and PEFT folders.

Loading never trusts a file: everything is compared with the model first, all faults are listed at once, and
a model that refuses an adapter is left as it was. The numbers are then copied straight into the adapter,
without the dozen walks over all modules of `PeftModel.load_adapter`.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from peft import MODEL_TYPE_TO_PEFT_MODEL_MAPPING, PeftConfig, PeftModel

from modicum.errors import ConfigError, CorruptAdapterError
from modicum.store.record import SUFFIX, Record, build, decode, encode, peek
from modicum.store.state import (
    AdapterState,
    config_from,
    config_of,
    config_options,
    method_name,
    section_of,
    short_name,
    state_from,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from peft.tuners.tuners_utils import BaseTuner
    from torch import Tensor, nn

#: PEFT's own names, so that either side reads the other's folders
WEIGHT_FILES = ("adapter_model.safetensors", "adapter_model.bin")
CONFIG_FILE = "adapter_config.json"


@dataclass(frozen=True)
class SavedAdapter:
    """What was written, and what it took."""

    path: Path
    #: bytes of the file, and how they divide
    bytes: int
    value_bytes: int
    section_bytes: int
    container_bytes: int
    #: how many numbers the adapter has, full modules not counted
    values: int
    #: BLAKE2b-256 of the record
    digest: str
    #: ‖stored - trained‖ / ‖trained‖ over all values
    rounding_error: float


def save_adapter(
    model: PeftModel,
    path: str | os.PathLike,
    *,
    adapter_name: str = "default",
    dtype: str = "bfloat16",
    recipe_digest: str | None = None,
    metadata: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> SavedAdapter:
    """What was written: one adapter of `model` as a compact record; a `path` without suffix gets `.modicum`.

    Works for every method of modicum and of PEFT. Full modules (`modules_to_save`) keep their own type, the
    adapter's numbers are rounded to `dtype`.

    Raises:
        ConfigError: no adapter of that name, the file exists, `dtype` is unknown or too narrow.
        CorruptAdapterError: the adapter holds NaN or infinite numbers.
    """
    target = Path(path)
    target = target if target.suffix else target.with_suffix(SUFFIX)
    if target.exists() and not overwrite:
        raise _taken(target)
    record, rounding = to_record(
        model, adapter_name=adapter_name, dtype=dtype, recipe_digest=recipe_digest, metadata=metadata
    )
    data = encode(record)
    write_atomically(target, data, overwrite=overwrite)
    header = peek(data)
    return SavedAdapter(
        path=target,
        bytes=len(data),
        value_bytes=header.value_bytes,
        section_bytes=header.section_bytes,
        container_bytes=header.container_bytes,
        values=header.values,
        digest=header.digest,
        rounding_error=rounding,
    )


def to_record(
    model: PeftModel,
    *,
    adapter_name: str = "default",
    dtype: str = "bfloat16",
    recipe_digest: str | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> tuple[Record, float]:
    """One adapter of `model` as a record, and the relative rounding error of its values."""
    config = config_of(model, adapter_name)
    state = AdapterState.of(model, adapter_name)
    numbers = {name: state.tensors[name].detach().float().cpu().numpy() for name in state.adapter_names}
    record = build(
        method_name(config),
        numbers,
        dtype,
        sections=tuple(section_of(name, state.tensors[name]) for name in sorted(state.full_names)),
        config=config_options(config),
        task_type=getattr(config.task_type, "value", config.task_type),
        base_fingerprint=getattr(config, "base_fingerprint", None),
        basis_fingerprint=getattr(config, "basis_fingerprint", None),
        recipe_digest=recipe_digest,
        metadata=dict(metadata or {}),
    )
    error = sum(float(((got - numbers[name]) ** 2).sum()) for name, got in record.tensors())
    norm = sum(float((value**2).sum()) for value in numbers.values())
    return record, (error / norm) ** 0.5 if norm else 0.0


def load_adapter(
    base_model: nn.Module,
    path: str | os.PathLike,
    *,
    adapter_name: str = "default",
    is_trainable: bool = False,
) -> PeftModel:
    """`base_model` with the adapter of a `.modicum` file or of a PEFT folder on it.

    A `PeftModel` gets one adapter more and is returned itself. Either way the model is changed in place, as
    PEFT does; if the adapter is refused, the model is as it was.

    Raises:
        ConfigError: no adapter at `path`, the name is taken, or the method or an option is unknown.
        CorruptAdapterError: damage, or tensors missing, unexpected, misshapen or not finite; all of them.
        BaseMismatchError, BasisMismatchError: the adapter belongs to another base model or basis.
    """
    config, state = read_adapter(path)
    config.inference_mode = not is_trainable
    return install(base_model, config, state, adapter_name=adapter_name)


def read_adapter(path: str | os.PathLike) -> tuple[PeftConfig, dict[str, Tensor]]:
    """The configuration and the tensors (by short name) of a `.modicum` file or of a PEFT folder."""
    source = Path(path)
    if source.is_dir():
        return _read_folder(source)
    if not source.is_file():
        raise ConfigError(f"no adapter at {source}: name a {SUFFIX} file or a folder with {CONFIG_FILE}")
    record = decode(source.read_bytes())
    return config_from(record), state_from(record)


def install(
    base_model: nn.Module, config: PeftConfig, state: Mapping[str, Tensor], *, adapter_name: str = "default"
) -> PeftModel:
    """`base_model` with an adapter of the given configuration and tensors (by short name) on it."""
    if isinstance(base_model, PeftModel) and adapter_name in base_model.peft_config:
        raise ConfigError(
            f"the model has an adapter named {adapter_name!r} already; pass another adapter_name"
        )
    with _undo_on_error(base_model, adapter_name):
        if isinstance(base_model, PeftModel):
            base_model.add_adapter(adapter_name, config)
            model = base_model
        else:
            kind = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(str(config.task_type or ""), PeftModel)
            model = kind(base_model, config, adapter_name)
        live = AdapterState.of(model, adapter_name)
        live.check(state)
        live.copy_from(state)
    if config.inference_mode:
        model.eval()
    return model


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors or PyTorch file.

    Raises:
        CorruptAdapterError: the file cannot be read.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        return cast("dict[str, Tensor]", torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:
        raise CorruptAdapterError(f"{path} is damaged ({error}); get the file again") from error


def find_weights(folder: Path) -> Path:
    """The weight file of a PEFT folder.

    Raises:
        ConfigError: the folder holds no adapter.
    """
    weights = next((folder / name for name in WEIGHT_FILES if (folder / name).is_file()), None)
    if weights is None or not (folder / CONFIG_FILE).is_file():
        raise ConfigError(
            f"{folder} is no adapter folder: it needs {CONFIG_FILE} and one of {', '.join(WEIGHT_FILES)}"
        )
    return weights


def write_atomically(path: Path, data: bytes, *, overwrite: bool = False) -> None:
    """Write `data` to `path` so that other processes see all of it or nothing, also after a power cut.

    Raises:
        ConfigError: the file exists and `overwrite` is False.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o644)  # mkstemp gives 0600; adapters are read like any other file
        if overwrite:
            temporary.replace(path)
        else:
            _publish(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # not every file system lets folders be synced
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _publish(temporary: Path, path: Path) -> None:
    try:
        path.hardlink_to(temporary)  # unlike a rename, fails when somebody else was first
    except FileExistsError as error:
        raise _taken(path) from error
    except OSError:  # no hard links on this file system
        temporary.replace(path)


def _taken(path: Path) -> ConfigError:
    return ConfigError(f"{path} exists already; choose another name or pass overwrite=True")


def _read_folder(folder: Path) -> tuple[PeftConfig, dict[str, Tensor]]:
    weights = find_weights(folder)
    config = PeftConfig.from_pretrained(str(folder))
    return config, {short_name(key, config): value for key, value in read_weights(weights).items()}


@contextlib.contextmanager
def _undo_on_error(model: nn.Module, adapter_name: str) -> Iterator[None]:
    """On an error inside, take the adapter off again: modules, flags and modes as they were."""
    modules = list(model.modules())
    children = [dict(module._modules) for module in modules]  # noqa: SLF001 - the exact inverse of replacing modules
    modes = [module.training for module in modules]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    before = list(model.active_adapters) if isinstance(model, PeftModel) else []
    had_config = "peft_config" in vars(model)
    try:
        yield
    except BaseException:
        if isinstance(model, PeftModel):
            if adapter_name in model.peft_config:
                model.delete_adapter(adapter_name)
            cast("BaseTuner", model.base_model).set_adapter(before)
        elif not had_config:
            vars(model).pop("peft_config", None)
        for module, names, training in zip(modules, children, modes, strict=True):
            module._modules.clear()  # noqa: SLF001
            module._modules.update(names)  # noqa: SLF001
            module.training = training
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        raise
