"""The embedded engine answers every request as if it were alone, whatever else is in the batch."""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import json
import shutil
import threading
from types import SimpleNamespace

import pytest
import torch
from peft import get_peft_model
from tests import small_checkpoints
from tests.cli.adapter_files import tokenizer, trained
from tests.models.test_families import decoder
from tests.serve.engine.offline import (
    SMALL,
    Offline,
    adapter,
    base,
    greedy,
    mixed,
    prompt,
    request,
    sampling,
    serving,
    settled,
    steps,
    tokens,
)

from modicum import LoraXSConfig
from modicum.adapters.elastic import SubNetwork
from modicum.compress.extract import extract
from modicum.compress.quantize import quantize_model
from modicum.compress.quantize_report import QuantizeOptions
from modicum.compress.sparsify import sparsify_model
from modicum.compress.sparsify_report import SparsifyOptions
from modicum.errors import ConfigError
from modicum.methods.elastic_lora import ElasticLoraConfig
from modicum.models.families import widths
from modicum.models.loading import load_base
from modicum.serve.engine.embedded import EmbeddedEngine, open_engine
from modicum.serve.engine.interface import AdapterUnavailableError, Observer, OverloadedError
from modicum.serve.settings import EngineSettings
from modicum.store import Store
from modicum.store.files import install, to_record
from modicum.store.state import config_from, state_from


def test_answers_are_those_of_every_adapter_alone():
    async def main():
        offline = Offline("small")
        asked = [
            request(prompt(i, 3 + 5 * i), version, count=6 + i) for i, version in enumerate([*mixed(), None])
        ]
        async with serving(mixed()) as engine:
            found = await asyncio.gather(*(tokens(engine, one) for one in asked))
            assert engine.stats().pool.used == len(mixed())
            assert engine.stats().steps > 10  # prompts went through in pieces
            await settled(engine)
        for one, answer in zip(asked, found, strict=True):
            alone = offline.greedy(mixed().get(one.version), one.prompt, one.sampling.max_tokens)
            assert answer == alone, one.version
        assert len({tuple(answer[:6]) for answer in found}) == len(found)

    asyncio.run(main())


def test_64_adapters_in_one_batch_of_the_embedded_model():
    versions = {f"u{i}@{i}": adapter(i, name="embedded", r=(4, 8, 16)[i % 3]) for i in range(64)}
    versions |= {f"l{i}@1": adapter(100 + i, name="embedded", kind="lora", r=2 << i) for i in range(3)}
    settings = EngineSettings(
        "embedded", max_batch=80, max_batch_tokens=100, cache_tokens=8192, slots=80, max_rank=16
    )

    async def main():
        async with serving(versions, settings, model=open_engine(settings, None)[0]._model) as engine:
            found = await asyncio.gather(*(tokens(engine, one) for one in asked))
            assert engine.stats().pool.used == 67
        return found

    asked = [
        request(prompt(i, 2 + i % 23, 4000), version, count=6)
        for i, version in enumerate([*versions, None, None])
    ]
    offline = Offline("embedded")
    found = asyncio.run(main())
    for one, answer in zip(asked, found, strict=True):
        assert answer == offline.greedy(versions.get(one.version), one.prompt, 6), one.version


def test_seeded_answers_are_the_same_in_company():
    def drawn(seed):
        return request(prompt(1, 9), "a1@1", count=12, temperature=0.9, top_p=0.8, seed=seed)

    async def main():
        async with serving(mixed()) as engine:
            alone = [await tokens(engine, drawn(seed)) for seed in range(5)]
            others = [request(prompt(i, 4 + i), f"a{i}@1", temperature=1.0) for i in range(6)]
            company = await asyncio.gather(
                *(tokens(engine, drawn(seed)) for seed in range(5)), *(tokens(engine, one) for one in others)
            )
            again = [await tokens(engine, drawn(None)) for _ in range(3)]
        assert company[:5] == alone
        assert len({tuple(one) for one in alone}) > 2
        assert len({tuple(one) for one in again}) > 1

    asyncio.run(main())


def test_log_probabilities_are_the_models_own():
    async def main():
        async with serving() as engine:
            greedily = await steps(engine, request(prompt(0, 5), logprobs=3))
            drawn = await steps(engine, request(prompt(0, 5), logprobs=0, temperature=2.0, seed=1, top_p=0.9))
            plain = await steps(engine, request(prompt(0, 5)))
        return greedily, drawn, plain

    greedily, drawn, plain = asyncio.run(main())
    for found in (greedily, drawn):
        ids = torch.tensor([[*prompt(0, 5), *(step.token for step in found)]])
        with torch.no_grad():
            logs = base("small")(ids).logits[0, 4:-1].log_softmax(-1)
        for row, step in zip(logs, found, strict=True):
            assert step.logprob == pytest.approx(row[step.token].item(), abs=1e-4)
            wanted = row.topk(3)
            for (token, logprob), value, index in zip(step.top, *wanted, strict=False):
                assert (token, logprob) == (int(index), pytest.approx(float(value), abs=1e-4))
    assert [len(step.top) for step in greedily] == [3] * 8
    assert not any(step.top for step in drawn)
    assert all(step.logprob is None for step in plain)


def test_an_end_token_ends_an_answer_and_is_told():
    async def main():
        async with serving() as engine:
            for seed in range(60):
                one = request(prompt(seed, 4), count=40, ignore_eos=False)
                found = await steps(engine, one)
                whole = Offline("small").greedy(None, one.prompt, 40)
                if 2 in whole:
                    end = whole.index(2)
                    assert [step.token for step in found] == whole[: end + 1]
                    assert [step.finish for step in found] == [None] * end + ["stop"]
                    break
                assert found[-1].finish == "length"
            else:
                pytest.fail("no answer ended, so nothing was tested")

    asyncio.run(main())


def test_what_makes_no_sense_is_refused_all_at_once():
    async def main():
        async with serving(mixed()) as engine:
            longest = engine.max_length
            assert longest == 64
            with pytest.raises(ConfigError, match="60 tokens of prompt and 5 of answer are more than the 64"):
                await steps(engine, request(prompt(0, 60), count=5))
            with pytest.raises(ConfigError, match=r"empty.*max_tokens is 0.*temperature is -1.*top_p is 2"):
                await steps(engine, request((), count=0, temperature=-1.0, top_p=2.0))
            with pytest.raises(ConfigError, match="holds 67, tokens are 0 … 66"):
                await steps(engine, request((1, 67)))
            assert len(await steps(engine, request(prompt(0, 60), count=4))) == 4
            with pytest.raises(AdapterUnavailableError, match="none@3"):
                await steps(engine, request((5,), "none@3"))
            await settled(engine)

    asyncio.run(main())
    for wrong in ({"max_length": 65}, {"cache_tokens": 8}, {"max_batch": 0}, {"max_length": 1}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            EmbeddedEngine(base("small"), dataclasses.replace(SMALL, **wrong))
    with pytest.raises(ConfigError, match="float32"):
        open_engine(EngineSettings("embedded", dtype="float3"), None)


def test_a_cache_that_does_not_fit_is_refused_and_leaves_the_model_alone():
    model = copy.deepcopy(base("small"))
    before = model.config._attn_implementation
    engine = EmbeddedEngine(model, dataclasses.replace(SMALL, cache_tokens=10**13))
    with pytest.raises(
        ConfigError, match="10,000,000,000,000 tokens do not fit into memory; start with fewer"
    ):
        engine.start()
    assert (model.config._attn_implementation, engine.alive) == (before, False)


def test_without_a_store_only_the_base_model_answers():
    async def main():
        async with serving() as engine:
            with pytest.raises(AdapterUnavailableError, match="only the base model"):
                await steps(engine, request((5,), "a@1"))
            with pytest.raises(AdapterUnavailableError, match="only the base model"):
                await engine.load("a@1")
            assert (engine.residents(), await engine.unload("a@1")) == ([], False)

    asyncio.run(main())


def test_more_than_the_queue_holds_is_refused_with_a_time():
    async def main():
        async with serving(max_batch=2, max_queue=3) as engine:
            asked = [asyncio.create_task(tokens(engine, request((9, i), count=30))) for i in range(1, 9)]
            done = await asyncio.gather(*asked, return_exceptions=True)
            refused = [one for one in done if isinstance(one, OverloadedError)]
            assert len(refused) == 3
            assert all(1 <= one.retry_after <= 60 for one in refused)
            assert sum(isinstance(one, list) and len(one) == 30 for one in done) == 5

    asyncio.run(main())


def test_a_thousand_at_once():
    async def main():
        async with serving(mixed(), max_batch=64, max_batch_tokens=128) as engine:
            asked = [request((9 + i % 50, 8), [*mixed(), None][i % 9], count=3) for i in range(1000)]
            found = await asyncio.gather(*(tokens(engine, one) for one in asked))
            await settled(engine)
        return asked, found

    asked, found = asyncio.run(main())
    offline, alone = Offline("small"), {}
    for one, answer in zip(asked, found, strict=True):
        key = one.version, one.prompt
        if key not in alone and len(alone) < 60:
            alone[key] = offline.greedy(mixed().get(one.version), one.prompt, 3)
        assert answer == alone.get(key, answer)


def test_fewer_slots_than_versions_in_the_queue():
    async def main():
        offline = Offline("small")
        async with serving(mixed(), slots=2) as engine:
            asked = [request((9, i + 8), version, count=5) for i, version in enumerate([*mixed()] * 3)]
            found = await asyncio.gather(*(tokens(engine, one) for one in asked))
            for one, answer in zip(asked, found, strict=True):
                assert answer == offline.greedy(mixed()[one.version], one.prompt, 5)
            await engine.load("a0@1", pin=True)
            await engine.load("a1@1", pin=True)
            with pytest.raises(OverloadedError, match="2 places"):
                await tokens(engine, request((9,), "a2@1"))
            await engine.unpin("a1@1")
            assert await tokens(engine, request((9,), "a2@1", count=3)) == offline.greedy(
                mixed()["a2@1"], (9,), 3
            )
            assert [one.version for one in engine.residents()] == ["a2@1", "a0@1"]

    asyncio.run(main())


def test_versions_of_waiting_requests_are_in_memory_before_their_turn():
    """As many as half of the slots run or wait with their versions held; the others' may stay for who asks again."""
    go_on = threading.Event()

    class Halted(Observer):
        def step(self, sequences, tokens, seconds):
            assert go_on.wait(30)

    async def main():
        async with serving(mixed(), observer=Halted(), max_batch=1, slots=8) as engine:
            await engine.load("lora@1")
            asked = [request(prompt(i, 5), f"a{i}@1", count=4) for i in range(6)]
            answers = [asyncio.create_task(tokens(engine, one)) for one in asked]
            held = {f"a{i}@1" for i in range(4)}
            for _ in range(3000):
                if {one.version for one in engine.residents() if one.requests} == held:
                    break
                await asyncio.sleep(0.005)
            # the first step has not ended: one request runs, one is next, and two more were fetched for
            assert {one.version: one.requests for one in engine.residents()} == {
                **dict.fromkeys(held, 1),
                "lora@1": 0,
            }
            # what waits may leave, and makes room for the next
            answers.pop(2).cancel()
            for _ in range(3000):
                if {one.version for one in engine.residents() if one.requests} == held - {"a2@1"} | {"a4@1"}:
                    break
                await asyncio.sleep(0.005)
            assert {one.version for one in engine.residents() if one.requests} == held - {"a2@1"} | {"a4@1"}
            go_on.set()
            found = await asyncio.gather(*answers)
            assert engine.stats().pool.evictions == 0
            await settled(engine)
        del asked[2]
        for one, answer in zip(asked, found, strict=True):
            assert answer == Offline("small").greedy(mixed()[one.version], one.prompt, 4)

    asyncio.run(main())


def test_a_slot_that_is_in_use_is_waited_for_whoever_uses_it():
    """Of those who hold leases, some are no sequences any more, and some not yet."""

    async def main():
        async with serving(mixed(), slots=1) as engine:
            acquire, refused = engine._slots.acquire, asyncio.Event()
            lease, loop = acquire("a0@1"), asyncio.get_running_loop()

            def watched(version):
                try:
                    return acquire(version)
                except OverloadedError:
                    loop.call_soon_threadsafe(refused.set)
                    raise

            engine._slots.acquire = watched
            waiting = asyncio.create_task(tokens(engine, request((9, 10), "a1@1", count=3)))
            await asyncio.wait([waiting, asyncio.create_task(refused.wait())], return_when="FIRST_COMPLETED")
            engine._slots.release(lease)
            assert await waiting == Offline("small").greedy(mixed()["a1@1"], (9, 10), 3)
            assert refused.is_set()

    asyncio.run(main())


def test_a_tiny_cache_makes_requests_wait_and_begin_again_but_not_differ():
    async def main():
        offline = Offline("small")
        async with serving(mixed(), cache_tokens=80, max_batch=8, max_batch_tokens=16) as engine:
            asked = [request(prompt(i, 18), f"a{i % 6}@1", count=30) for i in range(8)]
            asked += [request(prompt(9, 18), f"a{i}@1", count=30, temperature=1.0, seed=3) for i in range(2)]
            found = await asyncio.gather(*(tokens(engine, one) for one in asked))
            again = [await tokens(engine, one) for one in asked[8:]]
            assert engine.stats().generated_tokens == 12 * 30
            await settled(engine)
        for one, answer in zip(asked[:8], found, strict=False):
            assert answer == offline.greedy(mixed()[one.version], one.prompt, 30)
        assert found[8:] == again

    asyncio.run(main())


def test_running_requests_keep_their_version_when_it_is_unloaded():
    async def main():
        offline = Offline("small")
        versions = dict(mixed())
        async with serving(versions) as engine:
            running = engine.generate(request((9, 10), "a0@1", count=40))
            found = [(await anext(running)).token]
            assert await engine.unload("a0@1")
            assert not await engine.unload("a0@1")
            # the same name with other numbers, as after a damaged restore; nothing of it may reach what runs
            versions["a0@1"] = mixed()["a5@1"]
            other = await tokens(engine, request((9, 10), "a0@1", count=40, salt="after"))
            found += [step.token async for step in running]
            assert found == offline.greedy(mixed()["a0@1"], (9, 10), 40)
            assert other == offline.greedy(mixed()["a5@1"], (9, 10), 40)

    asyncio.run(main())


def test_a_quantized_base_model_serves_adapters():
    from modicum import AffineConfig
    from modicum.quant.huggingface import AffineQuantizer, quantize_linears

    def quantized():
        model = copy.deepcopy(base("small"))
        config = AffineConfig(bits=4, group_size=16, modules_to_not_convert=["lm_head"])
        quantize_linears(model, config)
        model.hf_quantizer = AffineQuantizer(config)
        return model

    async def main():
        async with serving(records, model=quantized()) as engine:
            asked = [request(prompt(i, 4 + 9 * i), version) for i, version in enumerate([*records, None])]
            return asked, await asyncio.gather(*(tokens(engine, one) for one in asked))

    records = {}
    for seed in range(3):
        torch.manual_seed(seed)
        model = get_peft_model(quantized(), LoraXSConfig(r=4, alpha=8, init_weights=False))
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.3)
        records[f"q{seed}@1"] = to_record(model, dtype="float32")[0]
    asked, found = asyncio.run(main())
    for one, answer in zip(asked, found, strict=True):
        record = records.get(one.version)
        model = quantized()
        if record is not None:
            model = install(model, config_from(record), state_from(record))
        assert answer == greedy(model, one.prompt, 8)


