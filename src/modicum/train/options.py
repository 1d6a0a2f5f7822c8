"""What the train section of a recipe can say; the only place where these options are declared."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from modicum.data.options import Section

Tracker = Literal["mlflow", "trackio", "tensorboard", "wandb"]


def _listed(value: Any) -> Any:
    """One tracker as a list of one, and 'none' as none."""
    if value == "none":
        return []
    return [value] if isinstance(value, str) else value


class TrainOptions(Section):
    """How to train. One step sees `batch_size` x `gradient_accumulation_steps` rows on any number of devices."""

    epochs: float = Field(3.0, gt=0, description="Passes over the training rows.")
    max_steps: int | None = Field(None, ge=1, description="Number of steps; takes the place of `epochs`.")
    batch_size: int = Field(16, ge=1, description="Rows per forward pass, over all devices together.")
    gradient_accumulation_steps: int = Field(1, ge=1, description="Forward passes per step.")
    eval_batch_size: int | None = Field(None, ge=1, description="Rows per evaluation pass and device.")
    learning_rate: float | None = Field(None, gt=0, description="Peak learning rate; by method when unset.")
    head_learning_rate: float | None = Field(
        None, gt=0, description="Peak learning rate of a classification head."
    )
    scheduler: Literal["linear", "cosine", "constant"] = Field(
        "linear", description="Learning-rate schedule."
    )
    warmup_ratio: float = Field(0.06, ge=0, lt=1, description="Share of the steps that warm up.")
    weight_decay: float = Field(0.0, ge=0, description="Weight decay, on matrices only.")
    max_grad_norm: float = Field(
        1.0, ge=0, description="Gradient norm above which gradients are scaled; 0: never."
    )
    optim: str = Field("adamw_torch", description="Optimizer by its Transformers name.")
    seed: int = Field(0, ge=0, description="Seed of the head, the adapter, the row order and dropout.")
    bf16: bool = Field(False, description="Compute in bfloat16 (autocast).")
    fp16: bool = Field(False, description="Compute in float16 (autocast with loss scaling).")
    gradient_checkpointing: bool = Field(False, description="Recompute activations to save memory.")
    use_reentrant: bool = Field(False, description="Recompute with PyTorch's older, reentrant method.")
    eval_steps: int | None = Field(
        None, ge=1, description="Steps between evaluations; every epoch when unset."
    )
    save_steps: int | None = Field(
        None, ge=1, description="Steps between checkpoints; as evaluations when unset."
    )
    logging_steps: int = Field(10, ge=1, description="Steps between logged losses.")
    report_to: Annotated[list[Tracker] | None, BeforeValidator(_listed)] = Field(
        None,
        description="Experiment tracker or a list of them, or 'none'; tensorboard when it is installed and this is "
        "unset.",
    )
    metric: str | None = Field(
        None, description="Validation metric that selects checkpoints and learning rates."
    )
    load_best: bool | None = Field(
        None, description="Keep the best checkpoint; when unset, if there is validation."
    )
    early_stopping_patience: int | None = Field(
        None, ge=1, description="Evaluations without gain before stopping."
    )
    evaluate_before: bool = Field(True, description="Measure the metrics before training too.")
    device: Literal["auto", "cpu"] = Field("auto", description="Where to train.")
    num_workers: int = Field(0, ge=0, description="Processes that prepare batches.")
