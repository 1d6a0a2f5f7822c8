"""What an experiment is: its arms, what is counted as good, and when it ends."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Self

from modicum.errors import ConfigError, did_you_mean, not_among, too_low
from modicum.store.catalogue.names import check_label, check_name, reference

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

Kind = Literal["score", "thumbs", "outcome"]
State = Literal["draft", "running", "stopped", "promoted", "rolled back"]
KINDS = ("score", "thumbs", "outcome")
#: what the two words of a kind of feedback are worth
WORDS = {"thumbs": {"down": 0.0, "up": 1.0}, "outcome": {"failure": 0.0, "success": 1.0}}
_MOST_ARMS = 16
#: larger numbers are none that anybody means
_LARGEST = 1e15


@dataclass(frozen=True)
class Arm:
    """A version that some of the users get."""

    label: str
    #: `name@3`; None: the base model alone
    version: str | None
    #: its share of the users, against those of the others
    weight: float = 1.0

    @property
    def adapter(self) -> str | None:
        """The name of the adapter."""
        return None if self.version is None else self.version.partition("@")[0]


@dataclass(frozen=True)
class Design:
    """An experiment as it was planned; of all this only weights change later on."""

    name: str
    #: the first is the control, which the others are compared with
    arms: tuple[Arm, ...]
    #: what users say of answers: a number, `up` or `down`, `success` or `failure`
    feedback: Kind = "thumbs"
    #: the range of scores
    low: float = 0.0
    high: float = 1.0
    #: the chance that a difference is declared which is none, however often one looks
    alpha: float = 0.05
    #: it ends undecided after so many users whose outcome is known
    max_users: int = 100_000
    #: seconds after a user's first feedback in which more of it counts; its mean is then the user's outcome for good
    window: float = 3600.0
    #: seconds after an answer in which feedback on it is taken
    patience: float = 604_800.0
    #: an arm is stopped that has surely more errors than the control, by more than this share of requests
    error_margin: float = 0.02
    #: an arm is stopped if surely more than 5 % of its requests take longer than this times the control's p95
    latency_factor: float = 1.5
    #: the control answers everybody; the other arm runs beside it, and is only compared
    shadow: bool = False

    @property
    def control(self) -> Arm:
        """The arm that the others are compared with."""
        return self.arms[0]

    @property
    def adapters(self) -> tuple[str, ...]:
        """The names of the adapters in it."""
        return tuple(dict.fromkeys(arm.adapter for arm in self.arms if arm.adapter is not None))

    def arm(self, label: str) -> Arm:
        """The arm of that label.

        Raises:
            ConfigError: it has none.
        """
        for arm in self.arms:
            if arm.label == label:
                return arm
        labels = [arm.label for arm in self.arms]
        raise ConfigError(
            f"{self.name!r} has no arm {label!r}{did_you_mean(label, labels)}: {', '.join(labels)}"
        )

    def value(self, given: Any) -> float:
        """What feedback is worth, 0 … 1.

        Raises:
            ConfigError: it is not of this experiment's kind, or out of range.
        """
        if self.feedback != "score":
            words = WORDS[self.feedback]
            if not isinstance(given, str) or given not in words:
                raise ConfigError(f"{self.feedback} = {given!r}, must be {' or '.join(map(repr, words))}")
            return words[given]
        if (
            isinstance(given, bool)
            or not isinstance(given, (int, float))
            or not self.low <= given <= self.high
        ):
            raise ConfigError(f"score = {given!r}, must be a number from {self.low:g} to {self.high:g}")
        return (given - self.low) / (self.high - self.low)

    def as_dict(self) -> dict[str, Any]:
        """The design in plain JSON types."""
        return dataclasses.asdict(self)

    @classmethod
    def read(cls, stored: Mapping[str, Any]) -> Self:
        """The design of which this is `as_dict`."""
        return cls(**{**stored, "arms": tuple(Arm(**arm) for arm in stored["arms"])})

    @classmethod
    def check(cls, body: Mapping[str, Any], find: Callable[[str], str | None], base_name: str) -> Self:
        """The design that `body` describes; `find` tells what a reference to a version stands for now.

        Arms are `{"label": …, "version": "ada@3", "weight": 9}`; the version may be the base model's name.

        Raises:
            ConfigError: all that is wrong with it.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        wrong = [f"unknown field {name!r}{did_you_mean(name, known)}" for name in body if name not in known]
        arms = _arms(body.get("arms"), find, base_name, wrong)
        values = {name: value for name, value in body.items() if name in known - {"arms"}}
        wrong += _of_wrong_type(values)
        try:
            check_name(values.get("name", ""))
        except ConfigError as error:
            wrong.append(str(error).replace("an adapter", "an experiment"))
        if wrong:
            raise ConfigError("no such experiment can be made: " + "; ".join(wrong))
        design = cls(arms=arms, **values)
        if wrong := design._faults():
            raise ConfigError("no such experiment can be made: " + "; ".join(wrong))
        return design

    def _faults(self) -> list[str]:
        wrong = not_among("feedback", self.feedback, KINDS)
        wrong += too_low(
            self, {"max_users": 2, "window": 0, "patience": 0, "error_margin": 0, "latency_factor": 1}
        )
        if not 0 < self.alpha < 0.5:
            wrong.append(f"alpha = {self.alpha}, must be above 0 and below 0.5")
        if not self.low < self.high:
            wrong.append(f"low = {self.low}, high = {self.high}: low must be below high")
        if self.shadow and len(self.arms) != 2:
            wrong.append(
                f"a shadow experiment has two arms, the one that answers and its shadow, not {len(self.arms)}"
            )
        return wrong


