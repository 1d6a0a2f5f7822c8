"""A search space fitted to a model: its groups, their choices, and the sub-networks they stand for."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast, final

import torch

from modicum.adapters.elastic import Cut, SubNetwork, Switch
from modicum.errors import ConfigError, did_you_mean, listing
from modicum.models.families import Width, known_widths
from modicum.search.spec import SpaceSpec, read_space

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from modicum.search.spec import GroupSpec

#: what is chosen in each group
Choices = dict[str, int]


@dataclass(frozen=True)
class Group:
    """Layers that share one choice."""

    name: str
    #: descending; the first is the largest
    choices: tuple[int, ...]
    #: layers whose adapters share the rank that is chosen
    layers: tuple[str, ...] = ()
    #: widths that get the number of channels, or of query heads, that is chosen
    widths: tuple[Width, ...] = ()


@final
class SearchSpace:
    """All groups of a model. A choice for each of them is a sub-network."""

    def __init__(self, groups: Sequence[Group], spec: SpaceSpec) -> None:
        self.groups = {group.name: group for group in groups}
        self.spec = spec
        self._largest = {name: group.choices[0] for name, group in self.groups.items()}

    @classmethod
    def of(
        cls,
        source: str | Mapping[str, Any] | SpaceSpec,
        layers: Mapping[str, int],
        parts: Sequence[Width],
    ) -> SearchSpace:
        """The space `source` (see `read_space`) on a model with the adapters {layer: rank} and the widths `parts`.

        Raises:
            ConfigError: everything in it that does not fit the model.
        """
        spec = read_space(source)
        fitting = _Fitting(layers, parts)
        groups = [group for one in spec.groups for group in fitting.groups(one)]
        faults = [*fitting.faults, *_overlaps(groups)]
        if faults:
            raise ConfigError(f"the search space {spec.name!r} does not fit: {listing(faults, 12)}")
        return cls(groups, spec)

    @classmethod
    def of_model(
        cls, source: str | Mapping[str, Any] | SpaceSpec, model: Any, adapter_name: str = "default"
    ) -> SearchSpace:
        """The space `source` on a PEFT model; see `of`."""
        adapters = Switch(model, adapter_name).adapters
        return cls.of(source, {name: adapter.rank for name, adapter in adapters.items()}, known_widths(model))

    @property
    def size(self) -> int:
        """The number of sub-networks."""
        return math.prod(len(group.choices) for group in self.groups.values())

    def digest(self) -> str:
        """16 hex digits over groups, what they hold, and choices."""
        parts = {
            name: [group.choices, group.layers, [width.name for width in group.widths]]
            for name, group in self.groups.items()
        }
        text = json.dumps(parts, sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

    def largest(self) -> Choices:
        """The super-network."""
        return dict(self._largest)

    def smallest(self) -> Choices:
        """The last choice of every group."""
        return {name: group.choices[-1] for name, group in self.groups.items()}

    def heuristic(self) -> Choices:
        """Entry (n − 1) // 2 of the n choices of every group, the reference point of LoNAS and Shears."""
        return {name: group.choices[(len(group.choices) - 1) // 2] for name, group in self.groups.items()}

    def named(self, name: str) -> Choices:
        """The choices called largest, smallest or heuristic.

        Raises:
            ConfigError: another name.
        """
        known = {"largest": self.largest, "smallest": self.smallest, "heuristic": self.heuristic}
        if name not in known:
            raise ConfigError(
                f"no sub-network {name!r}{did_you_mean(name, known)}; known: {', '.join(known)}"
            )
        return known[name]()

    def sample(self, generator: torch.Generator) -> Choices:
        """Every group's choice drawn independently and uniformly."""
        return {
            name: group.choices[int(torch.randint(len(group.choices), (), generator=generator))]
            for name, group in self.groups.items()
        }

    def neighbours(self, choices: Mapping[str, int]) -> Iterator[Choices]:
        """Sub-networks that differ in one group by one step."""
        for name, group in self.groups.items():
            at = group.choices.index(choices[name])
            for step in (at - 1, at + 1):
                if 0 <= step < len(group.choices):
                    yield {**choices, name: group.choices[step]}

    def sub_network(self, choices: Mapping[str, int]) -> SubNetwork:
        """The sub-network of `choices`, one for each group.

        Raises:
            ConfigError: groups are unknown or missing, or have no such choice; all of them.
        """
        faults = [
            f"no group {name!r}{did_you_mean(name, self.groups)}"
            for name in choices
            if name not in self.groups
        ]
        faults += [f"no choice for {name}" for name in self.groups if name not in choices]
        faults += [
            f"{name} = {choices[name]} (choices: {', '.join(map(str, group.choices))})"
            for name, group in self.groups.items()
            if name in choices and choices[name] not in group.choices
        ]
        if faults:
            raise ConfigError(f"no sub-network of this space: {listing(faults, 8)}")
        ranks: dict[str, int] = {}
        units: dict[str, int] = {}
        cuts: dict[str, Cut] = {}
        for name, group in self.groups.items():
            ranks |= dict.fromkeys(group.layers, choices[name])
            for width in group.widths:
                left = choices[name] // width.size
                if left < width.units:
                    units[width.name] = left
                    for layer, cut in width.cuts(left).items():
                        before = cuts.get(layer, Cut())
                        cuts[layer] = Cut(cut.outputs or before.outputs, cut.inputs or before.inputs)
        return SubNetwork(ranks, cuts, units, dict(choices))


@dataclass
class _Fitting:
    """Groups of a specification on a model, and what does not fit."""

    #: adapted layer -> rank of its adapter
    ranks: Mapping[str, int]
    widths: Sequence[Width]
    faults: list[str] = field(default_factory=list)

    def groups(self, spec: GroupSpec) -> list[Group]:
        found = self._rank_groups(spec) if spec.rank is not None else self._width_groups(spec)
        if spec.share == "block":
            return found
        # "rank.q_proj" of all blocks, "0+1.rank.q_proj" of some
        place = "" if spec.blocks is None else "+".join(map(str, spec.blocks)) + "."
        merged = Group(
            place + found[0].name.partition(".")[2] if found else "",
            found[0].choices if found else (),
            tuple(layer for group in found for layer in group.layers),
            tuple(width for group in found for width in group.widths),
        )
        if any(group.choices != merged.choices for group in found):
            self.faults.append(f"{merged.name} is shared by the model, but its choices differ between layers")
        return [merged] if found else []

    def _rank_groups(self, spec: GroupSpec) -> list[Group]:
        blocks: dict[int, list[str]] = defaultdict(list)
        for wanted in spec.rank or ():
            members = self._layers(wanted)
            if not members:
                ends = sorted({name.rpartition(".")[2] for name in self.ranks})
                roles = sorted(
                    {f"{width.kind}.{side}" for width in self.widths for side in ("inputs", "outputs")}
                )
                self.faults.append(
                    f"rank: no adapted layer is called {wanted!r}{did_you_mean(wanted, [*ends, *roles])} "
                    f"(adapted: {listing(ends, 12)}; roles: {', '.join(roles)})"
                )
            for block, layer in members:
                if layer not in blocks[block]:
                    blocks[block].append(layer)
        groups = []
        for block in self._chosen(spec, blocks):
            layers = blocks[block]
            name = f"{block}.rank.{'+'.join(self._short(layer) for layer in layers)}"
            sizes = sorted({self.ranks[layer] for layer in layers})
            if len(sizes) > 1:
                self.faults.append(
                    f"{name} joins adapters of the ranks {', '.join(map(str, sizes))}; give them one"
                )
                continue
            groups.append(Group(name, self._numbers(spec, name, sizes[0], 1), tuple(layers)))
        return groups

    def _width_groups(self, spec: GroupSpec) -> list[Group]:
        wanted = [spec.width] if isinstance(spec.width, str) else list(spec.width or ())
        found: dict[int, Width] = {}
        before = len(self.faults)
        for width in self.widths:
            outputs = [port.layer for port in width.outputs]
            hit = [layer for layer in outputs if any(_ends(layer, end) for end in wanted)]
            if wanted == [width.kind] or len(hit) == len(outputs):
                other = found.setdefault(width.block, width)
                if other != width:
                    self.faults.append(
                        f"width: {', '.join(wanted)} cuts {other.name} and {width.name}; give each a group"
                    )
            elif hit:
                self.faults.append(
                    f"width: {', '.join(wanted)} cuts {listing(hit)} alone, but {width.name} needs "
                    f"{listing([name for name in outputs if name not in hit])} cut along"
                )
        kinds = sorted({width.kind for width in self.widths})
        layers = [port.layer for width in self.widths for port in width.outputs]
        idle = [one for one in wanted if one not in kinds and not any(_ends(layer, one) for layer in layers)]
        if found and idle:
            near = did_you_mean(idle[0], {layer.rpartition(".")[2] for layer in layers})
            self.faults.append(f"width: no layer with channels or heads is called {', '.join(idle)}{near}")
        elif not found and len(self.faults) == before:
            known = ", ".join(kinds) or "none of this kind of model, whose ranks alone can be elastic"
            near = did_you_mean(" ".join(wanted), kinds)
            self.faults.append(f"width: no width is called {', '.join(wanted)}{near}; known: {known}")
        groups = []
        for block in self._chosen(spec, found):
            width = found[block]
            bare = [layer for layer in width.cuts(1) if layer not in self.ranks]
            if bare:
                self.faults.append(
                    f"{width.name} cuts {listing(bare)}, which carry no adapter: add them to target_modules"
                )
            name = f"{block}.width.{width.kind}"
            choices = self._numbers(spec, name, width.units * width.size, width.size)
            groups.append(Group(name, choices, widths=(width,)))
        return groups

    def _short(self, layer: str) -> str:
        """The last name of a layer; where others of its block end alike (BERT's dense), all that follows the block."""
        end, block = layer.rpartition(".")[2], _block(layer)
        alike = [name for name in self.ranks if _ends(name, end) and _block(name) == block]
        return end if len(alike) == 1 else layer.partition(f".{block}.")[2] or layer

    def _layers(self, wanted: str) -> list[tuple[int, str]]:
        """(transformer layer, name) of the adapted layers that a role or an ending means."""
        kind, _, side = wanted.partition(".")
        if side in ("outputs", "inputs"):
            return [
                (width.block, port.layer)
                for width in self.widths
                if width.kind == kind
                for port in cast("tuple[Any, ...]", getattr(width, side))
                if port.layer in self.ranks
            ]
        return [(_block(name), name) for name in self.ranks if _ends(name, wanted)]

    def _chosen(self, spec: GroupSpec, found: Mapping[int, Any]) -> list[int]:
        if spec.blocks is None:
            return sorted(found)
        missing = [block for block in spec.blocks if block not in found]
        if missing and found:
            self.faults.append(
                f"blocks {missing} hold nothing of this group (there are {min(found)} to {max(found)})"
            )
        return [block for block in spec.blocks if block in found]

    def _numbers(self, spec: GroupSpec, name: str, full: int, unit: int) -> tuple[int, ...]:
        """The choices as whole numbers, descending."""
        numbers, step = set(), math.lcm(unit, spec.multiple_of)
        for choice in spec.choices:
            # a share is taken to the nearest step, the full width aside; a count has to be whole units
            number = choice
            if isinstance(choice, float):
                number = full if choice == 1 else min(full, max(1, round(choice * full / step)) * step)
            if not 1 <= number <= full:
                self.faults.append(f"{name}: {choice} is outside 1 to {full}")
            elif number % unit:
                down = max(unit, number // unit * unit)
                self.faults.append(
                    f"{name}: {choice} query heads are no multiple of the {unit} that share a key/value head "
                    f"(nearest: {down}, {min(full, down + unit)})"
                )
            numbers.add(number)
        return tuple(sorted(numbers, reverse=True))


def _overlaps(groups: Sequence[Group]) -> list[str]:
    """Layers whose rank, and widths, that two groups choose; or groups that cannot be told apart."""
    owners: dict[str, list[str]] = defaultdict(list)
    for group in groups:
        for name in (*group.layers, *(width.name for width in group.widths)):
            owners[name].append(group.name)
    names = [group.name for group in groups]
    faults = [f"{name} is in {' and '.join(mine)}" for name, mine in owners.items() if len(mine) > 1]
    return faults or [f"two groups are called {name}" for name in {*names} if names.count(name) > 1]


def _ends(name: str, end: str) -> bool:
    return name == end or name.endswith(f".{end}")


def _block(name: str) -> int:
    """The index of the transformer layer in a layer's name, −1 outside."""
    found = re.search(r"\.(\d+)\.", name)
    return int(found[1]) if found else -1
