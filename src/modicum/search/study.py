"""Every evaluated sub-network, kept in an Optuna study on disk: resumable, and shared by several processes."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, final

from modicum.errors import ConfigError, MissingExtraError, listing

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from modicum.search.options import SearchOptions
    from modicum.search.space import Choices, SearchSpace

FILE = "study.db"
#: values of objectives and budgeted costs, and by what share budgets are exceeded
Found = tuple[dict[str, float], dict[str, float]]
_IDENTITY, _CHOICES, _VALUES, _OVER, _SECONDS = "identity", "choices", "values", "violations", "seconds"
_DRAWN = "drawn"
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
    #: which of the draws of the sampler it was; its place where it was not drawn
    drawn: int = -1


@final
class Study:
    """The points of one search. Choices are drawn or wanted, evaluated by the caller, and kept."""

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
            ConfigError: the folder holds a study of something else; everything that differs. Or it cannot be read.
            MissingExtraError: Optuna is not installed.
        """
        optuna = _optuna()
        self.space, self.names = space, list(maximized)
        storage = _storage(optuna, folder / FILE)
        self._study = optuna.create_study(
            storage=storage,
            study_name=_NAME,
            load_if_exists=True,
            directions=["maximize" if larger else "minimize" for larger in maximized.values()],
        )
        self._options, self._worker = options, worker
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

    def draw(self, ahead: int = 0) -> Any:
        """The next trial that the sampler wants; `trial.params` are its choices. To be told or dropped.

        `ahead`: how many were drawn and are not told yet.
        """
        told = {point.drawn for point in self.points()}
        index = next(itertools.islice((at for at in itertools.count() if at not in told), ahead, None))
        # each draw has a seed of its own: a resumed search draws what it lacks, also in the middle of a generation
        seed = (self._options.seed * 1000 + self._worker) * 100_000 + index
        self._study.sampler = _optuna().samplers.NSGAIISampler(
            population_size=self._options.population, seed=seed
        )
        trial = self._study.ask(self._distributions)
        trial.set_user_attr(_DRAWN, index)
        return trial

    def tell(self, trial: Any, found: Found, seconds: float) -> Point:
        """The finished point of a trial that was drawn, which took `seconds`."""
        point = Point(trial.number, dict(trial.params), *found, seconds, trial.user_attrs[_DRAWN])
        for key, value in _attributes(point).items():
            trial.set_user_attr(key, value)
        trial.set_constraint("budgets", sum(point.violations.values()))
        self._study.tell(trial, [point.values[name] for name in self.names])
        return point

    def enter(self, choices: Choices, found: Found, seconds: float) -> Point:
        """The finished point of `choices` that the strategy wanted, written at once."""
        entered = _optuna().create_trial(
            values=[found[0][name] for name in self.names],
            params=choices,
            distributions=self._distributions,
            user_attrs=_attributes(Point(-1, choices, *found, seconds)),
        )
        self._study.add_trial(entered)
        return next(point for point in reversed(self.points()) if point.choices == choices)

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
                trial.user_attrs.get(_DRAWN, place),
            )
            for place, trial in enumerate(self._study.get_trials(deepcopy=False, states=complete))
        ]


def _storage(optuna: Any, file: Path) -> Any:
    from sqlalchemy.exc import DatabaseError

    try:
        return optuna.storages.RDBStorage(
            f"sqlite:///{file}", engine_kwargs={"connect_args": {"timeout": 60}}
        )
    except (DatabaseError, RuntimeError) as error:
        raise ConfigError(
            f"{file} cannot be read as a study ({str(error).splitlines()[0]}): name another output, or start anew with "
            "--overwrite"
        ) from error


def _attributes(point: Point) -> dict[str, Any]:
    return {
        _CHOICES: point.choices, _VALUES: point.values, _OVER: point.violations, _SECONDS: point.seconds
    }  # fmt: skip


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise MissingExtraError(
            "a search keeps its points with Optuna: pip install 'modicum[search]'"
        ) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna
