"""Real servers for tests: the embedded model, a store of adapters, real sockets, and what is answered offline."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import threading

import numpy as np
import openai
import torch
from peft import get_peft_model

from modicum import LoraXSConfig
from modicum.models.loading import load_base, load_tokenizer
from modicum.serve.server import Server, bind, open_service
from modicum.serve.settings import EngineSettings, Settings
from modicum.store.files import install, to_record
from modicum.store.record import Record, build
from modicum.store.state import AdapterState, config_from, state_from

RANK = 8


@functools.cache
def template() -> Record:
    """A LoRA-XS record for the embedded model."""
    config = LoraXSConfig(r=RANK, alpha=16, init_weights=False)
    return to_record(get_peft_model(load_base("embedded", dtype="float32"), config), dtype="float32")[0]


def adapter(seed: int) -> Record:
    """A LoRA-XS adapter whose answers differ from the base model's and from those of other seeds."""
    rng = np.random.default_rng(seed)
    tensors = {
        name: rng.normal(0, 0.3, value.shape).astype(np.float32) for name, value in template().tensors()
    }
    return rebuilt(tensors)


def rebuilt(tensors: dict[str, np.ndarray]) -> Record:
    """A record like `template`, with other numbers."""
    fields = {field.name: getattr(template(), field.name) for field in dataclasses.fields(template())}
    about = {
        name: fields[name]
        for name in ("config", "task_type", "base_fingerprint", "basis_fingerprint", "metadata")
    }
    return build("lora_xs", tensors, "float32", **about)


class Offline:
    """What versions answer alone, by Transformers and PEFT."""

    def __init__(self) -> None:
        self.tokenizer = load_tokenizer("embedded")
        self._base = load_base("embedded", dtype="float32")
        self._model = install(
            load_base("embedded", dtype="float32"), config_from(template()), state_from(template())
        )

    @torch.no_grad()
    def tokens(
        self, record: Record | None, prompt: str, count: int, *, ignore_eos: bool = False
    ) -> list[int]:
        """The greedy tokens behind the prompt."""
        model = self._base
        if record is not None:
            model = self._model
            AdapterState.of(model, "default").copy_from(state_from(record))
        ids = torch.tensor([self.tokenizer(prompt).input_ids])
        answer = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            do_sample=False,
            **({"eos_token_id": None} if ignore_eos else {}),
        )
        return answer[0, ids.shape[1] :].tolist()

    def text(self, record: Record | None, prompt: str, count: int, **options) -> str:
        """The greedy text behind the prompt."""
        before = self.tokenizer(prompt).input_ids
        whole = self.tokenizer.decode(
            before + self.tokens(record, prompt, count, **options), skip_special_tokens=True
        )
        return whole[len(self.tokenizer.decode(before, skip_special_tokens=True)) :]


@dataclasses.dataclass
class Served:
    """A server that runs in a thread."""

    url: str
    service: object
    server: Server

    def client(self, key: str = "none", **options) -> openai.OpenAI:
        """The OpenAI client, which does not try again."""
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60, **options)

    def aclient(self, key: str = "none", **options) -> openai.AsyncOpenAI:
        """The same, for an event loop."""
        return openai.AsyncOpenAI(
            base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60, **options
        )


@contextlib.contextmanager
def serving(state, store=None, *, engine=None, **settings):
    """A server of the embedded model on a free port, stopped at the end."""
    # most tests look into the engine, and another process takes seconds to start
    engine = {
        "dtype": "float32",
        "slots": 80,
        "max_rank": RANK,
        "cache_tokens": 1 << 15,
        "own_process": False,
    } | (engine or {})
    wanted = Settings(
        EngineSettings("embedded", **engine),
        store=None if store is None else str(store),
        state=state,
        port=0,
        **{"grace": 5.0} | settings,
    )
    up = threading.Event()
    with bind(wanted) as listener, open_service(wanted) as service:
        port = listener.getsockname()[1]
        server = Server(service, listener)
        thread = threading.Thread(target=server.run, args=(up.set,))
        thread.start()
        try:
            assert up.wait(120), "the server does not start"
            yield Served(f"http://127.0.0.1:{port}", service, server)
        finally:
            server.stop()
            thread.join(60)
            assert not thread.is_alive(), "the server does not stop"
