"""What a comparison would do, without training: cells, runs, steps."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from modicum.compare.conditions import threads_of
from modicum.compare.run import check

if TYPE_CHECKING:
    from modicum.compare.spec import Spec


def plan(spec: Spec) -> dict[str, Any]:
    """What `run_comparison(spec)` would do; the trained values of PEFT's methods are those of its default options.

    Raises:
        The same errors as `run_comparison` before its first run.
    """
    data, counts = check(spec)
    options, train = spec.options, spec.recipe.train
    assert data.train is not None
    batches = math.ceil(len(data.train) / train.batch_size)
    per_epoch = math.ceil(batches / train.gradient_accumulation_steps)
    cells = [
        {
            "label": cell.label,
            "method": cell.method,
            "rank": cell.rank,
            "compression": cell.compression,
            "trained_values": count,
            "learning_rates": list(cell.rates),
            "runs": _runs(len(cell.rates), len(options.seeds), cheap=options.select_on == "first_seed"),
        }
        for cell, count in counts.items()
    ]
    return {
        "kind": "plan",
        "output": str(spec.folder),
        "digest": spec.digest(),
        "cells": cells,
        "runs": sum(cell["runs"] for cell in cells),
        "steps": train.max_steps or math.ceil(train.epochs * per_epoch),
        "seeds": list(options.seeds),
        "selected_on": f"rates are chosen on validation {spec.recipe.metric}, {options.select_on}",
        "workers": options.workers,
        "threads": threads_of(spec),
        "data": data.describe(),
    }


def _runs(rates: int, seeds: int, *, cheap: bool) -> int:
    return rates + seeds - 1 if cheap else rates * seeds
