"""What is counted, how durations are spread, whose the cost is, and what Prometheus reads of it."""

from __future__ import annotations

import asyncio
import math
import random
import statistics
import threading

import pytest
from prometheus_client.parser import text_string_to_metric_families

from modicum.errors import ConfigError
from modicum.evaluate.resources import Prices
from modicum.serve.costs import Tariff, Usage, largest
from modicum.serve.engine.interface import EngineStats, PoolStats
from modicum.serve.exposition import Exposition
from modicum.serve.metrics import Metrics
from modicum.serve.timeline import Gauges, Spread, Timeline, Work


class Standing:
    """All that metrics ask of an engine."""

    def __init__(self, **said):
        self.said = said

    def stats(self):
        return EngineStats(**self.said)


@pytest.fixture
def metrics():
    made = Metrics(tariff=Tariff("EUR", prompt=1.0, cached=0.1, generated=3.0))
    yield made
    made.close()


def scraped(metrics):
    """(name, labels) → value of everything that is told."""
    text, kind = Exposition(metrics).text()
    assert kind.startswith("text/plain")
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
    }


def value(found, name, **labels):
    return found[f"modicum_{name}", tuple(sorted(labels.items()))]


def finish(metrics, tenant, outcome="ok", tokens=3, **told):
    meter = metrics.request(tenant)
    for _ in range(tokens):
        meter.tokens()
    meter.done(outcome, **told)


def test_tokens_and_requests_are_counted_by_tenant(metrics):
    finish(metrics, "ada", prompt_tokens=10, cached_tokens=4)
    finish(metrics, "ada", "cancelled", prompt_tokens=5)
    finish(metrics, "bob", "error", tokens=0, prompt_tokens=1, error="GenerationError")
    found = scraped(metrics)
    assert value(found, "requests_total", tenant="ada", outcome="ok") == 1
    assert value(found, "requests_total", tenant="ada", outcome="cancelled") == 1
    assert value(found, "tokens_total", tenant="ada", kind="prompt") == 15
    assert value(found, "tokens_total", tenant="ada", kind="cached") == 4
    assert value(found, "tokens_total", tenant="ada", kind="generated") == 6
    assert value(found, "errors_total", kind="GenerationError") == 1
    # 11 prompt tokens at 1, 4 cached at 0.1, 6 generated at 3, per thousand
    assert value(found, "cost_total", tenant="ada") == pytest.approx((11 + 0.4 + 18) / 1000)
    assert metrics.usage_of("bob").requests == {"error": 1}
    assert metrics.usage_of("nobody").requests == {}


def test_first_tokens_and_gaps_are_told_apart(metrics):
    meter = metrics.request("ada")
    meter.first_token()
    meter.tokens()  # the same token
    meter.tokens(4)
    meter.done("ok")
    # two answers of one request: neither is the other's next token
    meter = metrics.request("ada")
    for sequence in (0, 1, 0, 1):
        meter.tokens(1, sequence)
    meter.done("ok", generated_tokens=4)
    found = scraped(metrics)
    assert value(found, "time_to_first_token_seconds_count") == 2
    assert value(found, "time_per_token_seconds_count") == 4 + 2
    assert value(found, "request_seconds_count") == 2
    metrics.tick()
    assert value(scraped(metrics), "time_per_token_seconds_count") == 6
    frame = metrics.timeline.since()
    assert frame["per_token_p50"][0] <= frame["per_token_p95"][0] < 1
    assert metrics.usage_of("ada").generated_tokens == 5 + 4


def test_tokens_that_were_not_told_one_by_one_are_counted_at_the_end(metrics):
    metrics.request("ada").done("ok", prompt_tokens=2, generated_tokens=7, cached_tokens=9)
    assert metrics.usage_of("ada").generated_tokens == 7
    assert metrics.usage_of("ada").cached_tokens == 2  # no more than the prompt has


def test_what_is_said_after_the_end_is_ignored(metrics):
    meter = metrics.request("ada")
    meter.done("ok", 5)
    meter.done("error", 5, error="Late")
    assert metrics.usage_of("ada").requests == {"ok": 1}
    assert not metrics.totals.errors


def test_labels_are_bounded_and_usage_is_not():
    metrics = Metrics(labels=2)
    for index in range(5):
        finish(metrics, f"tenant-{index}", tokens=1)
    tenants = {dict(labels)["tenant"] for name, labels in scraped(metrics) if name == "modicum_tokens_total"}
    assert tenants == {"tenant-0", "tenant-1", "other"}
    assert value(scraped(metrics), "tokens_total", tenant="other", kind="generated") == 3
    assert metrics.usage_of("tenant-4").generated_tokens == 1
    # counters never go down: who has a label keeps it
    finish(metrics, "tenant-4", tokens=100)
    assert value(scraped(metrics), "tokens_total", tenant="other", kind="generated") == 103


def test_kinds_of_errors_are_bounded(metrics):
    for index in range(80):
        finish(metrics, "ada", "error", error=f"Error{index}")
    assert len(metrics.totals.errors) == 51
    assert metrics.totals.errors["other"] == 30


