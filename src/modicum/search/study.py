"""Every evaluated sub-network, kept in an Optuna study on disk: resumable, and shared by several processes."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, final

from modicum.errors import ConfigError, MissingExtraError, listing

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from modicum.search.options import SearchOptions
    from modicum.search.space import Choices, SearchSpace

FILE = "study.db"
_IDENTITY, _CHOICES, _VALUES, _OVER, _SECONDS = "identity", "choices", "values", "violations", "seconds"
_NAME = "search"


@dataclass(frozen=True)
class Point:
    """One sub-network that was evaluated."""

    number: int
    choices: Choices
    #: objectives and budgeted costs
    values: dict[str, float]
    #: budget -> by what share it is exceeded; empty where all are kept
    violations: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0


@final
class Study:
    """The points of one search. Choices are asked for, evaluated by the caller, and told."""

    def __init__(
        self,
        folder: Path,
        space: SearchSpace,
        options: SearchOptions,
        maximized: Mapping[str, bool],
        identity: Mapping[str, Any],
        worker: int = 0,
    ) -> None:
        """Open or begin the study in `folder`; `identity` is what has to be the same for a study to go on.

        Raises:
            ConfigError: the folder holds a study of something else; everything that differs.
            MissingExtraError: Optuna is not installed.
        """
        optuna = _optuna()
        self.space, self.names = space, list(maximized)
        storage = optuna.storages.RDBStorage(
            f"sqlite:///{folder / FILE}", engine_kwargs={"connect_args": {"timeout": 60}}
        )
        self._study = optuna.create_study(
            storage=storage,
            study_name=_NAME,
            load_if_exists=True,
            directions=["maximize" if larger else "minimize" for larger in maximized.values()],
        )
        # another seed for every start, so that a resumed search does not draw the same again
        drawn = len(self._study.get_trials(deepcopy=False))
        self._study.sampler = _sampler(optuna, options, (options.seed * 1000 + worker) * 1000 + drawn)
        self._distributions = {
            name: optuna.distributions.CategoricalDistribution(group.choices)
            for name, group in space.groups.items()
        }
        known = self._study.user_attrs.get(_IDENTITY)
        wanted = json.loads(json.dumps({**identity, "objectives": self.names}))
        if known is None:
            self._study.set_user_attr(_IDENTITY, wanted)
        elif known != wanted:
            other = [
                f"{key} was {known.get(key)!r}, is {wanted.get(key)!r}"
                for key in sorted({*known, *wanted})
                if known.get(key) != wanted.get(key)
            ]
            raise ConfigError(
                f"{folder} holds the study of something else: {listing(other, 8)}. Name another output, or start anew "
                "with --overwrite"
            )

    def ask(self, choices: Choices | None = None) -> Any:
        """The next trial: of `choices`, or of what the sampler wants; `trial.params` are its choices."""
        if choices is not None:
            self._study.enqueue_trial(choices)
        return self._study.ask(self._distributions)

    def tell(
        self, trial: Any, values: Mapping[str, float], violations: Mapping[str, float], began: float
    ) -> Point:
        """The finished point of a trial that `ask` gave; `began` is `time.monotonic()` of then."""
        seconds = time.monotonic() - began
        attributes = {
            _CHOICES: trial.params, _VALUES: dict(values), _OVER: dict(violations), _SECONDS: seconds
        }  # fmt: skip
        for key, value in attributes.items():
            trial.set_user_attr(key, value)
        self._study.tell(trial, [values[name] for name in self.names])
        return Point(trial.number, dict(trial.params), dict(values), dict(violations), seconds)

    def drop(self, trial: Any) -> None:
        """Give up a trial whose evaluation failed."""
        self._study.tell(trial, state=_optuna().trial.TrialState.FAIL)

    def points(self) -> list[Point]:
        """All finished points, of earlier runs and of other processes too."""
        complete = (_optuna().trial.TrialState.COMPLETE,)
        return [
            Point(
                trial.number,
                trial.user_attrs[_CHOICES],
                trial.user_attrs[_VALUES],
                trial.user_attrs[_OVER],
                trial.user_attrs[_SECONDS],
            )
            for trial in self._study.get_trials(deepcopy=False, states=complete)
        ]


def _sampler(optuna: Any, options: SearchOptions, seed: int) -> Any:
    if options.strategy == "nsga2":
        return optuna.samplers.NSGAIISampler(
            population_size=options.population,
            seed=seed,
            constraints_func=lambda trial: [sum(trial.user_attrs.get(_OVER, {}).values())],
        )
    return optuna.samplers.RandomSampler(seed=seed)


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise MissingExtraError(
            "a search keeps its points with Optuna: pip install 'modicum[search]'"
        ) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna
