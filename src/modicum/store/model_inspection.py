"""What a model folder holds, read from its files alone: counts, zeros, which sub-network it is, a fingerprint.

No model is built, and no whole tensor is in memory unless it is quantized: then one layer's rows at a time.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from modicum.errors import ConfigError, listing
from modicum.store.active import ActiveSubNetwork, of_model
from modicum.store.numbers import finite
from modicum.store.tensor_files import DamagedFileError, StoredTensor, read_header

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

OK = "ok"
_CONFIG, _WEIGHTS, _INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
#: matrices that are looked up, not multiplied with; GPT-NeoX's embed_out is its head all the same
_EMBEDDING = re.compile(r"(^|\.)(\w*emb(?!ed_out)\w*|wte|wpe|shared|relative_attention_bias)\.")
#: what a quantized layer has in place of a weight
_QUANTIZED = ("codes", "scales", "offsets", "block_offsets")
#: numbers decoded at a time
_PART = 1 << 22


@dataclass(frozen=True)
class LayerInspection:
    """One weight matrix of a linear layer."""

    name: str
    #: as stored: (out, in), GPT-2's (in, out)
    shape: tuple[int, ...]
    #: number type, or bits of a quantized weight
    dtype: str
    #: share of weights that are exactly 0
    sparsity: float


@dataclass(frozen=True)
class ModelInspection:
    """What is in a model folder."""

    path: Path
    #: model folder, quantized model folder, or either with `sub-network`
    kind: str
    #: `ok`, or what is wrong
    state: str
    model_class: str | None = None
    model_type: str | None = None
    #: numbers of the model, tied ones once; None where a foreign format packs them
    parameters: int | None = None
    #: those in weight matrices of linear layers; a head that is the embedding again counts as embedding
    linear_parameters: int | None = None
    tensors: int = 0
    dtypes: tuple[str, ...] = ()
    #: bytes of the weight files
    bytes: int = 0
    #: share of zeros in the linear layers: over all of them, of the least sparse and of the sparsest
    sparsity: float | None = None
    least_sparse: float | None = None
    sparsest: float | None = None
    base_model: str | None = None
    sub_network: ActiveSubNetwork | None = None
    #: 32 hex digits over the names, types, shapes and bytes of all tensors
    fingerprint: str | None = None
    layers: tuple[LayerInspection, ...] = ()


def inspect_model(folder: Path) -> ModelInspection:
    """What the model folder holds, and whether it is undamaged; damage is reported in `state`.

    The fingerprint is of the exact bytes, not of values rounded to bfloat16 as those by which adapters know their
    base: it has to tell models apart that a small merge made different, offsets of quantized layers included. The
    same weights in another number type are another model to it; shards, their order and metadata do not matter.

    Raises:
        ConfigError: no safetensors weights in the folder.
    """
    try:
        config = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
        about = _about(config)
    except (ValueError, TypeError, AttributeError) as error:
        return ModelInspection(
            folder, "model folder", f"{_CONFIG} cannot be read ({error!r}); get the folder again"
        )
    files = _files(folder)
    size = sum(file.stat().st_size for file in files if file.is_file())
    try:
        tensors = _tensors(folder, files)
        layers = _quantized(tensors, config)
    except DamagedFileError as error:
        return ModelInspection(folder, state=str(error), bytes=size, **about)
    digests, zeros, broken = _read(tensors)
    foreign = "quantization_config" in config and not layers
    single = _once(tensors, digests, config)
    plain = {name: tensor for name, tensor in single.items() if not foreign and _layer(name) not in layers}
    found = [
        LayerInspection(name, tensor.shape, tensor.dtype, zeros[name] / max(1, tensor.size))
        for name, tensor in plain.items()
        if len(tensor.shape) == 2 and name.endswith("weight") and not _EMBEDDING.search(name)
    ]
    found += [layer.inspected() for layer in layers.values()]
    found.sort(key=lambda layer: layer.name)
    numbers = [math.prod(layer.shape) for layer in found]
    others = sum(t.size for name, t in single.items() if _layer(name) not in layers)
    low = sum(layer.rows * layer.columns for layer in layers.values())
    shares = [layer.sparsity for layer in found]
    return ModelInspection(
        folder,
        state=f"NaN or infinite values in {listing(broken)}" if broken else OK,
        parameters=None if foreign else others + low,
        linear_parameters=None if foreign else sum(numbers),
        tensors=len(tensors),
        dtypes=tuple(sorted({tensor.dtype for tensor in tensors.values()})),
        bytes=size,
        sparsity=float(np.average(shares, weights=numbers)) if found else None,
        least_sparse=min(shares, default=None),
        sparsest=max(shares, default=None),
        fingerprint=_fingerprint(digests),
        layers=tuple(found),
        **about,
    )


def _about(config: Mapping[str, Any]) -> dict[str, Any]:
    entry, stored = config.get("modicum"), config.get("quantization_config")
    kind = "model folder" if not stored else f"model folder, quantized by {stored.get('quant_method')}"
    return {
        "kind": f"{kind}, sub-network" if entry else kind,
        "model_class": (config.get("architectures") or [None])[0],
        "model_type": config.get("model_type"),
        "base_model": (entry or {}).get("base_model"),
        "sub_network": of_model(entry.get("sub_network") or {}) if entry else None,
    }


def _files(folder: Path) -> list[Path]:
    if (folder / _INDEX).is_file():
        try:
            listed = json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"]
            return [folder / name for name in sorted(set(listed.values()))]
        except (ValueError, KeyError, TypeError, AttributeError):
            return [folder / _INDEX]
    if (folder / _WEIGHTS).is_file():
        return [folder / _WEIGHTS]
    raise ConfigError(
        f"{folder} holds a configuration but no {_WEIGHTS} or {_INDEX}; save the model with `save_pretrained`"
    )


def _tensors(folder: Path, files: list[Path]) -> dict[str, StoredTensor]:
    """All tensors by name, sorted, as the index promises them."""
    if files == [folder / _INDEX]:
        raise DamagedFileError(f"{_INDEX} cannot be read; get the folder again")
    absent = [file.name for file in files if not file.is_file()]
    if absent:
        raise DamagedFileError(f"{listing(absent)} missing, which {_INDEX} names; get the folder again")
    tensors = {name: tensor for file in files for name, tensor in read_header(file).items()}
    if (folder / _INDEX).is_file():
        promised = json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"]
        lacking = [name for name in promised if name not in tensors]
        if lacking:
            raise DamagedFileError(
                f"{listing(lacking)} missing from the files that {_INDEX} names; get the folder again"
            )
    return dict(sorted(tensors.items()))


def _read(tensors: Mapping[str, StoredTensor]) -> tuple[dict[str, str], dict[str, int], list[str]]:
    """Digest and zeros of every tensor, and the names of those that are not finite; reads each once."""
    digests, zeros, broken = {}, {}, []
    for name, tensor in tensors.items():
        state, good, none = hashlib.sha256(f"{tensor.dtype} {tensor.shape}\n".encode()), True, 0
        for part in tensor.parts():
            state.update(part.data)
            none += tensor.zeros(part)
            good = good and finite(part, tensor.dtype)
        digests[name], zeros[name] = state.hexdigest(), none
        if not good:
            broken.append(name)
    return digests, zeros, broken


def _fingerprint(digests: Mapping[str, str]) -> str:
    lines = "\n".join(f"{name} {digest}" for name, digest in sorted(digests.items()))
    return hashlib.sha256(f"modicum model\n{lines}".encode()).hexdigest()[:32]


def _once(
    tensors: Mapping[str, StoredTensor], digests: Mapping[str, str], config: Mapping[str, Any]
) -> dict[str, StoredTensor]:
    """The tensors without a head that is stored although it is the embedding again."""
    vocabulary = (config.get("text_config") or config).get("vocab_size")
    known = {digests[name] for name in tensors if _EMBEDDING.search(name)}
    return {
        name: tensor
        for name, tensor in tensors.items()
        if _EMBEDDING.search(name) or tensor.shape[:1] != (vocabulary,) or digests[name] not in known
    }


def _layer(name: str) -> str | None:
    """The quantized layer that a tensor belongs to, if it can belong to one."""
    layer, _, leaf = name.rpartition(".")
    return layer if leaf in _QUANTIZED else None


@dataclass(frozen=True)
class _Quantized:
    """One layer of ours: its tensors and how they are stored."""

    name: str
    spec: Any
    rows: int
    columns: int
    tensors: Mapping[str, StoredTensor]

    def inspected(self) -> LayerInspection:
        """The layer with its share of weights that decode to exactly 0: those whose code is the zero-point."""
        from modicum.ops.affine import Grid, decode, spread, unpack

        extra = self.spec.offset_block or (1, 1)
        step = math.lcm(self.spec.block[0], extra[0])
        step *= max(1, _PART // (step * self.columns))
        zeros = 0
        for at in range(0, self.rows, step):
            codes, scales, offsets, more = (self._rows(leaf, at, step) for leaf in _QUANTIZED)
            weight = decode(
                unpack(codes, self.spec.bits, self.columns),
                Grid(scales, offsets),
                self.spec.bits,
                self.spec.block,
            )
            if more is not None:
                weight += spread(more, extra)
            zeros += int((weight == 0).sum())
        share = zeros / max(1, self.rows * self.columns)
        return LayerInspection(self.name, (self.rows, self.columns), f"{self.spec.bits} bit", share)

    def _rows(self, leaf: str, at: int, count: int) -> Any:
        """What the rows at … at + count of the weight have in the tensor `leaf`, None without such a tensor."""
        import torch

        tensor = self.tensors.get(leaf)
        if tensor is None:
            return None
        height = self.rows // tensor.shape[0]
        part = np.array(tensor.array()[at // height : (at + count) // height])
        if tensor.dtype == "bfloat16":
            return torch.from_numpy(part.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(part)


def _quantized(tensors: Mapping[str, StoredTensor], config: Mapping[str, Any]) -> dict[str, _Quantized]:
    """The layers of ours, by name.

    Raises:
        DamagedFileError: the tensors of a layer and the configuration contradict each other.
    """
    stored = config.get("quantization_config") or {}
    if stored.get("quant_method") != "modicum":
        return {}
    layers = {}
    for name in tensors:
        layer, _, leaf = name.rpartition(".")
        if leaf == "codes":
            mine = {part: t for part in _QUANTIZED if (t := tensors.get(f"{layer}.{part}")) is not None}
            layers[layer] = _one(layer, mine, stored)
    return layers


def _one(name: str, tensors: Mapping[str, StoredTensor], stored: Mapping[str, Any]) -> _Quantized:
    from modicum.ops.affine import packed_width
    from modicum.quant.spec import AffineSpec

    try:
        fields = AffineSpec.__dataclass_fields__
        values = {
            key: value
            for key, value in {**stored, **stored.get("layers", {}).get(name, {})}.items()
            if key in fields
        }
        for key in ("block", "offset_block"):
            values[key] = None if values.get(key) is None else tuple(values[key])
        spec = AffineSpec(**values)
        rows, columns = tensors["codes"].shape[0], tensors["scales"].shape[1] * spec.block[1]
        wanted = {"codes": (rows, packed_width(columns, spec.bits))}
        grid = (rows // spec.block[0], columns // spec.block[1])
        wanted |= {"scales": grid, **({} if spec.zero_point == "none" else {"offsets": grid})}
        if spec.offset_block is not None:
            wanted["block_offsets"] = (rows // spec.offset_block[0], columns // spec.offset_block[1])
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise DamagedFileError(
            f"{name} is not stored as {_CONFIG} says ({error!r}); get the folder again"
        ) from error
    shapes = {part: tensor.shape for part, tensor in tensors.items()}
    if shapes != wanted or spec.faults(rows, columns):
        raise DamagedFileError(f"{name} is stored as {shapes}, {_CONFIG} says {wanted}; get the folder again")
    return _Quantized(name, spec, rows, columns, tensors)
