"""vLLM behind our interface: answers equal those of Transformers and PEFT, whatever else is in the batch."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.serve.vllm.adapters_for_tests import offline, prompts, record_of, varied

from modicum import LoraXSConfig
from modicum.store import Store

pytestmark = pytest.mark.slow
TOKENS = 8


def test_64_adapters_and_the_base_in_one_batch(ask, store_of_many):
    store, versions = store_of_many
    asked = [
        {"prompt": prompt, "version": version}
        for prompt, version in zip(prompts(len(versions) + 4), [*versions, *[None] * 4], strict=True)
    ]
    # one prompt under all versions: what is shared by mistake would be seen here
    same = [{**one, "prompt": asked[0]["prompt"]} for one in asked[:40]]
    sampled = {"temperature": 1.0, "seed": 11, "logprobs": 2}
    wrong = [
        {"prompt": [5], "version": "nobody@1"},
        {"prompt": [5], "version": "user-0@9"},
        {"prompt": [], "version": None},
        {"prompt": [5] * 125, "version": None},
        {"prompt": [5, 6], "version": versions[0], "leave_after": 1, "sampling": {"max_tokens": 64}},
        {"prompt": [5, 6], "version": versions[0], "sampling": sampled},
    ]
    # what is asked for by several at once is loaded once, also if all of them want to be rid of what it was before
    with Store(store) as opened:
        opened.put("late", varied(opened.get(versions[0]), 99))
    late = [{"prompt": prompts(1)[0], "version": "late@1", "unload_first": True}] * 4
    # answers long enough that everybody is there before the first one has ended
    long = [{**one, "sampling": {"max_tokens": 6 * TOKENS}} for one in asked]
    found = ask([asked, asked, same, wrong, wrong[-1:], late, long], max_batch_tokens=4096)
    first, second, alike, failed, again, cold, crowd = found["rounds"]
    expected = [offline(store, one["version"], one["prompt"], TOKENS) for one in asked]
    assert [one.get("tokens", one) for one in first["answers"]] == expected
    assert [one["tokens"] for one in second["answers"]] == expected
    assert [one["tokens"] for one in alike["answers"]] == [
        offline(store, one["version"], one["prompt"], TOKENS) for one in same
    ]
    # equal prompts under equal versions are shared: a page has 32 tokens, all prompts more
    assert second["cached"] - first["cached"] >= 32 * len(asked)
    assert len({tuple(answer) for answer in expected}) > 30
    assert {one["finish"] for one in first["answers"]} == {"length"}
    texts = [one.get("error", "") for one in failed["answers"]]
    assert texts[0].startswith("AdapterUnavailableError: nobody@1")
    assert texts[1].startswith("AdapterUnavailableError: user-0@9")
    assert texts[2].startswith("ConfigError")
    assert texts[3].startswith("ConfigError: prompt and answer are 133 tokens")
    assert len(failed["answers"][4]["tokens"]) == 1
    likely = failed["answers"][5]
    assert again["answers"][0]["tokens"] == likely["tokens"]
    for token, logprob, top in zip(likely["tokens"], likely["logprobs"], likely["top"], strict=True):
        assert len(top) == 2
        assert logprob <= top[0][1]
        assert top[1][1] <= top[0][1]
        assert token not in dict(top) or dict(top)[token] == logprob
    assert again["used"].count(0) == len(again["used"])
    assert first["pool"]["misses"] == 64
    assert [one["tokens"] for one in cold["answers"]] == [offline(store, "late@1", prompts(1)[0], TOKENS)] * 4
    assert cold["pool"]["misses"] - again["pool"]["misses"] == 1
    assert [one["tokens"][:TOKENS] for one in crowd["answers"]] == expected
    # all of them in one step
    assert crowd["adapters"] == len(versions) == 64
    assert found["alive"] is False


def test_few_slots_for_many_versions(ask, store_of_many, tmp_path):
    store, versions = store_of_many
    other = varied(record_of(LoraXSConfig(r=8, init_weights=False)), 1)
    damaged = record_of(LoraXSConfig(r=2, init_weights=False))
    with Store(store) as opened:
        opened.put("stranger", _of_another_base(other))
        opened.put("damaged", damaged)
        data = opened.get_bytes("damaged@1")
        opened.put("whole", other)
    _flip(Path(store), data)
    prompt = prompts(1)[0]
    few = [{"prompt": prompt, "version": version} for version in versions[:4]]
    more = [{"prompt": prompt, "version": version} for version in versions[4:8]]
    bad = [{"prompt": prompt, "version": f"{name}@1"} for name in ("stranger", "damaged", "whole")]
    crowd = [{"prompt": prompt, "version": version} for version in versions[:6]]
    found = ask([few, more, few, bad, crowd], slots=4, max_batch=4, max_queue=8)
    expected = {version: offline(store, version, prompt, TOKENS) for version in versions[:8]}
    for asked, answers in zip((few, more, few), found["rounds"][:3], strict=True):
        assert [one.get("tokens", one) for one in answers["answers"]] == [
            expected[one["version"]] for one in asked
        ]
        assert answers["pool"]["used"] <= 4
    assert found["rounds"][2]["pool"]["evictions"] == 8
    stranger, broken, whole = found["rounds"][3]["answers"]
    assert "trained on another base model" in stranger["error"]
    assert broken["error"].startswith("AdapterUnavailableError: damaged@1")
    assert whole["tokens"] == offline(store, "whole@1", prompt, TOKENS)
    # six versions at once for four slots: two wait
    assert [one.get("tokens", one) for one in found["rounds"][4]["answers"]] == [
        expected[one["version"]] for one in crowd
    ]


def _of_another_base(record):
    import dataclasses

    return dataclasses.replace(record, base_fingerprint="0" * 32)


def _flip(store: Path, data: bytes) -> None:
    for file in sorted(store.glob("segments/*.seg")):
        content = bytearray(file.read_bytes())
        place = content.find(data)
        if place >= 0:
            content[place + len(data) // 2] ^= 1
            file.write_bytes(content)
            return
    raise AssertionError("the record is in no segment")
