"""Adapters that share batches answer as they do alone, and what one leaves in the base does not reach the next."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from tests import models_for_tests
from tests.small_checkpoints import bert, llama, signs, write_jsonl

import modicum
from modicum.adapters import registry
from modicum.errors import ConfigError
from modicum.evaluate import mixing, run_suite
from modicum.evaluate.llm_adapters import Task
from modicum.evaluate.protocols import Subject, check
from modicum.evaluate.records import Header, Records, digest_of
from modicum.evaluate.suites import load_suite
from modicum.models.loading import load_base, load_tokenizer
from modicum.store.files import save_adapter

TARGETS = ["q_proj", "down_proj"]
TEXT = "it was the best of times, it was the worst of times? " * 4
GENERATED = {
    "data": "q", "template": "Q: {question}", "reference": "answer", "extract": "choice", "answers": ["a", "e"],
    "num_beams": 3, "max_new_tokens": 6,
}  # fmt: skip
WINDOWS = {"data": "text", "window": 64, "stride": 40}


@pytest.fixture
def folder(tmp_path):
    rows = [
        {"id": f"q-{n}", "question": f"{n}+{'12' * (n % 3)}", "answer": "ae"[n % 2], "label": n % 2,
         "choices": ["a", f"the {'e' * (n % 3)}"]} for n in range(5)
    ]  # fmt: skip
    write_jsonl(tmp_path / "q.jsonl", rows)
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    return tmp_path


def suite_of(folder, protocol, **tasks):
    path = folder / f"{protocol}.yaml"
    path.write_text(yaml.safe_dump({"suite": "own", "protocol": protocol, "tasks": tasks}), encoding="utf-8")
    return load_suite(str(path))


def stirred(model, seed, size=0.5):
    """`model` with random numbers in everything that is trained."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * size)
    return model


def saved(path, config, seed, base=None):
    """The folder of an adapter with random numbers."""
    stirred(get_peft_model(base or load_base(str(llama())), config), seed).save_pretrained(path)
    return str(path)


def recorded(task, subject, adapters):
    """The items of `task` for each of so many adapters of a subject, by id."""
    task.bind(subject)
    header = Header("p", "1", "s", "t", "", "m", None, "", digest_of(task.ids))
    done = [Records(header) for _ in range(adapters)]
    for items in task.run(subject, done, batch_size=4):
        for place, item in items:
            done[place].append([item])
    assert all(records.complete for records in done)
    return [{one.item: one for one in records.items} for records in done]


def alike(shared, alone):
    """Whether two sets of items are the same, losses up to rounding."""
    assert shared.keys() == alone.keys()
    for name, one in shared.items():
        other = alone[name]
        if one.loss is not None:
            assert one.loss == pytest.approx(other.loss, rel=1e-5, abs=1e-5)
        assert replace(one, loss=None) == replace(other, loss=None)


def items_in(folder, task):
    return {one.item: one for one in Records.read(folder / f"{task}.parquet").items}


@pytest.mark.parametrize("method", registry.names())
def test_every_method_answers_in_shared_batches_as_alone(method, folder):
    config = registry.config_class(method)(
        r=4, target_modules=TARGETS, **models_for_tests.SMALL.get(method, {})
    )
    model = get_peft_model(
        models_for_tests.base_for(method, load_base(str(llama()))), config, adapter_name="a0"
    )
    names = ("a0", "a1", "a2")
    for name in names[1:]:
        model.add_adapter(name, config)
    for seed, name in enumerate(names):
        model.set_adapter(name)
        stirred(model, seed, 0.3)
    model.eval()
    tokenizer = load_tokenizer(str(llama()))
    (beams,) = check(suite_of(folder, "llm-adapters", t=GENERATED), folder).tasks
    (windows,) = check(suite_of(folder, "perplexity", t=WINDOWS), folder).tasks
    for task in (beams, windows):
        together = recorded(task, Subject(model, tokenizer, "m", "", names), 3)
        answers = []
        for name, shared in zip(names, together, strict=True):
            model.set_adapter(name)
            (alone,) = recorded(task, Subject(model, tokenizer, "m", ""), 1)
            alike(shared, alone)
            answers.append([(alone[item].prediction, alone[item].loss) for item in sorted(alone)])
        assert answers[0] != answers[1] != answers[2]


