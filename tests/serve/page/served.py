"""A real server on the embedded model: a store with versions, keys, an experiment with answers, and traffic."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
import urllib.error
import urllib.request

from tests.serve.servers import Served, adapter, serving

from modicum.store import Store

#: what nobody should be able to put into a page
HOSTILE = "<img src=x onerror=window.ran=1><script>window.ran=1</script>"


@dataclasses.dataclass
class Site:
    """A running server, and who may ask it."""

    served: Served
    store: Store
    admin: str = ""
    ada: str = ""

    @property
    def address(self) -> str:
        return self.served.url

    def ask(self, method, place, body=None, key=None):
        """(status, answer) of one request; JSON is read."""
        headers = {"Authorization": f"Bearer {key or self.admin}", "Content-Type": "application/json"}
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.address}{place}", data, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                status, kind, text = answer.status, answer.headers["content-type"], answer.read()
        except urllib.error.HTTPError as error:
            with error:
                status, kind, text = error.code, error.headers["content-type"], error.read()
        return status, json.loads(text) if kind == "application/json" else text.decode()

    def complete(self, model, key=None, **more):
        """The answer to a small completion."""
        body = {"model": model, "prompt": "The little", "max_tokens": 8, **more}
        status, answer = self.ask("POST", "/v1/completions", body, key or self.ada)
        assert status == 200, answer
        return answer


@contextlib.contextmanager
def site(folder, *, with_keys=True, words=HOSTILE):
    """A server whose files are in `folder`; `words` are what others wrote into its store."""
    prices = folder / "prices.yaml"
    prices.write_text("currency: EUR\nper_1000_tokens: {prompt: 0.5, generated: 2}\n", encoding="utf-8")
    engine = {"max_batch": 8, "cache_tokens": 4096, "slots": 8}
    with Store(folder / "store", create=True, actor=words) as store:
        fill(store, words)
        with serving(folder / "state", folder / "store", engine=engine, grace=1.0, prices=prices) as served:
            running, keys = Site(served, store), served.service.keys
            if with_keys:
                running.admin = keys.add("chief", adapters=("*",), admin=True, base=True)
                running.ada = keys.add("ada", adapters=("notes",), base=True)
            yield running


def fill(store: Store, words: str) -> None:
    """Three versions of `notes`, the second of them in production after the first, and another tenant's `secret`."""
    for seed, note in ((1, words), (2, "shorter answers"), (3, None)):
        store.put("notes", adapter(seed), metrics={"accuracy": 0.9 + seed / 100}, note=note)
    store.put("secret", adapter(4))
    store.promote("notes@1")
    store.promote("notes@2")


def run_experiment(site: Site, users: int = 24) -> None:
    """Makes the experiment `tone` of versions 2 and 3, and lets users ask and say how they liked it."""
    arms = [
        {"label": "control", "version": "notes@2", "weight": 1},
        {"label": "bold", "version": "notes@3", "weight": 1},
    ]
    made = {"name": "tone", "arms": arms, "window": 1.0}
    assert site.ask("POST", "/admin/experiments", made)[0] == 201
    assert site.ask("POST", "/admin/experiments/tone/start")[0] == 200
    for user in range(users):
        answer = site.complete("tone", site.admin, user=f"user-{user}", max_tokens=2)
        given = {"response_id": answer["id"], "thumbs": "up" if user % 3 else "down"}
        status, said = site.ask("POST", "/v1/feedback", given)
        assert status < 300, said
    until = time.monotonic() + 30
    while site.ask("GET", "/admin/experiments/tone")[1]["rated_users"] < users:
        assert time.monotonic() < until
        time.sleep(0.1)
