"""Sub-networks: at which rank each adapter runs, and which part of its layer is there.

A sub-network is always a prefix. At rank k an adapter uses the first k of its R directions, with the scaling of
the largest rank, alpha / R. A layer of a narrower width gives the first outputs only, or takes the first inputs
only; fused layers (queries, keys and values in one matrix) have one such run in each of their parts.

Sources: LoNAS (LREC-COLING 2024), Shears arXiv 2404.10934, SQFT arXiv 2410.03750.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast, final

import torch
from torch.nn import functional as F

from modicum.adapters.config import AdapterConfig, option
from modicum.errors import ConfigError, did_you_mean, listing

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn

    from modicum.adapters.contract import Adapter
    from modicum.adapters.layer import AdapterLinear

#: runs (start, stop) of outputs or inputs, in order
Runs = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Cut:
    """The outputs and the inputs of a layer that a sub-network has; None: all of them."""

    outputs: Runs | None = None
    inputs: Runs | None = None

    def as_dict(self) -> dict[str, list[list[int]]]:
        """The runs as plain lists, absent ones left out."""
        sides = (("outputs", self.outputs), ("inputs", self.inputs))
        return {name: [list(run) for run in runs] for name, runs in sides if runs is not None}


@dataclass(frozen=True)
class SubNetwork:
    """One choice out of a super-network: everything that is smaller than in the super-network."""

    #: layer -> rank of its adapter
    ranks: Mapping[str, int] = field(default_factory=dict)
    #: layer -> the part of it that runs
    cuts: Mapping[str, Cut] = field(default_factory=dict)
    #: name of a width -> units left (channels, or key/value heads), see `models.families`
    widths: Mapping[str, int] = field(default_factory=dict)
    #: what was chosen in each group of the search space
    choices: Mapping[str, int] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON; `read` is the inverse."""
        cuts = {name: cut.as_dict() for name, cut in self.cuts.items()}
        parts = {"ranks": dict(self.ranks), "widths": dict(self.widths), "choices": dict(self.choices)}
        return {name: values for name, values in {**parts, "cuts": cuts}.items() if values}

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> SubNetwork:
        """The sub-network that `as_dict` gave.

        Raises:
            ConfigError: it holds something else.
        """
        known = ("ranks", "cuts", "widths", "choices")
        unknown = [f"{name!r}{did_you_mean(name, known)}" for name in values if name not in known]
        if unknown:
            raise ConfigError(f"sub_network has no {listing(unknown)}; known: {', '.join(known)}")
        try:
            cuts = {
                name: Cut(**{side: tuple((int(a), int(b)) for a, b in runs) for side, runs in cut.items()})
                for name, cut in values.get("cuts", {}).items()
            }
            ranks, widths, choices = (
                {name: int(value) for name, value in values.get(part, {}).items()}
                for part in ("ranks", "widths", "choices")
            )
        except (TypeError, ValueError, AttributeError) as error:
            raise ConfigError(f"sub_network cannot be read: {error}") from error
        return cls(ranks, cuts, widths, choices)


@dataclass
class ElasticConfig(AdapterConfig):
    """The options of methods that can be searched for sub-networks; abstract."""

    search_space: dict[str, Any] | None = option(
        None, "The search space that was trained: the groups of layers and their choices."
    )
    sub_network: dict[str, Any] | None = option(
        None, "The sub-network that is active on loading; the whole super-network when unset."
    )


@final
class Switch:
    """Turns a model with an elastic adapter into any of its sub-networks, in place."""

    def __init__(self, model: nn.Module, adapter_name: str = "default") -> None:
        """Find the adapters called `adapter_name` on `model`.

        Raises:
            ConfigError: there is none, or its method is not elastic.
        """
        from modicum.adapters.layer import AdapterLinear

        configs = getattr(model, "peft_config", {})
        if adapter_name not in configs:
            raise ConfigError(
                f"the model has no adapter {adapter_name!r}{did_you_mean(adapter_name, configs)}; "
                f"loaded: {', '.join(configs) or 'none'}"
            )
        self._name, self._config = adapter_name, configs[adapter_name]
        self.layers: dict[str, AdapterLinear] = {
            module.site.name: module
            for module in model.modules()
            if isinstance(module, AdapterLinear) and adapter_name in module.adapters
        }
        self.adapters = {
            name: cast("Adapter", layer.adapters[adapter_name]) for name, layer in self.layers.items()
        }
        if not self.adapters or not isinstance(self._config, ElasticConfig):
            raise ConfigError(f"the adapter {adapter_name!r} has no sub-networks: its method is not elastic")

    def activate(self, sub_network: SubNetwork | None) -> None:
        """Make `sub_network` the one that runs and is saved; None: the whole super-network.

        Raises:
            ConfigError: it names layers without this adapter, ranks or runs that they do not have, or adapters are
                merged at present; nothing was changed.
        """
        chosen = sub_network or SubNetwork()
        faults = self._faults(chosen)
        if faults:
            raise ConfigError(f"this sub-network does not fit the model: {listing(faults, 8)}")
        for name, adapter in self.adapters.items():
            adapter.active_rank = chosen.ranks.get(name, adapter.rank)
            adapter.cut = chosen.cuts.get(name)
        self._config.sub_network = None if sub_network is None else chosen.as_dict()

    def _faults(self, chosen: SubNetwork) -> list[str]:
        faults = [
            f"{name} carries no adapter{did_you_mean(name, self.adapters)}"
            for name in {**chosen.ranks, **chosen.cuts}
            if name not in self.adapters
        ]
        faults += [
            f"rank {rank} of {name} (1 to {self.adapters[name].rank})"
            for name, rank in chosen.ranks.items()
            if name in self.adapters and not 1 <= rank <= self.adapters[name].rank
        ]
        for name, cut in chosen.cuts.items():
            layer = self.layers.get(name)
            if layer is None:
                continue
            sides = (
                (cut.outputs, layer.out_features, "outputs"),
                (cut.inputs, layer.in_features, "inputs"),
            )
            for runs, size, what in sides:
                bounds = [0, *(bound for run in runs or () for bound in run)]
                if runs is not None and (
                    not runs or sorted(bounds) != bounds or bounds[-1] > size or any(a == b for a, b in runs)
                ):
                    faults.append(f"{what} {list(runs)} of {name}, which has {size}")
        # a merged weight stays what it is, whatever rank or width is chosen
        merged = [
            name
            for name, layer in self.layers.items()
            if self._name in layer.merged_adapters or (layer.merged and name in chosen.cuts)
        ]
        if merged:
            faults.append(f"adapters are merged into {listing(merged, 2)}: unmerge them first")
        return faults


def take(tensor: Tensor, runs: Runs | None, dim: int) -> Tensor:
    """The entries of `tensor` in `runs` along `dim`; a view where it is one run."""
    if runs is None:
        return tensor
    parts = [tensor.narrow(dim, start, stop - start) for start, stop in runs]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def put_back(tensor: Tensor, runs: Runs | None, size: int) -> Tensor:
    """`tensor` (…, n) at the places of `runs` in zeros (…, size): the inverse of `take` along the last dimension."""
    if runs is None:
        return tensor
    if len(runs) == 1:
        ((start, stop),) = runs
        return F.pad(tensor, (start, size - stop))
    parts, end = [], 0
    pieces = tensor.split([stop - start for start, stop in runs], -1)
    for piece, (start, stop) in zip(pieces, runs, strict=True):
        parts += [F.pad(piece, (start - end, 0))]
        end = stop
    return F.pad(torch.cat(parts, -1), (0, size - end))
