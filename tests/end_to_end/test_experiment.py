"""An experiment from the first user to production and back, on a real server with simulated users."""

from __future__ import annotations

import json
import random
import time

import httpx
import pytest
from tests.serve.servers import Offline, adapter, serving

from modicum.cli import main
from modicum.serve.experiments import tables
from modicum.store import Store

PROMPT = "The little dog"
TENANT = "shop"


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    with Store(folder / "store", create=True, actor="maker") as store:
        for seed in range(2):
            store.put("ada", adapter(seed))
        store.promote("ada@1")
        with serving(folder / "state", folder / "store") as one:
            one.admin = one.service.keys.add("chief", admin=True)
            one.user = one.service.keys.add(TENANT, adapters=("ada", "a-*"))
            one.rival = one.service.keys.add("rival", adapters=("ada", "a-*"))
            one.store = store
            offline = Offline()
            one.texts = {
                label: offline.text(adapter(seed), PROMPT, 4) for seed, label in enumerate(("old", "new"))
            }
            yield one


@pytest.fixture(autouse=True)
def _same_salt(monkeypatch):
    """The same users get the same arms every time: what holds with chance 0.95 holds or does not."""
    monkeypatch.setattr(tables, "token_bytes", random.Random(7).randbytes)


@pytest.fixture
def command(served, capsys, monkeypatch):
    """What `modicum ARGS --json` prints."""
    monkeypatch.setenv("MODICUM_URL", served.url)
    monkeypatch.setenv("MODICUM_KEY", served.admin)

    def run(*args, status=0):
        with pytest.raises(SystemExit) as exit_:
            main([*args, "--json"])
        out = capsys.readouterr().out
        assert exit_.value.code == status, out
        return json.loads(out)

    return run


@pytest.fixture
def users(served):
    with Users(served) as made:
        yield made


class Users:
    """People who ask the server and say how they liked the answer; by it they are known to have got an arm."""

    def __init__(self, served) -> None:
        self._served = served
        self._http = httpx.Client(base_url=f"{served.url}/v1", timeout=60, trust_env=False)
        self.arms: dict[str, str] = {}

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        self._http.close()

    def post(self, path, body, key=None):
        return self._http.post(
            path, json=body, headers={"Authorization": f"Bearer {key or self._served.user}"}
        )

    def ask(self, model, user=None):
        """(arm, identifier of the response)."""
        body = {
            "model": model,
            "prompt": PROMPT,
            "max_tokens": 4,
            "temperature": 0,
            **({"user": user} if user else {}),
        }
        answer = self.post("/completions", body)
        assert answer.status_code == 200, answer.text
        found = answer.json()
        arms = {text: label for label, text in self._served.texts.items()}
        return arms[found["choices"][0]["text"]], found["id"]

    def come(self, model, count, liked, seed=0):
        """How many came before the experiment had ended, each with one to three answers and a thumb for each."""
        rng = random.Random(seed)
        for number in range(count):
            user = f"user-{number}"
            for _ in range(rng.choice((1, 1, 2, 3))):
                arm, response = self.ask(model, user)
                thumbs = "up" if rng.random() < liked[arm] else "down"
                said = self.post("/feedback", {"response_id": response, "thumbs": thumbs})
                if said.status_code == 404:
                    # it had ended before the question, which was no part of it
                    return number
                assert self.arms.setdefault(user, arm) == arm, "a user keeps the arm"
                if said.status_code == 409:
                    assert "has ended" in said.text
                    return number
                assert said.status_code == 200, said.text
        return count


