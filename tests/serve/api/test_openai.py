"""The OpenAI API, asked by its own client over real sockets: shapes, sampling, streams, errors of the right class."""

from __future__ import annotations

import json
import math

import httpx
import openai
import pytest
import torch
from tests.serve.servers import Offline, adapter, serving

from modicum.store import Store

PROMPT = "Once upon a time"
NAMES = ("team/ada", "team/bob", "solo")


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    with Store(folder / "store", create=True) as store:
        for seed, name in enumerate(NAMES):
            store.put(name, adapter(seed))
        store.put("team/ada", adapter(50))
        store.promote("team/ada@1")
        store.alias("team/ada@2", "canary")
    with serving(folder / "state", folder / "store") as one:
        yield one


@pytest.fixture(scope="module")
def offline():
    return Offline()


@pytest.fixture
def client(served):
    with served.client() as made:
        yield made


def _complete(client, model="base", prompt=PROMPT, **options):
    return client.completions.create(
        model=model, prompt=prompt, **{"max_tokens": 12, "temperature": 0} | options
    )


def _chat(client, model="base", **options):
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Tell me a story"}]
    return client.chat.completions.create(
        model=model, messages=messages, **{"max_tokens": 12, "temperature": 0} | options
    )


def test_a_completion_is_the_offline_model_s(client, offline):
    answer = _complete(client)
    assert answer.choices[0].text == offline.text(None, PROMPT, 12)
    assert answer.choices[0].finish_reason == "length"
    assert (answer.object, answer.model) == ("text_completion", "base")
    prompt = len(offline.tokenizer(PROMPT).input_ids)
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (prompt, 12)
    assert answer.usage.total_tokens == prompt + 12


@pytest.mark.parametrize(
    ("model", "seed", "version"),
    [
        ("team/ada", 0, "team/ada@1"),
        ("team/ada@2", 50, "team/ada@2"),
        ("team/ada@canary", 50, "team/ada@2"),
        ("team/ada@latest", 50, "team/ada@2"),
        ("solo", 2, "solo@1"),
    ],
)
def test_models_are_names_versions_and_aliases(client, offline, model, seed, version):
    answer = _complete(client, model)
    assert answer.choices[0].text == offline.text(adapter(seed), PROMPT, 12)
    assert answer.choices[0].text != offline.text(None, PROMPT, 12)
    assert answer.model == model
    assert answer.system_fingerprint == version


@pytest.mark.parametrize("ask", [_complete, _chat])
def test_a_stream_is_the_whole_in_pieces(client, ask):
    whole = ask(client, logprobs=(True if ask is _chat else 3)).model_dump()
    with ask(
        client, stream=True, stream_options={"include_usage": True}, logprobs=(True if ask is _chat else 3)
    ) as stream:
        chunks = [chunk.model_dump() for chunk in stream]
    assert chunks[-1]["choices"] == []
    last = chunks[-1]["usage"]
    assert {k: last[k] for k in ("prompt_tokens", "completion_tokens", "total_tokens")} == {
        k: whole["usage"][k] for k in ("prompt_tokens", "completion_tokens", "total_tokens")
    }
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert len({chunk["id"] for chunk in chunks}) == 1
    choices = [chunk["choices"][0] for chunk in chunks[:-1]]
    assert [choice["finish_reason"] for choice in choices] == [
        *[None] * (len(choices) - 1),
        whole["choices"][0]["finish_reason"],
    ]
    if ask is _chat:
        assert choices[0]["delta"]["role"] == "assistant"
        text = "".join(choice["delta"]["content"] or "" for choice in choices)
        assert text == whole["choices"][0]["message"]["content"]
        told = [token for choice in choices for token in (choice["logprobs"] or {"content": []})["content"]]
        assert told == whole["choices"][0]["logprobs"]["content"]
    else:
        assert "".join(choice["text"] for choice in choices) == whole["choices"][0]["text"]
        for name, values in whole["choices"][0]["logprobs"].items():
            assert [v for choice in choices if choice["logprobs"] for v in choice["logprobs"][name]] == values