def sparse(folder):
    options = SparsifyOptions(algorithm="magnitude", evaluate=False)
    sparsify_model(str(small_checkpoints.llama()), folder, options)


def quantized(folder):
    options = QuantizeOptions(bits=4, group_size=16, algorithm="rtn", evaluate=False)
    quantize_model(str(small_checkpoints.llama()), folder, options)


def extracted(kind, **units):
    """A function that writes a sub-network of a model of that kind with so many units of `mlp` and `heads` by layer."""

    def write(folder):
        # GPT-2 has no groups of heads, and the small one's configuration speaks of two
        model = decoder(kind, **({"num_key_value_heads": 4} if kind == "gpt2" else {}))
        left = {w.name: units[w.kind][w.block] for w in widths(model) if w.kind in units}
        whole = trained(model, ElasticLoraConfig(r=4, alpha=6.0), 0.1)
        extract(whole, folder, tokenizer=tokenizer(), sub_network=SubNetwork(widths=left), texts=["w1 w5 w9"])

    return write


@pytest.mark.parametrize(
    "write",
    [
        sparse,
        quantized,
        extracted("llama", mlp=(16, 40)),
        extracted("llama", heads=(1, 2)),
        extracted("qwen3", heads=(1, 1), mlp=(24, 24)),
        extracted("gpt2", heads=(3, 2)),
        # windows and soft caps, which torch computes
        extracted("gemma2", heads=(2, 1)),
    ],
    ids=["sparse", "4 bits", "channels", "heads", "stock", "gpt2", "gemma2"],
)
def test_a_folder_that_modicum_made_smaller_is_served(write, tmp_path):
    write(tmp_path / "model")
    settings = EngineSettings(
        str(tmp_path / "model"), dtype="float32", max_batch=8, max_batch_tokens=24, cache_tokens=1024, slots=4,
        max_rank=16,
    )  # fmt: skip
    alone = {None: load_base(settings.model, dtype="float32")}
    with Store(tmp_path / "store", create=True) as store:
        for name, size in (("ada", 0.3), ("bob", 0.9)):
            model = trained(load_base(settings.model, dtype="float32"), LoraXSConfig(r=4, alpha=8.0), size)
            alone[str(store.put(name, to_record(model, dtype="float32")[0]))] = model
        asked = [request(prompt(i, 4 + 13 * i), version, logprobs=0) for i in range(3) for version in alone]

        async def main():
            engine, _ = open_engine(settings, store)
            engine.start()
            try:
                return await asyncio.gather(*(steps(engine, one) for one in asked))
            finally:
                await engine.close()

        found = asyncio.run(main())
    assert len({tuple(step.token for step in answer) for answer in found}) >= len(alone)
    for one, answer in zip(asked, found, strict=True):
        model, chosen = alone[one.version], [step.token for step in answer]
        assert chosen == greedy(model, one.prompt, 8), one.version
        # small models like to say the same again and again
        with torch.no_grad():
            logs = (
                model(torch.tensor([[*one.prompt, *chosen]]))
                .logits[0, len(one.prompt) - 1 : -1]
                .log_softmax(-1)
            )
        wanted = logs[torch.arange(8), chosen]
        torch.testing.assert_close(torch.tensor([step.logprob for step in answer]), wanted, atol=1e-3, rtol=0)


