"""The checkpoint that is compressed: the model without its weights, and its tensors one at a time."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from modicum.compress.open_files import OpenFiles
from modicum.errors import ConfigError, CorruptAdapterError, listing
from modicum.models.architecture import meta_model, read_config
from modicum.models.checkpoint import weight_files
from modicum.models.loading import resolve

if TYPE_CHECKING:
    from torch import Tensor

#: what a model folder holds beside weights and config.json that its users need
BESIDE = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "*.model",
    "*.tiktoken",
    "chat_template*",
    "generation_config.json",
    "LICENSE*",
    "NOTICE*",
)
#: the way out for models that text cannot be run through layer by layer
WITHOUT_TEXT = (
    "Take an algorithm that needs no text (quantize: rtn or mse, sparsify: magnitude), without evaluation; it reads "
    "only the matrices it changes"
)


@dataclass(frozen=True)
class Linear:
    """A linear layer of the checkpoint."""

    #: its name in the model
    name: str
    #: the key of its weight in the checkpoint
    key: str
    #: the name that its tensors have in a quantized folder: as in the checkpoint, with or without the prefix
    stored: str
    #: (out, in)
    shape: tuple[int, int]
    #: whether the checkpoint holds it as (in, out), as GPT-2's Conv1D does
    transposed: bool = False


class Source:
    """A checkpoint folder, open for reading. Tensors are views of the files; nothing is held in memory."""

    def __init__(self, model: str) -> None:
        """Open the folder, the hub name or 'embedded'.

        Raises:
            ConfigError: no such model, no safetensors weights, or it is quantized already.
            CorruptAdapterError: the weights cannot be read.
        """
        self.folder = local_folder(model)
        self.raw: dict[str, Any] = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))
        stored = self.raw.get("quantization_config")
        if stored:
            raise ConfigError(
                f"{model} is quantized already ({stored.get('quant_method', 'unknown format')}); start from the "
                "original weights: quantizing twice adds both errors"
            )
        self.config = read_config(str(self.folder))
        self.model: Any = meta_model(self.config)
        self.files = weight_files(self.folder)
        self._open = OpenFiles(self.files)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def tensor(self, key: str) -> Tensor:
        """The tensor `key` in the type it is stored in, a view of the file.

        Raises:
            CorruptAdapterError: the file is damaged.
        """
        return self._open.tensor(key)

    def key(self, name: str) -> str | None:
        """The key of the parameter or buffer `name` of the model, with or without the base model's prefix."""
        prefix = getattr(self.model, "base_model_prefix", "")
        names = [name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}"]
        tied = getattr(self.model, "all_tied_weights_keys", None) or {}
        names += [other for pair in tied.items() if name in pair for other in pair if other != name]
        direct = next((key for key in names if key in self.files), None)
        return direct or self._renamed.get(name)

    @functools.cached_property
    def _renamed(self) -> dict[str, str]:
        """Name in the model -> key in the checkpoint, as Transformers renames them for old checkpoints."""
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming, rename_source_key

        transforms = get_model_conversion_mapping(self.model)
        renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
        # those join or split tensors
        others: Any = [entry for entry in transforms if not isinstance(entry, WeightRenaming)]
        names = {key: rename_source_key(key, renamings, others) for key in self.files}
        return {name: key for key, (name, joined) in names.items() if joined is None}

    def linears(self, names: list[str]) -> list[Linear]:
        """The linear layers called `names`, with what the checkpoint calls them.

        Raises:
            ConfigError: weights are missing.
            CorruptAdapterError: weights have another shape than the configuration says.
        """
        found, missing, wrong = [], [], []
        for name in names:
            key = self.key(f"{name}.weight")
            module = self.model.get_submodule(name)
            if key is None:
                missing.append(name)
                continue
            shape, wanted = tuple(self.tensor(key).shape), tuple(module.weight.shape)
            if shape != wanted:
                wrong.append(f"{key} is {shape}, the configuration says {wanted}")
            stored = key.removesuffix(".weight")
            # a loader finds quantized layers by the model's names, but for the prefix
            same = stored.endswith(name) or name.endswith(stored)
            transposed = isinstance(module, Conv1D)
            shape = (wanted[1], wanted[0]) if transposed else wanted
            found.append(Linear(name, key, stored if same else name, shape, transposed))
        if missing:
            raise ConfigError(
                f"{self.folder} holds no weight for {listing(missing)}; it may have been saved for another task "
                f"(this was read as {type(self.model).__name__})"
            )
        if wrong:
            raise CorruptAdapterError(f"{self.folder} mixes two models: {listing(wrong, 3)}")
        return found

    def weight(self, linear: Linear) -> Tensor:
        """The weight (out, in) of a layer, in the type it is stored in."""
        weight = self.tensor(linear.key)
        return weight.T if linear.transposed else weight

    def absent(self, module: nn.Module, prefix: str = "", skip: tuple[str, ...] = ()) -> list[str]:
        """The parameters of `module` (called `prefix` in the model) that the checkpoint lacks, or stores otherwise."""
        names = [_full(prefix, name) for name, _ in module.named_parameters(remove_duplicate=False)]
        return [name for name in names if not name.startswith(skip or ("\0",)) and self.key(name) is None]

    def fill(self, module: nn.Module, prefix: str, skip: tuple[str, ...] = ()) -> None:
        """Gives the parameters of `module` (called `prefix` in the model) their weights in place, in float32.

        Raises:
            ConfigError: the checkpoint lacks some, or stores them in another way than the model holds them.
        """
        missing = self.absent(module, prefix, skip)
        if missing:
            raise ConfigError(
                f"{self.folder} does not store {listing(missing)} the way {type(self.model).__name__} holds it "
                f"(some models join or split tensors on loading), so that no text can be run through it. {WITHOUT_TEXT}"
            )
        values: dict[str, Tensor] = {}
        for name in [*dict(module.named_parameters(remove_duplicate=False)), *dict(module.named_buffers())]:
            full = _full(prefix, name)
            key = None if full.startswith(skip or ("\0",)) else self.key(full)
            if key is not None:
                value = self.tensor(key)
                values[name] = value.float() if value.is_floating_point() else value
        module.load_state_dict(values, strict=False, assign=True)
        module.requires_grad_(False)

    def beside(self) -> list[Path]:
        """Tokenizer, generation config, chat template and the like, in the folder."""
        return sorted({f for pattern in BESIDE for f in self.folder.glob(pattern) if f.is_file()})

    def not_finite(self, linears: list[Linear]) -> list[str]:
        """The names of those layers that hold NaN or infinite weights; reads them all."""
        return [linear.name for linear in linears if not bool(torch.isfinite(self.weight(linear)).all())]


def empty(module: nn.Module) -> None:
    """Takes the parameters of `module` out of memory, in place; its buffers stay."""
    values = {name: p.to("meta") for name, p in module.named_parameters(remove_duplicate=False)}
    module.load_state_dict(values, strict=False, assign=True)


def _full(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def local_folder(model: str, revision: str | None = None) -> Path:
    """The folder of a model: its own, or where a hub model has been downloaded to.

    Raises:
        ConfigError: there is none, and it cannot be downloaded.
    """
    found = Path(resolve(model)).expanduser()
    if found.is_dir():
        return found
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(model, revision=revision, allow_patterns=["*.safetensors", "*.json", *BESIDE])
        )
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(
            f"{model!r} is no model folder and cannot be downloaded ({reason}); give the path of a folder, "
            "or 'embedded'"
        ) from error
