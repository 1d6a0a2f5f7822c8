"""Limits: buckets, quotas that outlive the server, and what is told when there is nothing left."""

from __future__ import annotations

import threading

import pytest

from modicum.serve.keys import Key
from modicum.serve.limits import DAY, LimitError, Limits


class Clock:
    """A clock that the test moves."""

    def __init__(self, at: float) -> None:
        self.at = at

    def __call__(self) -> float:
        return self.at


def generate(permit, tokens):
    """What a request does that generates so many tokens."""
    for _ in range(tokens):
        permit.token()


@pytest.fixture
def clock():
    return Clock(20000 * DAY + DAY / 4)


@pytest.fixture
def limits(tmp_path, clock):
    with Limits(tmp_path, clock=clock, now=clock) as made:
        yield made


def test_requests_per_minute(limits, clock):
    key = Key("ada", requests_per_minute=3)
    for _ in range(3):
        with limits.enter(key):
            pass
    with pytest.raises(LimitError, match="3 requests per minute") as caught:
        limits.enter(key)
    assert caught.value.retry_after == pytest.approx(20)
    assert caught.value.code == "rate_limit_exceeded"
    clock.at += 19
    with pytest.raises(LimitError):
        limits.enter(key)
    clock.at += 1.01
    with limits.enter(key):
        pass
    clock.at += 1000
    for _ in range(3):  # no more than a minute's worth is saved up
        with limits.enter(key):
            pass
    with pytest.raises(LimitError):
        limits.enter(key)


def test_tokens_are_a_debt_that_later_requests_wait_for(limits, clock):
    key = Key("ada", tokens_per_minute=60)
    with limits.enter(key) as permit:
        permit.used(prompt=40)
        generate(permit, 140)
    with pytest.raises(LimitError, match="60 tokens per minute") as caught:
        limits.enter(key)
    assert caught.value.retry_after == pytest.approx(121)
    clock.at += 121.01
    with limits.enter(key):
        pass


def test_what_is_generated_counts_while_it_is(limits):
    key = Key("ada", tokens_per_minute=100)
    with limits.enter(key) as permit:
        generate(permit, 120)
        with pytest.raises(LimitError, match="100 tokens per minute"):
            limits.enter(key)


def test_a_key_does_not_wait_for_another(limits):
    for name in ("ada", "bob"):
        with limits.enter(Key(name, requests_per_minute=1)):
            pass


def test_requests_at_a_time(limits):
    key = Key("ada", concurrent=2)
    with limits.enter(key), limits.enter(key):
        with pytest.raises(LimitError, match="2 requests at a time"):
            limits.enter(key)
        with limits.enter(Key("bob", concurrent=1)):
            pass
    with limits.enter(key):
        pass


def test_the_quota_of_a_day_outlives_the_server(tmp_path, clock):
    key = Key("ada", tokens_per_day=100)
    with Limits(tmp_path, clock=clock, now=clock) as limits, limits.enter(key) as permit:
        permit.used(prompt=60)
        generate(permit, 30)
    with Limits(tmp_path, clock=clock, now=clock) as limits:
        with limits.enter(key) as permit:
            generate(permit, 10)
        with pytest.raises(LimitError, match="100 tokens per day") as caught:
            limits.enter(key)
        assert caught.value.code == "insufficient_quota"
        assert caught.value.retry_after == pytest.approx(DAY * 3 / 4)
        clock.at += DAY * 3 / 4
        with limits.enter(key):
            pass


def test_refused_requests_are_not_counted(limits):
    key = Key("ada", concurrent=1)
    with limits.enter(key), pytest.raises(LimitError):
        limits.enter(key)
    (used,) = limits.usage()
    assert used.requests == 1


def test_two_servers_share_the_day(tmp_path, clock):
    key = Key("ada", tokens_per_day=100)
    with Limits(tmp_path, clock=clock, now=clock) as one, Limits(tmp_path, clock=clock, now=clock) as two:
        with one.enter(key) as permit:
            permit.used(prompt=99)
        with two.enter(key) as permit:
            permit.used(prompt=1)
        one.flush()
        two.flush()
        with pytest.raises(LimitError):
            two.enter(key)
        assert [(u.tenant, u.requests, u.prompt_tokens) for u in two.usage()] == [("ada", 2, 100)]


def test_usage_by_tenant_and_day(limits, clock):
    for name, tokens in (("ada", 5), ("bob", 7)):
        with limits.enter(Key(name)) as permit:
            permit.used(prompt=tokens)
            generate(permit, 1)
    limits.flush()
    clock.at += DAY
    with limits.enter(Key("ada")) as permit:
        generate(permit, 2)
    found = [
        (u.day - 20000, u.tenant, u.requests, u.prompt_tokens, u.generated_tokens)
        for u in limits.usage(days=2)
    ]
    assert found == [(0, "ada", 1, 5, 1), (0, "bob", 1, 7, 1), (1, "ada", 1, 0, 2)]
    assert [(u.tenant, u.generated_tokens) for u in limits.usage()] == [("ada", 2)]


def test_nothing_is_lost_or_counted_twice_while_it_is_written(limits):
    def ask():
        for _ in range(200):
            with limits.enter(Key("ada")) as permit:
                permit.used(prompt=1)
                generate(permit, 2)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        limits.flush()
    for thread in threads:
        thread.join()
    limits.flush()
    (used,) = limits.usage()
    assert (used.requests, used.prompt_tokens, used.generated_tokens) == (800, 800, 1600)
