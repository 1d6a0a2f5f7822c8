"""What a fleet trains: one YAML, checked as a whole before anything is read."""

from __future__ import annotations

import hashlib
import json
import string
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, ValidationError

from modicum.data.options import DataOptions, Section
from modicum.errors import ConfigError, did_you_mean, listing
from modicum.evaluate.metrics import LARGER_IS_BETTER
from modicum.fleet.adamw import Scheduler  # noqa: TC001, pydantic reads it at run time
from modicum.store.numbers import VALUE_DTYPES
from modicum.train import defaults
from modicum.train.methods import option_faults
from modicum.train.recipe import MethodOptions, ModelOptions, located
from modicum.train.yaml_lines import Lines, read_yaml_file, yaml_value

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    Faults = list[tuple[tuple[str | int, ...], str]]

#: metrics a user can be judged by, the first one unless another is named
METRICS = {"causal_lm": ("loss", "token_accuracy"), "seq_cls": ("loss", "accuracy")}
#: what names of adapters are made of
FIELDS = ("user", "slug", "digest")
#: options of data that are about one file of rows, not about users
_NOT_HERE = (
    "train", "validation", "test", "validation_fraction", "hub_config", "max_rows", "max_eval_rows", "group_by_length",
)  # fmt: skip
#: options of methods that a cohort cannot have, and why
_NO_OPTION = {
    "dropout": "what is dropped would depend on who shares a batch",
    "lora_dropout": "what is dropped would depend on who shares a batch",
    "modules_to_save": "whole modules are not stacked; users share the head of the base model",
    "bias": "biases are not stacked",
    "use_dora": "cohorts train plain LoRA",
    "rank_pattern": "ranks of users are set in `ranks`",
    "alpha_pattern": "all layers of a cohort share one scaling",
    "init_lora_weights": "cohorts start as plain LoRA does",
}


class UsersOptions(Section):
    """Whose rows there are, and which of them are kept to judge by."""

    source: str = Field(
        description="One table (.jsonl, .json, .csv, .parquet; .gz and .xz too), or a folder of such files."
    )
    column: str | None = Field(
        "user", description="Column with the user's id; null: every file is one user, called as the file is."
    )
    join_files: bool = Field(
        False, description="Rows of one id in several files are one user's; else such a user is reported."
    )
    held_out: float = Field(
        0.2,
        ge=0,
        lt=1,
        description="Share of each user's rows, at least one, that says when to stop and whether to keep the adapter.",
    )
    test: float = Field(
        0.0, ge=0, lt=1, description="Share of each user's rows, at least one, that decides nothing."
    )


class TrainOptions(Section):
    """How every user is trained; names and meanings are those of a recipe."""

    epochs: float = Field(3.0, gt=0, description="Passes of a user over its own rows.")
    min_steps: int = Field(10, ge=1, description="Steps that users with few rows make nevertheless.")
    max_steps: int | None = Field(None, ge=1, description="Steps at which users with many rows end.")
    batch_size: int = Field(8, ge=1, description="Rows of one user in a step.")
    learning_rate: float | None = Field(None, gt=0, description="Peak learning rate; by method when unset.")
    scheduler: Scheduler = Field("linear", description="Learning-rate schedule over a user's own steps.")
    warmup_ratio: float = Field(0.06, ge=0, lt=1, description="Share of a user's steps that warm up.")
    weight_decay: float = Field(0.0, ge=0, description="Weight decay.")
    max_grad_norm: float = Field(
        1.0, ge=0, description="Gradient norm of a user above which it is scaled; 0: never."
    )
    seed: int = Field(0, ge=0, description="Seed of the adapters' start and of the row order.")
    evaluations: int = Field(4, ge=1, description="How often a user's held-out rows are looked at.")
    early_stopping_patience: int | None = Field(
        None, ge=1, description="Evaluations without gain after which a user stops."
    )
    metric: str | None = Field(None, description="Metric on held-out rows that decides; loss when unset.")
    device: Literal["auto", "cpu"] = Field("auto", description="Where to train.")
    tokens_per_pass: int | None = Field(
        None,
        ge=1,
        description="Tokens of a forward pass, padding counted; by the memory there is when unset.",
    )
    cohort_size: int | None = Field(
        None, ge=1, description="Users that train at the same time; by the memory there is when unset."
    )


