"""Compressed model folders: shards, index, configuration, and what the original has beside its weights."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Protocol

from safetensors.torch import save_file

from modicum.store.atomic import write_text

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

    from modicum.compress.source import Linear, Source
    from modicum.compress.work import Work

    class _Unit(Protocol):
        @property
        def name(self) -> str: ...

    class Planned(Protocol):
        """What was done: the units whose results the work folder holds, and the linear layers they replace."""

        @property
        def units(self) -> Sequence[_Unit]:
            """Finished units."""
            ...

        @property
        def linears(self) -> Sequence[Linear]:
            """Layers whose stored weights are not copied."""
            ...


#: bytes of a shard
_SHARD = 5 * 10**9
REPORT = "quantization_report.json"


def write_folder(
    source: Source,
    work: Work,
    plan: Planned,
    config: Mapping[str, Any] | None,
    report: Any,
    name: str = REPORT,
) -> None:
    """Write the finished model into the work folder. Tensors are copied from file to file, none is held in memory.

    `config` is the quantization config, None for a dense model; the dataclass `report` goes into the file `name`.
    """
    folder = work.model
    changed = {key: tensor for unit in plan.units for key, tensor in work.tensors(unit.name).items()}
    replaced = {linear.key for linear in plan.linears}
    tensors = {key: source.tensor(key) for key in source.files if key not in replaced}
    write_shards(folder, dict(sorted({**tensors, **changed}.items())))
    added = {} if config is None else {"quantization_config": dict(config)}
    write_text(folder / "config.json", _pretty({**source.raw, **added}))
    for file in source.beside():
        shutil.copyfile(file, folder / file.name)
    write_text(folder / name, _pretty(asdict(report)))


def write_shards(folder: Path, tensors: Mapping[str, Tensor], most: int = _SHARD) -> None:
    """Write tensors as `model.safetensors`, or as shards of at most `most` bytes with an index."""
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for key, tensor in tensors.items():
        if size and size + tensor.nbytes > most:
            shards.append({})
            size = 0
        shards[-1][key] = tensor
        size += tensor.nbytes
    if len(shards) == 1:
        _save(shards[0], folder / "model.safetensors")
        return
    names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        _save(shard, folder / name)
    index = {
        "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())},
        "weight_map": {key: name for name, shard in zip(names, shards, strict=True) for key in shard},
    }
    write_text(folder / "model.safetensors.index.json", _pretty(index))


def _save(tensors: dict[str, Tensor], file: Path) -> None:
    save_file(tensors, file, {"format": "pt"})
    file.chmod(0o644)  # safetensors gives 0600; models are read like any other file


def _pretty(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
