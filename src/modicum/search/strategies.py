"""How the next sub-network to evaluate is chosen.

    heuristic   entry (n − 1) // 2 of every group's n choices, nothing else
    hill        from the heuristic to whichever neighbour is better, the incumbent stays otherwise
    random      uniform, those within the budgets that shapes tell first
    nsga2       Deb et al. 2002, as Optuna has it; points over a budget lose against all others

Sources: hill-climbing from the heuristic as in Shears, arXiv 2404.10934; NSGA-II as in LoNAS.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, final

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from modicum.search.options import SearchOptions
    from modicum.search.space import Choices
    from modicum.search.study import Point, Study

    Evaluate = Callable[[Choices], tuple[dict[str, float], dict[str, float]]]

#: draws of the random strategy before it takes one that is over a budget
_DRAWS = 200


@final
class Explorer:
    """Evaluates sub-networks until the study has as many as wanted."""

    def __init__(
        self,
        study: Study,
        options: SearchOptions,
        evaluate: Evaluate,
        violations: Callable[[Choices], Mapping[str, float]],
        *,
        maximized: Mapping[str, bool],
        tell: Callable[[Point], None] = lambda _: None,
        worker: int = 0,
    ) -> None:
        """`evaluate(choices)` gives values and violated budgets, `violations(choices)` those that shapes tell."""
        self.study, self.options, self._evaluate, self._violations = study, options, evaluate, violations
        self._first = next(iter(maximized.items()))
        self._tell = tell
        self._generator = torch.Generator().manual_seed(options.seed * 1000 + worker)
        self._known = {_key(point.choices): point for point in study.points()}

    def run(self) -> None:
        """Go on until the strategy is done or `trials` sub-networks are evaluated."""
        if self.options.strategy == "heuristic":
            self._visit(self.study.space.heuristic())
        elif self.options.strategy == "hill":
            self._climb()
        else:
            while self._left():
                wanted = self._drawn() if self.options.strategy == "random" else None
                self._visit(wanted, again=True)

    def _left(self) -> int:
        return self.options.trials - len(self.study.points())

    def _climb(self) -> None:
        incumbent = self._visit(self.study.space.heuristic())
        improved = True
        while improved:
            improved = False
            neighbours = list(self.study.space.neighbours(incumbent.choices))
            for index in torch.randperm(len(neighbours), generator=self._generator).tolist():
                if not self._left() and _key(neighbours[index]) not in self._known:
                    return
                point = self._visit(neighbours[index])
                if self._rank(point) > self._rank(incumbent):
                    incumbent, improved = point, True
                    break

    def _rank(self, point: Point) -> tuple[float, float]:
        """Budgets first, then the metric."""
        name, larger = self._first
        value = point.values[name]
        return -sum(point.violations.values()), value if larger else -value

    def _drawn(self) -> Choices:
        """A random sub-network that is new and keeps the budgets that shapes tell, if there is one soon."""
        for _ in range(_DRAWS):
            choices = self.study.space.sample(self._generator)
            if _key(choices) not in self._known and not self._violations(choices):
                return choices
        return self.study.space.sample(self._generator)

    def _visit(self, choices: Choices | None, *, again: bool = False) -> Point:
        """The point of `choices`; one that is known is not evaluated again, but may be entered again."""
        if choices is not None and not again and _key(choices) in self._known:
            return self._known[_key(choices)]
        trial, began = self.study.ask(choices), time.monotonic()
        key = _key(trial.params)
        try:
            known: Any = self._known.get(key)
            values, over = (
                (known.values, known.violations) if known is not None else self._evaluate(dict(trial.params))
            )
        except BaseException:
            self.study.drop(trial)
            raise
        point = self.study.tell(trial, values, over, began)
        self._known.setdefault(key, point)
        self._tell(point)
        return point


def _key(choices: Mapping[str, int]) -> tuple[tuple[str, int], ...]:
    return tuple(sorted(choices.items()))
