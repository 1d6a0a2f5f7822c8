"""One run: from a recipe to a finished folder with adapter, report and model card; resumable."""

from __future__ import annotations

import platform
import shutil
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from modicum.data.prepare import Prepared, prepare
from modicum.errors import ConfigError
from modicum.models.loading import load_adapted, load_base, load_tokenizer, quiet_transformers
from modicum.store.atomic import write_folder, write_text
from modicum.train import artifacts
from modicum.train.methods import BASELINES, FULL, apply_method, trained_values
from modicum.train.recipe import Recipe, make_recipe

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from transformers import TrainerCallback

    from modicum.train.callbacks import Show
    from modicum.train.trainer import TwoRateTrainer


@dataclass(frozen=True)
class TuneResult:
    """A finished run or sweep: its folder and its report (`report.json`, or `summary.json` of a sweep)."""

    folder: Path
    report: dict[str, Any] = field(repr=False)
    #: True when it was finished before and nothing had to be done
    reused: bool = False

    @property
    def adapter(self) -> Path:
        """The PEFT folder of the adapter; the model folder after full fine-tuning."""
        model = self.folder / artifacts.MODEL
        return model if model.is_dir() else self.folder / artifacts.ADAPTER

    @property
    def metrics(self) -> dict[str, Any]:
        """The metrics `before`, on `validation` and on `test`, each None where not measured."""
        return self.report["metrics"]


@dataclass
class Loaded:
    """A model ready to train with its tokenizer and data."""

    model: Any
    tokenizer: Any
    data: Prepared
    setup_seconds: float


def tune(
    recipe: Recipe,
    *,
    resume: bool = False,
    overwrite: bool = False,
    data: Prepared | None = None,
    show: Show = "none",
) -> TuneResult:
    """The finished run that `recipe` describes, or the finished sweep if it has one.

    `resume` continues an unfinished run from its last checkpoint and returns a finished one as it is;
    `overwrite` starts again. `data` saves tokenizing again when many recipes share their data section.
    Runs unchanged under torchrun and `accelerate launch`; only the main process writes.

    Raises:
        ConfigError: the folder holds another or an unfinished run. DataError: see `prepare`.
        ModicumError: the disk is full.
    """
    from modicum.train.sweep import run_sweep
    from modicum.train.trackers import chosen

    # before anything is written
    chosen(recipe)
    with artifacts.disk_guard(recipe.folder), quiet_transformers():
        if recipe.sweep is not None:
            return run_sweep(recipe, resume=resume, overwrite=overwrite, data=data, show=show)
        return run_one(recipe, resume=resume, overwrite=overwrite, data=data, show=show)


def run_one(
    recipe: Recipe,
    *,
    resume: bool = False,
    overwrite: bool = False,
    data: Prepared | None = None,
    show: Show = "none",
    use_test: bool = True,
    title: str = "",
    sweep: str | None = None,
) -> TuneResult:
    """The finished single run of `recipe`; see `tune`. Without `use_test` the test rows stay unseen.

    `title` says on the screen, and `sweep` to experiment trackers, what it is a part of.
    """
    from modicum.train.callbacks import ResourceLog
    from modicum.train.trackers import Trackers

    folder = recipe.folder
    finished = claim(recipe, resume=resume, overwrite=overwrite)
    if finished is not None:
        return TuneResult(folder, finished, reused=True)
    processes = process_state(recipe)
    with Trackers(recipe, main=processes.is_main_process, sweep=sweep) as trackers:
        with ResourceLog(folder, processes) as used:
            loaded = load(recipe, data)
            trainer, timing = _train(recipe, loaded, [used, *trackers.callbacks], show, title)
            metrics = {
                "before": _before(trainer, loaded.data.validation),
                "validation": _validation(trainer, loaded.data.validation),
                "test": measure(trainer, loaded.data.test) if use_test else None,
            }
        report = _report(recipe, loaded, trainer, timing, metrics)
        report["resources"] = used.total()
        if trainer.is_world_process_zero():
            _save(recipe, loaded, report, folder)
            trackers.finish(report)
    trainer.accelerator.wait_for_everyone()
    return TuneResult(folder, artifacts.read_json(folder / artifacts.REPORT) or report)


