"""Weights of a checkpoint on disk, one matrix at a time, without building the model in memory."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modicum.errors import ConfigError, CorruptAdapterError, listing
from modicum.models.architecture import linear_shapes, meta_model, read_config

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from torch import Tensor

#: names the file of every tensor of a sharded checkpoint
INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


def iter_weights(
    path: str | Path, targets: str | Iterable[str] = "all-linear", *, task: str = "auto", **options: Any
) -> Iterator[tuple[str, Tensor]]:
    """(module name, weight (out, in) in the stored dtype) of the targeted layers, in the order of the model.

    Names are those of the model for `task` (causal_lm, seq_cls, base, or auto: what the checkpoint was saved
    from), whatever prefix the checkpoint uses; Conv1D weights come transposed. `targets` and `options`
    (`exclude`, `layers_to_transform`, `layers_pattern`, `modules_to_save`) match as PEFT's do. Drop each
    weight before asking for the next one, and one matrix is all that is ever in memory.

    Raises:
        ConfigError: no such folder, no safetensors weights in it, or a layer's weight is missing.
        CorruptAdapterError: a weights file is truncated or has another shape than the configuration says.
        TargetError: a target matches no linear layer.
    """
    folder, model = _open(path, task)
    yield from _stream(folder, model, layer_shapes(model, targets, **options))


def target_shapes(
    path: str | Path, targets: str | Iterable[str] = "all-linear", *, task: str = "auto", **options: Any
) -> dict[str, tuple[int, int]]:
    """(out, in) of the layers that `iter_weights` would yield, by name; reads the configuration alone."""
    return layer_shapes(_open(path, task)[1], targets, **options)


def layer_shapes(
    model: Any, targets: str | Iterable[str] = "all-linear", **options: Any
) -> dict[str, tuple[int, int]]:
    """(out, in) of the targeted layers of `model`, by name; a classification head is never one of them."""
    from modicum.models.loading import head_names

    if not options.get("modules_to_save"):
        options["modules_to_save"] = head_names(model) or None
    return linear_shapes(model, targets, **options)


def _open(path: str | Path, task: str) -> tuple[Path, Any]:
    from modicum.models.loading import resolve

    folder = Path(resolve(str(path))).expanduser()
    if not folder.is_dir():
        raise ConfigError(
            f"{path} is no local model folder; download it first (`hf download {path} --local-dir FOLDER`) and name "
            "the folder"
        )
    return folder, meta_model(read_config(str(folder)), task)


def _stream(folder: Path, model: Any, shapes: Mapping[str, tuple[int, int]]) -> Iterator[tuple[str, Tensor]]:
    from safetensors import SafetensorError, safe_open

    where = weight_files(folder)
    keys = {name: _key(name, where, model) for name in shapes}
    missing = [name for name, key in keys.items() if key is None]
    if missing:
        raise ConfigError(
            f"{folder} holds no weight for {listing(missing)}; it may have been saved for another task "
            f"(this was read as {type(model).__name__}) or be stored quantized: load such a model instead"
        )
    with contextlib.ExitStack() as stack:
        files: dict[Path, Any] = {}
        for name, key in keys.items():
            assert key is not None
            file = where[key]
            try:
                if file not in files:
                    files[file] = stack.enter_context(safe_open(file, framework="pt"))
                weight = files[file].get_tensor(key)
            except (SafetensorError, OSError) as error:
                raise CorruptAdapterError(
                    f"{file} cannot be read ({error}); download or copy it again"
                ) from error
            if not isinstance(model.get_submodule(name), _linear()):
                weight = weight.T
            if tuple(weight.shape) != shapes[name]:
                raise CorruptAdapterError(
                    f"{key} in {file} is {tuple(weight.shape)}, the configuration says {shapes[name]}: the folder "
                    "mixes two models, or its weights are stored quantized"
                )
            yield name, weight
            del weight


def _linear() -> type:
    from torch import nn

    return nn.Linear


def weight_files(folder: Path) -> dict[str, Path]:
    """Tensor name -> file of a checkpoint folder, sharded or not."""
    from safetensors import SafetensorError, safe_open

    index, single = folder / INDEX, folder / _SINGLE
    try:
        if index.is_file():
            listed: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            absent = sorted({file for file in listed.values() if not (folder / file).is_file()})
            if absent:
                raise ConfigError(
                    f"{folder} lacks {listing(absent)}, which its index names; download it again"
                )
            return {key: folder / file for key, file in listed.items()}
        if single.is_file():
            with safe_open(single, framework="pt") as file:
                return dict.fromkeys(file.keys(), single)
    except (SafetensorError, ValueError, KeyError) as error:
        if isinstance(error, ConfigError):
            raise
        raise CorruptAdapterError(
            f"the weights in {folder} cannot be read ({error}); download or copy them again"
        ) from error
    raise ConfigError(f"{folder} holds no {_SINGLE} or {INDEX}; save the model again with `save_pretrained`")


def _key(name: str, where: Mapping[str, Path], model: Any) -> str | None:
    """The tensor name of the weight of the module `name`, with or without the base model's prefix."""
    prefix = getattr(model, "base_model_prefix", "")
    names = [name]
    if prefix:
        names += [name.removeprefix(f"{prefix}."), f"{prefix}.{name}"]
    return next((f"{n}.weight" for n in names if f"{n}.weight" in where), None)
