"""The admin's routes on a real server: adapters in memory and in production, experiments, and who may do that."""

from __future__ import annotations

import threading

import httpx
import pytest
from tests.serve.servers import RANK, Offline, adapter, serving

from modicum.store import Store
from modicum.store.record import build

PROMPT = "Once upon a time"
ARMS = [{"label": "old", "version": "ada@1"}, {"label": "new", "version": "ada@2"}]


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    with Store(folder / "store", create=True, actor="maker") as store:
        for seed in range(3):
            store.put("ada", adapter(seed), metrics={"accuracy": 0.5 + seed / 10})
        store.put("team/eve", adapter(9))
        # of another model: nobody can serve it
        store.put(
            "alien",
            build(
                "lora_xs", {"x.R": adapter(0).tensors().__iter__().__next__()[1]}, base_fingerprint="00" * 16
            ),
        )
        store.promote("ada@1")
        with serving(folder / "state", folder / "store", engine={"slots": 3}) as one:
            one.admin = one.service.keys.add("chief", adapters=("*",), base=True, admin=True)
            one.user = one.service.keys.add("team", adapters=("ada", "trial"))
            one.store = store
            yield one


@pytest.fixture
def admin(served):
    with httpx.Client(
        base_url=f"{served.url}/admin",
        headers={"Authorization": f"Bearer {served.admin}"},
        timeout=60,
        trust_env=False,
    ) as client:
        yield client


def said(answer, status):
    assert answer.status_code == status, answer.text
    return answer.json()["error"]["message"]


def got(answer):
    assert answer.status_code in (200, 201), answer.text
    return answer.json()


def complete(served, model="ada", **about):
    with served.client(served.user) as client:
        return client.completions.create(model=model, prompt=PROMPT, max_tokens=8, temperature=0, **about)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/adapters"), ("GET", "/adapters/ada"), ("POST", "/adapters/ada/promote"), ("GET", "/usage"),
        ("POST", "/adapters/ada/load"), ("POST", "/adapters/ada/unload"), ("POST", "/adapters/ada/rollback"),
        ("GET", "/experiments"), ("POST", "/experiments"), ("GET", "/experiments/x"), ("POST", "/experiments/x/stop"),
        ("DELETE", "/experiments/x"), ("POST", "/users/purge"),
    ],
)  # fmt: skip
def test_only_an_admin_gets_in(served, method, path):
    body = {"version": 1} if method == "POST" else None
    with httpx.Client(base_url=f"{served.url}/admin", timeout=60, trust_env=False) as client:
        for key, status in ((None, 401), ("mod-wrong", 401), (served.user, 403)):
            headers = {"Authorization": f"Bearer {key}"} if key else {}
            assert client.request(method, path, json=body, headers=headers).status_code == status


def test_adapters_are_loaded_pinned_and_unloaded(served, admin):
    found = got(admin.post("/adapters/ada/load", json={"version": "production", "pin": True}))
    assert (found["version"], found["method"], found["rank"], found["pinned"]) == (
        "ada@1",
        "lora_xs",
        RANK,
        True,
    )
    got(admin.post("/adapters/team/eve/load", json={"version": "latest"}))
    listed = {one["version"]: one["pinned"] for one in got(admin.get("/adapters"))["adapters"]}
    assert listed == {"ada@1": True, "team/eve@1": False}
    # a pinned one stays while others come
    for number in (2, 3):
        got(admin.post("/adapters/ada/load", json={"version": number}))
    assert "ada@1" in {one["version"] for one in got(admin.get("/adapters"))["adapters"]}
    assert got(admin.post("/adapters/ada/unpin", json={"version": 1})) == {
        "version": "ada@1",
        "pinned": False,
    }
    assert got(admin.post("/adapters/ada/unload", json={"version": 1}))["unloaded"] is True
    assert got(admin.post("/adapters/ada/unload", json={"version": 1}))["unloaded"] is False
    assert "ada@9" in said(admin.post("/adapters/ada/load", json={"version": 9}), 404)
    assert "pim" in said(admin.post("/adapters/ada/load", json={"version": 1, "pim": True}), 400)


