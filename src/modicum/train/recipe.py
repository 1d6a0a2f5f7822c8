"""The recipe: one YAML that says what to train on what, checked before anything is loaded."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from modicum.data.options import DataOptions, Section, Task
from modicum.errors import ConfigError, did_you_mean
from modicum.evaluate.metrics import LARGER_IS_BETTER, TASK_METRICS
from modicum.models.loading import Dtype  # noqa: TC001, pydantic reads it at run time
from modicum.search.options import SearchOptions
from modicum.search.spec import read_space
from modicum.train import defaults
from modicum.train.methods import option_faults
from modicum.train.options import TrainOptions
from modicum.train.stages import AFTER, BEFORE, ElasticOptions, ExtractOptions, MergeOptions, stage_faults
from modicum.train.yaml_lines import Lines, read_yaml_file, yaml_value

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


class ModelOptions(Section):
    """The base model and what it is for."""

    name_or_path: str = Field(description="Folder, hub name, or 'embedded' for the model inside modicum.")
    task: Task = Field("causal_lm", description="Language modelling, classification or regression of texts.")
    dtype: Dtype = Field(
        "auto",
        description="Number type of the base weights; 'auto': the checkpoint's on a GPU, else float32.",
    )
    num_labels: int | None = Field(
        None, ge=2, description="Number of classes; counted in the data when unset."
    )
    revision: str | None = Field(None, description="Revision of a hub model.")
    trust_remote_code: bool = Field(False, description="Run code that a hub model brings along.")
    attn_implementation: str | None = Field(None, description="Attention kernel, e.g. 'sdpa' or 'eager'.")


class MethodOptions(BaseModel):
    """The method and its own options, which are the fields of its PEFT config."""

    model_config = ConfigDict(extra="allow", frozen=True)

    name: str = Field(
        "lora_xs", description="A method of modicum, lora, dora, vera, tiny_lora, psoft, or full."
    )

    @property
    def options(self) -> dict[str, Any]:
        """The method's options, without its name."""
        return dict(self.model_extra or {})


class SweepOptions(Section):
    """Learning rates x seeds. The rate is chosen on validation; test sees the chosen one only."""

    learning_rate: list[float] = Field(
        default_factory=list, description="Rates to try; the recipe's own when empty."
    )
    seeds: list[int] = Field(default_factory=lambda: [0], min_length=1, description="Seeds to train with.")
    select_on: Literal["all_seeds", "first_seed"] = Field(
        "all_seeds",
        description="Choose the rate on the mean over all seeds, or cheaply on the first seed alone.",
    )
    confidence: float = Field(0.95, gt=0, lt=1, description="Confidence of the intervals over seeds.")


#: sections that may be absent
_SECTIONS = {
    "sweep": SweepOptions,
    "elastic": ElasticOptions,
    "search": SearchOptions,
    "extract": ExtractOptions,
    "merge": MergeOptions,
}


