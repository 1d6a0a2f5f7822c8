"""What speaks against a recipe before its first stage, from configurations, texts and shapes: all of it at once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from modicum.compress.quantize import quantize_model
from modicum.compress.reorder import check_reorder
from modicum.compress.sparsify import sparsify_model
from modicum.data.prepare import prepare
from modicum.errors import ConfigError, ModicumError
from modicum.models.architecture import meta_model, read_config
from modicum.models.checkpoint import layer_shapes
from modicum.models.families import known_widths
from modicum.models.loading import load_tokenizer, quiet_transformers
from modicum.search.budgets import check_shapes
from modicum.search.space import SearchSpace
from modicum.train.methods import make_config
from modicum.train.search import search_rows
from modicum.train.stages import before_options

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from modicum.train.recipe import Recipe


def check_recipe(recipe: Recipe, folders: Mapping[str, str], *, overwrite: bool = False) -> None:
    """Returns when nothing that is known beforehand speaks against the stages of `recipe`.

    Known are the stages before training, planned on the recipe's own model (`folders`: stage -> the folder of what it
    makes; those that are there are finished, unless they are overwritten), the search space, budgets that shapes tell,
    and the rows that are searched on. Times are measured, bytes of low-bit models counted, when the search begins.

    Raises:
        ModicumError: what is wrong; a ConfigError of everything where it is more than one thing.
    """
    checks: list[Callable[[], None]] = []
    for stage, folder in folders.items():
        values, made = getattr(recipe, stage), recipe.folder / folder
        if values is not None and (overwrite or not made.exists()):
            checks.append(lambda s=stage, v=values, m=made: _check_stage(s, recipe.model.name_or_path, m, v))
    if recipe.elastic is not None:
        checks.append(lambda: _check_space(recipe))
    if recipe.search is not None:
        checks.append(lambda: _check_rows(recipe))
    faults: list[ModicumError] = []
    with quiet_transformers():
        for check in checks:
            try:
                check()
            except ModicumError as error:
                faults.append(error)
    if len(faults) == 1:
        raise faults[0]
    if faults:
        raise ConfigError("the recipe cannot run to its end: " + "; ".join(map(str, faults)))


def _check_stage(stage: str, model: str, made: Path, values: Mapping[str, Any]) -> None:
    """Returns when a stage before training can be done on `model`; the ones before it change no shape and no token."""
    options = before_options(stage, values)
    if stage == "reorder":
        check_reorder(model, options)
        return
    plan = {"sparsify": sparsify_model, "quantize": quantize_model}[stage]
    # a name that nothing has, so that what an earlier run left there is no fault
    plan(model, made.with_name(f"{made.name}.planned"), options, dry_run=True)


def _check_space(recipe: Recipe) -> None:
    """Returns when the search space fits the model, and its smallest sub-network the budgets."""
    import torch

    assert recipe.elastic is not None
    stored = read_config(recipe.model.name_or_path)
    low_bit = recipe.quantize is not None or getattr(stored, "quantization_config", None) is not None
    dtype: Any = recipe.model.dtype
    if dtype == "auto":  # as `load_base` has it
        dtype = (stored.dtype if torch.cuda.is_available() else None) or torch.float32
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    model = meta_model(stored, "seq_cls" if recipe.model.task == "regression" else recipe.model.task)
    config = make_config(recipe.method.name, recipe.method.options, recipe.model.task)
    targets = {"layers_to_transform": config.layers_to_transform, "layers_pattern": config.layers_pattern}
    shapes = layer_shapes(model, config.target_modules, exclude=config.exclude_modules, **targets)
    ranks = {name: config.rank_for(name) for name in shapes}
    space = SearchSpace.of(recipe.elastic.space, ranks, known_widths(model))
    if recipe.search is not None:
        check_shapes(model, ranks, space, recipe.search, None if low_bit else dtype.itemsize)


def _check_rows(recipe: Recipe) -> None:
    """Returns when there are rows to search on that neither training nor the reported test sees."""
    assert recipe.search is not None
    tokenizer = load_tokenizer(recipe.model.name_or_path, revision=recipe.model.revision)
    data = prepare(recipe.data, tokenizer, recipe.model.task, recipe.model.num_labels)
    search_rows(recipe, data, tokenizer, recipe.search)
