"""Attention by request gives what Transformers' own attention gives, of every kind of model."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from tests import models_for_tests as models
from tests.serve.engine.offline import base, greedy, prompt, request, serving, settled, tokens
from torch.nn import functional as F
from transformers import Gemma2Config, Gemma2ForCausalLM, MistralConfig, MistralForCausalLM

from modicum.serve.engine.attention import NAME, Rule, dense
from modicum.serve.engine.native import paged

needs_library = pytest.mark.skipif(not paged.available(), reason="no compiler")


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "groups", "size"), [(4, 4, 8), (8, 2, 64), (3, 1, 80), (6, 6, 128)])
def test_the_library_gives_what_torch_gives(dtype, heads, groups, size):
    generator = torch.Generator().manual_seed(size)
    count, tokens_held = 9, 400
    keys, values = (torch.randn(tokens_held, groups, size, generator=generator).to(dtype) for _ in range(2))
    # as projections leave them: by token first, and a part of something wider
    query = torch.randn(count, heads, size + 8, generator=generator).to(dtype)[..., :size].transpose(0, 1)
    lengths = [1, 2, 7, 8, 9, 16, 33, 100, 151]
    starts = np.cumsum([0, *lengths])
    rows = torch.randint(0, tokens_held, (int(starts[-1]),), generator=generator)
    queries = np.array([(i, starts[i], lengths[i]) for i in range(count)], np.int64)
    out = torch.full((count, heads, size), torch.nan, dtype=dtype)
    paged.attend(query, keys, values, out, rows.numpy(), queries, 0.3)
    for token, start, length in queries:
        seen = rows[start : start + length]
        k, v = (
            part[seen].float().transpose(0, 1).repeat_interleave(heads // groups, 0)
            for part in (keys, values)
        )
        wanted = F.scaled_dot_product_attention(query[:, token, None].float(), k, v, scale=0.3)[:, 0]
        torch.testing.assert_close(
            out[token].float(), wanted, atol=2e-6 if dtype == torch.float32 else 0.02, rtol=0.01
        )


@needs_library
def test_scores_of_any_size_and_threads():
    torch.set_num_threads(3)
    count, length, size = 40, 600, 16
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(length, 2, size, generator=generator) * 100
    values, query = torch.randn(length, 2, size, generator=generator), torch.randn(2, count, size)
    out = torch.empty(count, 2, size)
    queries = np.array([(i, 0, length - i) for i in range(count)], np.int64)
    paged.attend(query, keys, values, out, np.arange(length), queries, 1.0)
    for i in range(count):
        k, v = (part[: length - i].transpose(0, 1) for part in (keys, values))
        wanted = F.scaled_dot_product_attention(query[:, i, None], k, v, scale=1.0)[:, 0]
        torch.testing.assert_close(out[i], wanted, atol=1e-4, rtol=1e-4)


@needs_library
@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 8), (torch.bfloat16, 8), (torch.bfloat16, 64)])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_broken_numbers_reach_their_own_request_and_no_other(bad, dtype, size):
    keys, values = (torch.ones(20, 1, size, dtype=dtype) for _ in range(2))
    query = torch.ones(1, 2, size, dtype=dtype)
    keys[13, 0, 3] = bad
    values[14] = bad
    out = torch.empty(2, 1, size, dtype=dtype)
    paged.attend(query, keys, values, out, np.arange(20), np.array([(0, 0, 10), (1, 10, 10)], np.int64), 1.0)
    torch.testing.assert_close(out[0], torch.ones(1, size, dtype=dtype))
    assert not out[1].isfinite().any()


@pytest.mark.parametrize(("n", "m"), [(1, 9), (5, 5), (3, 9), (9, 9)])
@pytest.mark.parametrize(
    "rule",
    [
        Rule(0.4),
        Rule(0.4, window=4),
        Rule(0.4, softcap=2.0),
        Rule(0.4, sinks=torch.tensor([0.1, -1.0, 2.0, 0.0])),
    ],
)
def test_dense_attention_is_its_formula(n, m, rule):
    generator = torch.Generator().manual_seed(n + m)
    query = torch.randn(4, n, 6, generator=generator)
    key, value = (torch.randn(2, m, 6, generator=generator) for _ in range(2))
    found = dense(query, key, value, rule)
    for head in range(4):
        for i in range(n):
            last = m - n + i
            seen = [j for j in range(last + 1) if rule.window is None or last - j < rule.window]
            scores = key[head // 2, seen] @ query[head, i] * rule.scale
            if rule.softcap:
                scores = rule.softcap * torch.tanh(scores / rule.softcap)
            weights = scores.exp()
            whole = weights.sum() + (0 if rule.sinks is None else rule.sinks[head].exp())
            wanted = (weights / whole) @ value[head // 2, seen]
            torch.testing.assert_close(found[i, head], wanted, atol=1e-5, rtol=1e-5)


def _mistral(seed: int = 0):
    torch.manual_seed(seed)
    config = MistralConfig(
        vocab_size=models.VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128, sliding_window=12,
        initializer_range=0.3, attn_implementation="sdpa",
    )  # fmt: skip
    return MistralForCausalLM(config).eval()


def _gemma2():
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=models.VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=4, head_dim=8,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128, sliding_window=12,
        initializer_range=0.3, attn_logit_softcapping=5.0, query_pre_attn_scalar=8,
        layer_types=["sliding_attention", "full_attention"] * 2,
    )  # fmt: skip
    return Gemma2ForCausalLM(config).eval()


MODELS = {"llama": models.llama, "gpt2": models.gpt2, "mistral": _mistral, "gemma2": _gemma2}


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_answers_of_all_kinds_of_models_are_those_of_generate(name, native, monkeypatch):
    if not native:
        monkeypatch.setattr(paged, "available", lambda: False)

    async def main():
        # pieces of prompts, fresh prompts and single tokens meet in one step
        async with serving(model=MODELS[name](), max_batch_tokens=20) as engine:
            asked = [request(prompt(i, 1 + 5 * i), count=9 + i) for i in range(8)]
            found = await asyncio.gather(*(tokens(engine, one) for one in asked))
            await settled(engine)
        return asked, found

    asked, found = asyncio.run(main())
    for one, answer in zip(asked, found, strict=True):
        assert answer == greedy(MODELS[name](), one.prompt, one.sampling.max_tokens)


@needs_library
def test_the_library_is_what_answers(monkeypatch):
    calls = []
    real = paged.attend
    monkeypatch.setattr(paged, "attend", lambda *given: calls.append(len(given[5])) or real(*given))

    async def main():
        async with serving() as engine:
            assert engine._model.config._attn_implementation == NAME
            return await tokens(engine, request((9, 10, 11), count=5))

    assert asyncio.run(main()) == greedy(base("small"), (9, 10, 11), 5)
    # two layers; a prompt of three tokens, then one token at a time
    assert calls == [3, 3, *[1, 1] * 4]


def test_bfloat16_answers_as_generate_does():
    async def main():
        async with serving(model=models.llama(torch.bfloat16)) as engine:
            asked = [request(prompt(i, 5 + i), count=6) for i in range(6)]
            return asked, await asyncio.gather(*(tokens(engine, one) for one in asked))

    asked, found = asyncio.run(main())
    model = models.llama(torch.bfloat16)
    alike = 0
    for one, answer in zip(asked, found, strict=True):
        # a rounding may decide between near ties: the token must be among the likeliest two
        ids = torch.tensor([[*one.prompt, *answer]])
        with torch.no_grad():
            best = model(ids).logits[0, len(one.prompt) - 1 : -1].float().topk(2)
        for token, pair, values in zip(answer, best.indices.tolist(), best.values.tolist(), strict=True):
            assert token == pair[0] or (token == pair[1] and values[0] - values[1] < 0.1 * abs(values[0]))
            alike += token == pair[0]
    assert alike >= 30


def test_there_is_no_library_where_it_is_switched_off():
    code = "from modicum.serve.engine.native import paged; print(paged.available())"
    environment = {**os.environ, "MODICUM_NATIVE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"