class Recipe(Section):
    """Everything a training run depends on, and the stages that `modicum run` puts around it."""

    model: ModelOptions
    sparsify: dict[str, Any] | None = Field(
        None, description="Zero weights of the base model first; the options of `modicum sparsify`."
    )
    reorder: dict[str, Any] | None = Field(
        None, description="Then put channels and heads in order; the options of `modicum reorder`."
    )
    quantize: dict[str, Any] | None = Field(
        None, description="Then quantize it; the options of `modicum quantize`."
    )
    data: DataOptions
    method: MethodOptions = Field(default_factory=lambda: MethodOptions(name="lora_xs"))
    train: TrainOptions = Field(default_factory=TrainOptions)  # pyright: ignore[reportArgumentType]
    elastic: ElasticOptions | None = None
    sweep: SweepOptions | None = None
    search: SearchOptions | None = None
    extract: ExtractOptions | None = None
    merge: MergeOptions | None = None
    export: list[str] = Field(default_factory=list, description="Formats to export the merged model to.")
    output: str | None = Field(None, description="Folder of the results; runs/NAME-OF-THE-RECIPE when unset.")

    @property
    def learning_rate(self) -> float:
        """The peak learning rate, given or by method and rank."""
        rank = self.method.options.get("r")
        return self.train.learning_rate or defaults.learning_rate(self.method.name, self.model.task, rank)

    @property
    def head_learning_rate(self) -> float:
        """The peak learning rate of the head, given or by method."""
        return self.train.head_learning_rate or defaults.head_learning_rate(
            self.method.name, self.learning_rate
        )

    @property
    def metric(self) -> str:
        """The metric that selects: given or the first one of the task."""
        return self.train.metric or TASK_METRICS[self.model.task][0]

    @property
    def larger_is_better(self) -> bool:
        """Whether larger values of `metric` are better."""
        return LARGER_IS_BETTER[self.metric]

    @property
    def folder(self) -> Path:
        """The folder of the results."""
        return (
            Path(self.output).expanduser()
            if self.output
            else Path("runs") / f"{self.method.name}-{self.digest()}"
        )

    def digest(self) -> str:
        """16 hex digits over everything that changes the numbers: all but where results and logs go."""
        values = self.model_dump(
            mode="json",
            exclude={**dict.fromkeys(AFTER, True), "output": True, "train": {"report_to", "logging_steps"}},
        )
        values["train"] |= {
            "learning_rate": self.learning_rate,
            "head_learning_rate": self.head_learning_rate,
        }
        return hashlib.blake2b(json.dumps(values, sort_keys=True).encode(), digest_size=8).hexdigest()

    def with_values(self, **changes: Any) -> Recipe:
        """This recipe with other values, dots as double underscores: `train__seed=1, output='x'`."""
        values = self.model_dump(exclude_unset=True)
        for path, value in changes.items():
            _put(values, path.split("__"), value, path)
        return make_recipe(values)

    def to_yaml(self) -> str:
        """The recipe as YAML, without values left at their default."""
        import yaml

        return yaml.safe_dump(
            self.model_dump(mode="json", exclude_unset=True), sort_keys=False, allow_unicode=True
        )


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe at `path` with `overrides` such as `train.seed=1`, whose values are read as YAML.

    Raises:
        ConfigError: everything that is wrong, with lines and the nearest right names.
    """
    file = Path(path)
    values, lines = read_yaml_file(file, "recipe")
    if not isinstance(values, dict):
        raise ConfigError(f"{file}: a recipe is a mapping of sections: {', '.join(Recipe.model_fields)}")
    values.setdefault("output", f"runs/{file.stem}")
    for override in overrides:
        name, equals, value = override.partition("=")
        if not equals or not all(name.strip().split(".")):
            raise ConfigError(f"cannot read the override {override!r}; write section.name=value")
        _put(values, name.strip().split("."), yaml_value(value), override)
    return make_recipe(values, str(file), lines)


def make_recipe(values: Mapping[str, Any], name: str = "recipe", lines: Lines | None = None) -> Recipe:
    """The recipe of nested `values`.

    Raises:
        ConfigError: everything that is wrong, with lines where known and the nearest right names.
    """
    faults: list[tuple[tuple[str | int, ...], str]] = []
    recipe = None
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        faults += [(fault["loc"], _worded(fault)) for fault in error.errors()]
    method = values.get("method", {})
    if isinstance(method, dict) and isinstance(method.get("name", "lora_xs"), str):
        options = {key: value for key, value in method.items() if key != "name"}
        wrong = option_faults(method.get("name", "lora_xs"), options)
        faults += [(("method", key), message) for key, message in wrong.items()]
    if recipe is not None:
        faults += [*_cross_faults(recipe), *_stage_faults(recipe)]
    if faults or recipe is None:
        raise ConfigError("\n".join(located(name, loc, message, lines or {}) for loc, message in faults))
    return recipe


def json_schema() -> dict[str, Any]:
    """The JSON schema of a recipe, for docs and editors."""
    return Recipe.model_json_schema()


def _stage_faults(recipe: Recipe) -> list[tuple[tuple[str | int, ...], str]]:
    found = stage_faults({name: getattr(recipe, name) for name in BEFORE}, recipe.export)
    faults: list[tuple[tuple[str | int, ...], str]] = [
        (tuple(p.split(".")), said) for p, said in found.items()
    ]
    if recipe.export and recipe.merge is None and recipe.extract is None:
        faults.append((("export",), "export needs the section merge or extract: what it writes is exported"))
    if recipe.merge is not None and recipe.extract is not None:
        faults.append(
            (("extract",), "extract merges the adapter on the way out: leave the section merge out")
        )
    if recipe.search is not None:
        metrics = [*TASK_METRICS[recipe.model.task], "exact_match"]
        faults += [(("search",), fault) for fault in recipe.search.faults(recipe.metric, metrics)]
    alone = [name for name in ("search", "extract") if getattr(recipe, name) is not None]
    if alone and recipe.elastic is None:
        faults.append(
            ((alone[0],), f"{' and '.join(alone)} needs the section elastic, which trains sub-networks")
        )
    return faults


def _cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def _put(values: dict[str, Any], keys: Sequence[str], value: Any, shown: str) -> None:
    for key in keys[:-1]:
        below = values.get(key)
        values[key] = dict(below) if isinstance(below, dict) else {}
        if below is not None and not isinstance(below, dict):
            raise ConfigError(f"{shown!r} goes below {key!r}, which is no section")
        values = values[key]
    values[keys[-1]] = value


def _worded(fault: Any) -> str:
    path = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "extra_forbidden":
        known = _names_at(fault["loc"][:-1])
        return f"no option {path!r}{did_you_mean(str(fault['loc'][-1]), known)}; known: {', '.join(known)}"
    if fault["type"] == "missing":
        return f"{path} is missing"
    return f"{path} = {fault['input']!r}: {fault['msg'][0].lower()}{fault['msg'][1:]}"


def _names_at(loc: tuple[str | int, ...]) -> list[str]:
    section: Any = Recipe
    for part in loc:
        kind = section.model_fields[part].annotation
        section = {"sweep": SweepOptions, "merge": MergeOptions, "elastic": ElasticOptions}.get(
            str(part), kind
        )
    return list(section.model_fields)


def located(name: str, loc: tuple[str | int, ...], message: str, lines: Lines) -> str:
    """`message` with the file's name and the line of `loc`, or of the nearest thing around it that has one."""
    line = next((lines[loc[:end]] for end in range(len(loc), 0, -1) if loc[:end] in lines), None)
    return f"{name}:{line}: {message}" if line else f"{name}: {message}"


