"""The protocol `lm-eval` records what lm-evaluation-harness computes, and reads our rows as it means them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from peft import get_peft_model
from tests.cli.adapter_files import run
from tests.small_checkpoints import llama, write_jsonl

import modicum
from modicum.errors import ConfigError, DataError, MissingExtraError
from modicum.evaluate import harness
from modicum.evaluate.harness_rows import SETS
from modicum.evaluate.protocols import check
from modicum.evaluate.records import Records, faults_between
from modicum.evaluate.run_suite import run_suite
from modicum.evaluate.suites import load_suite
from modicum.models.loading import load_base, load_tokenizer

ANIMALS = ("cat", "dog", "cow", "hen", "fox")


def rows_of(count, **more):
    return [
        {
            "id": f"q-{n}",
            "question": f"Which animal is number {n}?",
            "choices": [f"the {ANIMALS[(n + k) % 5]}{'s of the farm' * k}" for k in range(4)],
            "label": n * 3 % 4,
            **{name: value(n) for name, value in more.items()},
        }
        for n in range(count)
    ]


def suite_of(folder, **tasks):
    path = folder / "own.yaml"
    path.write_text(yaml.safe_dump({"suite": "own", "protocol": "lm-eval", "tasks": tasks}), encoding="utf-8")
    return load_suite(str(path))


def go(suite, folder, **options):
    return run_suite(suite, "embedded", data_dir=folder, output=folder / "out", batch_size=8, **options)


def log_likelihoods(context, continuations, model, tokenizer):
    """Summed nats of each continuation after the context, computed by hand."""
    before, found = tokenizer(context)["input_ids"], []
    for continuation in continuations:
        ids = tokenizer(context + continuation)["input_ids"]
        with torch.no_grad():
            scores = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        found.append(sum(scores[at - 1, ids[at]].item() for at in range(len(before), len(ids))))
    return found


def test_records_agree_with_the_library_and_with_a_direct_computation(tmp_path):
    rows = rows_of(20)
    write_jsonl(tmp_path / "a.jsonl", rows)
    (result,) = go(suite_of(tmp_path, arc_easy={"data": "a"}), tmp_path)
    records = Records.read(tmp_path / "out" / "arc_easy.parquet")
    found = library_alone(rows, tmp_path / "theirs")
    assert records.column("item").tolist() == [sample["doc"]["id"] for sample in found["samples"]]
    np.testing.assert_array_equal(records.column("correct"), [sample["acc"] for sample in found["samples"]])
    gold = [sample["filtered_resps"][sample["target"]][0] for sample in found["samples"]]
    np.testing.assert_allclose(records.column("loss"), np.negative(gold), rtol=1e-5)
    metrics, theirs = result.tasks["arc_easy"].metrics, found["results"]
    right = records.column("correct")
    assert right.mean() == pytest.approx(theirs["acc,none"])
    assert right.std(ddof=1) / math.sqrt(len(right)) == pytest.approx(theirs["acc_stderr,none"])
    for name in ("acc", "acc_norm"):
        assert metrics[name].value == pytest.approx(theirs[f"{name},none"])
        half = 1.959964 * theirs[f"{name}_stderr,none"]
        assert metrics[name].high - metrics[name].value == pytest.approx(half, rel=1e-5)
    model, tokenizer = load_base("embedded"), load_tokenizer("embedded")
    for row, one in zip(rows[:3], records.items, strict=False):
        question, choices = (
            f"Question: {row['question']}\nAnswer:",
            [f" {choice}" for choice in row["choices"]],
        )
        scores = log_likelihoods(question, choices, model, tokenizer)
        assert one.loss == pytest.approx(-scores[row["label"]], rel=1e-4)
        assert one.prediction == row["choices"][int(np.argmax(scores))]
        assert one.reference == row["choices"][row["label"]]
    details = json.loads((tmp_path / "out" / "arc_easy.json").read_text())
    assert details["library"].startswith("lm_eval 0.")
    assert details["versions"] == {"arc_easy": 1.0}
    assert 0 < result.tasks["arc_easy"].metrics["acc"].value < 1


def small_set(name):
    """Rows in our columns, the same in the library's, and the place of the right answer in each."""
    gold = [n * 3 % 2 for n in range(12)]
    if name == "winogrande":
        told = [
            f"The {a} saw the {ANIMALS[n % 5]}, and _ ran {n} times." for n, a in enumerate("abcdefghijkl")
        ]
        ours = [
            {"question": text, "choices": ["he", "the old man"], "label": g}
            for text, g in zip(told, gold, strict=True)
        ]
        theirs = [
            {"sentence": text, "option1": "he", "option2": "the old man", "answer": "12"[g]}
            for text, g in zip(told, gold, strict=True)
        ]
    else:
        ends = [
            [f"runs [step] to {n}.", f"and the {ANIMALS[n % 5]} sleeps for a very long time."]
            for n in range(12)
        ]
        ours = [
            {"question": f"Farm: A {ANIMALS[n % 5]} wakes. then it", "choices": ends[n], "label": g}
            for n, g in enumerate(gold)
        ]
        theirs = [
            {
                "activity_label": "Farm", "ctx_a": f"A {ANIMALS[n % 5]} wakes.", "ctx_b": "then it",
                "endings": ends[n], "label": str(g),
            }
            for n, g in enumerate(gold)
        ]  # fmt: skip
    named = [[{"id": f"q-{n}", **row} for n, row in enumerate(rows)] for rows in (ours, theirs)]
    return *named, gold


