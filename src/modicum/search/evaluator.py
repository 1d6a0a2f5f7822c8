"""Evaluating sub-networks: the task's metric on rows set aside for it, costs from shapes, times measured in turns."""

from __future__ import annotations

import copy
import functools
import math
from typing import TYPE_CHECKING, Any, final

import torch

from modicum.adapters.elastic import Switch
from modicum.errors import ConfigError
from modicum.evaluate.latency import measure
from modicum.evaluate.run import evaluate
from modicum.models.families import unwrapped
from modicum.models.loading import quiet_transformers
from modicum.models.subnetwork import smaller_class
from modicum.search.budgets import Budgets, merges
from modicum.search.costs import Costs
from modicum.search.options import TIMES

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
        self.budgets = Budgets(options, space, Costs.of_model(model, merged=merges(space)))
        self._times: dict[tuple[tuple[str, int], ...], dict[str, float]] = {}
        smallest = self.budgets.costs(space.smallest())
        if any(name in TIMES for name in options.budgets):
            smallest |= self._time(space.smallest())
        self.budgets.check(smallest)

    def violations(self, choices: Mapping[str, int]) -> dict[str, float]:
        """By what share budgets known from shapes alone are exceeded; only those that are."""
        return self.budgets.exceeded(self.budgets.costs(choices))

    def __call__(self, choices: Choices) -> tuple[dict[str, float], dict[str, float]]:
        """Objectives and budgeted costs of a sub-network, and the budgets it exceeds, by what share."""
        sub_network = self._space.sub_network(choices)
        costs = self.budgets.costs(choices)
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
        if not math.isfinite(found.metrics[metric].value):
            raise ConfigError(
                f"{metric} is {found.metrics[metric].value} with the sub-network {dict(choices)}: training diverged, "
                "or the number type overflows"
            )
        values = {metric: found.metrics[metric].value} | costs
        kept = [*self.maximized, *(name for name in self._options.budgets if name not in self.maximized)]
        return {name: values[name] for name in kept}, self.budgets.exceeded(costs)

    def _time(self, choices: Mapping[str, int]) -> dict[str, float]:
        """Prefill and decode of a sub-network as shares of the super-network's, paired.

        Of the extracted models where widths are cut, else of the model with its adapters, which stay beside it.
        """
        sub_network = self._space.sub_network(choices)
        merged = merges(self._space)
        key = tuple(sorted((sub_network.widths if merged else sub_network.ranks).items()))
        if key not in self._times:
            if merged:
                whole, small = _shaped(self._model, {}), _shaped(self._model, sub_network.widths)
            else:
                whole, small = self._whole, self._model
                self._switch.activate(sub_network)
            models = {"super-network": whole, "sub-network": small}
            options = self._options
            found = measure(
                models,
                baseline="super-network",
                prompt=options.prompt,
                generate=options.generate,
                batch=options.batch,
                repeats=options.repeats,
            )
            times = next(model for model in found.models if model.name == "sub-network")
            ratios = {"prefill_time": times.prefill_ratio, "decode_time": times.decode_ratio}
            self._times[key] = {name: 1 / ratio.value for name, ratio in ratios.items() if ratio is not None}
        return self._times[key]

    @functools.cached_property
    def _whole(self) -> Any:
        """A copy of the model as the whole super-network."""
        whole = copy.deepcopy(self._model)
        Switch(whole).activate(None)
        return whole


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