@pytest.fixture
def adapters(folder):
    """Two LoRA-XS, one of them a compact record, two LoRAs and a DoRA."""
    xs = modicum.LoraXSConfig(r=4, target_modules=TARGETS)
    lora = LoraConfig(r=2, target_modules=TARGETS)
    dora = LoraConfig(r=2, target_modules=TARGETS, use_dora=True)
    made = {"xs": xs, "lora": lora, "dora": dora, "lora-too": LoraConfig(r=3, target_modules=["v_proj"])}
    paths = [saved(folder / name, config, seed) for seed, (name, config) in enumerate(made.items())]
    model = stirred(get_peft_model(load_base(str(llama())), xs), 9)
    return [*paths, str(save_adapter(model, folder / "xs-too", dtype="float32").path)]


@pytest.mark.parametrize(
    ("protocol", "name", "task"),
    [
        ("llm-adapters", "t", GENERATED),
        ("perplexity", "t", WINDOWS),
        ("lm-eval", "piqa", {"data": "q"}),
    ],
)
def test_files_of_many_kinds_answer_together_as_alone(folder, adapters, protocol, name, task):
    suite = suite_of(folder, protocol, **{name: task})

    def go(output, chosen, **options):
        return run_suite.run_suite(
            suite,
            str(llama()),
            data_dir=folder,
            output=output,
            adapters=chosen,
            limit=3,
            batch_size=4,
            **options,
        )

    together = go(folder / "together", adapters)
    assert [result.adapter.rpartition("@")[0] for result in together] == adapters
    for adapter, result in zip(adapters, together, strict=True):
        label = adapter.rpartition("/")[2]
        (alone,) = go(folder / f"alone-{label}", [adapter])
        alike(items_in(folder / "together" / label, name), items_in(folder / f"alone-{label}", name))
        assert list(result.tasks[name].metrics) == list(alone.tasks[name].metrics)
        for metric, measure in result.tasks[name].metrics.items():
            assert measure.value == pytest.approx(alone.tasks[name].metrics[metric].value, rel=1e-5)
        assert result.tasks[name].details.keys() == alone.tasks[name].details.keys()


def test_answers_that_the_library_generates_are_those_of_each_adapter(folder, adapters):
    base = load_base(str(llama()))
    base.config.max_position_embeddings = 300
    base.save_pretrained(folder / "long")
    load_tokenizer(str(llama())).save_pretrained(folder / "long")
    write_jsonl(
        folder / "g.jsonl", [{"id": f"q-{n}", "question": f"{n}?", "answer": f"#### {n}"} for n in range(2)]
    )
    suite = suite_of(folder, "lm-eval", gsm8k={"data": "g", "num_fewshot": 0})
    options = {"data_dir": folder}
    chosen = [adapters[0], adapters[4]]
    run_suite.run_suite(suite, str(folder / "long"), output=folder / "both", adapters=chosen, **options)
    texts = []
    for adapter in chosen:
        label = adapter.rpartition("/")[2]
        run_suite.run_suite(
            suite, str(folder / "long"), output=folder / f"alone-{label}", adapters=[adapter], **options
        )
        alone = items_in(folder / f"alone-{label}", "gsm8k")
        alike(items_in(folder / "both" / label, "gsm8k"), alone)
        texts.append([alone[f"q-{n}"].prediction for n in range(2)])
    assert texts[0] != texts[1]
    with pytest.raises(ConfigError, match=r"gsm8k: up to 256 new tokens, but .* has 128 positions"):
        run_suite.run_suite(suite, str(llama()), output=folder / "none", **options)


def test_single_token_answers_share_a_row_with_the_library_and_with_us(folder, adapters):
    rows = [
        {"id": f"m-{n}", "subject": "virology", "question": f"{n}? " * (n * 12 + 1),
         "choices": list("abcd"), "label": n % 4} for n in range(4)
    ]  # fmt: skip
    write_jsonl(folder / "m.jsonl", rows)  # the longest question runs past the model's positions
    suite = suite_of(folder, "lm-eval", mmlu={"data": "m", "num_fewshot": 0})
    options = {"data_dir": folder, "batch_size": 3}
    chosen = [adapters[1], adapters[3]]
    run_suite.run_suite(suite, str(llama()), output=folder / "together", adapters=chosen, **options)
    losses = []
    for adapter in chosen:
        label = adapter.rpartition("/")[2]
        run_suite.run_suite(
            suite, str(llama()), output=folder / f"alone-{label}", adapters=[adapter], **options
        )
        alone = items_in(folder / f"alone-{label}", "mmlu")
        alike(items_in(folder / "together" / label, "mmlu"), alone)
        losses.append([alone[f"m-{n}"].loss for n in range(4)])
    assert not np.allclose(*losses)


