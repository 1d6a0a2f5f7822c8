"""What a recipe would do, without training: steps, trained values, bytes, runs."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modicum.models.loading import quiet_transformers
from modicum.train import artifacts
from modicum.train.methods import FULL, trained_values
from modicum.train.run import load
from modicum.train.sweep import learning_rates

if TYPE_CHECKING:
    from modicum.train.recipe import Recipe


def plan(recipe: Recipe) -> dict[str, Any]:
    """What `tune(recipe)` would do; loads model and data, trains nothing and leaves nothing in the output folder.

    Raises:
        The same errors as `tune` before its first step.
    """
    with quiet_transformers():
        loaded = load(recipe)
    train = loaded.data.train
    assert train is not None
    options, sweep = recipe.train, recipe.sweep
    # partial batches and partial accumulations count as steps, as in the Trainer
    per_epoch = math.ceil(math.ceil(len(train) / options.batch_size) / options.gradient_accumulation_steps)
    rates, seeds = (
        (learning_rates(recipe), sweep.seeds) if sweep else ([recipe.learning_rate], [options.seed])
    )
    cheap = sweep is not None and sweep.select_on == "first_seed" and len(rates) > 1
    return {
        "kind": "plan",
        "output": str(recipe.folder),
        "recipe_digest": recipe.digest(),
        "base_model": recipe.model.name_or_path,
        "task": recipe.model.task,
        "method": recipe.method.name,
        "trained_values": trained_values(loaded.model),
        "adapter_bytes": _stored(recipe, loaded.model),
        "steps_per_epoch": per_epoch,
        "steps": options.max_steps or math.ceil(options.epochs * per_epoch),
        "rows_per_step": options.batch_size * options.gradient_accumulation_steps,
        "learning_rates": rates,
        "head_learning_rate": recipe.head_learning_rate if recipe.model.task != "causal_lm" else None,
        "seeds": seeds,
        "runs": len(rates) + len(seeds) - 1 if cheap else len(rates) * len(seeds),
        "data": loaded.data.describe(),
    }


def _stored(recipe: Recipe, model: Any) -> int:
    if recipe.method.name == FULL:
        return sum(p.numel() * p.element_size() for p in model.parameters())
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return artifacts.stored_bytes(Path(folder))["total"]