def test_a_stream_without_usage_has_none(served):
    body = {"model": "base", "prompt": PROMPT, "max_tokens": 3, "stream": True}
    with httpx.stream("POST", f"{served.url}/v1/completions", json=body, timeout=30) as answer:
        lines = [line for line in answer.iter_lines() if line]
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    assert all("usage" not in json.loads(line[6:]) for line in lines[:-1])
    assert "server" not in answer.headers


def _chance(offline, text):
    """The probability of the likeliest first token, whose text it must be, by the model alone."""
    with torch.no_grad():
        logits = offline._base(torch.tensor([offline.tokenizer(PROMPT).input_ids])).logits[0, -1]
    token = logits.argmax()
    assert offline.tokenizer.decode(token).strip() == text.strip()
    return logits.float().softmax(-1)[token].item()


def test_logprobs_of_completions(client, offline):
    found = _complete(client, logprobs=2, max_tokens=6).choices[0]
    assert "".join(found.logprobs.tokens) == found.text
    offsets = [sum(map(len, found.logprobs.tokens[:n])) for n in range(6)]
    assert found.logprobs.text_offset == offsets
    for token, logprob, top in zip(
        found.logprobs.tokens, found.logprobs.token_logprobs, found.logprobs.top_logprobs, strict=True
    ):
        assert len(top) == 2
        assert top[token] == logprob == max(top.values())
        assert sum(map(math.exp, top.values())) <= 1
        assert logprob <= 0
    assert math.exp(found.logprobs.token_logprobs[0]) == pytest.approx(
        _chance(offline, found.logprobs.tokens[0]), abs=1e-4
    )
    assert _complete(client).choices[0].logprobs is None
    assert len(_complete(client, logprobs=0).choices[0].logprobs.tokens) == 12


def test_what_is_found_in_the_cache_is_told_once(client):
    prompt = "She said that what has been read once need not be read again. " * 8
    first, again = (_complete(client, "solo", prompt, n=2, max_tokens=2).usage for _ in range(2))
    assert again.prompt_tokens == first.prompt_tokens
    assert 0 < again.prompt_tokens_details.cached_tokens < again.prompt_tokens


def test_logprobs_of_chats(client):
    found = _chat(client, logprobs=True, top_logprobs=3, max_tokens=6).choices[0]
    assert "".join(token.token for token in found.logprobs.content) == found.message.content
    for token in found.logprobs.content:
        assert bytes(token.bytes).decode() == token.token
        assert len(token.top_logprobs) == 3
        assert token.top_logprobs[0].logprob == token.logprob
    assert _chat(client, logprobs=True).choices[0].logprobs.content[0].top_logprobs == []


def test_stop_strings(client):
    whole = _complete(client, max_tokens=30).choices[0].text
    stop = whole[10:16]
    cut = _complete(client, max_tokens=30, stop=["not in it", stop]).choices[0]
    assert cut.text == whole[: whole.index(stop)]
    assert cut.finish_reason == "stop"
    with _complete(client, max_tokens=30, stop=stop, stream=True) as stream:
        assert "".join(chunk.choices[0].text for chunk in stream) == cut.text


def test_several_prompts_and_several_answers(client, offline):
    prompts = [PROMPT, "The dog", "A girl named Lily"]
    answer = _complete(client, "solo", prompts, n=2, max_tokens=8)
    assert [choice.index for choice in answer.choices] == list(range(6))
    wanted = [offline.text(adapter(2), prompt, 8) for prompt in prompts for _ in range(2)]
    assert [choice.text for choice in answer.choices] == wanted
    assert answer.usage.prompt_tokens == sum(len(offline.tokenizer(prompt).input_ids) for prompt in prompts)
    assert answer.usage.completion_tokens == 6 * 8
    texts = [""] * 6
    with _complete(client, "solo", prompts, n=2, max_tokens=8, stream=True) as stream:
        for chunk in stream:
            texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == wanted


def test_prompts_of_tokens(client, offline):
    ids = offline.tokenizer(PROMPT).input_ids
    text = _complete(client).choices[0].text
    assert _complete(client, prompt=ids).choices[0].text == text
    assert [choice.text for choice in _complete(client, prompt=[ids, ids]).choices] == [text, text]


