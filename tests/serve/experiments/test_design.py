"""What an experiment may be, and how everything that is wrong with one is told at once."""

from __future__ import annotations

import pytest

from modicum.errors import ConfigError
from modicum.serve.experiments.design import Arm, Design, check_weights

STORED = {"ada": "ada@2", "ada@1": "ada@1", "ada@2": "ada@2", "ada@canary": "ada@1", "bob@1": "bob@1"}
ARMS = [{"label": "old", "version": "ada@1", "weight": 9}, {"label": "new", "version": "ada"}]


def check(**body):
    return Design.check(
        {"name": "trial", "arms": ARMS, **body}, lambda text: STORED.get(text.removesuffix("@latest")), "base"
    )


def test_references_become_versions_that_never_change():
    design = check(arms=[{"label": "old", "version": "ada@canary"}, {"label": "new", "version": "base"}])
    assert design.arms == (Arm("old", "ada@1"), Arm("new", None))
    assert design.adapters == ("ada",)
    assert design.control.label == "old"
    assert Design.read(design.as_dict()) == design


def test_all_that_is_wrong_is_told_at_once():
    with pytest.raises(ConfigError) as caught:
        check(
            name="no name",
            wat=1,
            alpa=0.1,
            max_users=1.5,
            shadow=1,
            arms=[
                {"label": "old", "version": "ada@9"},
                {"label": "old", "version": "../x"},
                {"label": "n w", "version": "ada@1"},
                {"label": "old", "version": "ada@1", "weight": -1},
                {"label": "late", "version": "ada@canary", "weight": float("nan")},
                "arm",
            ],
        )
    said = str(caught.value)
    for part in (
        "no name for an experiment: 'no name'", "'wat'", "did you mean 'alpha'", "max_users = 1.5", "shadow = 1",
        "'ada@9' is not in the store", "arm 2", "arm 3", "weight of 'old' is -1", "weight of 'late' is nan", "arm 6",
        "differ in their labels",
    ):  # fmt: skip
        assert part in said


@pytest.mark.parametrize(
    ("about", "said"),
    [
        ({"arms": ARMS[:1]}, "list of 2 to"),
        ({"arms": None}, "list of 2 to"),
        ({"feedback": "thumb"}, "did you mean 'thumbs'"),
        ({"alpha": 0}, "alpha = 0"),
        ({"low": 1, "high": 1}, "low must be below high"),
        ({"latency_factor": 0.5}, "latency_factor = 0.5, must be at least 1"),
        ({"window": float("inf")}, "window = inf, must be a number"),
        ({"patience": 10**400}, "patience = 10+, must be a number"),
        ({"max_users": True}, "max_users = True, must be a whole number"),
        ({"shadow": True, "arms": [*ARMS, {"label": "x", "version": "bob@1"}]}, "two arms"),
        ({"arms": [{**arm, "weight": 0} for arm in ARMS]}, "no arm has a weight"),
    ],
)
def test_what_cannot_be_an_experiment(about, said):
    with pytest.raises(ConfigError, match=said):
        check(**about)


def test_what_feedback_is_worth():
    assert [check(feedback="thumbs").value(word) for word in ("down", "up")] == [0, 1]
    assert [check(feedback="outcome").value(word) for word in ("failure", "success")] == [0, 1]
    stars = check(feedback="score", low=1, high=5)
    assert [stars.value(given) for given in (1, 2, 5)] == [0, 0.25, 1]
    for design, given in [
        (stars, 0), (stars, 6), (stars, "up"), (stars, True), (stars, float("nan")), (stars, None),
        (check(), "yes"), (check(), 1), (check(), ["up"]),
    ]:  # fmt: skip
        with pytest.raises(ConfigError, match="must be"):
            design.value(given)


def test_weights_change_for_those_that_are_named():
    arms = (Arm("old", "ada@1", 9), Arm("new", "ada@2", 1))
    assert check_weights(arms, {"new": 3}) == (arms[0], Arm("new", "ada@2", 3))
    with pytest.raises(ConfigError, match=r"no arm 'nw' .*did you mean 'new'.*weight of 'old' is '9'"):
        check_weights(arms, {"nw": 3, "old": "9"})
    with pytest.raises(ConfigError, match="no arm has a weight above 0"):
        check_weights(arms, {"old": 0, "new": 0})
