"""Every stage of a recipe in order.

sparsify → reorder → quantize → tune → search → extract or merge → export → measure

Each stage leaves a folder of its own in the recipe's output and is passed over when that is there already, so a
run that was cut goes on where it stopped.
"""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from modicum.compress import reorder, sparsify_report, writing
from modicum.compress.export import export_model
from modicum.compress.merge import merge_to_folder
from modicum.compress.quantize import quantize_model
from modicum.compress.quantize_report import FOREIGN
from modicum.compress.reorder import reorder_model
from modicum.compress.sparsify import sparsify_model
from modicum.data.prepare import prepare
from modicum.errors import ConfigError
from modicum.evaluate.run import evaluate
from modicum.models.architecture import read_config
from modicum.models.loading import load_adapted, load_base, load_tokenizer, quiet_transformers
from modicum.store.atomic import write_text
from modicum.train import artifacts
from modicum.train.checks import check_recipe
from modicum.train.methods import FULL
from modicum.train.run import tune
from modicum.train.search import search_run
from modicum.train.stages import STAGES, before_options

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from modicum.data.prepare import Prepared
    from modicum.train.callbacks import Show
    from modicum.train.recipe import Recipe

TUNE, SEARCH, CHOSEN, EXTRACTED, MERGED = "tune", "search", "chosen", "extracted", "merged"
EXPORT, REPORT = "export", "pipeline.json"
#: stage before training -> its folder, what does it, and the report in the folder
_BEFORE: dict[str, tuple[str, Callable[..., Any], str]] = {
    "sparsify": ("sparse", sparsify_model, sparsify_report.REPORT),
    "reorder": ("reordered", reorder_model, reorder.REPORT),
    "quantize": ("base", quantize_model, writing.REPORT),
}
#: rows that the merge error is measured on
_MEASURED = 32


@dataclass(frozen=True)
class PipelineResult:
    """What every stage made and measured."""

    folder: Path
    #: stage -> its report
    report: dict[str, Any]
    #: stages that were there already
    reused: tuple[str, ...]


def run_recipe(
    recipe: Recipe,
    *,
    resume: bool = False,
    overwrite: bool = False,
    show: Show = "none",
    say: Callable[[str], None] = lambda _: None,
) -> PipelineResult:
    """The result of all stages of `recipe`; `say` is told which one begins.

    Raises:
        ConfigError: the folder holds another recipe's results, or stages that make no sense together. Also, before the
            first stage, what `check_recipe` finds.
        InexactMergeError: the merge or an export would lose something and `merge.allow_inexact` is not set.
    """
    if recipe.merge is not None and recipe.method.name == FULL:
        raise ConfigError("full fine-tuning leaves no adapter to merge: drop the section merge")
    if recipe.sweep is not None:
        raise ConfigError(
            "a sweep leaves one adapter for each rate and seed, and the stages go on with one: sweep with `modicum "
            "tune`, then put the best rate into train.learning_rate and drop the section sweep"
        )
    check_recipe(recipe, {stage: folder for stage, (folder, _, _) in _BEFORE.items()}, overwrite=overwrite)
    _claim(recipe, resume=resume, overwrite=overwrite)
    job = _Pipeline(recipe, say)
    with quiet_transformers():
        base = job.base()
        job.tuned(base, resume=resume or bool(job.reused), show=show)
        job.searched()
        job.extracted(base)
        job.merged(base)
        job.exported()
        job.measured(base)
    return PipelineResult(recipe.folder, job.report, tuple(job.reused))


def run_before(stage: str, model: str, folder: Path, values: Mapping[str, Any]) -> None:
    """Make the model folder `folder` of `model` by a stage before training, going on where it was cut off."""
    options = before_options(stage, values)
    begun = folder.with_name(f"{folder.name}.partial").exists()
    # what bitsandbytes makes is made in one go
    way = "overwrite" if getattr(options, "algorithm", None) in FOREIGN else "resume"
    _BEFORE[stage][1](model, folder, options, **({way: True} if begun else {}))