def until(condition, seconds=20):
    """What `condition` returns once that is true."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "it does not happen"
        time.sleep(0.05)
    return found


def arms_of(report):
    return {arm["label"]: arm for arm in report["arms"]}


def test_the_better_version_wins_is_promoted_and_taken_back(served, command, users):
    before = served.store.head().entries
    made = command(
        "experiment",
        "create",
        "a-b",
        "--arm",
        "old=ada@production:1",
        "--arm",
        "new=ada@2:1",
        "--window",
        "0",
        "--start",
    )
    assert (made["state"], arms_of(made)["old"]["version"]) == ("running", "ada@1")
    count = users.come("a-b", 400, {"old": 0.15, "new": 0.9})
    assert count < 400, "a difference as large as this one ends it soon"
    report = command("experiment", "show", "a-b")
    assert (report["state"], report["winner"], report["reason"]) == (
        "stopped",
        "new",
        "new is better than old",
    )
    assert set(users.arms.values()) == {"old", "new"}
    new = arms_of(report)["new"]
    assert new["difference"]["low"] > 0
    assert new["difference"]["low"] < 0.75 < new["difference"]["high"]
    for label, arm in arms_of(report).items():
        assert arm["users"] == sum(found == label for found in users.arms.values())
        assert arm["requests"] >= arm["users"] > 0
        assert arm["generated_tokens"] == 4 * arm["requests"]
        assert arm["outcome"]["n"] <= arm["users"]
    assert report["sample_ratio_p"] > 0.001
    # nobody gets the new one before it is promoted
    assert {users.ask("a-b", user)[0] for user in list(users.arms)[:10]} == {"old"}
    assert users.ask("ada")[0] == "old"
    assert command("experiment", "promote", "a-b")["state"] == "promoted"
    assert (users.ask("ada")[0], users.ask("a-b", "user-0")[0]) == ("new", "new")
    assert command("experiment", "rollback", "a-b")["state"] == "rolled back"
    assert (users.ask("ada")[0], users.ask("a-b", "user-0")[0]) == ("old", "old")
    log = served.store.log("ada", after=before)
    done = [(entry.actor, entry.detail.get("did", entry.action)) for entry in log]
    assert done == [
        ("chief", "create"), ("chief", "start"), ("modicum-serve", "stop"), ("chief", "alias"), ("chief", "promote"),
        ("chief", "rollback"), ("chief", "rollback"),
    ]  # fmt: skip
    assert served.store.verify().faults == ()


def test_the_same_version_twice_is_not_told_apart(served, command, users):
    command(
        "experiment", "create", "a-a", "--arm", "old=ada@1", "--arm", "same=ada@1", "--window", "0", "--start"
    )
    assert users.come("a-a", 60, {"old": 0.5, "new": 0.5}, seed=2) == 60
    report = until(lambda: (found := command("experiment", "show", "a-a"))["rated_users"] == 60 and found)
    assert (report["state"], report["winner"]) == ("running", None)
    same = arms_of(report)["same"]
    assert same["difference"]["low"] < 0 < same["difference"]["high"]
    assert 15 < same["users"] < 45
    assert command("experiment", "stop", "a-a")["state"] == "stopped"


def test_feedback_is_taken_from_whom_the_answer_was_given_to(command, users, served):
    command("experiment", "create", "a-f", "--arm", "old=ada@1", "--arm", "new=ada@2", "--start")
    _, response = users.ask("a-f", "u")
    given = {"response_id": response, "thumbs": "up"}
    told = {
        users.post("/feedback", body, key).text
        for body, key in ((given, served.rival), ({**given, "response_id": "cmpl-x"}, None))
    }
    assert len(told) == 1
    assert users.post("/feedback", given, "mod-wrong").status_code == 401
    assert users.post("/feedback", {**given, "thumbs": "sideways"}).status_code == 400
    assert users.post("/feedback", given).json() == {
        "object": "feedback", "experiment": "a-f", "thumbs": "up", "replaced": False,
    }  # fmt: skip
    assert users.post("/feedback", {**given, "thumbs": "down"}).json()["replaced"] is True
    assert command("experiment", "forget", TENANT, "u")["erased"] == 3
    assert users.post("/feedback", given).status_code == 404
    command("experiment", "weigh", "a-f", "new=0")
    assert {users.ask("a-f", f"w{number}")[0] for number in range(5)} == {"old"}
    command("experiment", "stop", "a-f")
    assert command("experiment", "delete", "a-f")["deleted"] is True
    assert "a-f" not in {one["name"] for one in command("experiment", "list")["experiments"]}


def test_a_shadow_runs_beside_and_is_told_apart(command, users):
    command(
        "experiment", "create", "a-s", "--arm", "old=ada@1:0", "--arm", "new=ada@2", "--shadow", "--start"
    )
    assert {users.ask("a-s", f"user-{number}")[0] for number in range(6)} == {"old"}
    report = until(
        lambda: (
            arms_of(found := command("experiment", "show", "a-s"))["new"]["requests"] >= 6 and arms_of(found)
        )
    )
    assert (report["old"]["requests"], report["old"]["agreement"]) == (6, None)
    assert 0 <= report["new"]["agreement"] < 1
    assert report["new"]["users"] == 0


def test_adapters_of_a_running_server(command, users, served):
    loaded = command("serve", "adapters", "load", "ada@2", "--pin")
    assert (loaded["version"], loaded["pinned"]) == ("ada@2", True)
    assert "ada@2" in {one["version"] for one in command("serve", "adapters", "list")["adapters"]}
    command("serve", "adapters", "unpin", "ada@2")
    assert command("serve", "adapters", "unload", "ada@2")["unloaded"] is True
    assert command("serve", "adapters", "promote", "ada@2", "--expected", "1")["version"] == 2
    assert users.ask("ada")[0] == "new"
    wrong = command("serve", "adapters", "rollback", "ada", "--expected", "1", status=1)
    assert wrong["kind"] == "ConflictError"
    assert command("serve", "adapters", "rollback", "ada")["version"] == 1
    assert users.ask("ada")[0] == "old"
    assert [one["version"] for one in command("serve", "adapters", "show", "ada")["versions"]] == [2, 1]


def test_what_people_are_shown(served, command, users, capsys):
    command(
        "experiment", "create", "a-p", "--arm", "old=ada@1", "--arm", "new=ada@2", "--window", "0", "--start"
    )
    _, response = users.ask("a-p", "u")
    assert users.post("/feedback", {"response_id": response, "thumbs": "up"}).status_code == 200
    until(lambda: command("experiment", "show", "a-p")["rated_users"] == 1)
    command("experiment", "stop", "a-p")
    for args, parts in (
        (
            ["experiment", "show", "a-p"],
            ["a-p: stopped", "ada@1", "1.000 [", "ended: stopped by hand", "hold at all"],
        ),
        (["experiment", "list"], ["a-p", "stopped", "old ada@1, new ada@2"]),
        (["serve", "adapters", "show", "ada"], ["production", "experiment", "chief"]),
        (["serve", "adapters", "list"], ["lora_xs"]),
    ):
        with pytest.raises(SystemExit):
            main(args)
        out = capsys.readouterr().out
        assert all(part in out for part in parts), out


def test_a_server_that_is_not_there_or_does_not_let_one_in(command, monkeypatch, served):
    monkeypatch.setenv("MODICUM_KEY", served.user)
    assert "needs the key of an admin" in command("experiment", "list", status=1)["error"]
    monkeypatch.setenv("MODICUM_URL", "http://127.0.0.1:9")
    assert "no server answers at http://127.0.0.1:9" in command("experiment", "list", status=1)["error"]
    monkeypatch.setenv("MODICUM_URL", "ftp://x")
    assert "no address of a server" in command("experiment", "list", status=1)["error"]
    monkeypatch.setenv("MODICUM_URL", served.url)
    wrong = command("experiment", "create", "x", "--arm", "old", "--arm", "new=ada@1", status=1)
    assert "cannot read the arm 'old'" in wrong["error"]
    assert "cannot read 'new'" in command("experiment", "weigh", "x", "new", status=1)["error"]
