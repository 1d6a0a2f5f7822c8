"""What is written down about a request, and what is not."""

from __future__ import annotations

import io
import json
import logging
import logging.config
import sys

import pytest

from modicum.serve.logs import RequestLog, configuration, route
from modicum.serve.metrics import Metrics

PROMPT = "my secret is 42"


@pytest.fixture
def written(monkeypatch):
    """Sets up the logging of a server; what was written comes back as lines."""
    names = ("modicum.serve", "uvicorn", "uvicorn.access")
    before = {
        name: (one.handlers[:], one.level, one.propagate)
        for name in names
        for one in [logging.getLogger(name)]
    }
    stream = io.StringIO()
    # to configure logging closes all handlers there are; absl's, in other tests' imports, would close pytest's streams
    monkeypatch.setattr(logging, "_handlerList", [])

    def begin(**options):
        monkeypatch.setattr(sys, "stderr", stream)
        logging.config.dictConfig(configuration(**options))
        return lambda: stream.getvalue().splitlines()

    yield begin
    for name, (handlers, level, propagate) in before.items():
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)


def ask(*, prompts=False, outcome="ok", **about):
    meter = Metrics(sinks=[RequestLog(prompts=prompts)]).request("ada", prompt=PROMPT, **about)
    meter.loaded(0.0)
    meter.tokens(3)
    meter.done(outcome, 7, cached_tokens=2, error=None if outcome == "ok" else "GenerationError")


def test_one_line_of_json_per_request(written):
    lines = written()
    ask(request_id="cmpl-1", model="ada/notes")
    (line,) = map(json.loads, lines())
    assert {
        name: line[name] for name in ("level", "logger", "message", "request", "tenant", "model", "outcome")
    } == {
        "level": "info",
        "logger": "modicum.serve.requests",
        "message": "request",
        "request": "cmpl-1",
        "tenant": "ada",
        "model": "ada/notes",
        "outcome": "ok",
    }
    assert (line["prompt_tokens"], line["cached_tokens"], line["generated_tokens"]) == (7, 2, 3)
    assert 0 <= line["load_seconds"] <= line["first_token_seconds"] <= line["seconds"]
    assert line["at"].endswith("+00:00")
    assert "error" not in line


def test_prompts_are_written_only_when_asked_for(written):
    lines = written()
    ask()
    assert PROMPT not in "".join(lines())
    ask(prompts=True)
    assert json.loads(lines()[-1])["prompt"] == PROMPT


def test_what_failed_is_a_warning(written):
    lines = written(level="WARNING")
    ask()
    ask(outcome="error")
    (line,) = map(json.loads, lines())
    assert (line["level"], line["error"]) == ("warning", "GenerationError")


def test_text_is_one_line_too_whatever_is_in_it(written):
    lines = written(kind="text")
    ask(model='x" tenant="bob', request_id="a\nb")
    logging.getLogger("modicum.serve").warning("two\nlines")
    first, second = lines()
    assert " tenant=ada" in first
    assert r'model="x\" tenant=\"bob"' in first
    assert r'request="a\nb"' in first
    assert second.endswith(r"two\nlines")


def test_exceptions_are_in_the_line(written):
    lines = written()
    try:
        int("broken")
    except ValueError:
        logging.getLogger("modicum.serve.api").exception("a fault")
    (line,) = map(json.loads, lines())
    assert line["message"] == "a fault"
    assert line["exception"].endswith("'broken'")


@pytest.mark.parametrize("access", [True, False])
def test_the_access_log_names_no_adapter(written, access):
    lines = written(access=access)
    logger = logging.getLogger("uvicorn.access")
    logger.info(
        '%s - "%s %s HTTP/%s" %d', "127.0.0.1:5", "GET", "/v1/models/bob/secret?key=mod-1", "1.1", 404
    )
    found = [json.loads(line) for line in lines()]
    assert [(one["client"], one["method"], one["path"], one["status"]) for one in found] == (
        [("127.0.0.1:5", "GET", "/v1/models/*", 404)] if access else []
    )
    assert "secret" not in "".join(lines())


@pytest.mark.parametrize(
    ("path", "kept"),
    [
        ("/v1/chat/completions", "/v1/chat/completions"),
        ("/v1/completions?x=1", "/v1/completions"),
        ("/v1/models", "/v1/models"),
        ("/v1/models/ada/notes@3", "/v1/models/*"),
        ("/admin/adapters/ada/notes/rollback", "/admin/adapters/*"),
        ("/admin/experiments", "/admin/experiments"),
        ("/", "/"),
        ("/secret/name", "/secret/*"),
        ("/page/live?after=3", "/page/live"),
    ],
)
def test_paths_are_cut_before_names(path, kept):
    assert route(path) == kept
