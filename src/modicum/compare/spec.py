"""What is compared: one YAML, checked as a whole before anything is trained."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from modicum.compare.cells import Cell, cells_of, method_faults
from modicum.data.options import Section
from modicum.errors import ConfigError, did_you_mean
from modicum.evaluate.resources import Prices
from modicum.train.recipe import Recipe, TrainOptions, load_recipe, located, make_recipe
from modicum.train.stages import BEFORE, STAGES, stage_faults
from modicum.train.yaml_lines import Lines, read_yaml_file

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    Faults = list[tuple[tuple[str | int, ...], str]]

#: of the recipe's train section, what a method may have of its own; the rest is the budget that all methods share
OWN = (
    "head_learning_rate", "scheduler", "warmup_ratio", "weight_decay", "max_grad_norm", "optim", "bf16", "fp16",
    "gradient_checkpointing", "use_reentrant",
)  # fmt: skip
#: sections of the recipe that a comparison sets itself
_SET = ("method", "sweep", "output")
#: names become folders
_NAME = re.compile(r"[\w][\w.+-]*")


class MethodEntry(BaseModel):
    """One method of a comparison; options beside these are the method's own."""

    model_config = ConfigDict(extra="allow", frozen=True)

    name: str | None = Field(None, description="The method; the label when unset.")
    ranks: list[int] | None = Field(None, description="Values of the option r, a cell each.")
    learning_rate: list[float] = Field(
        default_factory=list,
        description="Rates to sweep; those of the comparison, or a quarter, one and four times the default.",
    )
    only: list[str] | None = Field(None, description="Compressions to train on; all when unset.")
    train: dict[str, Any] = Field(
        default_factory=dict, description=f"What differs for this method in train: {', '.join(OWN)}."
    )

    @property
    def options(self) -> dict[str, Any]:
        """The method's own options."""
        return dict(self.model_extra or {})

    def method(self, label: str) -> str:
        """The method's name."""
        return self.name or label


class CompareOptions(Section):
    """A comparison as it is written."""

    name: str | None = Field(None, description="Title of the reports; the file's name when unset.")
    recipe: str | dict[str, Any] = Field(
        description="Model, data and budget that all cells share: a recipe, or the path of one from this file on."
    )
    methods: dict[str, MethodEntry] = Field(min_length=1, description="Label -> method.")
    compressions: dict[str, dict[str, Any]] = Field(
        default_factory=lambda: {"none": {}},
        min_length=1,
        description="Name -> what is done to the base first: sections sparsify, reorder, quantize of a recipe.",
    )
    learning_rate: list[float] = Field(
        default_factory=list, description="Rates to sweep for methods that name none."
    )
    seeds: list[int] = Field(
        default_factory=lambda: [0, 1, 2], min_length=1, description="Seeds of all cells."
    )
    select_on: Literal["all_seeds", "first_seed"] = Field(
        "all_seeds",
        description="Choose each rate on the mean over all seeds, or cheaply on the first seed alone.",
    )
    confidence: float = Field(0.95, gt=0, lt=1, description="Confidence of the intervals over seeds.")
    prices: dict[str, Any] | None = Field(
        None, description="What the runs cost: cpu_hour, gpu_hour, gb_month, kwh, and their currency."
    )
    workers: int = Field(1, ge=1, description="Runs at the same time, each in a process of its own.")
    threads: int | None = Field(
        None, ge=1, description="Threads of a run; the cores over the workers when unset."
    )
    output: str | None = Field(None, description="Folder of the results; runs/NAME-OF-THE-FILE when unset.")

    @field_validator("methods", "compressions", mode="before")
    @classmethod
    def _nothing_is_empty(cls, value: Any) -> Any:
        """`lora_xs:` with nothing behind it is an empty mapping."""
        if not isinstance(value, dict):
            return value
        return {key: {} if entry is None else entry for key, entry in value.items()}


