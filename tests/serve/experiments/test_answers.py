"""Answers and what users say of them: counted per user, heard of nobody else, on the disk when acknowledged."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tests.serve.experiments.speaking import arms_of, ask, flushed

from modicum.errors import ConfigError, ConflictError, NotStoredError
from modicum.serve.engine.interface import Request, Sampling
from modicum.serve.experiments import Experiments
from modicum.serve.names import Choice


def asked(experiments, engine, *users, name="trial", **about):
    """Arm by user, after each got an answer."""

    async def all_of_them():
        return {user: (await ask(experiments, engine, name, user, **about))[0] for user in users}

    found = asyncio.run(all_of_them())
    flushed(experiments)
    return found


def say(experiments, body, tenant="team"):
    return asyncio.run(experiments.feedback(tenant, body))


def two(arms):
    """A user of each arm."""
    return [next(user for user, arm in arms.items() if arm == label) for label in ("old", "new")]


USERS = [f"u{number}" for number in range(30)]


def test_answers_are_counted_by_arm(experiments, engine, trial):
    trial()
    engine.said["ada_3"] = [5, 6, 7, 8]
    arms = asked(experiments, engine, *USERS)
    asked(experiments, engine, *USERS[:3], response="again")
    report = arms_of(experiments.report("trial"))
    extra = [arms[user] for user in USERS[:3]]
    for label, length in (("old", 3), ("new", 4)):
        arm, users = report[label], sum(found == label for found in arms.values())
        count = users + extra.count(label)
        assert (arm.users, arm.requests, arm.errors, arm.cancelled) == (users, count, 0, 0)
        assert (arm.prompt_tokens, arm.generated_tokens) == (2 * count, length * count)
        assert 0 <= arm.first_token.p50 <= arm.seconds.p50 <= arm.seconds.p95
    # the version that answered is that of the arm
    assert {request.version for request in engine.asked} == {"ada@1", "ada@3"}


def test_without_a_user_or_an_experiment_nothing_is_counted(experiments, engine, trial):
    trial()
    assert asked(experiments, engine, None) == {None: None}
    assert all(arm.requests == 0 for arm in experiments.report("trial").arms)


def test_an_answer_that_fails_and_one_that_is_cut(experiments, engine, trial):
    trial()
    arms = asked(experiments, engine, *USERS)
    old, new = two(arms)
    engine.failing.add("ada@3")
    asked(experiments, engine, new, response="x")
    asked(experiments, engine, old, most=2, response="y")
    report = arms_of(experiments.report("trial"))
    assert (report["new"].errors, report["old"].errors) == (1, 0)
    assert report["new"].error_rate.n == report["new"].requests
    # a stop string ends an answer early, which is no fault
    assert report["old"].cancelled == 0


def test_what_no_arm_has_done_is_not_held_against_it(experiments, engine, trial):
    from modicum.serve.engine.interface import OverloadedError

    trial()

    async def full(request):
        raise OverloadedError("full")
        yield

    engine.generate = full

    async def refused():
        with pytest.raises(OverloadedError):
            await ask(experiments, engine, "trial", "u1")

    asyncio.run(refused())
    flushed(experiments)
    assert all(arm.requests == 0 for arm in experiments.report("trial").arms)


def test_a_client_that_hangs_up_before_the_first_token_is_told_apart(experiments, engine, trial):
    trial()

    async def slow(request):
        await asyncio.sleep(60)
        yield

    engine.generate = slow

    async def hang_up():
        task = asyncio.ensure_future(ask(experiments, engine, "trial", "u1"))
        await asyncio.sleep(0.02)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(hang_up())
    flushed(experiments)
    assert sum(arm.cancelled for arm in experiments.report("trial").arms) == 1


def test_what_runs_when_its_experiment_is_deleted_goes_on(experiments, engine, trial):
    trial()

    async def come():
        tokens = []
        one, request = experiments.get("trial"), Request((1,), Sampling(3), "ada@1")
        choice = Choice("ada@1", "ada", "trial", "old")
        async for step in experiments.generate(
            engine, request, choice, tenant="team", user="u", response="r"
        ):
            if not tokens:
                await asyncio.to_thread(experiments.stop, "trial", "chief")
                await asyncio.to_thread(experiments.delete, "trial", "chief")
            tokens.append(step.token)
        return one, tokens

    one, tokens = asyncio.run(come())
    assert tokens == [1, 2, 3]
    flushed(experiments)
    query = "SELECT count(*) FROM exposures"
    assert experiments._ledger.read(lambda db: db.execute(query).fetchone()) == (0,)
    # one of the same name is another one
    assert trial().id > one.id


def test_a_user_counts_once_with_the_mean_of_what_was_said(experiments, engine, trial, clock):
    trial(feedback="score", low=1, high=5)
    user = two(asked(experiments, engine, *USERS))[1]
    for number, score in enumerate([1, 5, 5]):
        asked(experiments, engine, user, response=f"r{number}")
        say(experiments, {"response_id": f"r{number}", "score": score})
    experiments.check()
    report = experiments.report("trial")
    assert (report.rated_users, report.waiting_users) == (0, 1)
    # within the window the last word counts, and only once
    assert say(experiments, {"response_id": "r0", "score": 3})["replaced"] is True
    clock.now += 11
    # too late for the outcome, and yet taken down
    assert say(experiments, {"response_id": "r2", "score": 1})["replaced"] is True
    say(experiments, {"experiment": "trial", "user": user, "score": 1})
    experiments.check()
    report = experiments.report("trial")
    assert (report.rated_users, report.waiting_users) == (1, 0)
    assert arms_of(report)["new"].outcome.value == pytest.approx((0.5 + 1 + 0) / 3, abs=1e-3)
    say(experiments, {"response_id": "r1", "score": 1})
    experiments.check()
    assert arms_of(experiments.report("trial"))["new"].outcome.n == 1
    assert arms_of(experiments.report("trial"))["new"].outcome.value == pytest.approx(0.5, abs=1e-3)


def test_what_is_said_of_another_arm_than_the_first_is_no_outcome(experiments, engine, trial, clock):
    trial()
    arms = asked(experiments, engine, *USERS)
    experiments.weigh("trial", {"old": 0}, "chief")
    moved = two(arms)[0]
    assert asked(experiments, engine, moved, response="other") == {moved: "new"}
    say(experiments, {"response_id": "other", "thumbs": "down"})
    clock.now += 11
    experiments.check()
    assert experiments.report("trial").rated_users == 0
    say(experiments, {"response_id": f"r-{moved}", "thumbs": "up"})
    clock.now += 11
    experiments.check()
    assert arms_of(experiments.report("trial"))["old"].outcome.value == 1
    # shares are no longer those of the beginning, and are not compared with them
    assert experiments.report("trial").sample_ratio_p is None


def test_a_tenant_is_heard_on_its_own_answers_alone(experiments, engine, trial):
    trial()
    asked(experiments, engine, "u1", response="mine")
    said = []
    for tenant, body in [
        ("rival", {"response_id": "mine", "thumbs": "down"}),
        ("rival", {"experiment": "trial", "user": "u1", "thumbs": "down"}),
        ("team", {"response_id": "never", "thumbs": "down"}),
        ("team", {"experiment": "trial", "user": "nobody", "thumbs": "down"}),
        ("team", {"experiment": "none", "user": "u1", "thumbs": "down"}),
    ]:
        with pytest.raises(NotStoredError) as caught:
            say(experiments, body, tenant)
        said.append(str(caught.value))
    assert len(set(said)) == 1
    assert say(experiments, {"response_id": "mine", "thumbs": "up"}) == {
        "object": "feedback", "experiment": "trial", "thumbs": "up", "replaced": False,
    }  # fmt: skip


def test_feedback_that_comes_too_late_or_is_none_of_its_kind(experiments, engine, trial, clock):
    trial(patience=100.0)
    asked(experiments, engine, "u1", response="r")
    with pytest.raises(ConfigError, match="asks for thumbs, not score"):
        say(experiments, {"response_id": "r", "score": 1})
    with pytest.raises(ConfigError, match="must be 'down' or 'up'"):
        say(experiments, {"response_id": "r", "thumbs": 1})
    clock.now += 101
    with pytest.raises(ConflictError, match=r"too late: .* 100 seconds"):
        say(experiments, {"response_id": "r", "thumbs": "up"})
    asked(experiments, engine, "u1", response="r2")
    experiments.stop("trial", "chief")
    with pytest.raises(ConflictError, match="has ended"):
        say(experiments, {"response_id": "r2", "thumbs": "up"})


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({}, "give one of score, thumbs, outcome; say what it is about"),
        ({"response_id": "r", "thumbs": "up", "score": 1}, "give one of"),
        ({"response_id": "r", "user": "u", "experiment": "e", "thumbs": "up"}, "either response_id, or"),
        ({"user": "u", "thumbs": "up"}, "either response_id, or"),
        ({"response_id": "\ud800", "thumbs": "up"}, "response_id must be text"),
        ({"response_id": 1, "thumbs": "up", "x": 2}, "unknown field 'x'; response_id must be text"),
    ],
)
def test_a_body_that_is_no_feedback(experiments, body, said):
    with pytest.raises(ConfigError, match=said):
        say(experiments, body)


def test_files_hold_no_user_and_no_tenant(experiments, engine, trial, tmp_path):
    trial()
    asked(experiments, engine, "somebody@example.org", tenant="secretive-tenant")
    say(experiments, {"response_id": "r-somebody@example.org", "thumbs": "up"}, "secretive-tenant")
    files = [file.read_bytes() for file in (tmp_path / "state").iterdir()]
    assert any(b"r-somebody" in data for data in files), "the identifier of the response is kept as it is"
    assert not any(b"secretive-tenant" in data for data in files)
    asked(experiments, engine, "elsewhere@example.org", response="r")
    assert not any(b"elsewhere" in file.read_bytes() for file in (tmp_path / "state").iterdir())


def test_a_purged_user_is_gone_and_the_outcome_is_nobody_s(experiments, engine, trial, clock):
    trial()
    arms = asked(experiments, engine, *USERS)
    gone, other = two(arms)
    for user in (gone, other):
        say(experiments, {"response_id": f"r-{user}", "thumbs": "up"})
    clock.now += 11
    experiments.check()
    assert experiments.purge("team", gone) >= 3
    assert experiments.purge("team", gone) == 0
    assert experiments.purge("rival", other) == 0
    assert experiments.report("trial").rated_users == 2
    with pytest.raises(NotStoredError):
        say(experiments, {"experiment": "trial", "user": gone, "thumbs": "up"})
    # one whose outcome is open yet is not counted at all
    early = next(user for user in USERS if user not in (gone, other))
    say(experiments, {"response_id": f"r-{early}", "thumbs": "up"})
    experiments.purge("team", early)
    clock.now += 11
    experiments.check()
    assert experiments.report("trial").rated_users == 2
    # what was told of an experiment that has ended is told anew
    experiments.stop("trial", "chief")
    (before,) = experiments.reports(10)
    experiments.purge("team", next(user for user in USERS if user not in (gone, other, early)))
    (after,) = experiments.reports(10)
    assert sum(arm.users for arm in after.arms) == sum(arm.users for arm in before.arms) - 1


_KILLED = """
import asyncio, sys
from pathlib import Path
from modicum.serve.engine.interface import Request, Sampling
from modicum.serve.experiments import Experiments
from modicum.serve.names import Choice
from modicum.store import Store
from tests.serve.experiments.speaking import Speaking, ask

async def main(folder):
    store = Store(folder / "store")
    experiments, engine = Experiments(folder / "state", store, every=None), Speaking()
    for number in range(100_000):
        await ask(experiments, engine, "trial", f"k{number}")
        await experiments.feedback("team", {"response_id": f"r-k{number}", "thumbs": "up"})
        print(number, flush=True)

asyncio.run(main(Path(sys.argv[1])))
"""


def test_what_was_acknowledged_survives_kill_9(experiments, store, trial, tmp_path):
    trial(window=0.0)
    experiments.close()
    child = subprocess.Popen(
        [sys.executable, "-c", _KILLED, str(tmp_path)], stdout=subprocess.PIPE, text=True, cwd=Path.cwd()
    )
    last = -1
    for line in child.stdout:
        last = int(line)
        if last >= 30:
            break
    child.send_signal(signal.SIGKILL)
    last = max([last, *(int(line) for line in child.stdout if line.strip().isdigit())])
    child.wait()
    child.stdout.close()
    with Experiments(tmp_path / "state", store, every=None) as again:
        count = again._ledger.read(lambda db: db.execute("SELECT count(*) FROM feedback").fetchone()[0])
        assert count in (last + 1, last + 2)
        again.check()
        assert again.report("trial").rated_users == count
