"""Evaluating sub-networks: the task's metric on rows set aside for it, costs from shapes, times measured in turns."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, final

import torch

from modicum.adapters.elastic import Switch
from modicum.errors import ConfigError
from modicum.evaluate.latency import measure
from modicum.evaluate.run import evaluate
from modicum.models.families import unwrapped
from modicum.models.loading import quiet_transformers
from modicum.models.subnetwork import smaller_class
from modicum.search.costs import Costs
from modicum.search.options import COSTS, TIMES

if TYPE_CHECKING:
    from collections.abc import Mapping

    from modicum.data.encoded import Encoded
    from modicum.data.options import Task
    from modicum.search.options import SearchOptions
    from modicum.search.space import Choices, SearchSpace


@final
class Evaluator:
    """Values of the objectives and violated budgets of any sub-network of one model."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        rows: Encoded,
        task: Task,
        space: SearchSpace,
        options: SearchOptions,
        metric: str,
    ) -> None:
        """`rows` are scored on; see `SearchOptions` for the rest.

        Raises:
            ConfigError: a budget that even the smallest sub-network exceeds; all of them.
        """
        self._model, self._tokenizer, self._rows = model, tokenizer, rows
        self._task: Task = task
        self._space, self._options = space, options
        self._switch = Switch(model)
        #: objective -> whether larger is better, the metric first
        self.maximized = {name: options.maximized(name) for name in options.names(metric)}
        # sub-networks of narrower widths are extracted, which merges; those of lower ranks alone keep their adapters
        merged = any(group.widths for group in space.groups.values())
        self.costs = Costs.of_model(model, merged=merged)
        #: the costs of the super-network
        self.whole = self._costs_of(space.largest())
        self._times: dict[tuple[tuple[str, int], ...], dict[str, float]] = {}
        self._check_budgets()

    def violations(self, choices: Mapping[str, int]) -> dict[str, float]:
        """By what share budgets known from shapes alone are exceeded; only those that are."""
        return self._over(self._costs_of(choices))

    def __call__(self, choices: Choices) -> tuple[dict[str, float], dict[str, float]]:
        """Objectives and budgeted costs of a sub-network, and the budgets it exceeds, by what share."""
        sub_network = self._space.sub_network(choices)
        costs = self._costs_of(choices)
        if any(name in TIMES for name in (*self.maximized, *self._options.budgets)):
            costs |= self._time(choices)
        metric = next(iter(self.maximized))
        self._switch.activate(sub_network)
        found = evaluate(
            self._model,
            self._tokenizer,
            self._rows,
            self._task,
            exact_match=metric == "exact_match",
            resamples=1,
        )
        if metric not in found.metrics:
            raise ConfigError(f"the rows give no {metric}; they give {', '.join(found.metrics)}")
        values = {metric: found.metrics[metric].value} | costs
        kept = [*self.maximized, *(name for name in self._options.budgets if name not in self.maximized)]
        return {name: values[name] for name in kept}, self._over(costs)

    def _costs_of(self, choices: Mapping[str, int]) -> dict[str, float]:
        sub_network, tokens = self._space.sub_network(choices), self._options.prompt * self._options.batch
        return {name: self.costs.of(name, sub_network, tokens) for name in COSTS}

    def _limit(self, name: str) -> float:
        """A budget in the units of its cost."""
        budget = self._options.budgets[name]
        return budget * self.whole[name] if name in COSTS and budget <= 1 else budget

    def _over(self, costs: Mapping[str, float]) -> dict[str, float]:
        limits = {name: self._limit(name) for name in self._options.budgets if name in costs}
        return {name: costs[name] / limit - 1 for name, limit in limits.items() if costs[name] > limit}

    def _check_budgets(self) -> None:
        smallest = self._costs_of(self._space.smallest())
        if any(name in TIMES for name in self._options.budgets):
            smallest |= self._time(self._space.smallest())
        faults = [
            f"budgets.{name} = {self._options.budgets[name]:g}, the smallest sub-network takes {smallest[name]:,.4g} "
            + (f"({smallest[name] / self.whole[name]:.3f} of the super-network)" if name in COSTS else "")
            for name in self._over(smallest)
        ]
        if faults:
            raise ConfigError("no sub-network keeps the budgets: " + "; ".join(faults))

    def _time(self, choices: Mapping[str, int]) -> dict[str, float]:
        """Prefill and decode of the extracted sub-network as shares of the merged super-network's, paired."""
        sub_network = self._space.sub_network(choices)
        key = tuple(sorted(sub_network.widths.items()))
        if key not in self._times:
            models = {
                "super-network": _shaped(self._model, {}),
                "sub-network": _shaped(self._model, sub_network.widths),
            }
            options = self._options
            found = measure(
                models,
                baseline="super-network",
                prompt=options.prompt,
                generate=options.generate,
                batch=options.batch,
                repeats=options.repeats,
            )
            small = next(model for model in found.models if model.name == "sub-network")
            ratios = {"prefill_time": small.prefill_ratio, "decode_time": small.decode_ratio}
            self._times[key] = {name: 1 / ratio.value for name, ratio in ratios.items() if ratio is not None}
        return self._times[key]


def _shaped(model: Any, units: Mapping[str, int]) -> Any:
    """A model as extraction would make it, with random weights: its times depend on its shapes alone."""
    from accelerate import init_empty_weights

    base = unwrapped(model)
    kind, config = smaller_class(model, units) if units else (type(base), base.config)
    with quiet_transformers(), init_empty_weights(include_buffers=False):
        small = kind(config)
    for module in small.modules():
        for name, parameter in module.named_parameters(recurse=False):
            values = torch.empty(parameter.shape, dtype=base.dtype, device=base.device).normal_(std=0.02)
            setattr(module, name, torch.nn.Parameter(values, requires_grad=False))
    small.tie_weights()
    return small.to(base.device).eval()
