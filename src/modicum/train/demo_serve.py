"""The end of the demo: its store is served, and two users with keys of their own send the same prompt."""

from __future__ import annotations

import json
import threading
import urllib.request
from typing import TYPE_CHECKING, Any

from modicum.errors import ModicumError
from modicum.evaluate.run import longest_completion
from modicum.serve.server import Server, bind, open_service
from modicum.serve.settings import EngineSettings, Settings
from modicum.train.demo import CHECKED, FORMS, STORE, forms_texts

if TYPE_CHECKING:
    from pathlib import Path

    from modicum.data.encoded import Encoded
    from modicum.train.recipe import Recipe

USERS = ("ada", "bob")
#: the method whose adapter the second user has; the base model where it was not trained
_SECOND = "lora"


def serve(recipe: Recipe, folder: Path, tokenizer: Any, rows: Encoded) -> dict[str, Any]:
    """What two users are answered over HTTP, and whether that is what their models answered offline."""
    second = folder / _SECOND
    texts = [forms_texts(folder / CHECKED, FORMS[0])]
    texts += [forms_texts(second, FORMS[0]) if second.is_dir() else forms_texts(folder / CHECKED, "before")]
    models = [f"demo/{CHECKED}", f"demo/{_SECOND}" if second.is_dir() else "base"]
    row = next((at for at, pair in enumerate(zip(*texts, strict=True)) if pair[0] != pair[1]), 0)
    settings = Settings(
        EngineSettings(recipe.model.name_or_path, dtype=recipe.model.dtype, own_process=False),
        store=str(folder / STORE),
        state=folder / "state",
        port=0,
    )
    with bind(settings) as listener, open_service(settings) as service:
        keys = [
            service.keys.add(user, adapters=() if model == "base" else (model,), base=model == "base")
            for user, model in zip(USERS, models, strict=True)
        ]
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1/completions"
        server, up = Server(service, listener), threading.Event()
        thread = threading.Thread(target=server.run, args=(up.set,))
        thread.start()
        try:
            if not up.wait(60):
                raise ModicumError("the server did not start within a minute")
            room = longest_completion(rows)
            answers = [_ask(url, *asked, rows.prompt(row), room) for asked in zip(keys, models, strict=True)]
        finally:
            server.stop()
            thread.join()
    served = [
        {"user": user, "model": model, "answer": answer, "as_offline": answer == offline[row]}
        for user, model, answer, offline in zip(USERS, models, answers, texts, strict=True)
    ]
    return {"served": served, "prompt": tokenizer.decode(rows.prompt(row), skip_special_tokens=True)}


def _ask(url: str, key: str, model: str, prompt: list[int], room: int) -> str:
    body = {"model": model, "prompt": prompt, "max_tokens": room, "temperature": 0}
    headers = {"Authorization": f"Bearer {key}"}
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)  # noqa: S310 - our own address
    with urllib.request.urlopen(request, timeout=120) as answer:  # noqa: S310 - likewise
        return json.load(answer)["choices"][0]["text"].strip()