def _cross_faults(recipe: Recipe) -> list[tuple[tuple[str | int, ...], str]]:
    train, data, task = recipe.train, recipe.data, recipe.model.task
    faults: list[tuple[tuple[str | int, ...], str]] = []
    if data.train is None:
        faults.append((("data", "train"), "data.train is missing: name the training rows"))
    if train.bf16 and train.fp16:
        faults.append((("train", "fp16"), "train.bf16 and train.fp16 exclude each other"))
    if data.packing and task != "causal_lm":
        faults.append((("data", "packing"), f"data.packing is for causal_lm, the task is {task}"))
    if recipe.model.num_labels is not None and task != "seq_cls":
        faults.append((("model", "num_labels"), f"model.num_labels is for seq_cls, the task is {task}"))
    if train.metric is not None and train.metric not in TASK_METRICS[task]:
        known = TASK_METRICS[task]
        hint = did_you_mean(train.metric, known)
        faults.append(
            (("train", "metric"), f"{task} has no metric {train.metric!r}{hint}; known: {', '.join(known)}")
        )
    if recipe.elastic is not None:
        faults += [(("elastic",), fault) for fault in _elastic_faults(recipe)]
    if train.optim.startswith("paged") and not _cuda():
        faults.append(
            (
                ("train", "optim"),
                f"train.optim = {train.optim!r} pages between a GPU and the host, and there is no GPU",
            )
        )
    return [*faults, *_sweep_faults(recipe.sweep)]


def _sweep_faults(sweep: SweepOptions | None) -> list[tuple[tuple[str | int, ...], str]]:
    faults: list[tuple[tuple[str | int, ...], str]] = []
    if sweep is None:
        return faults
    wrong = [rate for rate in sweep.learning_rate if rate <= 0]
    twice = len(set(sweep.seeds)) < len(sweep.seeds)
    if wrong:
        faults.append((("sweep", "learning_rate"), f"sweep.learning_rate holds {wrong}, must be above 0"))
    if twice:
        faults.append((("sweep", "seeds"), "sweep.seeds holds a seed twice, which would count one run twice"))
    return faults


def _elastic_faults(recipe: Recipe) -> list[str]:
    from modicum.adapters import registry

    options, name = recipe.elastic, recipe.method.name
    assert options is not None
    faults = []
    if name not in registry.names() or not registry.get(name).elastic:
        elastic = [method for method in registry.names() if registry.get(method).elastic]
        faults.append(f"the method {name} has no sub-networks; those that have: {', '.join(elastic)}")
    if options.distill and (options.sampling != "sandwich" or recipe.model.task == "regression"):
        faults.append(
            "elastic.distill needs sampling: sandwich, and a task whose predictions are probabilities"
        )
    try:
        read_space(options.space)
    except ConfigError as error:
        faults.append(str(error))
    return faults
