"""What a search can be told; the only place where these options are declared."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field

from modicum.data.options import Section
from modicum.errors import did_you_mean
from modicum.evaluate.metrics import LARGER_IS_BETTER

#: known from shapes alone: parameters left, multiply-accumulates of the linear layers, bytes of the weights, bytes of
#: weights and key/value cache
COSTS = ("parameters", "macs", "bytes", "memory")
#: measured in turns with the super-network, as a share of its time; merged where widths are cut out
TIMES = ("prefill_time", "decode_time")


class SearchOptions(Section):
    """How to search a trained super-network for good sub-networks."""

    strategy: Literal["heuristic", "hill", "random", "nsga2"] = Field(
        "hill",
        description="heuristic: the middle of every group, alone; hill: from there step by step while it gets better; "
        "random; nsga2: evolution towards the Pareto front.",
    )
    objectives: list[str] = Field(
        default_factory=list,
        description=f"A metric of the task and costs: {', '.join((*COSTS, *TIMES))}; metric and parameters when empty.",
    )
    budgets: dict[str, float] = Field(
        default_factory=dict,
        description="Upper limits of costs: shares of the super-network up to 1, absolute above (parameters: 0.8).",
    )
    trials: int = Field(50, ge=1, description="Sub-networks to evaluate; workers may add one each.")
    population: int = Field(16, ge=2, description="nsga2: sub-networks of a generation.")
    seed: int = Field(0, ge=0, description="Seed of the search.")
    workers: int = Field(1, ge=1, description="Processes that evaluate side by side (random and nsga2).")
    rows: str | None = Field(
        None, description="Rows to score on, like data.validation; the validation rows when unset."
    )
    max_rows: int | None = Field(None, ge=1, description="Score on so many of them at most.")
    prompt: int = Field(128, ge=1, description="Tokens of the prompt in times, MACs and memory.")
    generate: int = Field(16, ge=1, description="Tokens decoded when times are measured.")
    batch: int = Field(1, ge=1, description="Sequences in times, MACs and memory.")
    repeats: int = Field(5, ge=3, description="Turns of each measurement of times.")

    def faults(self, metric: str, metrics: list[str]) -> list[str]:
        """What is wrong for a task with these `metrics`, of which `metric` is the usual one."""
        known = [*metrics, *COSTS, *TIMES]
        faults = [
            f"no objective {name!r}{did_you_mean(name, known)}; known: {', '.join(known)}"
            for name in self.objectives
            if name not in known
        ]
        chosen = [name for name in self.names(metric) if name in metrics]
        if not faults and len(chosen) != 1:
            faults.append(
                f"objectives need exactly one metric of the task ({', '.join(metrics)}), not {len(chosen)}"
            )
        limits = (*COSTS, *TIMES)
        faults += [
            f"no budget for {name!r}{did_you_mean(name, limits)}; known: {', '.join(limits)}"
            for name in self.budgets
            if name not in limits
        ]
        faults += [
            f"budgets.{name} = {limit}, must be a number above 0"
            for name, limit in self.budgets.items()
            if not 0 < limit < math.inf
        ]
        faults += [
            f"budgets.{name} = {limit}: times are shares of the super-network's, at most 1"
            for name, limit in self.budgets.items()
            if name in TIMES and 1 < limit < math.inf
        ]
        if self.workers > 1 and self.strategy in ("hill", "heuristic"):
            faults.append(f"{self.strategy} goes step by step: workers = 1, or the strategy nsga2 or random")
        if self.workers > 1 and any(name in TIMES for name in (*self.objectives, *self.budgets)):
            faults.append("times measured by workers side by side disturb each other: workers = 1")
        return faults

    def names(self, metric: str) -> list[str]:
        """The objectives, the metric of the task first."""
        return sorted(self.objectives, key=lambda name: name not in LARGER_IS_BETTER) or [
            metric,
            "parameters",
        ]

    def maximized(self, name: str) -> bool:
        """Whether larger values of an objective are better."""
        return LARGER_IS_BETTER.get(name, False)