def same_metrics(found, theirs, names):
    """Whether the library's values and standard errors stand in ours."""
    for name in names:
        assert found[name].value == pytest.approx(theirs[f"{name},none"])
        half = 1.959964 * theirs[f"{name}_stderr,none"]
        assert found[name].high - found[name].value == pytest.approx(half, rel=1e-5)
        assert half > 0


@pytest.mark.parametrize(
    ("name", "file", "metrics"),
    [
        # the question is in the choices, and what follows is scored
        ("winogrande", "winogrande/default.yaml", ["acc"]),
        ("hellaswag", "hellaswag/hellaswag.yaml", ["acc", "acc_norm"]),
    ],
)
def test_other_sets_agree_with_the_library(tmp_path, name, file, metrics):
    rows, docs, gold = small_set(name)
    theirs = simply_evaluated(
        name, docs, tmp_path / "theirs", include=library_file(file), training_split=None
    )
    write_jsonl(tmp_path / "a.jsonl", rows)
    (result,) = go(suite_of(tmp_path, **{name: {"data": "a"}}), tmp_path)
    same_metrics(result.tasks[name].metrics, theirs["results"], metrics)
    records = Records.read(tmp_path / "out" / f"{name}.parquet")
    samples = theirs["samples"]
    assert records.column("item").tolist() == [sample["doc"]["id"] for sample in samples]
    np.testing.assert_array_equal(records.column("correct"), [sample["acc"] for sample in samples])
    scores = [sample["filtered_resps"][place][0] for sample, place in zip(samples, gold, strict=True)]
    np.testing.assert_allclose(records.column("loss"), np.negative(scores), rtol=1e-4)
    assert 0 < records.column("correct").mean() < 1


def test_a_group_of_subjects_agrees_with_the_library(tmp_path):
    """MMLU of two subjects of unlike size: the mean over all items, and the standard error of the group."""
    subject = {"subject": lambda n: "anatomy" if n % 3 else "virology"}
    rows, examples = rows_of(14, **subject), rows_of(9, **subject)
    docs = {}
    for row in rows:
        docs.setdefault(f"mmlu_{row['subject']}", []).append({**row, "answer": row["label"]})
    folder = tmp_path / "theirs"
    for name, some in docs.items():
        shown = [{**row, "answer": row["label"]} for row in examples if name.endswith(row["subject"])]
        written(name, some, folder, shown, include=library_file(f"mmlu/default/{name}.yaml"), num_fewshot=2)
    group = {
        "group": "pair",
        "task": list(docs),
        "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}],
    }
    (folder / "pair.yaml").write_text(yaml.safe_dump(group), encoding="utf-8")
    theirs = evaluated("pair", folder)
    write_jsonl(tmp_path / "a.jsonl", rows)
    write_jsonl(tmp_path / "dev.jsonl", examples)
    (result,) = go(suite_of(tmp_path, mmlu={"data": "a", "examples": "dev", "num_fewshot": 2}), tmp_path)
    same_metrics(result.tasks["mmlu"].metrics, theirs["results"]["pair"], ["acc"])
    samples = {sample["doc"]["id"]: sample for name in docs for sample in theirs["samples"][name]}
    records = Records.read(tmp_path / "out" / "mmlu.parquet")
    assert {one.item for one in records.items} == set(samples)
    for one in records.items:
        assert one.correct == samples[one.item]["acc"]
        score, _ = samples[one.item]["filtered_resps"][samples[one.item]["target"]]
        assert one.loss == pytest.approx(-score, rel=1e-4)
    assert len(set(map(len, docs.values()))) == 2


