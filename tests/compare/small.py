"""A comparison that runs in half a minute: two methods, two ranks, two bases, two seeds, on a model of two layers."""

from __future__ import annotations

import fcntl
import functools
import os
from pathlib import Path
from typing import Any

import yaml
from tests.small_checkpoints import recipe_values, sums

from modicum.compare.report import write_report
from modicum.compare.run import run_comparison
from modicum.compare.spec import load_comparison

#: what differs from one run of the same thing to the next
_MEASURED = {
    "train_seconds", "cpu_seconds", "gpu_seconds", "peak_memory_bytes", "peak_gpu_memory_bytes", "energy_joules",
    "energy_source", "cost", "conditions", "name",
}  # fmt: skip


def comparison_values(folder: Path, **changes: Any) -> dict[str, Any]:
    """The comparison, with data files in `folder`."""
    recipe = recipe_values(folder, max_steps=3, logging_steps=1)
    recipe["data"]["test"] = str(sums(folder / "test.jsonl", 8, 200))
    for name in ("method", "output"):
        del recipe[name]
    return {
        "recipe": recipe,
        "methods": {
            "lora": {"ranks": [1, 2], "learning_rate": [2e-2], "lora_alpha": 4},
            "xs": {"name": "lora_xs", "ranks": [2, 4], "learning_rate": [1e-3, 5e-2]},
        },
        "compressions": {
            "none": {},
            "4bit": {"quantize": {"bits": 4, "group_size": 16, "algorithm": "rtn", "evaluate": False}},
        },
        "seeds": [0, 1],
        "output": str(folder / "out"),
        **changes,
    }


def write(folder: Path, values: dict[str, Any]) -> Path:
    """`values` as a file in `folder`."""
    file = folder / "comparison.yaml"
    file.write_text(yaml.safe_dump(values, sort_keys=False))
    return file


def numbers(comparison: Any) -> Any:
    """A comparison (or a part of one) without what no two runs have in common: times, memory, threads, workers."""
    if isinstance(comparison, dict):
        return {key: numbers(value) for key, value in comparison.items() if key not in _MEASURED}
    if isinstance(comparison, list):
        return [numbers(value) for value in comparison]
    return comparison


@functools.cache
def reference() -> Path:
    """The folder of the finished comparison, with its file `comparison.yaml` beside; made once for all tests."""
    base = Path(os.environ["MODICUM_CACHE"]) / "comparison"
    base.mkdir(exist_ok=True)
    with (base / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        file = base / "comparison.yaml"
        if not file.is_file():
            write(base, comparison_values(base, workers=2))
        run_comparison(load_comparison(file), resume=True, publish=write_report)
    return base / "out"


def changed(folder: Path, **changes: Any) -> dict[str, Any]:
    """The comparison of `reference` with `changes`, and its results in `folder`."""
    values = yaml.safe_load((reference().parent / "comparison.yaml").read_text())
    return {**values, "output": str(folder), **changes}