class _Pipeline:
    def __init__(self, recipe: Recipe, say: Callable[[str], None]) -> None:
        self.recipe, self.say, self.folder = recipe, say, recipe.folder
        #: what stages of an earlier run said stays
        self.report: dict[str, Any] = artifacts.read_json(self.folder / REPORT) or {}
        self.reused: list[str] = []
        self.adapter: Path | None = None

    def base(self) -> str:
        """The base model to train on: the recipe's own, made sparse, reordered, quantized as it wants."""
        model = self.recipe.model.name_or_path
        for stage, (name, _, report) in _BEFORE.items():
            values = getattr(self.recipe, stage)
            if values is None:
                continue
            folder = self.folder / name
            if not self._is_there(folder, stage):
                self.say(stage)
                run_before(stage, model, folder, values)
            self._tell(stage, artifacts.read_json(folder / report))
            model = str(folder)
        return model

    def tuned(self, base: str, *, resume: bool, show: Show) -> None:
        """Train on `base`."""
        self.say("tune")
        recipe = self.recipe.with_values(
            model__name_or_path=base,
            output=str(self.folder / TUNE),
            **{**dict.fromkeys(STAGES), "export": []},
        )
        result = tune(recipe, resume=resume or (self.folder / TUNE).exists(), show=show)
        if result.reused:
            self.reused.append(TUNE)
        self.adapter = result.adapter
        self._tell(TUNE, result.report)

    def searched(self) -> None:
        """Search the super-network, and go on with the best sub-network as the active one."""
        options = self.recipe.search
        if options is None:
            return
        from modicum.adapters.elastic import SubNetwork
        from modicum.store.active import with_sub_network

        chosen = self.folder / CHOSEN
        if not self._is_there(chosen, "search", "adapter_config.json"):
            self.say("search")
            found = search_run(self.folder / TUNE, options, self.folder / SEARCH, resume=True)
            values = found.sub_network()
            if values is None:
                raise ConfigError(
                    f"none of the {len(found.points)} sub-networks that were evaluated keeps the budgets; give the "
                    "search more trials or wider budgets"
                )
            assert self.adapter is not None
            with_sub_network(self.adapter, chosen, SubNetwork.read(values))
        self.adapter = chosen
        report = artifacts.read_json(self.folder / SEARCH / "search.json") or {}
        self._tell("search", {key: report.get(key) for key in ("best", "front", "objectives", "whole")})

    def extracted(self, base: str) -> None:
        """Write the active sub-network as a smaller model, if the recipe wants it."""
        options = self.recipe.extract
        if options is None or self._is_there(self.folder / EXTRACTED, "extract"):
            return
        from modicum.compress.extract import extract

        self.say("extract")
        model, tokenizer = self._adapted(base)
        stored = str(read_config(base).dtype or "float32").removeprefix("torch.")
        dtype = stored if options.dtype == "auto" else options.dtype
        texts = self._texts(base)
        result = extract(model, self.folder / EXTRACTED, tokenizer=tokenizer, dtype=dtype, texts=texts)
        self._tell("extract", asdict(result))

    def merged(self, base: str) -> None:
        """Fold the adapter in, if the recipe wants it."""
        options = self.recipe.merge
        if options is None or self._is_there(self.folder / MERGED, "merge"):
            return
        self.say("merge")
        assert self.adapter is not None
        result = merge_to_folder(
            base,
            self.adapter,
            self.folder / MERGED,
            texts=self._texts(base),
            dtype=options.dtype,
            allow_inexact=options.allow_inexact,
        )
        self._tell("merge", asdict(result))

    def exported(self) -> None:
        """Write the merged model in the formats of other engines."""
        for name in self.recipe.export:
            target = self.folder / EXPORT / name
            # a folder, or a file with the ending of its format
            if self._is_there(next(target.parent.glob(f"{name}.*"), target), name, name="*"):
                continue
            self.say(f"export {name}")
            target.parent.mkdir(parents=True, exist_ok=True)
            merged = str(self.folder / (MERGED if self.recipe.extract is None else EXTRACTED))
            allow = self.recipe.merge is not None and self.recipe.merge.allow_inexact
            model = load_base(merged, dtype="float32")
            result = export_model(model, load_tokenizer(merged), target, name, allow)
            self._tell("export", self.report.get("export", {}) | {name: asdict(result)})

    def measured(self, base: str) -> None:
        """Measure on the test rows: the base, the base with the adapter, and the model that was written."""
        tokenizer = load_tokenizer(base)
        task = self.recipe.model.task
        prepared = prepare(self.recipe.data, tokenizer, task, self.recipe.model.num_labels)
        if prepared.test is None:
            return
        self.say("measure")
        names = {"base": (base, False), "adapted": (base, True)}
        for name in (MERGED, EXTRACTED):
            if (self.folder / name).is_dir():
                names[name] = (str(self.folder / name), False)
        found = {}
        for name, (path, with_adapter) in names.items():
            if task != "causal_lm" and name == "base":
                continue  # without its trained head a classifier answers at random
            model = self._loaded(path, prepared, tokenizer)
            if with_adapter and self.adapter is not None and self.recipe.method.name != FULL:
                model = load_adapted(model, self.adapter)
            measures = evaluate(model, tokenizer, prepared.test, task).as_dict()["metrics"]
            found[name] = measures
        self._tell("measure", found)

    def _tell(self, stage: str, report: Any) -> None:
        """Keep what a stage made, on disk too: a run that is cut and goes on has the report of one that was not."""
        self.report[stage] = report
        artifacts.write_json(self.folder / REPORT, self.report)

    def _adapted(self, base: str) -> tuple[Any, Any]:
        """The base with the adapter, and its tokenizer."""
        tokenizer = load_tokenizer(base)
        prepared = prepare(self.recipe.data, tokenizer, self.recipe.model.task, self.recipe.model.num_labels)
        model = self._loaded(base, prepared, tokenizer)
        assert self.adapter is not None
        return load_adapted(model, self.adapter), tokenizer

    def _loaded(self, path: str, prepared: Prepared, tokenizer: Any) -> Any:
        """The model at `path` for the task of the recipe."""
        task, names = self.recipe.model.task, self.recipe.data.label_names
        return load_base(path, task, num_labels=prepared.num_labels, label_names=names, tokenizer=tokenizer)

    def _texts(self, base: str) -> list[str]:
        """Real rows to measure the merge error on: of validation, or of training."""
        tokenizer = load_tokenizer(base)
        prepared = prepare(self.recipe.data, tokenizer, self.recipe.model.task, self.recipe.model.num_labels)
        rows = prepared.validation or prepared.train
        assert rows is not None
        return [tokenizer.decode(rows[i]["input_ids"]) for i in range(min(_MEASURED, len(rows)))]

    def _is_there(self, folder: Path, stage: str, name: str = "config.json") -> bool:
        found = folder.is_file() or (folder.is_dir() and any(folder.glob(name)))
        if found:
            self.reused.append(stage)
        return found


def _claim(recipe: Recipe, *, resume: bool, overwrite: bool) -> None:
    """Make the recipe's folder ours, or say why it is not."""
    folder, file = recipe.folder, recipe.folder / artifacts.RECIPE
    if overwrite:
        before = [name for folder, _, _ in _BEFORE.values() for name in (folder, f"{folder}.partial")]
        for name in (*before, TUNE, SEARCH, CHOSEN, EXTRACTED, MERGED, EXPORT):
            shutil.rmtree(folder / name, ignore_errors=True)
        for name in (REPORT, artifacts.RECIPE):
            (folder / name).unlink(missing_ok=True)
    if file.is_file():
        if not resume:
            raise ConfigError(f"{folder} holds a run: --resume to go on, --overwrite to start again")
        if file.read_text(encoding="utf-8") != recipe.to_yaml():
            raise ConfigError(
                f"{folder} was made by another recipe ({file}); run that one, set another output, or use --overwrite"
            )
    write_text(file, recipe.to_yaml())
