"""Times side by side: who runs when, on what, and what is made of the seconds; never how long anything took."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from peft import get_peft_model
from tests import models_for_tests as models

import modicum
from modicum.cli._common import jsonable
from modicum.errors import ConfigError
from modicum.evaluate import conditions
from modicum.evaluate.latency import Spread, _notes, measure, ratio
from modicum.evaluate.memory import Peak, weight_bytes
from modicum.quant.huggingface import AffineConfig, quantize_linears

SHORT = {"prompt": 6, "generate": 3, "repeats": 3, "warm_up": 1}


def watched(**named):
    """The models and a list that every forward pass adds to: who, how many tokens, how many in the cache, options."""
    seen = []

    def watch(name):
        def note(_, __, options):
            cache = options.get("past_key_values")
            held = 0 if cache is None else cache.get_seq_length()
            seen.append((name, tuple(options["input_ids"].shape), held, options))

        return note

    for name, model in named.items():
        model.register_forward_pre_hook(watch(name), with_kwargs=True)
    return named, seen


def test_models_take_turns():
    both, seen = watched(a=models.llama(), b=models.gpt2())
    steps = []
    measure(both, baseline="a", batch=2, advance=lambda: steps.append(1), **SHORT)
    prompts = [name for name, shape, _, _ in seen if shape == (2, 6)]
    # the first round also makes what is made once and looks at the memory
    assert "".join(prompts) == "aaabbb" + "ab" * 3
    assert len(steps) == 8


def test_a_turn_is_a_prompt_and_then_single_tokens_on_its_cache():
    both, seen = watched(a=models.llama(), b=models.gpt2())
    measure(both, baseline="a", **SHORT)
    for name in "ab":
        last = [(shape, held) for who, shape, held, _ in seen if who == name][-4:]
        assert last == [((1, 6), 0), ((1, 1), 6), ((1, 1), 7), ((1, 1), 8)]
    prompts = [options for _, shape, _, options in seen if shape == (1, 6)]
    assert all(options["logits_to_keep"] == 1 and options["use_cache"] for options in prompts)
    assert all(torch.equal(options["input_ids"], prompts[0]["input_ids"]) for options in prompts)


def test_decoding_is_greedy():
    both, seen = watched(a=models.llama(), b=models.llama(seed=1))
    measure(both, baseline="a", **SHORT)
    run = [options["input_ids"] for name, _, _, options in seen if name == "a"][-4:]
    wanted = models.llama().generate(
        input_ids=run[0], attention_mask=torch.ones_like(run[0]), max_new_tokens=3, do_sample=False, eos_token_id=None
    )  # fmt: skip
    assert torch.equal(torch.cat(run, 1), wanted)


def test_the_numbers_are_those_of_the_seconds():
    found = measure({"a": models.llama(), "b": models.gpt2()}, baseline="b", **SHORT)
    a, b = found.models
    for model in (a, b):
        assert len(model.prefill_seconds) == len(model.decode_seconds) == 3
        assert all(second > 0 for second in (*model.prefill_seconds, *model.decode_seconds))
        assert model.prefill == Spread.of(model.prefill_seconds)
        assert model.decode == Spread.of(model.decode_seconds)
    assert (b.prefill_ratio, b.decode_ratio) == (None, None)
    assert a.prefill_ratio == ratio(b.prefill_seconds, a.prefill_seconds)
    assert a.decode_ratio == ratio(b.decode_seconds, a.decode_seconds)
    assert json.loads(json.dumps(jsonable(found), allow_nan=False))["models"][0]["name"] == "a"


def test_spread_and_ratio():
    assert Spread.of([5.0, 1.0, 3.0, 2.0, 4.0]) == Spread(3.0, 2.0, 4.0, 5)
    assert ratio([4.0, 6.0, 5.0], [1.0, 2.0, 3.0]).value == 2.5
    # a load that doubles both sides of a round must not widen the interval: rounds are drawn as pairs
    own = np.exp(np.random.default_rng(0).normal(size=9))
    paired = ratio(list(2 * own), list(own))
    assert paired.low == pytest.approx(2)
    assert paired.high == pytest.approx(2)
    wide = ratio(list(2 * own[::-1]), list(own))
    assert wide.low < 1.9
    assert wide.high > 2.1


def test_conditions_are_recorded():
    found = measure(
        {"a": models.llama(), "b": models.llama(torch.bfloat16)}, baseline="a", threads=2, **SHORT
    )
    where = found.machine
    assert (found.prompt, found.generate, found.batch, found.repeats) == (6, 3, 1, 3)
    assert (where.threads, where.device, where.torch) == (2, "cpu", torch.__version__)
    assert where.processor
    assert where.cores >= 1
    assert [model.dtype for model in found.models] == ["float32", "bfloat16"]
    assert any("number types differ" in note and "b (bfloat16)" in note for note in found.notes)


def test_encoders_are_timed_on_the_prompt_alone():
    both, seen = watched(lm=models.llama(), encoder=models.bert())
    found = measure(both, baseline="lm", **SHORT)
    encoder = found.models[1]
    assert encoder.decode is None
    assert encoder.decode_ratio is None
    assert encoder.decode_seconds == ()
    assert encoder.prefill_ratio is not None
    assert {shape for name, shape, _, _ in seen if name == "encoder"} == {(1, 6)}
    assert any("prefill only: encoder" in note for note in found.notes)
    assert "decode" not in found.sentences[0]


def test_prefill_only_on_request():
    found = measure({"a": models.llama(), "b": models.llama()}, baseline="a", **{**SHORT, "generate": 0})
    assert [model.decode for model in found.models] == [None, None]
    assert not any("cache" in note for note in found.notes)


def test_every_ratio_names_its_baseline():
    adapted = get_peft_model(models.llama(), modicum.LoraXSConfig(r=2))
    three = {"dense": models.llama(), "adapter": adapted, "other": models.gpt2()}
    first, second = measure(three, baseline="dense", **SHORT).sentences
    assert first.startswith(
        "adapter (dense with an adapter that is not merged) against the baseline dense (dense)"
    )
    assert second.startswith("other (dense) against the baseline dense (dense)")
    *_, last = measure(three, baseline="adapter", **SHORT).sentences
    assert "baseline adapter carries an adapter that is not merged" in last
    adapted.merge_adapter()
    sentences = measure(three, baseline="adapter", **SHORT).sentences
    assert not any("not merged" in sentence for sentence in sentences)


def test_weights_are_counted_exactly_and_once():
    model = models.llama()
    plain = sum(4 * p.numel() for p in model.parameters()) + sum(b.nbytes for b in model.buffers())
    assert weight_bytes(model) == plain
    assert weight_bytes(models.llama(tied=True)) == plain - 4 * models.VOCABULARY * 32
    quantize_linears(model, AffineConfig(bits=4, group_size=16))
    layer = model.model.layers[0].mlp.up_proj
    assert layer.codes.nbytes == 48 * 32 // 2
    dense = sum(4 * p.numel() for n, p in models.llama().named_parameters() if "_proj" in n)
    low = sum(b.nbytes for n, b in model.named_buffers() if "_proj" in n)
    assert weight_bytes(model) == plain - dense + low


def test_the_peak_is_that_of_what_lives_at_once():
    weight = torch.zeros(100, 100)
    with torch.no_grad(), Peak(torch.device("cpu")) as peak:
        a = weight.T @ weight[:, :10]  # 4000 bytes; views of a weight are none of its own
        b = a + 1
        del a
        c = b.relu_().view(-1)[:5].clone()
        del b
        c = torch.stack([c, c])
    assert peak.bytes == 8000
    with torch.no_grad(), Peak(torch.device("cpu")) as peak:
        weight.add_(1).view(-1)
    assert peak.bytes == 0


def test_what_lies_beside_the_weights_holds_the_cache():
    def beside(**options):
        pair = {"a": models.llama(), "b": models.llama()}
        return measure(pair, baseline="a", **{**SHORT, "prompt": 1, **options}).models[1].working_bytes

    # keys and values of 2 layers with 2 heads of 8
    token = 2 * 2 * 2 * 8 * 4
    assert beside(generate=40) >= 41 * token
    assert beside(generate=40) - beside(generate=20) >= 20 * token
    assert beside(generate=40, batch=3) >= 3 * 41 * token


def test_everything_wrong_is_told_at_once():
    with pytest.raises(ConfigError) as error:
        measure(
            {"llama": models.llama()}, baseline="lama", prompt=60, generate=5, repeats=2, batch=0, threads=0
        )
    for words in (
        "at least two models",
        "no model is called 'lama' (did you mean 'llama'?)",
        "repeats = 2, must be at least 3",
        "batch = 0",
        "threads = 0",
        "llama takes sequences of up to 64 tokens, not 65 (prompt 60 + generate 5)",
    ):
        assert words in str(error.value)


def test_the_longest_sequence_is_taken_and_encoders_need_no_room_to_decode():
    pair = {"a": models.llama(), "b": models.bert()}
    measure(pair, baseline="a", **{**SHORT, "prompt": 61, "generate": 3})
    with pytest.raises(ConfigError, match="a takes sequences of up to 64 tokens, not 65") as error:
        measure(pair, baseline="a", **{**SHORT, "prompt": 64, "generate": 1})
    assert "b takes" not in str(error.value)


def test_an_encoder_with_a_decoder_is_refused():
    from transformers import T5Config, T5ForConditionalGeneration

    t5 = T5ForConditionalGeneration(
        T5Config(vocab_size=67, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    )
    with pytest.raises(ConfigError, match="t5 has an encoder and a decoder"):
        measure({"a": models.llama(), "t5": t5}, baseline="a", **SHORT)


def test_models_and_threads_are_left_as_they_were():
    a, b = models.llama().train(), models.llama()
    a_before = {name: value.clone() for name, value in a.state_dict().items()}
    measure({"a": a, "b": b}, baseline="a", threads=2, **SHORT)
    assert (a.training, b.training, torch.get_num_threads()) == (True, False, 1)
    assert all(torch.equal(value, a_before[name]) for name, value in a.state_dict().items())

    def fail():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure({"a": a, "b": b}, baseline="a", threads=2, advance=fail, **SHORT)
    assert (a.training, torch.get_num_threads()) == (True, 1)


def test_what_is_measured_can_still_be_trained():
    model = models.llama()
    quantize_linears(model, AffineConfig(bits=4, group_size=16))
    adapted = get_peft_model(model, modicum.LoraXSConfig(r=2))
    measure({"a": adapted, "b": models.llama()}, baseline="b", **SHORT)
    adapted(input_ids=models.tokens(), labels=models.tokens()).loss.backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in adapted.parameters() if p.requires_grad)


def test_a_busy_machine_and_too_many_threads_are_noted():
    found = measure({"a": models.llama(), "b": models.llama()}, baseline="a", **SHORT)
    where = conditions.Machine(**{**vars(found.machine), "cores": 4, "threads": 8, "load_before": 3.0})
    threads, busy = _notes(found.models, "a", where, 3)
    assert "8 threads on 4 cores" in threads
    assert "load 3.0 on 4 cores" in busy
    calm = conditions.Machine(**{**vars(where), "threads": 4, "load_before": 0.1})
    assert _notes(found.models, "a", calm, 3) == ()