class StoreOptions(Section):
    """Where finished adapters go."""

    path: str = Field(description="The store: a folder, made if need be, or an address of PostgreSQL.")
    name: str = Field("{user}", description="Name of a user's adapter, of {user}, {slug} and {digest}.")
    alias: str | None = Field(None, description="Alias that is moved to every new version, e.g. production.")
    tags: list[str] = Field(default_factory=list, description="Tags of every new version.")
    dtype: str = Field("bfloat16", description="Type the numbers are stored in.")
    start_from: str | None = Field(
        None,
        description="Alias (or 'latest') of a user's adapter to go on from, where there is one; it becomes the parent.",
    )


class FleetSpec(Section):
    """Everything that the training of a fleet depends on."""

    model: ModelOptions
    users: UsersOptions
    data: DataOptions = Field(default_factory=DataOptions)  # pyright: ignore[reportArgumentType]
    method: MethodOptions = Field(default_factory=lambda: MethodOptions(name="lora_xs"))
    ranks: dict[int, int] = Field(
        default_factory=dict,
        description="Rows -> rank: of lora, the rank of users with at least so many rows in all; else method.r.",
    )
    train: TrainOptions = Field(default_factory=TrainOptions)  # pyright: ignore[reportArgumentType]
    store: StoreOptions
    output: str | None = Field(None, description="Folder of the job; runs/NAME-OF-THE-FILE when unset.")

    @property
    def folder(self) -> Path:
        """The folder of the job."""
        return Path(self.output or f"runs/fleet-{self.digest()}").expanduser()

    @property
    def rank(self) -> int:
        """The rank of users that `ranks` gives none."""
        given = self.method.options.get("r")
        return given if isinstance(given, int) else {"lora_xs": 16, "lora": 8}.get(self.method.name, 16)

    @property
    def all_ranks(self) -> list[int]:
        """Every rank that a user may have."""
        return sorted({self.rank, *self.ranks.values()})

    def rank_of(self, rows: int) -> int:
        """The rank of a user with so many rows."""
        reached = [least for least in self.ranks if rows >= least]
        return self.ranks[max(reached)] if reached else self.rank

    @property
    def num_labels(self) -> int | None:
        """The number of classes, None for language modelling."""
        if self.model.task != "seq_cls":
            return None
        return self.model.num_labels or len(self.data.label_names or ()) or None

    @property
    def learning_rate(self) -> float:
        """The peak learning rate, given or by method and rank."""
        return self.train.learning_rate or defaults.learning_rate(
            self.method.name, self.model.task, self.rank
        )

    @property
    def metric(self) -> str:
        """The metric that decides."""
        return self.train.metric or METRICS[self.model.task][0]

    @property
    def larger_is_better(self) -> bool:
        """Whether larger values of `metric` are better."""
        return LARGER_IS_BETTER[self.metric]

    def digest(self) -> str:
        """16 hex digits over everything that changes the numbers."""
        sizes = ("tokens_per_pass", "cohort_size")
        values = self.model_dump(mode="json", exclude={"output": True, "store": True, "train": set(sizes)})
        values["store"] = {"dtype": self.store.dtype, "start_from": self.store.start_from}
        values["train"]["learning_rate"] = self.learning_rate
        return hashlib.blake2b(json.dumps(values, sort_keys=True).encode(), digest_size=8).hexdigest()

    def to_yaml(self) -> str:
        """The specification as YAML, without values left at their default."""
        import yaml

        return yaml.safe_dump(
            self.model_dump(mode="json", exclude_unset=True), sort_keys=False, allow_unicode=True
        )


def load_fleet(path: str | Path, overrides: Sequence[str] = ()) -> FleetSpec:
    """The specification at `path` with `overrides` such as `train.seed=1`, whose values are read as YAML.

    Raises:
        ConfigError: everything that is wrong, with lines and the nearest right names.
    """
    file = Path(path)
    values, lines = read_yaml_file(file, "fleet")
    if not isinstance(values, dict):
        raise ConfigError(f"{file}: a fleet is a mapping of sections: {', '.join(FleetSpec.model_fields)}")
    values.setdefault("output", f"runs/{file.stem}")
    for override in overrides:
        name, equals, value = override.partition("=")
        keys = name.strip().split(".")
        if not equals or not all(keys):
            raise ConfigError(f"cannot read the override {override!r}; write section.name=value")
        section = values
        for key in keys[:-1]:
            section = section.setdefault(key, {})
            if not isinstance(section, dict):
                raise ConfigError(f"{override!r} goes below {key!r}, which is no section")
        section[keys[-1]] = yaml_value(value)
    return make_fleet(values, str(file), lines)


