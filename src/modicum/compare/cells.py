"""The cells of a comparison: every method at every rank on every compressed base, each one a sweep of its own."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from modicum.adapters import registry
from modicum.compress.quantize_report import FOREIGN
from modicum.errors import ConfigError, TargetError, did_you_mean, listing
from modicum.models.architecture import meta_model, read_config
from modicum.models.checkpoint import layer_shapes
from modicum.models.counts import BASELINES
from modicum.models.loading import head_names
from modicum.train import defaults
from modicum.train.methods import FULL, make_config, method_names, option_faults

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from modicum.compare.spec import CompareOptions, MethodEntry, Spec
    from modicum.train.recipe import Recipe

    Faults = list[tuple[tuple[str | int, ...], str]]

CELLS = "cells"
#: the learning rates that are swept where none are named: the method's default times these
FACTORS = (0.25, 1.0, 4.0)
#: the option that a rank sets
RANK = "r"


@dataclass(frozen=True)
class Cell:
    """One method at one rank on one base: a sweep over learning rates and seeds."""

    label: str
    method: str
    #: None for a method without
    rank: int | None
    #: the method's options, the rank among them
    options: Mapping[str, Any]
    compression: str
    rates: tuple[float, ...]
    #: what of the recipe's train section is another for this method
    train: Mapping[str, Any] = field(default_factory=dict)

    def __hash__(self) -> int:
        return hash((self.label, self.compression))

    @property
    def name(self) -> str:
        """How messages call the cell."""
        return f"{self.compression}/{self.label}"

    def folder(self, root: Path) -> Path:
        """The folder of its sweep in the comparison's folder."""
        return root / CELLS / self.compression / self.label

    def recipe(self, spec: Spec, base: str) -> Recipe:
        """The recipe of its sweep on the base model at `base`."""
        options, own = spec.options, base == spec.recipe.model.name_or_path
        # the bare model is measured once for all cells
        train = {"evaluate_before": False, **spec.recipe.train.model_dump(exclude_unset=True), **self.train}
        train.pop("learning_rate", None)
        return spec.recipe.with_values(
            model__name_or_path=base,
            **({} if own else {"model__revision": None}),
            method={"name": self.method, **self.options},
            train=train,
            sweep={
                "learning_rate": list(self.rates),
                "seeds": options.seeds,
                "select_on": options.select_on,
                "confidence": options.confidence,
            },
            output=str(self.folder(spec.folder)),
        )


def cells_of(options: CompareOptions, task: str) -> list[Cell]:
    """All cells: base by base, method by method, in the order they are named; full fine-tuning on plain bases only."""
    return [
        cell
        for compression, stages in options.compressions.items()
        for label, entry in options.methods.items()
        if _takes(entry, label, compression, stages)
        for cell in _of_method(options, label, entry, compression, task)
    ]


def _takes(entry: MethodEntry, label: str, compression: str, stages: Mapping[str, Any]) -> bool:
    if entry.only is not None:
        return compression in entry.only
    return entry.method(label) != FULL or not stages


def _of_method(
    options: CompareOptions, label: str, entry: MethodEntry, compression: str, task: str
) -> list[Cell]:
    method, found = entry.method(label), []
    for rank in entry.ranks or [None]:
        values = {**entry.options, **({} if rank is None else {RANK: rank})}
        used = rank if rank is not None else _default_rank(method, values, task)
        rates = entry.learning_rate or options.learning_rate or _grid(method, task, used)
        name = label if rank is None else f"{label} r={rank}"
        found.append(Cell(name, method, used, values, compression, tuple(rates), entry.train))
    return found


def _default_rank(method: str, options: Mapping[str, Any], task: str) -> int | None:
    return None if method == FULL else getattr(make_config(method, options, task), RANK, None)


def _grid(method: str, task: str, rank: int | None) -> list[float]:
    middle = defaults.learning_rate(method, task, rank)
    return [float(f"{factor * middle:.3g}") for factor in FACTORS]


def method_faults(options: CompareOptions) -> Faults:
    """What is wrong with the methods by themselves, each with the path of the option; empty if fine."""
    return [
        fault for label, entry in options.methods.items() for fault in _entry_faults(options, label, entry)
    ]