def test_seeds(client):
    def ask(**options):
        return [c.text for c in _complete(client, temperature=1.0, max_tokens=10, **options).choices]

    first = ask(seed=7, n=3)
    assert ask(seed=7, n=3) == first
    assert len(set(first)) == 3, "answers to one prompt differ"
    assert ask(seed=7) == first[:1]
    assert ask(seed=8) == first[1:2]
    assert ask(seed=7, top_p=1e-6) == [_complete(client, max_tokens=10).choices[0].text]
    assert ask() != ask()


def test_a_chat(client, offline):
    answer = _chat(client, "team/bob")
    wanted = offline.text(adapter(1), "system: Be kind.\nuser: Tell me a story\nassistant:", 12)
    assert answer.choices[0].message.content == wanted
    assert (answer.object, answer.choices[0].message.role) == ("chat.completion", "assistant")
    parts = [{"type": "text", "text": "Tell me "}, {"type": "text", "text": "a story"}]
    messages = [{"role": "developer", "content": "Be kind."}, {"role": "user", "content": parts}]
    again = client.chat.completions.create(
        model="team/bob", messages=messages, max_completion_tokens=12, temperature=0
    )
    assert again.choices[0].message.content == wanted


def test_a_chat_goes_on_until_the_end_or_the_length(client, served):
    answer = client.chat.completions.create(
        model="base",
        messages=[{"role": "user", "content": "Hi"}],
        temperature=0,
        extra_body={"ignore_eos": True},
    )
    assert answer.usage.total_tokens == served.service.engine.max_length
    assert answer.choices[0].finish_reason == "length"


def test_models_are_listed_and_found(client):
    assert [model.id for model in client.models.list()] == ["base", "solo", "team/ada", "team/bob"]
    assert client.models.retrieve("team/ada").id == "team/ada"
    assert client.models.retrieve("team/ada@canary").object == "model"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nobody")


@pytest.mark.parametrize(
    ("options", "param", "said"),
    [
        ({"tools": [{"type": "function"}]}, "tools", "no support for tools"),
        ({"frequency_penalty": 0.5}, "frequency_penalty", "penalties"),
        ({"echo": True}, "echo", "repeating the prompt"),
        ({"temperature": -1}, "temperature", "greater than or equal to 0"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"n": 1000}, "n", "less than or equal to 128"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": "5"}, "max_tokens", "valid integer"),
        ({"stop": [""]}, "stop", "at least 1 character"),
        ({"logprobs": 21}, "logprobs", "less than or equal to 20"),
        ({"prompt": []}, "prompt", "at least 1 item"),
        ({"prompt": [-1]}, "prompt", "greater than or equal to 0"),
        ({"prompt": {"a": 1}}, "prompt", "valid string"),
        ({"tmperature": 1}, "tmperature", "did you mean 'temperature'"),
        ({"stream_options": {"x": 1}}, "stream_options", "Extra inputs"),
        ({"seed": 1.5}, "seed", "valid integer"),
    ],
)
def test_what_is_wrong_is_said(client, options, param, said):
    body = {"model": "base", "prompt": PROMPT} | options
    with pytest.raises(openai.BadRequestError, match=said) as caught:
        client.post("/completions", cast_to=object, body=body)
    assert caught.value.param == param
    assert caught.value.type == "invalid_request_error"


def test_everything_that_is_wrong_is_said_at_once(client):
    body = {"temperature": 3, "suffix": "x", "prompt": PROMPT, "messages": []}
    with pytest.raises(openai.BadRequestError) as caught:
        client.post("/completions", cast_to=object, body=body)
    for part in ("temperature", "suffix", "model: Field required", "no field 'messages'"):
        assert part in str(caught.value)


def test_harmless_fields_are_taken(client):
    answer = _complete(
        client,
        presence_penalty=0,
        best_of=1,
        echo=False,
        user="ann",
        logit_bias={},
        extra_body={"store": False},
    )
    assert answer.choices[0].text == _complete(client).choices[0].text
    assert _chat(client, tool_choice="none", response_format={"type": "text"}, metadata={"a": "b"})


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([], "at least 1 item"),
        ([{"role": "robot", "content": "x"}], "no role 'robot'"),
        ([{"role": "user"}], r"messages\[0\]\.content: Field required"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}], "'text'"),
    ],
)
def test_wrong_messages(client, messages, said):
    with pytest.raises(openai.BadRequestError, match=said) as caught:
        client.post("/chat/completions", cast_to=object, body={"model": "base", "messages": messages})
    assert caught.value.param == "messages"