def test_who_shares_batches(folder):
    xs, lora = modicum.LoraXSConfig(r=4, target_modules=TARGETS), {"r": 2, "target_modules": TARGETS}
    configs = {
        "xs-1": xs,
        "lora-1": LoraConfig(**lora),
        "dora": LoraConfig(**lora, use_dora=True),
        "xs-2": xs,
        "lora-2": LoraConfig(**{**lora, "r": 3}, use_rslora=True),
        "head-1": LoraConfig(**lora, modules_to_save=["lm_head"]),
        "xs-3": xs,
        "head-2": LoraConfig(**lora, modules_to_save=["lm_head"]),
        "biases": LoraConfig(**lora, bias="all"),
        "started-elsewhere": LoraConfig(**lora, init_lora_weights="olora"),
    }
    paths = [saved(folder / name, config, 0) for name, config in configs.items()]
    base = load_base(str(llama()))
    assert mixing.groups(paths, base, 16) == [[0, 3, 6], [1, 4], [2], [5, 7], [8], [9]]
    assert mixing.groups(paths[:7], base, 2) == [[0, 3], [1, 4], [2], [5], [6]]
    base.is_quantized = True
    assert mixing.groups(paths[:5], base, 16) == [[0, 3], [1], [2], [4]]


def test_sub_networks_and_heads_of_several_layers_are_alone(folder):
    from transformers import RobertaConfig, RobertaForSequenceClassification

    narrow = modicum.LoraXSConfig(r=4, target_modules=TARGETS, sub_network={"ranks": {}})
    paths = [saved(folder / name, narrow, 0) for name in ("a", "b")]
    assert mixing.groups(paths, load_base(str(llama())), 16) == [[0], [1]]
    with torch.device("meta"):
        roberta = RobertaForSequenceClassification(
            RobertaConfig(
                vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
            )
        )
    heads = LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")
    paths = [saved(folder / name, heads, 0, classifier()) for name in ("c", "d")]
    assert mixing.groups(paths, roberta, 16) == [[0], [1]]
    assert mixing.groups(paths, classifier(), 16) == [[0, 1]]


def classifier(folder=None):
    """A BERT classifier whose head counts as trained; saved with its tokenizer into `folder`."""
    torch.manual_seed(4)
    model = load_base(str(bert()), "seq_cls", num_labels=2)
    if folder is not None:
        model.save_pretrained(folder)
        load_tokenizer(str(bert())).save_pretrained(folder)
    return model


@pytest.mark.parametrize("first", [{"modules_to_save": ["classifier"]}, {"bias": "all"}])
def test_nothing_of_an_adapter_is_left_for_the_next(folder, first):
    signs(folder / "s.jsonl", 9)
    task = {"data": "s", "columns": ["sentence"], "labels": 2, "metrics": ["accuracy"]}
    suite, model = suite_of(folder, "classifier", t=task), str(folder / "model")
    classifier(model)
    plain = {"r": 2, "target_modules": ["query"]}
    adapters = [
        saved(folder / "x", LoraConfig(**plain, **first), 0, classifier()),
        saved(folder / "y", LoraConfig(**plain), 1, classifier()),
    ]
    options = {"data_dir": folder, "adapters_at_once": 1}
    run_suite.run_suite(suite, model, output=folder / "both", adapters=adapters, **options)
    run_suite.run_suite(suite, model, output=folder / "alone", adapters=adapters[1:], **options)
    alike(items_in(folder / "both" / "y", "t"), items_in(folder / "alone", "t"))


