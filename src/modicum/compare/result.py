"""What a comparison found: one entry per cell, one row per run, and everything together as plain values."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

from modicum.compare.bases import shared_bytes
from modicum.compare.judge import judge, measure, pareto
from modicum.evaluate.resources import Prices, cost
from modicum.train import artifacts
from modicum.train.methods import FULL
from modicum.train.sweep import SUMMARY, cell_recipe

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from modicum.compare.cells import Cell
    from modicum.compare.spec import Spec
    from modicum.train.recipe import Recipe

COMPARISON, RUNS, SPEC = "comparison.json", "runs.parquet", "comparison.yaml"
#: beside a run's report: how many runs shared the machine with it
SHARED = "shared.json"
FORMAT = 1
_ALONE = "several runs shared the machine, and its counters do not tell them apart"


@dataclass(frozen=True)
class Run:
    """One finished run of a cell."""

    rate: float
    seed: int
    folder: Path
    report: dict[str, Any]
    #: None where the test rows were not met
    test: dict[str, Any] | None
    #: runs at a time, None where unknown
    workers: int | None

    @property
    def resources(self) -> dict[str, Any]:
        """What it took; the energy only where nothing else ran."""
        used = self.report.get("resources") or {}
        if self.workers == 1:
            return used
        return {**used, "energy_joules": None, "energy_source": None, "energy_note": _ALONE}

    @property
    def train_seconds(self) -> float | None:
        """The time of training; None for a run that was interrupted, whose clock has seen a part of it."""
        timing = self.report["timing"]
        return None if timing.get("resumed_from") else timing["train_seconds"]


def finished_runs(recipe: Recipe) -> list[Run]:
    """The finished runs of the sweep of `recipe`, rate by rate."""
    sweep, found = recipe.sweep, []
    assert sweep is not None
    for rate in sweep.learning_rate:
        for seed in sweep.seeds:
            run = cell_recipe(recipe, rate, seed)
            report = artifacts.read_json(run.folder / artifacts.REPORT)
            if report is None or report["recipe_digest"] != run.digest():
                continue
            shared = artifacts.read_json(run.folder / SHARED) or {}
            test = artifacts.read_json(run.folder / "test.json")
            found.append(Run(rate, seed, run.folder, report, test, shared.get("workers")))
    return found


def open_entry(cell: Cell, error: str | None = None) -> dict[str, Any]:
    """The entry of a cell without results: `missing`, or `failed` with the error."""
    return {
        "label": cell.label,
        "method": cell.method,
        "rank": cell.rank,
        "options": dict(cell.options),
        "train": dict(cell.train),
        "compression": cell.compression,
        "state": "missing" if error is None else "failed",
        "error": error,
        **dict.fromkeys(_LATER),
        "rates": [{"learning_rate": rate, "validation": None} for rate in cell.rates],
        "metrics": {},
        "curves": [],
    }


#: what an entry has once its cell is done
_LATER = (
    "learning_rate", "at_edge", "trained_values", "trained_values_without_head", "stored_bytes", "shared_bytes",
    "train_seconds", "cpu_seconds", "gpu_seconds", "peak_memory_bytes", "peak_gpu_memory_bytes", "energy_joules",
    "energy_source", "cost", "device",
)  # fmt: skip


def entry(spec: Spec, cell: Cell, base: dict[str, Any]) -> dict[str, Any]:
    """The entry of a cell whose sweep is finished; `failed` where it diverged at every rate.

    Numbers of trained values and bytes are those of one adapter; times, energy and cost those of one run at the chosen
    rate, the mean over seeds; memory is the highest peak of them.
    """
    recipe = cell.recipe(spec, base["model"])
    summary = artifacts.read_json(recipe.folder / SUMMARY)
    assert summary is not None
    runs, best = finished_runs(recipe), summary["best_learning_rate"]
    chosen = [run for run in runs if run.rate == best]
    measured = [run.test or run.report["metrics"]["validation"] for run in chosen]
    metrics = _over_seeds(measured, spec.options.confidence) or {}
    # an accuracy of logits that are no numbers is one of chance
    lost = [name for name in (recipe.metric, "loss") if (metrics.get(name) or {}).get("value") is None]
    if lost:
        rates = ", ".join(f"{rate:g}" for rate in cell.rates)
        return open_entry(
            cell, f"{cell.name} diverged: no finite {lost[0]} at the best of the learning rates {rates}"
        )
    trained, stored = summary["trained_values"], _stored(cell, summary, base)
    return {
        **open_entry(cell),
        "state": "done",
        "learning_rate": best,
        "at_edge": _edge(best, cell.rates),
        "rates": [_rate(runs, rate, spec.options.confidence) for rate in cell.rates],
        "trained_values": trained["total"],
        "trained_values_without_head": trained["adapter"],
        "stored_bytes": stored,
        "shared_bytes": shared_bytes(spec, cell, base),
        **_used(chosen, stored, spec),
        "device": chosen[0].report["device"],
        "metrics": metrics,
        "curves": [_curve(run, recipe.metric) for run in chosen],
    }


def comparison(
    spec: Spec,
    cells: Sequence[dict[str, Any]],
    bases: Mapping[str, dict[str, Any] | None],
    about: dict[str, Any],
) -> dict[str, Any]:
    """The comparison as plain values. `about`: its conditions; `bases`: what is known of each base so far."""
    options, recipe = spec.options, spec.recipe
    devices = list(dict.fromkeys(cell["device"] for cell in cells if cell["device"]))
    return conclude(
        {
            "kind": "comparison",
            "format": FORMAT,
            "name": spec.name,
            "digest": spec.digest(),
            "metric": recipe.metric,
            "larger_is_better": recipe.larger_is_better,
            "split": "test" if "test" in about["data"]["rows"] else "validation",
            "confidence": options.confidence,
            "interval": f"Student's t over seeds, {options.confidence:.0%}",
            "seeds": list(options.seeds),
            "conditions": {**about, "device": ", ".join(devices) or None},
            "compressions": {name: dict(stages) for name, stages in options.compressions.items()},
            "base": {"shared_bytes": {name: base["bytes"] for name, base in bases.items() if base}},
            "untrained": {name: base["untrained"] if base else None for name, base in bases.items()},
        },
        cells,
    )


def conclude(head: dict[str, Any], cells: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A comparison with `cells`, judged against each other."""
    metric, larger = head["metric"], head["larger_is_better"]
    judged = judge(cells, metric, larger=larger, confidence=head["confidence"])
    return {**head, "cells": judged, "pareto": pareto(judged, metric, larger=larger)}