def make_fleet(values: Mapping[str, Any], name: str = "fleet", lines: Lines | None = None) -> FleetSpec:
    """The specification of nested `values`.

    Raises:
        ConfigError: everything that is wrong, with lines where known and the nearest right names.
    """
    faults: Faults = []
    spec = None
    try:
        spec = FleetSpec.model_validate(values)
    except ValidationError as error:
        faults += [(fault["loc"], _worded(fault)) for fault in error.errors()]
    method = values.get("method", {})
    if isinstance(method, dict):
        faults += _method_faults(method)
    if spec is not None:
        faults += _cross_faults(spec)
    if faults or spec is None:
        raise ConfigError("\n".join(located(name, loc, said, lines or {}) for loc, said in faults))
    return spec


def _method_faults(method: Mapping[str, Any]) -> Faults:
    name = method.get("name", "lora_xs")
    if name not in ("lora_xs", "lora"):
        near = did_you_mean(str(name), ("lora_xs", "lora"))
        return [(("method", "name"), f"no cohorts of {name!r}{near}; lora_xs, or lora at a higher cost")]
    options = {key: value for key, value in method.items() if key != "name"}
    faults: Faults = [(("method", key), said) for key, said in option_faults(name, options).items()]
    for key, why in _NO_OPTION.items():
        if options.get(key):
            faults.append((("method", key), f"method.{key} = {options[key]!r}: {why}"))
    return faults


def _cross_faults(spec: FleetSpec) -> Faults:
    data, users, train, task = spec.data, spec.users, spec.train, spec.model.task
    faults: Faults = [
        (("data", key), f"data.{key} has no meaning for users; see the section users")
        for key in sorted(data.model_fields_set & set(_NOT_HERE))
    ]
    if task not in METRICS:
        faults.append((("model", "task"), f"fleets train {' and '.join(METRICS)}, not {task}"))
    elif train.metric is not None and train.metric not in METRICS[task]:
        hint = did_you_mean(train.metric, METRICS[task])
        known = ", ".join(METRICS[task])
        faults.append((("train", "metric"), f"no metric {train.metric!r}{hint} for users; known: {known}"))
    if task == "seq_cls" and spec.num_labels is None:
        faults.append(
            (("model", "num_labels"), "set model.num_labels, or data.label_names: the head has one size")
        )
    if users.held_out + users.test >= 1:
        faults.append((("users", "test"), "users.held_out and users.test leave nothing to train on"))
    if train.early_stopping_patience and not users.held_out:
        faults.append(
            (("train", "early_stopping_patience"), "early stopping needs held-out rows: set users.held_out")
        )
    if train.max_steps and train.min_steps > train.max_steps:
        faults.append((("train", "min_steps"), "train.min_steps is above train.max_steps"))
    if spec.ranks and spec.method.name != "lora":
        faults.append((("ranks",), "ranks by rows are for lora; adapters of lora_xs share one rank"))
    if any(least < 0 or rank < 1 for least, rank in spec.ranks.items()):
        faults.append((("ranks",), "ranks maps numbers of rows, from 0 on, to ranks, from 1 on"))
    return [*faults, *_store_faults(spec.store)]


def _store_faults(store: StoreOptions) -> Faults:
    faults: Faults = []
    if store.dtype not in VALUE_DTYPES:
        known = ", ".join(VALUE_DTYPES)
        hint = did_you_mean(store.dtype, VALUE_DTYPES)
        faults.append((("store", "dtype"), f"store.dtype = {store.dtype!r}{hint}; known: {known}"))
    try:
        found = [field for _, field, _, _ in string.Formatter().parse(store.name) if field is not None]
    except ValueError as error:
        return [*faults, (("store", "name"), f"store.name {store.name!r} cannot be read: {error}")]
    wrong = [f"{{{field}}}{did_you_mean(field, FIELDS)}" for field in found if field not in FIELDS]
    if wrong or not found:
        what = f"has {listing(wrong)}" if wrong else "gives every user one name"
        known = ", ".join(f"{{{field}}}" for field in FIELDS)
        faults.append((("store", "name"), f"store.name {store.name!r} {what}; known: {known}"))
    return faults


def _worded(fault: Any) -> str:
    path = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "extra_forbidden":
        section: Any = FleetSpec
        for part in fault["loc"][:-1]:
            section = section.model_fields[part].annotation
        known = list(section.model_fields)
        return f"no option {path!r}{did_you_mean(str(fault['loc'][-1]), known)}; known: {', '.join(known)}"
    if fault["type"] == "missing":
        return f"{path} is missing"
    return f"{path} = {fault['input']!r}: {fault['msg'][0].lower()}{fault['msg'][1:]}"