def test_nothing_is_labelled_by_adapter(metrics):
    meter = metrics.request("ada", model="secret-adapter")
    meter.about(version="secret-adapter@3", prompt="a secret")
    meter.done("ok")
    text, _ = Exposition(metrics).text()
    assert b"secret" not in text


def test_the_engine_is_asked_at_every_scrape(metrics):
    pool = PoolStats(slots=8, used=3, pinned=1, hits=20, misses=4, evictions=2, failures=1, bytes=99)
    metrics.watch(
        Standing(running=5, waiting=7, cache_used=0.25, prompt_tokens=100, cached_tokens=30, pool=pool)
    )
    metrics.step(4, 40, 0.010)
    metrics.step(2, 2, 0.020)
    metrics.load(0.003, failed=False)
    metrics.load(0.005, failed=True)
    found = scraped(metrics)
    assert value(found, "requests_running") == 5
    assert value(found, "requests_waiting") == 7
    assert value(found, "cache_used_ratio") == 0.25
    assert value(found, "pool_slots_used") == 3
    assert value(found, "pool_slots_pinned") == 1
    assert value(found, "pool_hits_total") == 20
    assert value(found, "pool_misses_total") == 4
    assert value(found, "pool_evictions_total") == 2
    assert value(found, "pool_failures_total") == 1
    assert value(found, "engine_cached_tokens_total") == 30
    assert value(found, "step_sequences_total") == 6
    assert value(found, "step_tokens_total") == 42
    assert value(found, "steps_total") == 2
    assert value(found, "adapter_load_seconds_count") == 2
    assert value(found, "step_seconds_sum") == pytest.approx(0.030)
    assert value(found, "memory_bytes", kind="resident") > 1e6
    metrics.tick()
    frames = metrics.timeline.since()
    assert (frames["batch"][-1], frames["waiting"][-1], frames["slots_used"][-1]) == (3.0, 7, 3)


def test_histograms_are_cumulative_and_complete(metrics):
    for exponent in range(-6, 5):
        metrics.load(3 * 10.0**exponent, failed=False)
    buckets = {
        float(dict(labels)["le"]): count
        for (name, labels), count in scraped(metrics).items()
        if name == "modicum_adapter_load_seconds_bucket"
    }
    bounds = sorted(buckets)
    assert [buckets[bound] for bound in bounds] == sorted(buckets.values())
    assert buckets[math.inf] == 11
    assert buckets[0.1] == sum(3 * 10.0**exponent < 0.1 for exponent in range(-6, 5))


@pytest.mark.parametrize("share", [0.5, 0.95])
def test_quantiles_are_within_their_cell(share):
    drawn = [math.exp(random.Random(seed).gauss(-4, 1)) for seed in range(2000)]
    spread = Spread()
    for one in drawn:
        spread.add(one)
    exact = statistics.quantiles(drawn, n=100, method="inclusive")[round(share * 100) - 1]
    assert spread.quantile(share) == pytest.approx(exact, rel=0.06)
    assert Spread().quantile(share) is None


def test_frames_of_an_hour_hold_what_the_seconds_held():
    line = Timeline()
    for second in range(700):
        work = Work(requests=1, generated_tokens=20, steps=2, sequences=6 if second % 10 else 16)
        work.first_token.add(0.1)
        line.add(second + 1.0, 1.0, work, Gauges(running=second))
    fine, coarse = line.since(), line.since(coarse=True)
    assert (len(fine["at"]), fine["at"][0], fine["at"][-1]) == (600, 101.0, 700.0)
    assert len(coarse["at"]) == 70
    assert coarse["generated_tokens"][-1] == 20.0
    assert coarse["batch"][-1] == 3.5  # (9 · 6 + 16) / 20
    assert coarse["running"][-1] == 699
    assert coarse["first_token_p95"][-1] == pytest.approx(0.1, rel=0.06)
    assert line.since(695.0)["at"] == [696.0, 697.0, 698.0, 699.0, 700.0]


def test_the_last_hour_takes_no_more_room_than_an_hour():
    line = Timeline()
    for second in range(5000):
        line.add(float(second), 1.0, Work(), Gauges())
    assert len(line.since()["at"]) == 600
    assert len(line.since(coarse=True)["at"]) == 360


def test_the_machine_is_paid_by_those_it_worked_for(metrics):
    metrics.share_cost(1.0)
    assert metrics.idle_cost == 1.0
    open_one = metrics.request("ada")
    metrics.share_cost(2.0)  # a long prompt is read: nothing is known of it yet, and it is not idle
    assert metrics.idle_cost == 1.0
    open_one.tokens(10)
    before = {tenant: usage.cost for tenant, usage in metrics.usage().items()}
    metrics.request("bob").done("ok", 40, cached_tokens=10)
    bob = metrics.usage_of("bob").cost
    metrics.share_cost(4.0)
    # 10 tokens of ada's, 30 of bob's that were not cached: 6 are shared 1 : 3
    assert metrics.usage_of("ada").cost - before["ada"] == pytest.approx(1.5)
    assert metrics.usage_of("bob").cost - bob == pytest.approx(4.5)
    metrics.share_cost(0.0)
    assert metrics.usage_of("ada").cost - before["ada"] == pytest.approx(1.5)


