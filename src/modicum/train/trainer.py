"""The Transformers Trainer, set up from a recipe; a subclass for two learning rates, row order and sub-networks."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn import functional as F
from transformers import EarlyStoppingCallback, PrinterCallback, Trainer, TrainingArguments

from modicum.data.encoded import IGNORED, Collator
from modicum.data.sampling import EpochSampler
from modicum.errors import ConfigError
from modicum.evaluate import metrics as formulas
from modicum.train.callbacks import EpochSetter
from modicum.train.methods import head_parameters

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from torch import Tensor
    from transformers import TrainerCallback

    from modicum.data.prepare import Prepared
    from modicum.train.elastic import ElasticTraining
    from modicum.train.recipe import Recipe


class TwoRateTrainer(Trainer):
    """A Trainer with a learning rate for the head, and a row order that depends on seed and epoch alone.

    With `elastic` set, every micro-batch trains the sub-networks that are drawn for it.
    """

    head_rate: float | None = None
    sampler: EpochSampler | None = None
    elastic: ElasticTraining | None = None
    #: step and micro-batch in it that run
    _micro: tuple[int, int] = (-1, 0)

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """The usual step, once for each sub-network of the micro-batch; none changes before its backward pass ends."""
        if self.elastic is None:
            return super().training_step(model, inputs, num_items_in_batch)
        step = self.state.global_step
        self._micro = step, (self._micro[1] + 1 if self._micro[0] == step else 0)
        losses = []
        with self.elastic.micro_batch(*self._micro) as turns:
            for _ in turns:
                losses.append(super().training_step(model, inputs, num_items_in_batch))  # noqa: PERF401
        return torch.stack(losses).sum()

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The usual loss; of a sub-network in training its share of the micro-batch."""
        if self.elastic is None or self.elastic.running is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        labels = inputs["labels"]
        found: Any = super().compute_loss(model, inputs, True, num_items_in_batch)
        loss = self.elastic.loss(found[0], found[1]["logits"], labels)
        return (loss, found[1]) if return_outputs else loss

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # a run may be killed between its last checkpoint and its end; resumed, the Trainer counts steps after one more
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        # the Trainer's own orders are not kept by a resumed run of several processes (accelerate does not hand the
        # epoch through its skipping batch sampler), nor, when grouping by length, by any resumed run
        return self.sampler if self.sampler is not None else super()._get_train_sampler(train_dataset)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The usual optimizer; parameters of the head move to groups with the head's rate."""
        fresh = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if fresh and self.head_rate is not None:
            trained: Any = self.model if model is None else model
            head = {id(p) for _, p in head_parameters(trained)}
            split_rates(optimizer, head, self.head_rate)
        return optimizer


def split_rates(optimizer: torch.optim.Optimizer, head: set[int], rate: float) -> None:
    """Move the parameters whose `id` is in `head` to groups of their own with the learning rate `rate`, in place."""
    for group in list(optimizer.param_groups):
        mine = [p for p in group["params"] if id(p) in head]
        if mine:
            group["params"] = [p for p in group["params"] if id(p) not in head]
            optimizer.param_groups.append({**group, "params": mine, "lr": rate})


def build_trainer(
    recipe: Recipe,
    model: Any,
    data: Prepared,
    pad_id: int,
    folder: Path,
    callbacks: Sequence[TrainerCallback] = (),
) -> TwoRateTrainer:
    """The trainer of one run, with checkpoints in `folder`/checkpoints.

    Raises:
        ConfigError: the batch does not divide over the processes, or something needs validation rows.
    """
    task = recipe.model.task
    arguments = training_arguments(recipe, folder, has_validation=data.validation is not None)
    is_language = task == "causal_lm"
    trainer = TwoRateTrainer(
        model=model,
        args=arguments,
        train_dataset=data.train,
        eval_dataset=data.validation,
        data_collator=Collator(pad_id, multiple=8 if torch.cuda.is_available() else 1),
        compute_metrics=_metrics_of(task),
        preprocess_logits_for_metrics=token_sums if is_language else first_logits,
        compute_loss_func=None if is_language else _LOSSES[task],
        callbacks=[*callbacks, *_stopping(recipe, data)],
    )
    trainer.remove_callback(PrinterCallback)
    if data.train is not None:
        trainer.sampler = EpochSampler(
            len(data.train),
            recipe.train.seed,
            lengths=data.train.lengths if recipe.data.group_by_length else None,
            batch_size=recipe.train.batch_size,
        )
        trainer.add_callback(EpochSetter(trainer.sampler))
    if not is_language:
        # the number of rows of a step is for our loss function; models of this kind would only pass it on unused
        trainer.model_accepts_loss_kwargs = False
        trainer.head_rate = recipe.head_learning_rate
    return trainer