def _entry_faults(options: CompareOptions, label: str, entry: MethodEntry) -> Faults:
    here, method = ("methods", label), entry.method(label)
    faults: Faults = []
    if method not in method_names():
        hint = did_you_mean(method, method_names())
        # without a name, the label is the method
        place = (*here, "name") if entry.name else here
        return [(place, f"no method {method!r}{hint}; known: {', '.join(method_names())}")]
    if entry.ranks is not None:
        faults += [((*here, "ranks"), f"{label}: {fault}") for fault in _rank_faults(method, entry)]
    ranks = [] if faults else entry.ranks or []
    # one rank after the other, and each fault once
    wrong: dict[str, str] = {}
    for values in [{**entry.options, RANK: rank} for rank in ranks] or [dict(entry.options)]:
        for key, said in option_faults(method, values).items():
            near = did_you_mean(key, type(entry).model_fields) if "no option" in said else ""
            # an option of the comparison is meant more likely than one of the method
            said = f"{method} has no option {key!r}{near}" if near else said  # noqa: PLW2901
            wrong.setdefault("ranks" if key == RANK and ranks else key, said)
    faults += [((*here, key), f"{label}: {said}") for key, said in wrong.items()]
    unknown = [name for name in entry.only or [] if name not in options.compressions]
    faults += [
        ((*here, "only"), f"{label}: no compression {name!r}{did_you_mean(name, options.compressions)}")
        for name in unknown
    ]
    bases = [name for name, stages in options.compressions.items() if _takes(entry, label, name, stages)]
    if not bases and not unknown:
        faults.append((here, f"{label} has no base to train on: {_why_none(method)}"))
    for name in bases:
        fault = _base_fault(method, options.compressions[name])
        if fault:
            faults.append(((*here, "only") if entry.only else here, f"{label} on {name}: {fault}"))
    return faults


def _rank_faults(method: str, entry: MethodEntry) -> list[str]:
    faults, ranks = [], entry.ranks or []
    if method == FULL:
        return ["full fine-tuning has no ranks"]
    if RANK in entry.options:
        faults.append(f"{RANK} and ranks both name the rank: give one of them")
    if len(set(ranks)) < len(ranks) or not ranks:
        faults.append(f"ranks = {ranks}: name each rank once, and at least one")
    return faults


def _why_none(method: str) -> str:
    return "it needs a compression without stages, e.g. none: {}" if method == FULL else "only names none"


def _base_fault(method: str, stages: Mapping[str, Any]) -> str | None:
    if method == FULL:
        return (
            "full fine-tuning trains the base model itself, which a compressed one does not allow"
            if stages
            else None
        )
    if method not in registry.names() or not registry.get(method).on_grid:
        return None
    quantize = stages.get("quantize")
    if not isinstance(quantize, dict):
        return "it trains the codes of a low-bit base: give the compression a section quantize, or name others in only"
    if quantize.get("zero_point", "float") == "float" or quantize.get("algorithm") in FOREIGN:
        return (
            "it trains codes on grids that hold 0: quantize with zero_point: integer, keep_zeros and "
            "keep_residuals, or name other compressions in only"
        )
    return None


def count_values(spec: Spec, cells: Sequence[Cell]) -> tuple[dict[Cell, int], list[str]]:
    """What each cell trains, the head included, by the closed forms on the shapes of the model; and what does not fit.

    The counts of PEFT's methods are those of their default options.
    """
    recipe = spec.recipe
    task = "seq_cls" if recipe.model.task == "regression" else recipe.model.task
    labels = 1 if recipe.model.task == "regression" else recipe.model.num_labels
    model = meta_model(read_config(recipe.model.name_or_path), task, labels)
    heads = head_names(model) if task == "seq_cls" else []
    head = sum(p.numel() for name in heads for p in model.get_submodule(name).parameters())
    whole = sum(p.numel() for p in model.parameters())
    counts, faults, known = {}, [], {}
    for cell in cells:
        key = cell.method, repr(sorted(cell.options.items()))
        if key not in known:
            known[key] = (
                _count(cell, model, recipe.model.task) if cell.method != FULL else (whole - head, None)
            )
            if known[key][1]:
                faults.append(f"{cell.label}: {known[key][1]}")
        counts[cell] = known[key][0] + head
    return counts, faults


def _count(cell: Cell, model: Any, task: str) -> tuple[int, str | None]:
    config = make_config(cell.method, cell.options, task)
    names = ("layers_to_transform", "layers_pattern")
    targets = {name: getattr(config, name, None) for name in names}
    try:
        shapes = layer_shapes(
            model, config.target_modules, exclude=getattr(config, "exclude_modules", None), **targets
        )
    except (ConfigError, TargetError) as error:
        return 0, str(error)
    if cell.method in BASELINES:
        return BASELINES[cell.method].trained(shapes, cell.rank or 0), None
    adapter, count, misfits = registry.get(cell.method), 0, []
    for name, (out, into) in shapes.items():
        rank = config.rank_for(name)
        reason = adapter.misfit(into, out, rank, config)
        misfits += [f"{name} {(out, into)}: {reason}"] if reason else []
        count += 0 if reason else adapter.count(into, out, rank, config)
    return count, f"{cell.method} does not fit {listing(misfits, 3)}" if misfits else None