def library_alone(rows, folder):
    """Results and samples of the library's arc_easy, from its own file, data loader, model class and entry point."""
    docs = [
        {
            "id": row["id"],
            "question": row["question"],
            "choices": {"text": row["choices"], "label": ["A", "B", "C", "D"]},
            "answerKey": "ABCD"[row["label"]],
        }
        for row in rows
    ]
    return simply_evaluated(
        "arc_easy", docs, folder, include=library_file("arc/arc_easy.yaml"), training_split=None
    )


def library_file(name):
    import lm_eval.tasks

    return str(Path(lm_eval.tasks.__file__).parent / name)


def simply_evaluated(name, docs, folder, model="embedded", start=None, **task):
    """Results and samples of one task of the library on `docs`; `start`: whether it sets start marks in texts."""
    written(name, docs, folder, **task)
    found = evaluated(name, folder, model, start)
    return {"results": found["results"][name], "samples": found["samples"][name]}


def written(name, docs, folder, examples=(), **task):
    """Writes a task of the library with `docs` as its rows, and the rows of its examples as its split dev."""
    folder.mkdir(exist_ok=True)
    files = {"test": str(write_jsonl(folder / f"{name}.jsonl", docs))}
    if examples:
        files["dev"] = str(write_jsonl(folder / f"{name}-dev.jsonl", examples))
    task |= {
        "task": name,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": files},
        "validation_split": None,
        "test_split": "test",
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(task), encoding="utf-8")


def evaluated(name, folder, model="embedded", start=None):
    """What the library finds for a task or a group in `folder`."""
    import lm_eval.tasks
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    with harness._quietly():
        wrapped = HFLM(load_base(model), tokenizer=load_tokenizer(model), batch_size=1, add_bos_token=start)
        manager = lm_eval.tasks.TaskManager(include_defaults=False, include_path=str(folder))
        return simple_evaluate(wrapped, tasks=[name], task_manager=manager)


def test_generated_answers_agree_with_the_library(tmp_path):
    base = load_base(str(llama()))
    base.config.max_position_embeddings = 300
    base.save_pretrained(tmp_path / "model")
    load_tokenizer(str(llama())).save_pretrained(tmp_path / "model")
    include, model = library_file("gsm8k/gsm8k.yaml"), str(tmp_path / "model")
    rows = [{"id": f"g-{n}", "question": f"{n} and 1?", "answer": "so\n#### 1234567"} for n in range(3)]
    options = {"include": include, "num_fewshot": 0, "fewshot_split": None, "training_split": None}
    said = simply_evaluated("gsm8k", rows, tmp_path / "first", model, **options)["samples"]
    numbers = {
        one["doc"]["id"]: one["filtered_resps"][0] for one in said if one["filter"] == "flexible-extract"
    }
    assert sum(number != "[invalid]" for number in numbers.values()) >= 2
    for row in rows[:2]:  # what the model says is right for some
        row["answer"] = f"so\n#### {numbers[row['id']]}"
    theirs = simply_evaluated("gsm8k", rows, tmp_path / "second", model, **options)["results"]
    write_jsonl(tmp_path / "a.jsonl", rows)
    suite = suite_of(tmp_path, gsm8k={"data": "a", "num_fewshot": 0})
    (result,) = run_suite(suite, model, data_dir=tmp_path, output=tmp_path / "out", batch_size=3)
    found = result.tasks["gsm8k"].metrics
    for name in ("strict-match", "flexible-extract"):
        ours = found[f"exact_match ({name})"]
        assert ours.value == pytest.approx(theirs[f"exact_match,{name}"])
        half = 1.959964 * theirs[f"exact_match_stderr,{name}"]
        assert ours.high - ours.value == pytest.approx(half, rel=1e-5, abs=1e-9)
    assert 0 < found["exact_match (flexible-extract)"].value < 1
    records = Records.read(tmp_path / "out" / "gsm8k.parquet")
    assert records.column("correct").mean() == pytest.approx(theirs["exact_match,strict-match"])
    strict = [one["filtered_resps"][0] != "[invalid]" for one in said if one["filter"] == "strict-match"]
    assert found["matched"].value == np.mean(strict)
    assert found["empty"].value == np.mean([not one["resps"][0][0].strip() for one in said[:3]])