def training_arguments(recipe: Recipe, folder: Path, *, has_validation: bool) -> TrainingArguments:
    """The Transformers arguments that a recipe stands for."""
    options = recipe.train
    values: dict[str, Any] = {
        "output_dir": str(folder / "checkpoints"),
        "num_train_epochs": options.epochs,
        "max_steps": options.max_steps or -1,
        "gradient_accumulation_steps": options.gradient_accumulation_steps,
        "learning_rate": recipe.learning_rate,
        "lr_scheduler_type": _scheduler(recipe),
        "warmup_steps": options.warmup_ratio,
        "weight_decay": options.weight_decay,
        "max_grad_norm": options.max_grad_norm,
        "optim": options.optim,
        "seed": options.seed,
        "data_seed": options.seed,
        "bf16": options.bf16,
        "fp16": options.fp16,
        **_rhythm(recipe, has_validation=has_validation),
        "logging_steps": options.logging_steps,
        "report_to": [],
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "label_names": ["labels"],
        "use_cpu": options.device == "cpu" or not torch.cuda.is_available(),
        "dataloader_pin_memory": torch.cuda.is_available() and options.device != "cpu",
        "dataloader_num_workers": options.num_workers,
        "include_num_input_tokens_seen": "non_padding",
        "ddp_find_unused_parameters": False,
    }
    known = {field.name for field in dataclasses.fields(TrainingArguments)}
    # renamed in Transformers 5.2x
    checkpointing = (
        "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
    )
    if options.gradient_checkpointing:
        values |= {checkpointing: True, f"{checkpointing}_kwargs": {"use_reentrant": options.use_reentrant}}
    try:
        arguments = TrainingArguments(**values)
    except ValueError as error:
        raise ConfigError(f"the train section cannot be used: {error}") from error
    return _per_device(arguments, recipe)


def _rhythm(recipe: Recipe, *, has_validation: bool) -> dict[str, Any]:
    """When to evaluate and to save, and whether the best checkpoint is kept."""
    options = recipe.train
    keep_best = has_validation if options.load_best is None else options.load_best
    if not has_validation and (options.load_best or options.early_stopping_patience):
        raise ConfigError(
            "train.load_best and train.early_stopping_patience need validation rows: set data.validation or "
            "data.validation_fraction"
        )
    evaluate = ("steps" if options.eval_steps else "epoch") if has_validation else "no"
    save, save_steps = ("steps", options.save_steps) if options.save_steps else (evaluate, options.eval_steps)
    if keep_best and (save != evaluate or (options.eval_steps and (save_steps or 0) % options.eval_steps)):
        raise ConfigError(
            f"train.save_steps = {options.save_steps} must be a multiple of train.eval_steps = {options.eval_steps}, "
            "so that the best checkpoint is on disk (or set train.load_best to false)"
        )
    return {
        "eval_strategy": evaluate,
        "eval_steps": options.eval_steps,
        "save_strategy": "epoch" if save == "no" else save,
        "save_steps": save_steps or 500,
        "save_total_limit": 2,
        "load_best_model_at_end": keep_best,
        "metric_for_best_model": recipe.metric,
        "greater_is_better": recipe.larger_is_better,
    }


def _per_device(arguments: TrainingArguments, recipe: Recipe) -> TrainingArguments:
    """`arguments` with the recipe's batch divided over the processes, changed in place."""
    options = recipe.train
    devices = arguments.world_size * max(1, arguments.n_gpu)
    if options.batch_size % devices:
        raise ConfigError(
            f"train.batch_size = {options.batch_size} rows do not divide over {devices} devices; "
            f"the nearest sizes that do are {max(devices, options.batch_size // devices * devices)} and "
            f"{(options.batch_size // devices + 1) * devices}"
        )
    arguments.per_device_train_batch_size = options.batch_size // devices
    arguments.per_device_eval_batch_size = options.eval_batch_size or max(1, options.batch_size // devices)
    return arguments


def _scheduler(recipe: Recipe) -> str:
    name = recipe.train.scheduler
    return "constant_with_warmup" if name == "constant" and recipe.train.warmup_ratio else name


def _stopping(recipe: Recipe, data: Prepared) -> list[TrainerCallback]:
    patience = recipe.train.early_stopping_patience
    return [EarlyStoppingCallback(patience)] if patience and data.validation is not None else []


def first_logits(logits: Any, labels: Tensor) -> Tensor:
    """The logits alone, where a model returns more than that."""
    del labels
    return logits[0] if isinstance(logits, tuple) else logits


@torch.no_grad()
def token_sums(logits: Any, labels: Tensor) -> Tensor:
    """(rows, 3) float64: summed loss, number of tokens, tokens guessed right; keeps logits out of memory."""
    logits = logits[0] if isinstance(logits, tuple) else logits
    result = torch.zeros(len(labels), 3, dtype=torch.float64, device=labels.device)
    for index, (row, following) in enumerate(zip(logits[:, :-1], labels[:, 1:], strict=True)):
        counted = following != IGNORED
        scores, wanted = row[counted].float(), following[counted]
        result[index, 0] = F.cross_entropy(scores, wanted, reduction="sum") if len(wanted) else 0.0
        result[index, 1] = len(wanted)
        result[index, 2] = (scores.argmax(-1) == wanted).sum()
    return result


def _metrics_of(task: str) -> Any:
    def compute(prediction: Any) -> dict[str, float]:
        values = prediction.predictions
        if task == "causal_lm":
            return formulas.language(values)
        labels = np.asarray(prediction.label_ids)
        return (formulas.classification if task == "seq_cls" else formulas.regression)(values, labels)

    return compute


def _class_loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """Summed cross-entropy over the number of rows of the whole step, so that accumulation changes nothing."""
    logits = outputs["logits"].float()
    return F.cross_entropy(logits, labels, reduction="sum") / _count(num_items_in_batch, labels)


def _squared_loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    logits = outputs["logits"].float().squeeze(-1)
    return F.mse_loss(logits, labels.float(), reduction="sum") / _count(num_items_in_batch, labels)


def _count(num_items_in_batch: Any, labels: Tensor) -> Any:
    return len(labels) if num_items_in_batch is None else num_items_in_batch


_LOSSES = {"seq_cls": _class_loss, "regression": _squared_loss}