def test_the_next_request_gets_what_was_promoted_and_running_ones_go_on(served, admin):
    offline = Offline()
    texts = {number: offline.text(adapter(number - 1), PROMPT, 8) for number in (1, 2)}
    assert texts[1] != texts[2]
    long = offline.text(adapter(0), PROMPT, 200)
    with served.client(served.user) as client:
        running = client.completions.create(
            model="ada",
            prompt=PROMPT,
            max_tokens=200,
            temperature=0,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        first = next(iter(running)).choices[0].text
        assert got(admin.post("/adapters/ada/promote", json={"version": 2, "expected": 1}))["version"] == 2
        assert complete(served).choices[0].text == texts[2]
        rest = "".join(chunk.choices[0].text for chunk in running if chunk.choices)
    assert (first + rest)[: len(long)] == long[: len(first + rest)]
    assert len(first + rest) > len(texts[1])
    assert got(admin.post("/adapters/ada/rollback", json={"expected": 2})) == {
        "name": "ada", "alias": "production", "version": 1,
    }  # fmt: skip
    assert complete(served).choices[0].text == texts[1]
    moves = [(e.actor, e.action, e.version) for e in served.store.log("ada")][-2:]
    assert moves == [("chief", "alias", 2), ("chief", "rollback", 1)]


def test_what_cannot_be_is_told_and_changes_nothing(served, admin):
    head = served.store.head()
    assert "points at version 1, not at 2" in said(
        admin.post("/adapters/ada/promote", json={"version": 3, "expected": 2}), 409
    )
    assert "is not set" not in said(
        admin.post("/adapters/ada/promote", json={"version": 3, "expected": None}), 409
    )
    assert "alien@1 cannot be served" in said(admin.post("/adapters/alien/promote", json={"version": 1}), 409)
    assert "cannot be an alias" in said(
        admin.post("/adapters/ada/promote", json={"version": 1, "alias": "7"}), 400
    )
    assert "no earlier version" in said(admin.post("/adapters/team/eve/rollback"), 404)
    assert "no adapter 'nobody'" in said(admin.get("/adapters/nobody"), 404)
    assert said(admin.post("/adapters/ada/promote", content=b"{"), 400)
    assert said(admin.post("/adapters/ada/promote"), 400)
    assert served.store.head() == head


def test_an_adapter_is_shown_with_its_history(served, admin):
    found = got(admin.get("/adapters/ada"))
    assert [one["version"] for one in found["versions"]] == [3, 2, 1]
    assert found["versions"][2]["aliases"] == ["production"]
    assert found["versions"][0]["metrics"] == {"accuracy": 0.7}
    assert found["history"][-1]["action"] == "put"
    assert found["history"][-1]["actor"] == "maker"
    assert found["history"][0]["at"] >= found["history"][-1]["at"]


def test_an_experiment_over_http(served, admin):
    body = {"name": "trial", "arms": ARMS, "window": 0.0, "feedback": "score", "high": 5}
    found = got(admin.post("/experiments", json=body))
    assert (found["state"], [arm["label"] for arm in found["arms"]]) == ("draft", ["old", "new"])
    assert "there is an experiment 'trial'" in said(admin.post("/experiments", json=body), 409)
    assert "did you mean 'alpha'" in said(admin.post("/experiments", json={**body, "alpa": 1}), 400)
    assert got(admin.post("/experiments/trial/start"))["state"] == "running"
    assert [one["name"] for one in got(admin.get("/experiments"))["experiments"]] == ["trial"]
    answers = {user: complete(served, "trial", user=user) for user in ("u1", "u2", "u3", "u4", "u5", "u6")}
    texts = {answer.choices[0].text for answer in answers.values()}
    assert len(texts) == 2
    assert {answer.model for answer in answers.values()} == {"trial"}
    assert complete(served, "trial", user="u1").choices[0].text == answers["u1"].choices[0].text
    assert got(admin.post("/experiments/trial/weights", json={"new": 3}))["arms"][1]["weight"] == 3
    assert "no arm 'x'" in said(admin.post("/experiments/trial/weights", json={"x": 3}), 400)
    assert "has won; name the one" in said(promote_after_stop(admin), 400)
    assert got(admin.post("/experiments/trial/promote", json={"arm": "new"}))["state"] == "promoted"
    assert served.store.find("ada@production") == "ada@2"
    assert got(admin.post("/experiments/trial/rollback"))["state"] == "rolled back"
    assert served.store.find("ada@production") == "ada@1"
    report = got(admin.get("/experiments/trial"))
    assert sum(arm["requests"] for arm in report["arms"]) == 7
    assert sum(arm["generated_tokens"] for arm in report["arms"]) == 7 * 8
    assert got(admin.post("/users/purge", json={"tenant": "team", "user": "u1"}))["erased"] == 3
    assert got(admin.delete("/experiments/trial"))["deleted"] is True
    assert "no experiment 'trial'" in said(admin.get("/experiments/trial"), 404)
    assert served.store.verify(records=False).faults == ()


def promote_after_stop(admin):
    assert got(admin.post("/experiments/trial/stop"))["reason"] == "stopped by hand"
    return admin.post("/experiments/trial/promote")


def test_an_experiment_with_an_arm_that_cannot_be_served_does_not_start(served, admin):
    arms = [ARMS[0], {"label": "alien", "version": "alien"}]
    got(admin.post("/experiments", json={"name": "team/odd", "arms": arms}))
    assert "alien@1 cannot be served" in said(admin.post("/experiments/team/odd/start"), 409)
    assert got(admin.get("/experiments/team/odd"))["state"] == "draft"
    got(admin.delete("/experiments/team/odd"))


def test_two_admins_at_once_start_it_once(served, admin):
    got(admin.post("/experiments", json={"name": "race", "arms": ARMS}))
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(admin.post("/experiments/race/start").status_code))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == [200, 409, 409, 409]
    assert [e.detail["did"] for e in served.store.log("ada") if e.detail.get("experiment") == "race"] == [
        "create", "start",
    ]  # fmt: skip
    got(admin.post("/experiments/race/stop"))
    got(admin.delete("/experiments/race"))


def test_usage_is_told_by_tenant(served, admin):
    complete(served)
    found = {one["name"]: one for one in got(admin.get("/usage"))["tenants"]}
    assert found["team"]
    assert "mod-" not in str(found)