@pytest.mark.parametrize("tokens", [40, 127])
def test_perplexity_of_texts_agrees_with_the_library(tmp_path, tokens):
    letters = "the dog saw a cat and the cat ran far away from it "
    texts = [(letters * 9)[start : start + tokens - 1] + "." for start in (0, 4)]
    texts[1] = texts[1][: tokens // 2] + "!"
    options = {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": name} for name in ("word_perplexity", "bits_per_byte")],
    }
    docs = [{"text": text} for text in texts]
    # the library puts a start mark before every text, and predicts a second one where the tokenizer sets it too
    theirs = simply_evaluated("plain", docs, tmp_path / "theirs", str(llama()), start=False, **options)[
        "results"
    ]
    write_jsonl(tmp_path / "a.jsonl", docs)
    values = {
        "suite": "own",
        "protocol": "perplexity",
        "tasks": {"a": {"data": "a", "window": 128, "stride": 64}},
    }
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    suite = load_suite(str(tmp_path / "own.yaml"))
    (result,) = run_suite(suite, str(llama()), data_dir=tmp_path, output=tmp_path / "out")
    found = result.tasks["a"].metrics
    for name in ("word_perplexity", "bits_per_byte"):
        assert found[name].value == pytest.approx(theirs[f"{name},none"], rel=1e-5)
    records = Records.read(tmp_path / "out" / "a.parquet")
    assert records.column("tokens").sum() == sum(map(len, texts))


def test_an_adapter_on_a_quantized_base(tmp_path, capsys):
    quantized = str(tmp_path / "q")
    made = run(capsys, "quantize", llama(), "--output", quantized, "--algorithm", "rtn",
               "--group-size", 16, "--sequence-length", 24)  # fmt: skip
    assert made.code == 0, made.err
    model = get_peft_model(
        load_base(quantized), modicum.LoraXSConfig(r=4, target_modules=["q_proj", "down_proj"])
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.fill_(0.5)
    model.save_pretrained(tmp_path / "adapter")
    rows = rows_of(2)
    write_jsonl(tmp_path / "a.jsonl", rows)
    options = {"data_dir": tmp_path, "output": tmp_path / "out", "adapters": [str(tmp_path / "adapter")]}
    run_suite(suite_of(tmp_path, arc_easy={"data": "a"}), quantized, **options)
    for row, one in zip(rows, Records.read(tmp_path / "out" / "arc_easy.parquet").items, strict=True):
        question, answer = f"Question: {row['question']}\nAnswer:", f" {row['choices'][row['label']]}"
        tokenizer = load_tokenizer(quantized)
        (score,) = log_likelihoods(question, [answer], model.eval(), tokenizer)
        assert one.loss == pytest.approx(-score, rel=1e-4)
        with model.disable_adapter():
            assert log_likelihoods(question, [answer], model, tokenizer)[0] != pytest.approx(score, rel=1e-2)


def test_finished_tasks_are_not_run_again(tmp_path, monkeypatch):
    write_jsonl(tmp_path / "a.jsonl", rows_of(3))
    suite = suite_of(tmp_path, arc_easy={"data": "a"})
    (first,) = go(suite, tmp_path)
    monkeypatch.setattr(harness, "_first_filter", None)  # whatever runs fails
    (second,) = go(suite, tmp_path, resume=True)
    assert second.as_dict() == first.as_dict()


def test_several_subjects_with_examples(tmp_path):
    subject = {"subject": lambda n: ("anatomy", "virology")[n % 2]}
    write_jsonl(tmp_path / "a.jsonl", rows_of(6, **subject))
    write_jsonl(tmp_path / "dev.jsonl", rows_of(4, **subject))
    task = {"data": "a", "examples": "dev", "num_fewshot": 2}
    (result,) = go(suite_of(tmp_path, mmlu=task), tmp_path, limit=2)
    records = Records.read(tmp_path / "out" / "mmlu.parquet")
    assert sorted(records.slice_of("subject")) == ["anatomy"] * 2 + ["virology"] * 2
    metrics = result.tasks["mmlu"].metrics
    assert metrics["acc"].value == pytest.approx(records.column("correct").mean())
    assert metrics["acc"].n == 4
    assert records.header.decoding["num_fewshot"] == 2
    assert set(records.column("tokens")) == {1}
    task["num_fewshot"] = 3
    (fault,) = check(suite_of(tmp_path, mmlu=task), tmp_path).faults
    assert "mmlu_anatomy (2), mmlu_virology (2)" in fault


def test_generated_answers(tmp_path):
    problems = [{"id": f"g-{n}", "question": f"{n} and 1?", "answer": f"so\n#### {n + 1}"} for n in range(6)]
    write_jsonl(tmp_path / "a.jsonl", problems)
    suite = suite_of(tmp_path, gsm8k={"data": "a", "examples": "a", "num_fewshot": 1})
    (result,) = go(suite, tmp_path, limit=2)
    assert list(result.tasks["gsm8k"].metrics) == [
        "exact_match (strict-match)",
        "exact_match (flexible-extract)",
        "matched",
        "empty",
    ]
    records = Records.read(tmp_path / "out" / "gsm8k.parquet")
    assert len(records) == 2
    assert records.items[0].loss is None
    assert "generation" in records.header.decoding
    (fault,) = check(suite_of(tmp_path, gsm8k={"data": "a"}), tmp_path).faults
    assert "fewer examples than num_fewshot wants: gsm8k (0)" in fault


@pytest.mark.parametrize(
    ("name", "row", "prompt", "choices", "target"),
    [
        ("boolq", {"passage": "P.", "question": "is it?", "choices": ["true", "false"], "label": 0},
         "P.\nQuestion: is it?\nAnswer:", ["no", "yes"], 1),
        ("piqa", {"question": "G", "choices": ["x", "y"], "label": 1}, "Question: G\nAnswer:", ["x", "y"], 1),
        ("winogrande", {"question": "A _ of it.", "choices": ["x", "y"], "label": 1}, 1, ["A x", "A y"], "of it."),
        ("social_iqa", {"question": "Ann ran. Why did she?", "choices": ["x", "y", "z"], "label": 2},
         "Q: Ann ran. Why did she?\nA:", ["x", "y", "z"], 2),
        ("openbookqa", {"question": "Q", "choices": ["x", "y", "z"], "label": 2}, "Q", ["x", "y", "z"], 2),
        ("arc_challenge", {"question": "Q", "choices": ["x", "y"], "label": 0}, "Question: Q\nAnswer:", ["x", "y"], 0),
        ("hellaswag", {"question": "Roof: A man sits on a roof. he", "choices": ["is [x] up.", "y"], "label": 1},
         "Roof: A man sits on a roof. He", ["is up.", "y"], 1),
    ],
)  # fmt: skip
def test_our_rows_as_the_library_reads_them(tmp_path, name, row, prompt, choices, target):
    write_jsonl(tmp_path / "a.jsonl", [{"id": "1", **row}])
    (task,) = check(suite_of(tmp_path, **{name: {"data": "a"}}), tmp_path).tasks
    (built,) = task._built.values()
    (doc,) = built.eval_docs
    assert built.doc_to_text(doc) == prompt
    assert built.doc_to_choice(doc) == choices
    assert built.doc_to_target(doc) == target
    assert task.ids == ["1"]


def test_rows_and_examples_are_told_by_their_digests(tmp_path):
    problems = [{"id": f"g-{n}", "question": f"{n} and 1?", "answer": f"so\n#### {n + 1}"} for n in range(4)]

    def digests(rows=problems, examples=problems, shots=2, limit=None):
        write_jsonl(tmp_path / "a.jsonl", rows)
        write_jsonl(tmp_path / "shown.jsonl", examples)
        task = {"data": "a", "examples": "shown", "num_fewshot": shots}
        (found,) = check(suite_of(tmp_path, gsm8k=task), tmp_path, limit).tasks
        return found.template, found.rows

    template, rows = digests()
    other = [*problems[:-1], {**problems[-1], "question": "3 and one?"}]
    assert digests(limit=2) == (template, rows)
    assert digests(rows=other)[0] == template
    assert digests(rows=other)[1] != rows
    assert digests(examples=other)[0] != template
    assert digests(examples=problems[::-1])[0] != template
    assert digests(examples=other)[1] == rows
    # examples that are not shown do not matter
    assert digests(shots=0) == digests(examples=other, shots=0)


def test_results_with_other_examples_are_not_compared(tmp_path):
    rows = rows_of(4, subject=lambda n: "anatomy")
    suite = suite_of(tmp_path, mmlu={"data": "a", "examples": "dev", "num_fewshot": 1})
    write_jsonl(tmp_path / "a.jsonl", rows)
    found = []
    for turn, examples in enumerate((rows[:1], rows[1:2])):
        write_jsonl(tmp_path / "dev.jsonl", examples)
        run_suite(suite, "embedded", data_dir=tmp_path, output=tmp_path / str(turn))
        found.append(Records.read(tmp_path / str(turn) / "mmlu.parquet"))
    assert [fault.split()[0] for fault in faults_between(*found)] == ["template"]
    with pytest.raises(DataError, match="template differs"):
        run_suite(suite, "embedded", data_dir=tmp_path, output=tmp_path / "0", resume=True)


@pytest.mark.parametrize(
    ("task", "rows", "fault"),
    [
        ("arc_esy", rows_of(1), "did you mean 'arc_easy'"),
        (
            "boolq",
            rows_of(1),
            "lacks the column 'passage' for the library's task boolq, which is asked with it",
        ),
        (
            "piqa",
            [{"question": "Q", "choices": ["x", "y"], "label": 2}],
            "label = 2 must be an index into the 2",
        ),
        ("piqa", [{"question": "Q", "choices": "xy", "label": 0}], "choices must be a list of texts"),
    ],
)
def test_rows_that_cannot_be_used(tmp_path, task, rows, fault):
    write_jsonl(tmp_path / "a.jsonl", rows)
    (found,) = check(suite_of(tmp_path, **{task: {"data": "a"}}), tmp_path).faults
    assert fault in found


def test_a_library_that_is_missing_or_does_not_fit(monkeypatch):
    import importlib

    for error, words in (
        (ModuleNotFoundError("no", name="lm_eval"), r"pip install \"modicum\[eval\]\""),
        (ImportError("cannot import name 'x' from 'transformers'"), r"lm_eval 0\.\S+, transformers 5.*'x'"),
    ):

        def broken(_name, error=error):
            raise error

        with monkeypatch.context() as patched:
            patched.setattr(importlib, "import_module", broken)
            with pytest.raises(MissingExtraError, match=words):
                harness._library("evaluator")


def test_an_answer_that_is_longer_than_the_model_is_told_before_any_is_scored(tmp_path):
    rows = [{"question": "Q", "choices": ["x", "y" * length], "label": 0} for length in (3, 200)]
    write_jsonl(tmp_path / "a.jsonl", rows)
    suite, model = suite_of(tmp_path, piqa={"data": "a"}), str(llama())
    with pytest.raises(
        ConfigError, match=r"piqa: an answer of 201 tokens is to be scored, but .* has 128 positions"
    ):
        run_suite(suite, model, data_dir=tmp_path, output=tmp_path / "out")
    (result,) = run_suite(suite, model, data_dir=tmp_path, output=tmp_path / "out", limit=1)
    assert result.tasks["piqa"].items == 1


@pytest.mark.shared_data
def test_the_bundled_suites_fit_the_data(shared_data):
    for name, task, size in (
        ("commonsense", "hellaswag", 2034),
        ("commonsense", "social_iqa", 1573),
        ("math", "gsm8k", 1069),
        ("mmlu", "mmlu", 11182),
    ):
        found = check(load_suite(name, "lm-eval").only([task]), shared_data)
        assert not found.faults
        assert len(found.tasks[0].ids) == size
    assert set(load_suite("commonsense", "lm-eval").tasks) < set(SETS)