def test_a_head_that_nobody_trained_is_refused(folder):
    signs(folder / "s.jsonl", 4)
    task = {"data": "s", "columns": ["sentence"], "labels": 2, "metrics": ["accuracy"]}
    suite = suite_of(folder, "classifier", t=task)
    plain = {"r": 2, "target_modules": ["query"]}
    adapters = [
        saved(folder / "none", LoraConfig(**plain), 0, classifier()),
        saved(folder / "with", LoraConfig(**plain, task_type="SEQ_CLS"), 0, classifier()),
        saved(folder / "on-it", LoraConfig(r=2, target_modules=["query", "classifier"]), 0, classifier()),
    ]

    def go(*chosen):
        run_suite.run_suite(suite, str(bert()), data_dir=folder, output=folder / "out", adapters=chosen)

    with pytest.raises(ConfigError, match=r"classifier\.bias, classifier\.weight in its checkpoint\. A head"):
        go()
    with pytest.raises(ConfigError, match=r"head of .* has not been trained") as caught:
        go(*adapters)
    assert f"in {adapters[0]}; " in str(caught.value)
    assert f"in {adapters[2]}." in str(caught.value)
    assert f"in {adapters[1]}" not in str(caught.value)
    assert not list((folder / "out").rglob("*.parquet"))
    go(adapters[1])


def test_a_regression_needs_a_trained_head_too(folder):
    write_jsonl(folder / "s.jsonl", [{"sentence": "a" * n, "label": n / 2} for n in range(1, 5)])
    task = {"data": "s", "columns": ["sentence"], "labels": 0, "metrics": ["pearson"]}
    with pytest.raises(ConfigError, match="has not been trained"):
        run_suite.run_suite(
            suite_of(folder, "classifier", t=task), str(bert()), data_dir=folder, output=folder / "out"
        )


def test_each_adapter_is_continued_by_itself(folder, adapters, monkeypatch):
    suite, chosen = suite_of(folder, "llm-adapters", t=GENERATED), [adapters[1], adapters[0], adapters[4]]
    options = {"data_dir": folder, "output": folder / "out", "adapters": chosen, "batch_size": 3}
    whole = Task.run

    def interrupted(self, subject, done, batch_size):
        for number, items in enumerate(whole(self, subject, done, batch_size)):
            if number == 2:
                raise KeyboardInterrupt
            yield items

    with monkeypatch.context() as patched:
        patched.setattr(Task, "run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_suite.run_suite(suite, str(llama()), **options)
    # the LoRA is finished; two batches of three are five items of the first LoRA-XS and one of the second
    files = [folder / "out" / name / "t.parquet" for name in ("lora", "xs", "xs-too.modicum")]
    parts = [Records.read(file) for file in files]
    assert [len(part) for part in parts] == [5, 5, 1]
    for part, file, kept in zip(parts, files, (5, 3, 1), strict=True):
        Records(part.header, [replace(one, prediction="kept") for one in part.items[:kept]]).write(file)
    loaded = []
    monkeypatch.setattr(
        run_suite, "put_on", lambda base, some: loaded.append(list(some)) or mixing.put_on(base, some)
    )
    results = run_suite.run_suite(suite, str(llama()), resume=True, **options)
    assert loaded == [[adapters[0], adapters[4]]]
    assert [sum(one.prediction == "kept" for one in Records.read(file).items) for file in files] == [5, 3, 1]
    assert all(Records.read(file).complete for file in files)
    assert [result.tasks["t"].items for result in results] == [5, 5, 5]
    summaries = [json.loads((file.parent / "summary.json").read_text()) for file in files]
    assert [summary["adapter"] for summary in summaries] == [result.adapter for result in results]


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 30)), min_size=1, max_size=40))
def test_rows_of_an_adapter_stay_together_and_lengths_do_not_jump(rows):
    owners, lengths = [owner for owner, _ in rows], [length for _, length in rows]
    order = mixing.in_order(lengths, owners)
    assert sorted(order) == list(range(len(rows)))
    runs = [
        owners[index] for at, index in enumerate(order) if not at or owners[index] != owners[order[at - 1]]
    ]
    assert len(runs) == len(set(owners))
    for turn, owner in enumerate(runs):
        mine = [lengths[index] for index in order if owners[index] == owner]
        assert mine == sorted(mine, reverse=turn % 2 == 0)


def test_one_adapter_goes_from_long_to_short():
    assert mixing.in_order([3, 9, 9, 1]) == [1, 2, 0, 3]
