"""When experiments end by themselves: a decision, enough users, an arm that harms; and shadows, which end nothing."""

from __future__ import annotations

import asyncio
import random
import time

import pytest
from tests.serve.experiments.speaking import arms_of, ask, flushed

from modicum.serve.experiments import Experiments
from modicum.serve.experiments.assignment import pseudonym
from modicum.serve.experiments.experiments import ACTOR
from modicum.serve.experiments.tables import Exposure


def simulate(experiments, engine, clock, users, liked, *, seed=0, look=20):
    """How many users came, one by one, and said how they liked it, before a look ended it."""
    rng = random.Random(seed)

    async def come():
        for number in range(users):
            arm, _ = await ask(experiments, engine, "trial", f"user {number}")
            thumbs = "up" if rng.random() < liked[arm] else "down"
            await experiments.feedback("team", {"response_id": f"r-user {number}", "thumbs": thumbs})
            clock.now += 1
            if number % look == 0:
                await asyncio.to_thread(experiments.check)
                if experiments.get("trial").state != "running":
                    return number
        return users

    return asyncio.run(come())


def test_a_true_difference_ends_it_and_the_winner_is_known(experiments, engine, clock, trial, store):
    trial()
    count = simulate(experiments, engine, clock, 1500, {"old": 0.4, "new": 0.75})
    one = experiments.get("trial")
    assert count < 1000
    assert (one.state, one.winner, one.reason) == ("stopped", "new", "new is better than old")
    report = experiments.report("trial")
    new = arms_of(report)["new"]
    assert new.verdict == "better"
    assert 0 < new.difference.low < 0.35 < new.difference.high
    assert new.p < 0.05
    assert new.outcome.low < 0.75 < new.outcome.high
    assert report.sample_ratio_p > 0.01
    entry = [entry for entry in store.log("ada") if entry.action == "experiment"][-1]
    assert (entry.actor, entry.detail["did"], entry.detail["winner"]) == (ACTOR, "stop", "new")
    assert experiments.promote("trial", "chief").state == "promoted"
    assert store.find("ada@production") == "ada@3"


def test_a_worse_arm_ends_it_for_the_control(experiments, engine, clock, trial):
    trial()
    simulate(experiments, engine, clock, 1500, {"old": 0.75, "new": 0.4})
    one = experiments.get("trial")
    assert (one.state, one.winner, one.reason) == ("stopped", "old", "no arm is as good as old")
    assert arms_of(experiments.report("trial"))["new"].verdict == "worse"


def test_the_same_against_the_same_goes_on_until_there_are_enough(experiments, engine, clock, trial):
    trial(max_users=600)
    count = simulate(experiments, engine, clock, 1000, {"old": 0.5, "new": 0.5}, seed=4)
    one = experiments.get("trial")
    assert 600 <= count <= 640
    assert (one.state, one.winner, one.reason) == ("stopped", None, "undecided after 600 users")


def test_what_ends_is_told_to_the_last_user(experiments, engine, clock, trial):
    trial(max_users=5000)
    simulate(experiments, engine, clock, 301, {"old": 0.5, "new": 0.5}, seed=4, look=50)
    clock.now += 11
    experiments.check()
    # three more are not worth a look while it runs
    simulate(experiments, engine, clock, 304, {"old": 0.5, "new": 0.5}, seed=4, look=1000)
    clock.now += 11
    experiments.check()
    assert experiments.report("trial").rated_users == 301
    experiments.stop("trial", "chief")
    assert experiments.report("trial").rated_users == 304


def test_of_three_arms_each_has_less_of_the_chance_to_err(experiments, engine, clock, trial):
    arms = [{"label": label, "version": f"ada@{n}"} for n, label in ((1, "old"), (2, "mid"), (3, "new"))]
    trial(arms=arms)
    simulate(experiments, engine, clock, 3000, {"old": 0.4, "mid": 0.45, "new": 0.8})
    report = arms_of(experiments.report("trial"))
    assert experiments.get("trial").winner == "new"
    assert report["mid"].verdict == "undecided"
    assert report["old"].difference is None