def test_code_in_a_model_folder_is_not_run(tmp_path):
    """Where the model is of a kind that Transformers knows, without it; otherwise not at all."""
    ran = tmp_path / "ran"
    code = f"open({str(ran)!r}, 'a').close()\nfrom transformers import *\n"
    classes = {
        "AutoConfig": "modeling_x.LlamaConfig",
        "AutoModelForCausalLM": "modeling_x.LlamaForCausalLM",
        "AutoTokenizer": ["modeling_x.LlamaTokenizer", "modeling_x.LlamaTokenizer"],
    }
    for kind in ("llama", "nobodys"):
        folder = tmp_path / kind
        shutil.copytree(small_checkpoints.llama(), folder)
        (folder / "modeling_x.py").write_text(code)
        for name in ("config.json", "tokenizer_config.json"):
            file = folder / name
            file.write_text(json.dumps({**json.loads(file.read_text()), "auto_map": classes}))
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"model_type": kind}))
    settings = EngineSettings(str(tmp_path / "llama"), dtype="float32", cache_tokens=1024)

    async def main():
        engine, _ = open_engine(settings, None)
        engine.start()
        try:
            return await tokens(engine, request((9, 10)))
        finally:
            await engine.close()

    assert asyncio.run(main()) == greedy(
        load_base(str(small_checkpoints.llama()), dtype="float32"), (9, 10), 8
    )
    with pytest.raises(ConfigError, match=r"nobodys"):
        open_engine(dataclasses.replace(settings, model=str(tmp_path / "nobodys")), None)
    assert not ran.exists()


def test_what_it_did_is_counted_and_observed():
    class Noted(Observer):
        def __init__(self):
            self.steps, self.loads = [], []

        def step(self, sequences, tokens, seconds):
            self.steps.append((sequences, tokens))
            assert seconds > 0

        def load(self, seconds, *, failed):
            self.loads.append(failed)

    async def main():
        noted = Noted()
        async with serving(mixed(), observer=noted, max_batch_tokens=10) as engine:
            await tokens(engine, request(prompt(0, 25), "a0@1", count=4))
            with pytest.raises(AdapterUnavailableError):
                await tokens(engine, request((5,), "none@1"))
            found = engine.stats()
        assert noted.steps == [(1, 10), (1, 10), (1, 5), (1, 1), (1, 1), (1, 1)]
        assert noted.loads == [False, True]
        assert (found.steps, found.prompt_tokens, found.generated_tokens, found.last_batch) == (6, 25, 4, 1)
        assert (found.pool.used, found.pool.misses, found.pool.failures) == (1, 2, 1)

    asyncio.run(main())


def test_the_model_is_as_it_was_after_an_engine():
    model = open_engine(EngineSettings("embedded"), None)[0]._model
    before = [type(module) for module in model.modules()], model.config._attn_implementation
    records = {"a@1": adapter(0, name="embedded")}

    async def main():
        async with serving(records, EngineSettings("embedded"), model=model) as engine:
            await tokens(engine, request((9, 10), "a@1"))

    asyncio.run(main())
    assert ([type(module) for module in model.modules()], model.config._attn_implementation) == before
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
    assert sampling().max_tokens == 8


@pytest.mark.parametrize(("location", "threads"), [("adapters", 1), ("postgresql://here/adapters", 8)])
def test_a_database_is_asked_by_several_threads_and_a_folder_by_one(location, threads):
    store = SimpleNamespace(location=location, get=None)
    engine, _ = open_engine(EngineSettings("embedded"), store)
    assert engine._loaders._max_workers == threads
