"""A real server on the embedded model: a store with versions, keys, an experiment with answers, and traffic."""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import json
import threading
import time

import torch
from peft import get_peft_model

from modicum import LoraXSConfig
from modicum.models.embedded import path
from modicum.models.loading import load_base
from modicum.serve.server import Server, bind, open_service
from modicum.serve.settings import EngineSettings, Settings
from modicum.store import Store
from modicum.store.files import to_record

#: what nobody should be able to put into a page
HOSTILE = "<img src=x onerror=window.ran=1><script>window.ran=1</script>"


@dataclasses.dataclass
class Site:
    """A running server, and who may ask it."""

    port: int
    service: object
    store: Store
    admin: str
    ada: str

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def ask(self, method, place, body=None, key=None):
        """(status, JSON) of one request."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            headers = {"Authorization": f"Bearer {key or self.admin}", "Content-Type": "application/json"}
            connection.request(method, place, None if body is None else json.dumps(body), headers)
            answer = connection.getresponse()
            text = answer.read()
        finally:
            connection.close()
        kind = answer.getheader("content-type", "")
        return answer.status, json.loads(text) if kind.startswith("application/json") else text.decode()

    def complete(self, model, key=None, **more):
        body = {"model": model, "prompt": "The little", "max_tokens": 8, **more}
        status, answer = self.ask("POST", "/v1/completions", body, key or self.ada)
        assert status == 200, answer
        return answer


@contextlib.contextmanager
def site(folder, *, with_keys=True):
    """A server whose files are in `folder`."""
    store = Store(folder / "store", create=True, actor=HOSTILE)
    fill(store)
    settings = Settings(
        EngineSettings("embedded", max_batch=8, cache_tokens=4096, slots=8, max_rank=8),
        store=str(folder / "store"),
        state=folder / "state",
        port=0,
        grace=1.0,
        prices=folder / "prices.yaml",
    )
    settings.prices.write_text(
        "currency: EUR\nper_1000_tokens: {prompt: 0.5, generated: 2}\n", encoding="utf-8"
    )
    with store, bind(settings) as listener, open_service(settings) as service:
        admin = service.keys.add("chief", adapters=("*",), admin=True, base=True) if with_keys else ""
        ada = service.keys.add("ada", adapters=("notes",), base=True) if with_keys else ""
        server, ready = Server(service, listener), threading.Event()
        thread = threading.Thread(target=server.run, args=(ready.set,))
        thread.start()
        try:
            assert ready.wait(60)
            yield Site(listener.getsockname()[1], service, store, admin, ada)
        finally:
            server.stop()
            thread.join()


def fill(store: Store) -> None:
    """Three versions of `notes`, the second of them in production after the first, and another tenant's `secret`."""
    model = get_peft_model(load_base(str(path())), LoraXSConfig(r=4, target_modules=["q_proj"]))
    for seed, note in ((1, HOSTILE), (2, "shorter answers"), (3, None)):
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.normal_(std=0.5, generator=torch.Generator().manual_seed(seed))
        record, _ = to_record(model)
        store.put("notes", record, metrics={"accuracy": 0.9 + seed / 100}, note=note)
        store.put("secret", record)
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
