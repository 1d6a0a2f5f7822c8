"""Tenants over real sockets: each sees its own adapters alone, and gets what its key allows."""

from __future__ import annotations

import logging

import httpx
import openai
import pytest
from tests.serve.servers import adapter, serving

from modicum.errors import ConfigError
from modicum.serve.keys import Keys
from modicum.serve.server import check_reach, open_service
from modicum.serve.settings import EngineSettings, Settings
from modicum.store import Store

SECRET_NAME, SECRET_PROMPT = "bob/diagnosis-xyzzy", "the patient plugh"


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    """The secret of every key by its name, and the folders."""
    folder = tmp_path_factory.mktemp("tenants")
    with Store(folder / "store", create=True) as store:
        store.put("ada/notes", adapter(0))
        store.put(SECRET_NAME, adapter(1))
    with Keys(folder / "state") as keys:
        made = {
            "ada": keys.add("ada", adapters=("ada/*",)),
            "bob": keys.add("bob", adapters=("bob/*",), base=True),
            "root": keys.add("root", admin=True),
            "prometheus": keys.add("prometheus", metrics=True),
            "slow": keys.add("slow", base=True, requests_per_minute=2),
            "poor": keys.add("poor", base=True, tokens_per_day=5),
            "gone": keys.add("gone", base=True),
        }
        keys.revoke("gone")
    return folder, made


@pytest.fixture(scope="module")
def served(keys):
    folder, _ = keys
    with serving(folder / "state", folder / "store") as one:
        yield one


@pytest.fixture
def client(served, keys):
    made = []

    def make(name):
        made.append(served.client(keys[1].get(name, name)))
        return made[-1]

    yield make
    for one in made:
        one.close()


def _ask(client, model, prompt="Once", **options):
    return client.completions.create(model=model, prompt=prompt, **{"max_tokens": 2} | options)


@pytest.mark.parametrize("key", ["nobody", "mod-" + "A" * 43, "gone", "ü"])
def test_without_a_valid_key_nothing(served, client, key):
    if key == "ü":  # no header can have it in ASCII, so it is sent by hand
        answer = httpx.get(f"{served.url}/v1/models", headers={"Authorization": "Bearer ü".encode()})
        assert answer.status_code == 401
        return
    for action in (
        lambda c: _ask(c, "base"),
        lambda c: c.models.list(),
        lambda c: c.models.retrieve("base"),
        lambda c: c.embeddings.create(model="base", input="x"),
    ):
        with pytest.raises(openai.AuthenticationError) as caught:
            action(client(key))
        assert caught.value.code == "invalid_api_key"


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        ("/v1/models", {"ada", "bob", "root", "prometheus", "slow", "poor"}),
        ("/metrics", {"root", "prometheus"}),
        ("/admin/usage", {"root"}),
        ("/admin/adapters", {"root"}),
    ],
)
def test_who_may_ask_what(served, keys, path, allowed):
    found = set()
    for name, secret in keys[1].items():
        answer = httpx.get(served.url + path, headers={"Authorization": f"Bearer {secret}"})
        assert answer.status_code in (200, 401, 403), answer.text
        found |= {name} if answer.status_code == 200 else set()
    assert found == allowed
    answer = httpx.get(served.url + path)
    assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")


def test_each_sees_its_own_models(client):
    assert [model.id for model in client("ada").models.list()] == ["ada/notes"]
    assert [model.id for model in client("bob").models.list()] == ["base", SECRET_NAME]
    assert [model.id for model in client("root").models.list()] == []
    assert _ask(client("ada"), "ada/notes").choices
    for name in ("ada", "root", "prometheus"):
        with pytest.raises(openai.NotFoundError):
            _ask(client(name), "base")