def check_weights(arms: tuple[Arm, ...], weights: Mapping[str, Any]) -> tuple[Arm, ...]:
    """The arms with these weights in place of theirs, by label; others stay.

    Raises:
        ConfigError: a label or a weight is wrong, or none would be above 0.
    """
    labels = [arm.label for arm in arms]
    wrong = [f"no arm {label!r}{did_you_mean(label, labels)}" for label in weights if label not in labels]
    found = tuple(dataclasses.replace(arm, weight=weights.get(arm.label, arm.weight)) for arm in arms)
    wrong += _of_wrong_weight(found)
    if wrong:
        raise ConfigError("the weights cannot be changed: " + "; ".join(wrong))
    return found


def _arms(given: Any, find: Callable[[str], str | None], base_name: str, wrong: list[str]) -> tuple[Arm, ...]:
    if not isinstance(given, (list, tuple)) or not 2 <= len(given) <= _MOST_ARMS:
        wrong.append(f"arms must be a list of 2 to {_MOST_ARMS}, the control first")
        return ()
    arms = []
    for number, one in enumerate(given, 1):
        if not isinstance(one, dict) or not {"label", "version"} <= one.keys() <= {
            "label",
            "version",
            "weight",
        }:
            wrong.append(f'arm {number} must be like {{"label": "new", "version": "ada@3", "weight": 1}}')
            continue
        try:
            label = check_label(one["label"], "an arm")
            version = None if one["version"] == base_name else find(str(reference(one["version"])))
        except ConfigError as error:
            wrong.append(f"arm {number}: {error}")
            continue
        if version is None and one["version"] != base_name:
            wrong.append(f"arm {number}: {one['version']!r} is not in the store")
        arms.append(Arm(label, version, one.get("weight", 1.0)))
    # the same version twice is a test of the test
    if len({arm.label for arm in arms}) < len(arms):
        wrong.append("arms must differ in their labels")
    wrong += _of_wrong_weight(tuple(arms))
    return tuple(arms)


def _of_wrong_weight(arms: tuple[Arm, ...]) -> list[str]:
    wrong = [
        f"the weight of {arm.label!r} is {arm.weight!r}, must be a number from 0 on"
        for arm in arms
        if not _is_number(arm.weight) or arm.weight < 0
    ]
    if arms and not wrong and not any(arm.weight for arm in arms):
        wrong.append("no arm has a weight above 0")
    return wrong


def _of_wrong_type(values: Mapping[str, Any]) -> list[str]:
    wrong = []
    for name, value in values.items():
        kind = "text" if name in {"name", "feedback"} else "true or false" if name == "shadow" else "a number"
        right = {
            "text": isinstance(value, str),
            "true or false": isinstance(value, bool),
            "a number": _is_number(value),
        }
        if not right[kind] or (name == "max_users" and not isinstance(value, int)):
            wrong.append(f"{name} = {value!r}, must be {'a whole number' if name == 'max_users' else kind}")
    return wrong


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= _LARGEST
