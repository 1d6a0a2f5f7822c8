"""Under which conditions a comparison ran, and what two comparisons must agree on to be one."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

from modicum.compress.source import local_folder
from modicum.evaluate.conditions import cores, machine
from modicum.models.checkpoint import weight_files
from modicum.train.run import versions
from modicum.train.search import rows_digest

if TYPE_CHECKING:
    from pathlib import Path

    from modicum.compare.spec import Spec
    from modicum.data.encoded import Encoded
    from modicum.data.prepare import Prepared

#: where rows come from: the same rows may lie in another place
_SOURCES = ("train", "validation", "test", "hub_config")
#: of the train section, what a sweep sets, and what changes no number
_NO_BUDGET = (
    "learning_rate",
    "seed",
    "report_to",
    "logging_steps",
    "num_workers",
    "device",
    "metric",
    "evaluate_before",
)


def identity(spec: Spec, data: Prepared) -> dict[str, Any]:
    """Digests of the model and of the rows of every split: what they really are, whatever they are called."""
    model = spec.recipe.model
    return {
        "model": model_digest(local_folder(model.name_or_path, model.revision)),
        "rows": {name: rows_digest(rows) for name, rows in _splits(data).items()},
    }


def conditions(spec: Spec, data: Prepared, digests: dict[str, Any]) -> dict[str, Any]:
    """Model, data, budget, and the machine, as plain values. `digests`: their `identity`."""
    recipe, options = spec.recipe, spec.options
    train = recipe.train.model_dump(mode="json", exclude=set(_NO_BUDGET))
    here = machine("cpu", threads_of(spec), None)
    return {
        "model": recipe.model.name_or_path,
        "model digest": digests["model"],
        "task": recipe.model.task,
        "dtype": recipe.model.dtype,
        "data": {
            "sources": {name: getattr(recipe.data, name) for name in _SOURCES if getattr(recipe.data, name)},
            "options": recipe.data.model_dump(mode="json", exclude_unset=True, exclude=set(_SOURCES)),
            "rows": {name: len(rows) for name, rows in _splits(data).items()},
            "digests": digests["rows"],
        },
        "protocol": f"learning rate of each cell chosen on validation {recipe.metric} ({options.select_on}); test rows "
        "seen with the chosen one only",
        "epochs": None if train["max_steps"] else train.pop("epochs"),
        "steps": train.pop("max_steps"),
        "batch_size": train.pop("batch_size"),
        "train": {name: value for name, value in train.items() if name != "epochs"},
        "processor": here.processor,
        "cores": here.cores,
        "threads": threads_of(spec),
        "workers": options.workers,
        "versions": versions(),
    }


def _splits(data: Prepared) -> dict[str, Encoded]:
    found = {"train": data.train, "validation": data.validation, "test": data.test}
    return {name: rows for name, rows in found.items() if rows is not None}


def threads_of(spec: Spec) -> int:
    """Threads of each run: as given, else the cores over the workers, at most what the environment allows."""
    import torch

    given = spec.options.threads
    return given or max(1, min(torch.get_num_threads(), cores() // spec.options.workers))


def model_digest(folder: Path) -> str:
    """16 hex digits over configuration and weights of the model in `folder`, file by file."""
    digest = hashlib.blake2b(digest_size=8)
    for file in [folder / "config.json", *sorted(set(weight_files(folder).values()))]:
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "blake2b").digest())
    return digest.hexdigest()


def agreement(comparison: dict[str, Any]) -> dict[str, Any]:
    """What has to be the same in comparisons that are joined, as one flat mapping."""
    shared = comparison["conditions"]
    values = {
        **{name: comparison[name] for name in ("metric", "split", "seeds", "confidence")},
        **{name: shared.get(name) for name in _SAME},
        "data": {name: shared["data"][name] for name in ("options", "digests")},
    }
    return flat(values)


_SAME = ("model digest", "task", "dtype", "protocol", "epochs", "steps", "batch_size", "train")


def flat(values: Any, path: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted names."""
    if not isinstance(values, dict) or not values:
        return {path: values}
    parts = [flat(value, f"{path}.{key}" if path else str(key)) for key, value in values.items()]
    return {key: value for part in parts for key, value in part.items()}


def differences(first: dict[str, Any], second: dict[str, Any]) -> list[str]:
    """What differs between two flat mappings, in words."""
    names = [name for name in {**first, **second} if first.get(name) != second.get(name)]
    return [f"{name}: {first.get(name)!r} and {second.get(name)!r}" for name in names]