def _train(
    recipe: Recipe, loaded: Loaded, watching: Sequence[TrainerCallback], show: Show, title: str
) -> tuple[TwoRateTrainer, dict[str, Any]]:
    """The trainer of a run whose training is over, and the run's timing."""
    from modicum.train.callbacks import Meter, Progress
    from modicum.train.trackers import name_run
    from modicum.train.trainer import build_trainer

    folder = recipe.folder
    checkpoint = artifacts.last_checkpoint(folder)
    meter, progress = Meter(), Progress(show, title)
    callbacks = [meter, *watching] if show == "none" else [meter, *watching, progress]
    trainer = build_trainer(
        recipe, loaded.model, loaded.data, loaded.tokenizer.pad_token_id, folder, callbacks
    )
    name_run(trainer.args, folder)
    if recipe.elastic is not None:
        from modicum.train.elastic import ElasticTraining

        trainer.elastic = ElasticTraining(loaded.model, recipe.elastic, recipe.train.seed)
    # inside `train`, not before it: an evaluation of the bare model makes the Trainer skip the wrapping that
    # averages gradients over processes, without a word
    trainer.args.eval_on_start = bool(
        recipe.train.evaluate_before and checkpoint is None and loaded.data.validation is not None
    )
    began = time.perf_counter()
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    finally:
        progress.close()
    return trainer, {
        **meter.summary(),
        "setup_seconds": loaded.setup_seconds,
        "train_seconds": time.perf_counter() - began,
        "resumed_from": checkpoint.name if checkpoint else None,
    }


def load(recipe: Recipe, data: Prepared | None = None) -> Loaded:
    """Tokenizer, data and adapted model of `recipe`; the same for the same seed."""
    from transformers import set_seed

    began = time.perf_counter()
    options = recipe.model
    tokenizer = load_tokenizer(
        options.name_or_path, revision=options.revision, trust_remote_code=options.trust_remote_code
    )
    data = data or prepare(recipe.data, tokenizer, options.task, options.num_labels)
    if data.train is None or not len(data.train):
        raise ConfigError("there are no training rows: set data.train")
    # the head and some methods draw from the global generator
    set_seed(recipe.train.seed)
    base = load_model(recipe, tokenizer, data)
    _check_length(base, recipe)
    model = apply_method(base, recipe.method, options.task, recipe.train.seed)
    return Loaded(model, tokenizer, data, time.perf_counter() - began)


def load_model(recipe: Recipe, tokenizer: Any, data: Prepared, name_or_path: str | None = None) -> Any:
    """The base model of `recipe` (or what a full run saved at `name_or_path`), with a head of the right size."""
    options = recipe.model
    return load_base(
        name_or_path or options.name_or_path,
        options.task,
        dtype=options.dtype,
        num_labels=data.num_labels,
        label_names=recipe.data.label_names,
        revision=options.revision if name_or_path is None else None,
        trust_remote_code=options.trust_remote_code,
        attn_implementation=options.attn_implementation,
        tokenizer=tokenizer,
    )


def finished_model(recipe: Recipe, folder: Path, tokenizer: Any, data: Prepared) -> Any:
    """The trained model of a finished run, loaded from its folder."""
    if recipe.method.name == FULL:
        return load_model(recipe, tokenizer, data, str(folder / artifacts.MODEL))
    return load_adapted(load_model(recipe, tokenizer, data), folder / artifacts.ADAPTER)


def measure(trainer: TwoRateTrainer, rows: Any) -> dict[str, float] | None:
    """The metrics of the trainer's model on `rows`, and their number; None without rows."""
    if rows is None:
        return None
    # `predict`, unlike `evaluate`, tells no callback, so early stopping does not count it
    found = trainer.predict(rows, metric_key_prefix="eval").metrics or {}
    return _plain(found) | {"n": len(rows)}


def _validation(trainer: TwoRateTrainer, rows: Any) -> dict[str, float] | None:
    """The validation metrics of the trainer's model, from its history where they were measured already."""
    state = trainer.state
    kept = state.best_global_step if trainer.args.load_best_model_at_end else state.global_step
    for entry in state.log_history:
        if rows is not None and entry.get("step") == kept and "eval_loss" in entry:
            return _plain(entry) | {"n": len(rows)}
    return measure(trainer, rows)


def _plain(metrics: dict[str, Any]) -> dict[str, float]:
    """Evaluation metrics without prefix; the Trainer's own timings go, timing is the meter's job."""
    extra = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")
    named = {key.removeprefix("eval_"): value for key, value in metrics.items() if key.startswith("eval_")}
    return {key: value for key, value in named.items() if key not in extra}


def claim(
    recipe: Recipe, *, resume: bool, overwrite: bool, report: str = artifacts.REPORT
) -> dict[str, Any] | None:
    """The report of the finished run in the recipe's folder if it may be reused, else None with the folder ready.

    Raises:
        ConfigError: the folder holds a finished, an unfinished or another run and neither flag allows to touch it.
    """
    state = process_state(recipe)
    folder = recipe.folder
    started, finished = (folder / artifacts.RECIPE).is_file(), artifacts.read_json(folder / report)
    # nobody may write before everybody has looked
    state.wait_for_everyone()
    if started and not overwrite:
        if not resume:
            what = "a finished run" if finished else "an unfinished run"
            way = "--resume to keep it" if finished else "--resume to continue"
            raise ConfigError(
                f"{folder} holds {what}: {way}, --overwrite to start again, or set another output"
            )
        _check_same(recipe, folder)
        if finished:
            return finished
    if state.is_main_process:
        if overwrite:
            clear(folder)
        write_text(folder / artifacts.RECIPE, recipe.to_yaml())
    state.wait_for_everyone()
    return None


