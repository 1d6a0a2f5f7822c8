"""What metrics, log and traces of a real server say about real requests, and to whom."""

from __future__ import annotations

import json
import logging

import pytest
from prometheus_client.parser import text_string_to_metric_families
from tests.serve.page.served import site
from tests.serve.servers import serving

from modicum.serve.logs import REQUESTS, Lines

PROMPT = "Once upon a secret"


class Kept(logging.Handler):
    """The lines that were written."""

    def __init__(self):
        super().__init__()
        self.setFormatter(Lines())
        self.lines = []

    def emit(self, record):
        self.lines.append(json.loads(self.format(record)))


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    with site(tmp_path_factory.mktemp("site")) as running:
        yield running


@pytest.fixture
def written():
    handler, logger = Kept(), logging.getLogger(REQUESTS)
    before = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    yield handler.lines
    logger.removeHandler(handler)
    logger.setLevel(before)


def scrape(served, key):
    status, text = served.ask("GET", "/metrics", key=key)
    assert status == 200, text
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_metrics_count_what_was_asked(served):
    name = ("tenant", "ada")
    before = scrape(served, served.admin)
    answers = [served.complete("notes@1", prompt=PROMPT) for _ in range(3)]
    after = scrape(served, served.admin)

    def grown(metric, *labels):
        key = (f"modicum_{metric}", tuple(sorted(labels)))
        return after[key] - before.get(key, 0.0)

    prompts, tokens = (
        sum(one["usage"][f"{kind}_tokens"] for one in answers) for kind in ("prompt", "completion")
    )
    cached = sum(one["usage"]["prompt_tokens_details"]["cached_tokens"] for one in answers)
    assert grown("requests_total", name, ("outcome", "ok")) == 3
    assert grown("tokens_total", name, ("kind", "prompt")) == prompts
    assert grown("tokens_total", name, ("kind", "cached")) == cached
    assert (
        grown("tokens_total", name, ("kind", "generated")) == tokens == grown("engine_generated_tokens_total")
    )
    assert grown("time_to_first_token_seconds_count") == grown("request_seconds_count") == 3
    assert grown("time_per_token_seconds_count") == tokens - 3
    assert grown("cost_total", name) == pytest.approx((0.5 * prompts + 2 * tokens) / 1000)
    assert grown("pool_misses_total") == grown("adapter_load_seconds_count") == 1
    assert grown("pool_hits_total") == 2
    assert grown("step_sequences_total") >= tokens - 3
    assert grown("steps_total") == grown("step_seconds_count") > 0


def test_only_who_may_reads_metrics(served):
    keys = served.served.service.keys
    for key in (served.ada, "mod-wrong", "none"):
        status, text = served.ask("GET", "/metrics", key=key)
        assert status == (403 if key == served.ada else 401)
        assert "modicum_" not in text
    watcher = keys.add("prometheus", metrics=True)
    found = scrape(served, watcher)
    assert not [labels for _, labels in found if "notes" in str(labels)]
    assert served.ask("GET", "/page/live", key=watcher)[1]["you"]["sees_all"]
    assert served.ask("GET", "/admin/usage", key=watcher)[0] == 403


def test_refused_requests_are_told_by_kind(served):
    before = scrape(served, served.admin)
    assert served.ask("POST", "/v1/completions", {"model": "secret", "prompt": "a"}, served.ada)[0] == 404
    assert served.ask("POST", "/v1/completions", {"model": "notes", "n": -1}, served.ada)[0] == 400
    after = scrape(served, served.admin)
    key = ("modicum_requests_total", (("outcome", "refused"), ("tenant", "ada")))
    assert after[key] - before.get(key, 0) == 2
    kinds = {labels[0][1] for name, labels in after if name == "modicum_errors_total"}
    assert kinds
    assert "secret" not in str(kinds)


def test_the_log_says_who_waited_for_a_load_and_never_what_was_asked(served, written):
    for _ in range(2):
        served.complete("notes@3", prompt=PROMPT)
    served.ask("POST", "/v1/completions", {"model": "secret", "prompt": PROMPT}, served.ada)
    first, second, refused = written
    assert first["load_seconds"] > 0
    assert "load_seconds" not in second
    assert (first["model"], first["version"], first["tenant"]) == ("notes@3", "notes@3", "ada")
    assert first["first_token_seconds"] >= first["load_seconds"]
    assert refused["outcome"] == "refused"
    # what the tenant may not see is not in the log under its name
    assert "model" not in refused
    assert "secret" not in json.dumps(written)


def test_prompts_are_in_the_log_of_a_server_that_is_told_to(tmp_path, written):
    with serving(tmp_path, log_prompts=True) as served:
        served.client().completions.create(model="base", prompt=[PROMPT, "Another"], max_tokens=1)
    (line,) = written
    assert PROMPT in line["prompt"]
    assert "Another" in line["prompt"]
