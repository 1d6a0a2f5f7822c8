"""The base models of a comparison: each compression made once, its bytes, and what it does without training."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

from modicum.adapters.basis import BasisCache
from modicum.compress.source import BESIDE, local_folder
from modicum.errors import ConfigError
from modicum.evaluate.run import evaluate
from modicum.models.architecture import meta_model, read_config
from modicum.models.checkpoint import INDEX, layer_shapes, weight_files
from modicum.models.loading import load_tokenizer, quiet_transformers
from modicum.train import artifacts
from modicum.train.methods import FULL, make_config
from modicum.train.pipeline import run_before
from modicum.train.run import load_model
from modicum.train.stages import BEFORE

if TYPE_CHECKING:
    from pathlib import Path

    from modicum.compare.cells import Cell
    from modicum.compare.spec import Spec
    from modicum.data.prepare import Prepared

BASES = "bases"


def base_report(spec: Spec, compression: str) -> dict[str, Any] | None:
    """What is known of a finished base: `model`, its `bytes`, its metrics `untrained`; None while it is not made."""
    return artifacts.read_json(spec.folder / BASES / f"{compression}.json")


def make_base(spec: Spec, compression: str, data: Prepared) -> None:
    """Make the base model of a compression and measure it; its report marks it as finished."""
    stages = {name: values or {} for name, values in spec.options.compressions[compression].items()}
    options, root = spec.recipe.model, spec.folder / BASES
    model = options.name_or_path
    with artifacts.disk_guard(spec.folder), quiet_transformers():
        folder = original = local_folder(model, options.revision)
        ordered = [stage for stage in BEFORE if stage in stages]
        for stage in ordered:
            before, folder = (
                folder,
                root / (compression if stage == ordered[-1] else f".{compression}.{stage}"),
            )
            if not (folder / "config.json").is_file():
                root.mkdir(parents=True, exist_ok=True)
                run_before(stage, str(before), folder, stages[stage])
        for stage in ordered[:-1]:
            shutil.rmtree(root / f".{compression}.{stage}", ignore_errors=True)
        model = model if folder == original else str(folder)
        report = {"model": model, "bytes": base_bytes(folder), "untrained": _untrained(spec, model, data)}
    artifacts.write_json(root / f"{compression}.json", report)


def base_bytes(folder: Path) -> int:
    """Bytes of the files that loading the model in `folder` takes: weights, configuration, tokenizer."""
    try:
        weights = {file.resolve() for file in weight_files(folder).values()}
    except ConfigError:  # of an older format
        return artifacts.stored_bytes(folder)["total"]
    beside = {file.resolve() for pattern in (*BESIDE, "config.json", INDEX) for file in folder.glob(pattern)}
    return sum(file.stat().st_size for file in weights | beside)


def shared_bytes(spec: Spec, cell: Cell, base: dict[str, Any]) -> int:
    """Bytes that all adapters of a cell's kind need once: the base, and a basis that its weights do not determine.

    Nothing for full fine-tuning, whose every result is a model of its own.
    """
    return 0 if cell.method == FULL else base["bytes"] + _basis_bytes(spec, cell)


def _basis_bytes(spec: Spec, cell: Cell) -> int:
    config = make_config(cell.method, cell.options, spec.recipe.model.task)
    basis = config.basis_spec() if getattr(config, "basis", None) == "stored" else None
    if basis is None:
        return 0
    task = "causal_lm" if spec.recipe.model.task == "causal_lm" else "seq_cls"
    shapes = layer_shapes(
        meta_model(read_config(spec.recipe.model.name_or_path), task),
        config.target_modules,
        exclude=config.exclude_modules,
    )
    found = BasisCache().get(config.basis_fingerprint or "", {name: config.rank_for(name) for name in shapes})
    if found is None:
        return 0
    factors = [
        part for name in found for part in (found[name].u, found[name].s, found[name].a, found[name].r0)
    ]
    return sum(part.nbytes for part in factors if part is not None)


def _untrained(spec: Spec, model: str, data: Prepared) -> dict[str, float] | None:
    """The metrics of the bare base; None for a classifier, whose fresh head answers at random."""
    import torch

    recipe = spec.recipe.with_values(
        model__name_or_path=model,
        **({} if model == spec.recipe.model.name_or_path else {"model__revision": None}),
    )
    rows = data.test or data.validation
    if recipe.model.task != "causal_lm" or rows is None:
        return None
    tokenizer = load_tokenizer(model, revision=recipe.model.revision)
    loaded = load_model(recipe, tokenizer, data)
    if torch.cuda.is_available() and recipe.train.device == "auto":
        loaded = loaded.to("cuda")
    batch = recipe.train.eval_batch_size or recipe.train.batch_size
    found = evaluate(loaded, tokenizer, rows, "causal_lm", batch_size=batch, exact_match=False)
    return {name: measure.value for name, measure in found.metrics.items()}