def seen(experiments, arm, user, seconds=1.0, outcome="ok", count=1):
    """Answers of an arm that took so long."""
    one = experiments.get("trial")
    for _ in range(count):
        known = pseudonym(one.salt, "team", user)
        experiments._expose(one, Exposure(one.id, arm, known, known, None, 0.0, outcome, seconds, None, 1, 1))
    flushed(experiments)


def test_an_arm_that_fails_is_stopped_soon(experiments, trial):
    trial()
    for number in range(60):
        seen(experiments, "old", f"u{number}")
        seen(experiments, "new", f"v{number}", outcome="error")
        experiments.check()
        if experiments.get("trial").state != "running":
            break
    assert number < 25
    one = experiments.get("trial")
    assert one.winner is None
    assert one.reason == f"guardrail: new fails in {number + 1} of {number + 1} requests"


def test_one_user_alone_stops_nothing(experiments, trial):
    trial()
    seen(experiments, "old", "u", count=100)
    for user in ("v", "w"):
        seen(experiments, "new", user, outcome="error", count=100)
    experiments.check()
    assert experiments.get("trial").state == "running"
    seen(experiments, "new", "x", outcome="error")
    experiments.check()
    assert experiments.get("trial").state == "stopped"


def test_errors_that_both_arms_have_stop_nothing(experiments, trial):
    trial()
    for number in range(40):
        for arm in ("old", "new"):
            seen(experiments, arm, f"u{number}", outcome="error" if number % 2 else "ok", count=5)
    experiments.check()
    assert experiments.get("trial").state == "running"


def test_a_slow_arm_is_stopped_and_one_that_is_as_fast_is_not(experiments, trial, tmp_path, store):
    trial()
    rng = random.Random(1)
    for number in range(60):
        seen(experiments, "old", f"u{number}", rng.expovariate(1))
    # who was asked before it is known what is slow, counts for nothing
    assert experiments._ledger.read(lambda db: db.execute("SELECT sum(slow) FROM totals").fetchone()[0]) <= 5
    for number in range(200):
        seen(experiments, "old", f"u{number}", rng.expovariate(1))
        seen(experiments, "new", f"u{number}", rng.expovariate(1))
    experiments.check()
    assert experiments.get("trial").state == "running"
    # what is slow is known after a restart too
    with Experiments(tmp_path / "state", store, every=None) as again:
        for number in range(100):
            seen(again, "new", f"w{number}", 2 + 3 * rng.expovariate(1))
            again.check()
            if again.get("trial").state != "running":
                break
        assert 5 < number < 95
        assert again.get("trial").reason.startswith("guardrail: new is slow in")


def test_an_arm_may_be_as_slow_as_the_design_says(experiments, trial):
    trial(latency_factor=1.5)
    for number in range(100):
        seen(experiments, "old", f"u{number}", 1.0)
    for number in range(100):
        seen(experiments, "new", f"v{number}", 1.4)
    experiments.check()
    assert experiments.get("trial").state == "running"
    assert arms_of(experiments.report("trial"))["new"].seconds.p95 == 1.4
    for number in range(100):
        seen(experiments, "new", f"w{number}", 1.6)
    experiments.check()
    assert experiments.get("trial").reason == "guardrail: new is slow in 100 of 200 requests"