def test_processor_hours_are_priced():
    metrics = Metrics(tariff=Tariff("EUR", machine=Prices(cpu_hour=3600.0, currency="EUR")))
    try:
        metrics.request("ada").done("ok", 1)
        sum(range(2_000_000))
        for _ in range(10):
            metrics.tick()
        assert metrics.usage_of("ada").cost > 0.005  # a second of a processor costs 1
    finally:
        metrics.close()


def test_a_tariff_is_read(tmp_path):
    file = tmp_path / "prices.yaml"
    file.write_text("currency: EUR\ncpu_hour: 0.04\nper_1000_tokens: {prompt: 0.2, generated: 0.6}\n")
    tariff = Tariff.read(file)
    assert tariff == Tariff("EUR", 0.2, 0.2, 0.6, Prices(cpu_hour=0.04, currency="EUR"))
    assert tariff.of_tokens(prompt=1000, cached=500, generated=1000) == pytest.approx(0.8)
    file.write_text("prices:\n  currency: EUR\n  per_1000_tokens: {prompt: 1, cached: 0}\n")
    assert Tariff.read(file) == Tariff("EUR", 1.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("cpu_hour: 1", ["currency"]),
        (
            "currency: EUR\ncpu_our: 1\nper_1000_tokens: {promt: 1, generated: -2, cached: yes}",
            ["'cpu_our'", "cpu_hour", "'promt'", "did you mean 'prompt'", "generated = -2", "cached = True"],
        ),
        ("currency: EUR\ngb_month: 1", ["modicum cost"]),
        ("currency: EUR\nper_1000_tokens: 3", ["must be a mapping"]),
        ("- 1", ["mapping"]),
        ("{", ["cannot be read"]),
    ],
)
def test_a_wrong_tariff_is_refused_with_all_that_is_wrong(tmp_path, text, said):
    file = tmp_path / "prices.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        Tariff.read(file)
    for part in [*said, "prices.yaml"]:
        assert part in str(caught.value)


def test_the_largest_tenants_are_listed_and_the_others_together():
    usage = {f"t{index}": Usage({"ok": 1}, index, 0, 0, float(index > 7)) for index in range(10)}
    found = largest(usage, 3)
    assert list(found) == ["t9", "t8", "t7", "other"]
    assert found["other"] == Usage({"ok": 7}, sum(range(7)))
    assert usage["t0"] == Usage({"ok": 1})


def test_an_engine_that_cannot_be_looked_at_leaves_a_gap(caplog):
    class Broken(Standing):
        def stats(self):
            if self.said.pop("broken", False):
                raise RuntimeError("in between")
            return super().stats()

    metrics = Metrics()
    metrics._stop.wait = _answers([False, False, True])
    metrics.watch(Broken(broken=True, running=3))
    metrics._sampler.join()
    assert "in between" in caplog.text
    assert metrics.timeline.since()["running"] == [3]


def _answers(given):
    left = iter(given)
    return lambda _: next(left)


def test_no_prices_no_cost(tmp_path):
    metrics = Metrics()
    finish(metrics, "ada")
    assert not [name for name, _ in scraped(metrics) if "cost" in name]
    with pytest.raises(ConfigError, match="cannot be read"):
        Tariff.read(tmp_path / "missing.yaml")


def test_loads_are_put_down_to_the_request_that_waited_for_them():
    ended = []
    metrics = Metrics(sinks=[ended.append])

    async def one(tenant, seconds):
        meter = metrics.request(tenant)
        await asyncio.sleep(0.005)
        if seconds:
            await asyncio.to_thread(metrics.load, seconds, failed=False)
        meter.tokens()
        meter.done("ok", 1)

    async def both():
        await asyncio.gather(one("ada", 0.001), one("bob", 0))

    asyncio.run(both())
    loads = {seen.tenant: seen.load for seen in ended}
    assert loads["bob"] is None
    begin, end = loads["ada"]
    assert end - begin == pytest.approx(0.001)


def test_it_counts_right_from_many_threads(metrics):
    def work(tenant):
        for _ in range(200):
            finish(metrics, tenant, tokens=5, prompt_tokens=1)
            metrics.step(1, 1, 0.001)

    threads = [threading.Thread(target=work, args=(f"t{index % 2}",)) for index in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        metrics.tick()
    for thread in threads:
        thread.join()
    found = scraped(metrics)
    assert value(found, "tokens_total", tenant="t0", kind="generated") == 2000
    assert value(found, "requests_total", tenant="t1", outcome="ok") == 400
    assert value(found, "time_per_token_seconds_count") == 3200
    assert value(found, "steps_total") == 800


def test_it_watches_until_it_is_closed():
    metrics = Metrics()
    metrics.watch(Standing(running=2))
    sampler = metrics._sampler
    assert sampler.is_alive()
    metrics.close()
    assert not sampler.is_alive()