@dataclass(frozen=True)
class Spec:
    """A comparison that has been checked."""

    options: CompareOptions
    #: model, data and budget of all cells
    recipe: Recipe

    @property
    def name(self) -> str:
        """The title."""
        return self.options.name or self.folder.name

    @property
    def folder(self) -> Path:
        """The folder of the results."""
        return Path(self.options.output or "runs/comparison").expanduser()

    @property
    def cells(self) -> list[Cell]:
        """All cells, in the order of the tables."""
        return cells_of(self.options, self.recipe.model.task)

    def with_options(self, **changes: Any) -> Spec:
        """This comparison with some options changed."""
        return Spec(self.options.model_copy(update=changes), self.recipe)

    def values(self) -> dict[str, Any]:
        """The comparison as plain values, the recipe within; what was left at its default is not named."""
        recipe = self.recipe.model_dump(mode="json", exclude_unset=True, exclude=dict.fromkeys(_SET, True))
        return {**self.options.model_dump(mode="json", exclude_unset=True), "recipe": recipe}

    def to_yaml(self) -> str:
        """The comparison as YAML, the recipe within."""
        import yaml

        return yaml.safe_dump(self.values(), sort_keys=False, allow_unicode=True)

    def identity(self) -> dict[str, Any]:
        """Everything that changes the numbers, as plain values: not the name, the prices, the workers, the folder."""
        free = {"name", "prices", "workers", "output", "recipe"}
        recipe = self.recipe.model_dump(mode="json", exclude={**dict.fromkeys((*_SET, *STAGES), True)})
        for name in ("report_to", "logging_steps", "learning_rate", "seed", "evaluate_before", "num_workers"):
            recipe["train"].pop(name)
        return {"recipe": recipe, **self.options.model_dump(mode="json", exclude=free)}

    def digest(self) -> str:
        """16 hex digits over the identity."""
        text = json.dumps(self.identity(), sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def load_comparison(path: str | Path) -> Spec:
    """The comparison at `path`.

    Raises:
        ConfigError: everything that is wrong with it and with its recipe, with lines and the nearest right names.
    """
    file = Path(path)
    values, lines = read_yaml_file(file, "comparison")
    if not isinstance(values, dict):
        raise ConfigError(f"{file}: a comparison is a mapping: {', '.join(CompareOptions.model_fields)}")
    values.setdefault("name", file.stem)
    values.setdefault("output", f"runs/{file.stem}")
    return make_comparison(values, str(file), lines)


def make_comparison(values: Mapping[str, Any], name: str = "comparison", lines: Lines | None = None) -> Spec:
    """The comparison of nested `values`; paths of recipes are seen from the folder of the file `name`.

    Raises:
        ConfigError: everything that is wrong, with lines where known and the nearest right names.
    """
    lines, said, options = lines or {}, [], None
    faults: Faults = []
    try:
        options = CompareOptions.model_validate(values)
    except ValidationError as error:
        faults += [(fault["loc"], _worded(fault)) for fault in error.errors()]
        options = _rest(values, [fault["loc"] for fault in error.errors()])
    recipe = None
    try:
        recipe = _recipe(values.get("recipe"), name, lines)
    except ConfigError as error:
        said = str(error).splitlines()
    if recipe is not None:
        faults += _recipe_faults(recipe)
    if options is not None:
        faults += [*_option_faults(options), *method_faults(options)]
    if faults or said or options is None or recipe is None:
        raise ConfigError(
            "\n".join([*(located(name, loc, message, lines) for loc, message in faults), *said])
        )
    return Spec(options, recipe)


def _rest(values: Mapping[str, Any], wrong: Sequence[tuple[int | str, ...]]) -> CompareOptions | None:
    """The comparison without what is wrong, so that the rest is checked too; None where too little is left."""
    left = {key: dict(value) if isinstance(value, dict) else value for key, value in values.items()}
    for section, *below in wrong:
        if section in ("methods", "compressions") and below and isinstance(left[section], dict):
            left[section].pop(below[0], None)
        else:
            left.pop(str(section), None)
    try:
        return CompareOptions.model_validate(left)
    except ValidationError:
        return None


def _recipe(value: Any, name: str, lines: Lines) -> Recipe | None:
    if isinstance(value, str):
        return load_recipe(Path(name).parent / value)
    if not isinstance(value, dict):
        return None  # the schema says so
    below = {loc[1:]: line for loc, line in lines.items() if loc[:1] == ("recipe",) and len(loc) > 1}
    return make_recipe(value, name, below)


def _recipe_faults(recipe: Recipe) -> Faults:
    faults: Faults = []
    for stage in (*STAGES, "elastic"):
        if getattr(recipe, stage) in (None, []):
            continue
        where = "put it into compressions" if stage in BEFORE else "a comparison ends with training"
        faults.append(
            (
                ("recipe", stage),
                f"the recipe has the section {stage}: {where}, and leave it out of the recipe",
            )
        )
    return faults


def _option_faults(options: CompareOptions) -> Faults:
    faults: Faults = []
    if len(set(options.seeds)) < len(options.seeds):
        faults.append((("seeds",), "seeds holds a seed twice, which would count one run twice"))
    if any(seed < 0 for seed in options.seeds):
        faults.append((("seeds",), f"seeds = {options.seeds}, must be at least 0"))
    faults += [(("learning_rate",), fault) for fault in _rate_faults(options.learning_rate)]
    try:
        Prices.of(options.prices or {"currency": "none"})
    except ConfigError as error:
        faults.append((("prices",), str(error)))
    for section in ("methods", "compressions"):
        faults += [
            ((section, label), f"{section}: {label!r} becomes a folder: letters, digits and . _ + - only")
            for label in getattr(options, section)
            if not _NAME.fullmatch(label)
        ]
    for label, entry in options.methods.items():
        here = ("methods", label)
        faults += [
            ((*here, "learning_rate"), f"{label}: {said}") for said in _rate_faults(entry.learning_rate)
        ]
        faults += _train_faults(here, label, entry.train)
    for name, stages in options.compressions.items():
        faults += _compression_faults(name, stages)
    return faults


def _rate_faults(rates: Sequence[float]) -> list[str]:
    faults = [f"learning_rate holds {rate}, must be above 0" for rate in rates if not rate > 0]
    # runs of the same rate would share a folder
    names = [f"{rate:g}" for rate in rates]
    return faults + ["learning_rate holds a rate twice"] * (len(set(names)) < len(names))


def _train_faults(here: tuple[str, ...], label: str, train: Mapping[str, Any]) -> Faults:
    faults: Faults = []
    for key in train:
        if key in OWN:
            continue
        if key == "learning_rate":
            said = f"name the rates of {label} in methods.{label}.learning_rate"
        elif key in TrainOptions.model_fields:
            said = f"{label}: train.{key} is part of what all methods share: set it in the recipe"
        else:
            said = (
                f"{label}: no option train.{key}{did_you_mean(key, OWN)}; a method may set {', '.join(OWN)}"
            )
        faults.append(((*here, "train", key), said))
    try:
        TrainOptions.model_validate({key: value for key, value in train.items() if key in OWN})
    except ValidationError as error:
        faults += [
            ((*here, "train", *fault["loc"]), f"{label}: train.{_worded(fault)}") for fault in error.errors()
        ]
    return faults


def _compression_faults(name: str, stages: Mapping[str, Any]) -> Faults:
    here = ("compressions", name)
    faults: Faults = [
        (
            (*here, stage),
            f"{name}: no stage {stage!r}{did_you_mean(stage, BEFORE)}; known: {', '.join(BEFORE)}",
        )
        for stage in stages
        if stage not in BEFORE
    ]
    known = {stage: {} if stages[stage] is None else stages[stage] for stage in BEFORE if stage in stages}
    faults += [
        ((*here, stage), f"{name}: {stage} = {value!r}, must be a mapping of its options")
        for stage, value in known.items()
        if not isinstance(value, dict)
    ]
    checked = {stage: value for stage, value in known.items() if isinstance(value, dict)}
    said = stage_faults({stage: checked.get(stage) for stage in BEFORE}, ())
    return faults + [((*here, *path.split(".")), f"{name}: {message}") for path, message in said.items()]


def _worded(fault: Any) -> str:
    path = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "extra_forbidden":
        known = list(CompareOptions.model_fields)
        return f"no option {path!r}{did_you_mean(path, known)}; known: {', '.join(known)}"
    if fault["type"] == "missing":
        return f"{path} is missing"
    return f"{path} = {fault['input']!r}: {fault['msg'][0].lower()}{fault['msg'][1:]}"