def test_a_shadow_is_compared_and_never_seen(experiments, engine, trial):
    trial(shadow=True)
    engine.said |= {"ada_1": [1, 2, 3, 4], "ada_3": [1, 2, 9, 9]}

    async def come():
        answers = [await ask(experiments, engine, "trial", f"u{number}") for number in range(20)]
        await asyncio.gather(*experiments._shadows._tasks)
        return answers

    answers = asyncio.run(come())
    assert {(arm, tuple(tokens)) for arm, tokens in answers} == {("old", (1, 2, 3, 4))}
    flushed(experiments)
    report = arms_of(experiments.report("trial"))
    shadowed = sum(request.version == "ada@3" for request in engine.asked)
    assert 4 < shadowed < 16
    assert (report["old"].requests, report["new"].requests) == (20, shadowed)
    assert (report["old"].users, report["new"].users) == (20, 0)
    assert report["new"].agreement == 0.5
    # nobody got what a shadow said, so that nothing can be said of it
    query = "SELECT count(*) FROM exposures WHERE arm = 'new' AND response IS NOT NULL"
    assert experiments._ledger.read(lambda db: db.execute(query).fetchone()) == (0,)
    assert report["old"].agreement is None
    assert report["new"].difference is None


def test_a_shadow_that_fails_touches_nothing_but_its_own_numbers(experiments, engine, trial):
    arms = [{"label": "old", "version": "ada@1", "weight": 0}, {"label": "new", "version": "ada@3"}]
    trial(shadow=True, arms=arms)
    engine.failing.add("ada@3")

    async def come():
        answers = [await ask(experiments, engine, "trial", f"u{number}") for number in range(12)]
        cut = await ask(experiments, engine, "trial", "u99", most=1)
        await asyncio.gather(*experiments._shadows._tasks)
        return answers, cut

    answers, cut = asyncio.run(come())
    assert all(tokens == [1, 2, 3] for _, tokens in answers)
    assert cut == ("old", [1])
    flushed(experiments)
    report = arms_of(experiments.report("trial"))
    assert (report["new"].errors, report["old"].errors) == (13, 0)
    assert report["new"].agreement is None
    # which is what guardrails are for
    experiments.check()
    assert experiments.get("trial").reason == "guardrail: new fails in 13 of 13 requests"


def test_an_answer_that_was_cut_is_compared_as_far_as_it_goes(experiments, engine, trial):
    trial(
        shadow=True,
        arms=[{"label": "old", "version": "ada@1", "weight": 0}, {"label": "new", "version": "ada@3"}],
    )

    async def come():
        await ask(experiments, engine, "trial", "u", most=2)
        await asyncio.gather(*experiments._shadows._tasks)

    asyncio.run(come())
    flushed(experiments)
    assert arms_of(experiments.report("trial"))["new"].agreement == 1


def test_a_busy_engine_has_no_time_for_shadows(experiments, engine, trial):
    trial(
        shadow=True,
        arms=[{"label": "old", "version": "ada@1", "weight": 0}, {"label": "new", "version": "ada@3"}],
    )
    engine.waiting = 1
    asyncio.run(ask(experiments, engine, "trial", "u"))
    assert [request.version for request in engine.asked] == ["ada@1"]


def test_it_is_looked_at_without_being_asked(store, tmp_path, engine):
    with Experiments(tmp_path / "state", store, every=0.01) as made:
        arms = [{"label": "old", "version": "ada@1"}, {"label": "new", "version": "ada@3"}]
        made.create({"name": "trial", "arms": arms, "window": 0.0, "max_users": 2}, "chief")
        made.start("trial", "chief")

        async def come():
            for user in ("a", "b"):
                await ask(made, engine, "trial", user)
                await made.feedback("team", {"experiment": "trial", "user": user, "thumbs": "up"})

        asyncio.run(come())
        until = time.monotonic() + 20
        while made.get("trial").state == "running" and time.monotonic() < until:
            time.sleep(0.01)
        assert made.get("trial").reason == "undecided after 2 users"


@pytest.mark.parametrize("users", [{"old": 480, "new": 520}, {"old": 300, "new": 700}])
def test_shares_that_are_not_those_of_the_weights_are_told(users):
    from modicum.serve.experiments.design import Arm
    from modicum.serve.experiments.report import _sample_ratio

    found = _sample_ratio((Arm("old", "ada@1"), Arm("new", "ada@3")), users)
    assert (found < 1e-6) == (users["old"] == 300)
