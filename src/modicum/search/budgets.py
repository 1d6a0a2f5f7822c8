"""Upper limits of costs: which a sub-network exceeds, and whether any can keep them at all."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, final

from modicum.errors import ConfigError
from modicum.search.costs import Costs
from modicum.search.options import COSTS

if TYPE_CHECKING:
    from collections.abc import Mapping

    from modicum.search.options import SearchOptions
    from modicum.search.space import SearchSpace


@final
class Budgets:
    """The budgets of a search, and the costs of sub-networks that shapes tell."""

    def __init__(self, options: SearchOptions, space: SearchSpace, costs: Costs) -> None:
        self._options, self._space, self._costs = options, space, costs
        #: the costs of the super-network
        self.whole = self.costs(space.largest())

    def costs(self, choices: Mapping[str, int]) -> dict[str, float]:
        """All costs of a sub-network that shapes tell."""
        sub_network, tokens = self._space.sub_network(choices), self._options.prompt * self._options.batch
        return {name: self._costs.of(name, sub_network, tokens) for name in COSTS}

    def exceeded(self, costs: Mapping[str, float]) -> dict[str, float]:
        """By what share `costs` exceed the budgets that they know; only those that are exceeded."""
        limits = {
            name: budget * self.whole[name] if name in COSTS and budget <= 1 else budget
            for name, budget in self._options.budgets.items()
            if name in costs
        }
        return {name: costs[name] / limit - 1 for name, limit in limits.items() if costs[name] > limit}

    def check(self, smallest: Mapping[str, float]) -> None:
        """Returns when the costs of the `smallest` sub-network exceed no budget.

        Of times that is a rule of thumb: a narrower model computes less, but kernels may like a wider one more.

        Raises:
            ConfigError: they do; all budgets that cannot be kept.
        """
        faults = [
            f"budgets.{name} = {self._options.budgets[name]:g}, the smallest sub-network takes {smallest[name]:,.4g}"
            + (f" ({smallest[name] / self.whole[name]:.3f} of the super-network)" if name in COSTS else "")
            for name in self.exceeded(smallest)
        ]
        if faults:
            raise ConfigError("no sub-network keeps the budgets: " + "; ".join(faults))


def merges(space: SearchSpace) -> bool:
    """Whether costs count adapters as merged.

    Sub-networks of narrower widths are extracted, which merges; those of lower ranks alone keep their adapters.
    """
    return any(group.widths for group in space.groups.values())


def check_shapes(
    model: Any,
    ranks: Mapping[str, int],
    space: SearchSpace,
    options: SearchOptions,
    bytes_each: float | None,
) -> None:
    """Returns when the budgets that shapes tell can be kept on a base `model`, whose weights do not matter.

    `bytes_each`: of a weight when the model is loaded; None for low-bit ones, whose bytes and memory are not told.
    Times are measured, and never told.

    Raises:
        ConfigError: even the smallest sub-network exceeds one; all of them.
    """
    told = COSTS if bytes_each else ("parameters", "macs")
    known = {name: limit for name, limit in options.budgets.items() if name in told}
    costs = Costs.of_shapes(model, ranks, merged=merges(space), bytes_each=bytes_each or 2.0)
    budgets = Budgets(options.model_copy(update={"budgets": known}), space, costs)
    budgets.check(budgets.costs(space.smallest()))
