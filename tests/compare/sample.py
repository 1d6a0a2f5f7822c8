"""A comparison as `modicum compare` writes it, without having trained anything: twelve cells on two bases."""

from __future__ import annotations

import math
from typing import Any

SEEDS = (0, 1, 2)
RATES = (0.001, 0.004, 0.016)
#: method, rank, trained values, bytes stored and shared, accuracy on the dense base
_CELLS = (
    ("lora", 4, 50_432, 204_800, 0, 0.842),
    ("lora", 16, 197_888, 794_624, 0, 0.858),
    ("lora_xs", 4, 1_090, 5_300, 3_200_000, 0.791),
    ("lora_xs", 8, 2_242, 9_900, 3_200_000, 0.824),
    ("lora_xs", 16, 6_850, 28_300, 3_200_000, 0.851),
    ("vera", 256, 13_570, 55_000, 1_600_000, 0.812),
)


def measure(value: float, spread: float, n: int = len(SEEDS)) -> dict[str, Any]:
    low, high = (None, None) if n < 2 else (value - spread, value + spread)
    return {"value": value, "low": low, "high": high, "n": n, "method": "t"}


def cell(method: str, rank: int, compression: str, numbers: tuple[int, int, int, float]) -> dict[str, Any]:
    values, stored, shared, accuracy = numbers
    best = RATES[-1] if method == "vera" else RATES[1]
    rates = [
        {
            "learning_rate": rate,
            "validation": {
                "accuracy": measure(accuracy - 0.02 * abs(math.log(rate / best)), 0.012),
                "loss": measure(0.4, 0.01),
            },
        }
        for rate in RATES
    ]
    curves = [
        {
            "seed": seed,
            "train": [
                [step, 0.35 + 0.6 * math.exp(-step * accuracy / 60) + 0.01 * seed]
                for step in range(10, 201, 10)
            ],
            "validation": [
                [step, accuracy - 0.3 * math.exp(-step / 60) + 0.006 * (seed - 1)]
                for step in (50, 100, 150, 200)
            ],
        }
        for seed in SEEDS
    ]
    return {
        "label": f"{method} r={rank}",
        "method": method,
        "rank": rank,
        "options": {},
        "compression": compression,
        "state": "done",
        "error": None,
        "learning_rate": best,
        "at_edge": "high" if method == "vera" else None,
        "rates": rates,
        "trained_values": values,
        "trained_values_without_head": values - 66,
        "stored_bytes": stored,
        "shared_bytes": shared,
        "train_seconds": measure(41.0 + rank / 8, 2.0),
        "cpu_seconds": measure(80.0, 4.0),
        "gpu_seconds": None,
        "peak_memory_bytes": 812_000_000,
        "energy_joules": None,
        "energy_source": None,
        "cost": None,
        "metrics": {"accuracy": measure(accuracy, 0.011), "loss": measure(1.2 - accuracy, 0.02)},
        "curves": curves,
        "significantly_worse_than_best": accuracy < 0.83,
    }


def unfinished(whole: dict[str, Any], state: str, error: str | None) -> dict[str, Any]:
    """The same cell without results."""
    kept = ("label", "method", "rank", "options", "compression")
    absent = {key: [] if key in ("rates", "curves") else None for key in whole if key not in kept}
    return {**absent, **{key: whole[key] for key in kept}, "state": state, "error": error, "metrics": {}}


def comparison() -> dict[str, Any]:
    """Six methods and ranks on a dense and a 4-bit base; one cell failed, one is missing."""
    cells = [
        cell(method, rank, base, (values, stored, shared, accuracy - loss))
        for base, loss in (("none", 0.0), ("4bit", 0.017))
        for method, rank, values, stored, shared, accuracy in _CELLS
    ]
    cells[7] = unfinished(cells[7], "failed", "DataError: the rows ran out after 12 steps")
    cells[11] = unfinished(cells[11], "missing", None)
    front = [2, 3, 4, 1]
    return {
        "kind": "comparison",
        "format": 1,
        "name": "Adapters on notes",
        "digest": "0123456789abcdef",
        "metric": "accuracy",
        "larger_is_better": True,
        "split": "test",
        "confidence": 0.95,
        "interval": "Student's t over seeds, 95%",
        "seeds": list(SEEDS),
        "conditions": {
            "model": "embedded",
            "task": "classification",
            "data": {"train": "bundled:notes", "train_rows": 1200, "test_rows": 400},
            "protocol": "labelled rows",
            "steps": 200,
            "batch_size": 16,
            "device": "cpu",
            "threads": 1,
            "workers": 2,
            "versions": {"modicum": "0.4.0", "torch": "2.9.0"},
        },
        "untrained": {"none": {"accuracy": 0.512}, "4bit": {"accuracy": 0.498}},
        "cells": cells,
        "pareto": {"trained_values": front, "stored_bytes": front},
    }