def test_what_is_hidden_and_what_does_not_exist_look_the_same(client):
    ada = client("ada")
    for hidden, absent in (
        (SECRET_NAME, "bob/diagnosis-xyzzz"),
        (f"{SECRET_NAME}@1", "bob/diagnosis-xyzzz@1"),
        (f"{SECRET_NAME}@nothing", "bob/diagnosis-xyzzz@nothing"),
        ("base", "bass"),
    ):
        said = []
        for model in (hidden, absent):
            for action in (
                lambda model=model: _ask(ada, model),
                lambda model=model: ada.models.retrieve(model),
            ):
                with pytest.raises(openai.NotFoundError) as caught:
                    action()
                said.append(str(caught.value).replace(model, "MODEL"))
        assert len(set(said)) == 1, said


def test_nothing_of_a_tenant_is_told_to_another(served, client, keys, caplog):
    with caplog.at_level(logging.DEBUG):
        assert _ask(client("bob"), SECRET_NAME, SECRET_PROMPT).choices
        with pytest.raises(openai.BadRequestError):
            _ask(client("bob"), SECRET_NAME, SECRET_PROMPT, max_tokens=1 << 30)
        for model in ("bob/diagnosis", "bob/diagnosis-xyzz", "bob", "bo", "b"):
            with pytest.raises(openai.NotFoundError) as caught:
                _ask(client("ada"), model)
            assert "xyzzy" not in str(caught.value)
    assert "plugh" not in caplog.text + repr([vars(record) for record in caplog.records])
    ada = {"Authorization": f"Bearer {keys[1]['ada']}"}
    seen = [
        httpx.get(served.url + path, headers=ada).text
        for path in ("/v1/models", "/page/live", "/ready", "/health")
    ]
    metrics = httpx.get(f"{served.url}/metrics", headers={"Authorization": f"Bearer {keys[1]['root']}"}).text
    assert 'tenant="bob"' in metrics, "who counts sees tenants, and nobody sees adapters"
    for text in [*seen, metrics]:
        assert "xyzzy" not in text
        assert "plugh" not in text
    assert all("bob" not in text for text in seen)


def test_the_prefix_cache_is_not_shared_between_tenants(served):
    prompt = "The time that a prompt takes must not tell whether somebody else has sent it. " * 8
    asked = []
    for name in ("first", "first", "second"):
        keys = served.service.keys
        secret = (
            keys.rotate(name) if any(key.name == name for key in keys.list()) else keys.add(name, base=True)
        )
        with served.client(secret) as client:
            asked.append(_ask(client, "base", prompt).usage.prompt_tokens_details.cached_tokens)
    assert asked[0] == asked[2] == 0
    assert asked[1] > 0


def test_a_revoked_key_is_refused_at_once(served, client):
    with served.client(served.service.keys.add("brief", base=True)) as brief:
        assert _ask(brief, "base").choices
        served.service.keys.revoke("brief")
        with pytest.raises(openai.AuthenticationError):
            _ask(brief, "base")


def test_limits_are_429(client):
    for _ in range(2):
        _ask(client("slow"), "base")
    with pytest.raises(openai.RateLimitError, match="2 requests per minute") as caught:
        _ask(client("slow"), "base")
    assert caught.value.code == "rate_limit_exceeded"
    assert 1 <= int(caught.value.response.headers["retry-after"]) <= 30
    _ask(client("poor"), "base", max_tokens=8)
    with pytest.raises(openai.RateLimitError, match="5 tokens per day") as caught:
        _ask(client("poor"), "base")
    assert caught.value.code == "insufficient_quota"
    assert caught.value.response.headers["x-should-retry"] == "false"
    assert _ask(client("bob"), "base").choices, "others go on"


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.7"])
def test_a_wider_address_needs_a_key(tmp_path, host):
    settings = Settings(EngineSettings("embedded"), state=tmp_path, host=host)
    with pytest.raises(ConfigError, match="modicum serve keys add"), open_service(settings):
        pass
    with Keys(tmp_path) as keys:
        keys.add("ada", base=True)
        check_reach(settings, keys)
        keys.revoke("ada")
        with pytest.raises(ConfigError):
            check_reach(settings, keys)