def test_too_long_for_the_model(client, served):
    for options in ({"prompt": "dog " * 3000}, {"max_tokens": served.service.engine.max_length}):
        with pytest.raises(openai.BadRequestError, match="tokens fit") as caught:
            _complete(client, **options)
        assert caught.value.code == "context_length_exceeded"
        assert caught.value.param == "prompt"


def test_tokens_that_the_model_does_not_have(client):
    for token, said in ((1 << 30, "holds 1073741824"), (1 << 40, "less than 2147483648")):
        with pytest.raises(openai.BadRequestError, match=said):
            _complete(client, prompt=[token])


def test_there_are_no_embeddings_and_it_says_why(client):
    with pytest.raises(openai.NotFoundError, match=r"no embeddings here.*/v1/chat/completions") as caught:
        client.embeddings.create(model="base", input=PROMPT)
    error = caught.value
    assert (error.code, error.type, error.param) == (
        "embeddings_not_supported",
        "invalid_request_error",
        None,
    )


def test_unknown_models(client):
    for model in ("nobody", "team/ada@9", "team/ada@nothing", "../../etc", "base@1", "a b", "@", "é"):
        with pytest.raises(openai.NotFoundError) as caught:
            _complete(client, model)
        assert (caught.value.param, caught.value.code) == ("model", "model_not_found")
    with pytest.raises(openai.NotFoundError, match="did you mean 'team/ada'"):
        _complete(client, "team/adda")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"[]",
        b'"x"',
        b"[" * 100_000,
        b'{"model": NaN}',
        b"\xff\xfe",
        b'{"model": "\xed\xa0\x80"}',
        b'{"a":' * 50_000,
        b"1" * 5000,
    ],
    ids=[
        "empty",
        "cut",
        "list",
        "text",
        "deep",
        "NaN",
        "no UTF-8",
        "half a character",
        "deep objects",
        "long number",
    ],
)
def test_bodies_that_are_no_json_objects(served, data):
    answer = httpx.post(f"{served.url}/v1/completions", content=data, timeout=30)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["code"] == "invalid_json"
    assert set(error) == {"message", "type", "param", "code"}


def test_half_a_character_is_no_crash(served):
    for prompt in ('"\\ud800"', '"a\\u0000b"'):
        body = f'{{"model": "base", "prompt": {prompt}, "max_tokens": 1}}'
        answer = httpx.post(f"{served.url}/v1/completions", content=body, timeout=30)
        assert answer.status_code == (400 if "ud800" in prompt else 200), answer.text


def test_paths_and_methods_that_do_not_exist(served):
    for method, path, status in (
        ("GET", "/v1/nothing", 404),
        ("GET", "/v1/completions", 405),
        ("GET", "/docs", 404),
    ):
        answer = httpx.request(method, served.url + path)
        assert answer.status_code == status
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_a_long_body_is_refused_before_it_is_read(served, client):
    long = "x" * (10 << 20)
    with pytest.raises(openai.APIStatusError, match="longer than 1,048,576 bytes") as caught:
        _complete(client, prompt=long)
    assert caught.value.status_code == 413

    def pieces():
        for _ in range(1 << 10):
            yield b"x" * (10 << 10)

    answer = httpx.post(f"{served.url}/v1/completions", content=pieces(), timeout=30)
    assert answer.status_code == 413
    assert answer.json()["error"]["code"] == "request_too_large"
    assert _complete(client).choices


def test_health_and_readiness(served):
    assert httpx.get(f"{served.url}/health").json() == {"status": "alive"}
    answer = httpx.get(f"{served.url}/ready")
    assert (answer.status_code, answer.json()["ready"]) == (200, True)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "evil.example"}, 421),
        ({"Host": "evil.example:8000"}, 421),
        ({"Host": "[::1"}, 421),
        ({"Host": "localhost"}, 200),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Host": "localhost:1", "Origin": "http://localhost:1"}, 200),
        ({"Host": "localhost:1", "Origin": "http://localhost:2"}, 403),
    ],
)
def test_pages_of_other_sites_are_kept_out(served, headers, status):
    assert httpx.get(f"{served.url}/v1/models", headers=headers).status_code == status
