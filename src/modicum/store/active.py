"""Which sub-network a saved adapter or model says is active; and another one made active."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from modicum.errors import ConfigError, listing
from modicum.store.atomic import write_folder

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from modicum.adapters.elastic import SubNetwork

_CONFIG = "adapter_config.json"


@dataclass(frozen=True)
class LayerRank:
    """One adapted layer of an elastic adapter."""

    name: str
    #: the rank that runs, of the largest that was trained
    rank: int
    largest: int
    #: trained numbers that run, of all
    active: int
    values: int


@dataclass(frozen=True)
class ActiveSubNetwork:
    """The sub-network that runs when a file is loaded."""

    #: 32 hex digits over ranks and widths: an adapter and the model extracted from it have the same
    digest: str
    #: whether it is all that was trained
    whole: bool
    choices: dict[str, int]
    widths: dict[str, int]
    #: rank -> how many layers run at it
    ranks: dict[int, int]
    #: trained numbers that run; of a model, which holds none of them, 0
    active_values: int
    #: 32 hex digits over those numbers, as they are stored; of a model None, it has one of its weights
    fingerprint: str | None = None
    layers: tuple[LayerRank, ...] = ()


def of_adapter(
    shapes: Mapping[str, tuple[int, ...]],
    saved: Mapping[str, Any] | None,
    numbers: Mapping[str, np.ndarray] | None,
) -> tuple[ActiveSubNetwork, list[str]]:
    """The active sub-network of an adapter with these tensors (`layer.A`, `layer.B`, `layer.R`), and its faults.

    `saved` is what `SubNetwork.as_dict` gave; None or empty is the whole super-network. `numbers` are the tensors
    themselves as float32, None where they cannot be read.

    Raises:
        TypeError, ValueError, AttributeError: `saved` is something else.
    """
    saved = saved or {}
    ranks, cuts = dict(saved.get("ranks", {})), dict(saved.get("cuts", {}))
    largest = {name.rpartition(".")[0]: _rank(name, shape) for name, shape in shapes.items()}
    faults = [f"{name} carries no adapter" for name in {**ranks, **cuts} if name not in largest]
    faults += [
        f"rank {rank} of {name} (1 to {largest[name]})"
        for name, rank in ranks.items()
        if name in largest and not 1 <= rank <= largest[name]
    ]
    totals = dict.fromkeys(largest, 0)
    active = dict.fromkeys(largest, 0)
    for name, shape in shapes.items():
        layer, _, leaf = name.rpartition(".")
        totals[layer] += math.prod(shape)
        active[layer] += _active(leaf, shape, ranks.get(layer, largest[layer]), cuts.get(layer, {}))
    layers = tuple(
        LayerRank(name, ranks.get(name, most), most, active[name], totals[name])
        for name, most in largest.items()
    )
    running = {layer.name: layer.rank for layer in layers}
    widths = dict(saved.get("widths", {}))
    found = ActiveSubNetwork(
        digest=_digest(running, widths, cuts),
        whole=not cuts and all(layer.rank == layer.largest for layer in layers),
        choices=dict(saved.get("choices", {})),
        widths=widths,
        ranks=_counted(running),
        active_values=sum(active.values()),
        fingerprint=None if numbers is None or faults else _fingerprint(numbers, running, cuts),
        layers=layers,
    )
    return found, faults


def of_model(saved: Mapping[str, Any]) -> ActiveSubNetwork:
    """The sub-network that a model was extracted as, from the `modicum` entry of its config.json.

    Raises:
        TypeError, ValueError, AttributeError: `saved` is something else.
    """
    ranks, widths = dict(saved.get("ranks", {})), dict(saved.get("widths", {}))
    choices, cuts = dict(saved.get("choices", {})), dict(saved.get("cuts", {}))
    digest = _digest(ranks, widths, cuts)
    return ActiveSubNetwork(digest, not widths and not cuts, choices, widths, _counted(ranks), 0)


def unfit(faults: list[str]) -> str:
    """The state of a file whose sub-network has `faults`."""
    return f"its sub-network does not fit its tensors: {listing(faults)}; get the file again"


def with_sub_network(adapter: Path, target: Path, sub_network: SubNetwork | None) -> None:
    """Writes the PEFT folder `adapter` to `target`, where `sub_network` is active on loading; None: all of it.

    Raises:
        ConfigError: `adapter` holds no elastic adapter, or `target` exists.
    """
    file = adapter / _CONFIG
    config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if "sub_network" not in config:
        raise ConfigError(f"{adapter} holds no adapter with sub-networks")
    if target.exists():
        raise ConfigError(f"{target} exists already; choose another folder")
    config["sub_network"] = None if sub_network is None else sub_network.as_dict()

    def fill(folder: Path) -> None:
        for source in adapter.iterdir():
            if source.is_file():
                shutil.copyfile(source, folder / source.name)
        (folder / _CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")

    write_folder(target, fill)


def _digest(ranks: Mapping[str, int], widths: Mapping[str, int], cuts: Mapping[str, Any]) -> str:
    # widths say the same as cuts, and are all that is left of them in a smaller model
    parts = {
        "ranks": dict(ranks),
        "widths": dict(widths),
        **({} if widths or not cuts else {"cuts": dict(cuts)}),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def _counted(ranks: Mapping[str, int]) -> dict[int, int]:
    counts: dict[int, int] = {}
    for rank in sorted(ranks.values()):
        counts[rank] = counts.get(rank, 0) + 1
    return counts


def _rank(name: str, shape: tuple[int, ...]) -> int:
    return shape[-1] if name.endswith(".B") else shape[0]


def _active(leaf: str, shape: tuple[int, ...], rank: int, cut: Mapping[str, Any]) -> int:
    """How many numbers of one tensor run: A (R, in), B (out, R), or a core (R, R) or (R,)."""
    if leaf == "R":
        return rank ** len(shape)
    across = shape[1] if leaf == "A" else shape[0]
    runs = cut.get("inputs" if leaf == "A" else "outputs")
    return rank * (across if runs is None else sum(stop - start for start, stop in runs))


def _fingerprint(numbers: Mapping[str, np.ndarray], ranks: Mapping[str, int], cuts: Mapping[str, Any]) -> str:
    digest = hashlib.sha256()
    for name in sorted(numbers):
        layer, _, leaf = name.rpartition(".")
        part = _running(leaf, numbers[name], ranks[layer], cuts.get(layer, {}))
        digest.update(json.dumps([name, part.shape]).encode())
        digest.update(np.ascontiguousarray(part, "<f4").data)
    return digest.hexdigest()[:32]


def _running(leaf: str, numbers: np.ndarray, rank: int, cut: Mapping[str, Any]) -> np.ndarray:
    """The part of one tensor that runs, of which `_active` is the size."""
    if leaf == "R":
        return numbers[(slice(rank),) * numbers.ndim]
    axis, prefix = (1, numbers[:rank]) if leaf == "A" else (0, numbers[:, :rank])
    runs = cut.get("inputs" if leaf == "A" else "outputs")
    if runs is None:
        return prefix
    return np.concatenate([prefix.take(range(start, stop), axis) for start, stop in runs], axis)