def clear(folder: Path) -> None:
    """Remove what a run left in `folder`, and nothing else."""
    tables = (artifacts.HISTORY, artifacts.RUNS)
    for name in (artifacts.REPORT, "summary.json", "test.json", artifacts.RECIPE, *tables):
        (folder / name).unlink(missing_ok=True)
    for name in (artifacts.ADAPTER, artifacts.MODEL, artifacts.CHECKPOINTS, "logs"):
        shutil.rmtree(folder / name, ignore_errors=True)


def process_state(recipe: Recipe) -> Any:
    """Accelerate's view of the processes, on the device that the trainer will use."""
    import torch
    from accelerate import PartialState

    return PartialState(cpu=recipe.train.device == "cpu" or not torch.cuda.is_available())


def _check_same(recipe: Recipe, folder: Path) -> None:
    from modicum.train.yaml_lines import read_yaml

    path = folder / artifacts.RECIPE
    values, _ = read_yaml(path.read_text(encoding="utf-8"), str(path))
    before = make_recipe(values, str(path))
    if before.digest() == recipe.digest():
        return
    old, new = _flat(before.model_dump(mode="json")), _flat(recipe.model_dump(mode="json"))
    changes = [
        f"{key}: {old.get(key)} → {new.get(key)}" for key in {**old, **new} if old.get(key) != new.get(key)
    ]
    shown = "; ".join(change for change in changes if not change.startswith("output:"))
    raise ConfigError(
        f"{folder} was made by another recipe ({shown}); run that one, set another output, or use --overwrite"
    )


def _flat(values: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(values, dict):
        return {path: values}
    parts = [_flat(value, f"{path}.{key}" if path else str(key)) for key, value in values.items()]
    return {key: value for part in parts for key, value in part.items()}


def _check_length(model: Any, recipe: Recipe) -> None:
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit and recipe.data.max_length > limit:
        raise ConfigError(
            f"data.max_length = {recipe.data.max_length} is more than the {limit} positions of "
            f"{recipe.model.name_or_path}"
        )


def _before(trainer: TwoRateTrainer, rows: Any) -> dict[str, float] | None:
    """The validation metrics before the first step; a resumed run finds them in the history it continues."""
    for entry in trainer.state.log_history:
        if rows is not None and entry.get("step") == 0 and "eval_loss" in entry:
            return _plain(entry) | {"n": len(rows)}
    return None


def _save(recipe: Recipe, loaded: Loaded, report: dict[str, Any], folder: Path) -> None:
    """Write adapter (or model), card and report; the report comes last and marks the run as finished."""
    method, options = recipe.method.name, recipe.model

    def fill(aside: Path) -> None:
        loaded.model.save_pretrained(aside)
        if method == FULL:
            loaded.tokenizer.save_pretrained(aside)
        report["stored_bytes"] = artifacts.stored_bytes(aside)
        card = artifacts.model_card(
            report,
            base=options.name_or_path,
            method=method,
            task=options.task,
            is_ours=method not in BASELINES and method != FULL,
        )
        (aside / "README.md").write_text(card, encoding="utf-8")

    write_folder(folder / (artifacts.MODEL if method == FULL else artifacts.ADAPTER), fill)
    artifacts.write_table(folder / artifacts.HISTORY, report["history"])
    artifacts.write_json(folder / artifacts.REPORT, report)
    shutil.rmtree(folder / artifacts.CHECKPOINTS, ignore_errors=True)


def _report(
    recipe: Recipe, loaded: Loaded, trainer: TwoRateTrainer, timing: dict[str, Any], metrics: dict[str, Any]
) -> dict[str, Any]:
    history = trainer.state.log_history
    losses = [entry["train_loss"] for entry in history if "train_loss" in entry]
    return {
        "kind": "run",
        "recipe_digest": recipe.digest(),
        "method": recipe.method.name,
        "recipe": recipe.model_dump(mode="json"),
        "learning_rate": recipe.learning_rate,
        "head_learning_rate": recipe.head_learning_rate if recipe.model.task != "causal_lm" else None,
        "seed": recipe.train.seed,
        "trained_values": trained_values(loaded.model),
        "stored_bytes": None,
        "metrics": metrics,
        "train_loss": losses[-1] if losses else None,
        "steps": trainer.state.global_step,
        "best_step": trainer.state.best_global_step,
        "history": [entry for entry in history if "loss" in entry or "eval_loss" in entry],
        "data": loaded.data.describe(),
        "timing": timing,
        "resources": None,
        "processes": trainer.args.world_size,
        "device": str(trainer.args.device),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Versions of everything the numbers depend on."""
    from importlib.metadata import version

    packages = ("modicum", "torch", "transformers", "peft", "accelerate", "datasets")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}