def run_rows(spec: Spec, cell: Cell, base: dict[str, Any] | None, best: float | None) -> list[dict[str, Any]]:
    """One flat row per finished run of a cell; `chosen` marks those at the rate `best`."""
    if base is None:
        return []
    rows = []
    for run in finished_runs(cell.recipe(spec, base["model"])):
        report, used = run.report, run.resources
        splits = {"validation": report["metrics"]["validation"], "test": run.test}
        rows.append(
            {
                "compression": cell.compression,
                "label": cell.label,
                "method": cell.method,
                "rank": cell.rank,
                "learning_rate": run.rate,
                "seed": run.seed,
                "chosen": run.rate == best,
                "steps": report["steps"],
                "best_step": report["best_step"],
                "train_loss": report["train_loss"],
                **{
                    f"{name}_{key}": value
                    for name, found in splits.items()
                    for key, value in (found or {}).items()
                },
                "trained_values": report["trained_values"]["total"],
                "stored_bytes": report["stored_bytes"]["total"],
                "train_seconds": run.train_seconds,
                **{key: used.get(key) for key in _RESOURCES},
                "resumed_from": report["timing"].get("resumed_from"),
                "workers": run.workers,
                "device": report["device"],
                "folder": str(run.folder.relative_to(spec.folder)),
            }
        )
    return rows


_RESOURCES = (
    "seconds", "cpu_seconds", "gpu_seconds", "peak_memory_bytes", "peak_gpu_memory_bytes", "energy_joules",
    "energy_source",
)  # fmt: skip


def _stored(cell: Cell, summary: dict[str, Any], base: dict[str, Any]) -> int:
    """Bytes of all files that loading an adapter (or a trained model) takes, whatever folder its base lies in."""
    name = 0 if cell.method == FULL else len(json.dumps(base["model"])) - 2
    return summary["stored_bytes"]["total"] - name


def _over_seeds(found: Sequence[dict[str, Any] | None], confidence: float) -> dict[str, Any] | None:
    if not found or found[0] is None:
        return None
    names = [name for name in found[0] if name != "n"]
    return {name: measure([(one or {}).get(name) for one in found], confidence) for name in names}


def _rate(runs: Sequence[Run], rate: float, confidence: float) -> dict[str, Any]:
    found = [run.report["metrics"]["validation"] for run in runs if run.rate == rate]
    return {"learning_rate": rate, "validation": _over_seeds(found, confidence)}


def _edge(best: float, rates: Sequence[float]) -> str | None:
    if len(rates) < 2 or min(rates) < best < max(rates):
        return None
    return "low" if best == min(rates) else "high"


def _used(runs: Sequence[Run], stored: int, spec: Spec) -> dict[str, Any]:
    """What one run took, over seeds."""
    confidence = spec.options.confidence
    used = [run.resources for run in runs]

    def over_seeds(values: Sequence[float | None]) -> dict[str, Any] | None:
        known = [value for value in values if value is not None]
        return measure(known, confidence)

    def each(name: str) -> list[float]:
        return [one[name] for one in used if one.get(name) is not None]

    # a mean of some seeds would mix seeds that were measured with those that were not
    joules = each("energy_joules") if len(each("energy_joules")) == len(runs) else []
    sources = {one["energy_source"] for one in used} if joules else set()
    mean = {
        **{
            name: fmean(values) if (values := each(name)) else None for name in ("cpu_seconds", "gpu_seconds")
        },
        "energy_joules": fmean(joules) if joules else None,
        "energy_note": next((one["energy_note"] for one in used if one.get("energy_note")), None),
    }
    prices = spec.options.prices
    return {
        "train_seconds": over_seeds([run.train_seconds for run in runs]),
        "cpu_seconds": over_seeds(each("cpu_seconds")),
        "gpu_seconds": over_seeds(each("gpu_seconds")),
        "peak_memory_bytes": max(each("peak_memory_bytes"), default=None),
        "peak_gpu_memory_bytes": max(each("peak_gpu_memory_bytes"), default=None),
        "energy_joules": mean["energy_joules"],
        "energy_source": "+".join(sorted(sources)) or None,
        "cost": cost(mean, stored, Prices.of(prices)) if prices else None,
    }


def _curve(run: Run, metric: str) -> dict[str, Any]:
    history = run.report["history"]

    def points(name: str) -> list[list[float]]:
        return [
            [line["step"], line[name]]
            for line in history
            if line.get(name) is not None and math.isfinite(line[name])
        ]

    return {"seed": run.seed, "train": points("loss"), "validation": points(f"eval_{metric}")}
