"""The protocols for classifiers and for perplexity agree with direct computations."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import yaml
from tests.small_checkpoints import bert, llama, signs, write_jsonl

from modicum.errors import ConfigError, DataError
from modicum.evaluate.perplexity import _spans
from modicum.evaluate.protocols import Subject, check
from modicum.evaluate.records import Records
from modicum.evaluate.run_suite import run_suite
from modicum.evaluate.suites import load_suite
from modicum.models.loading import load_base, load_tokenizer

TEXT = "it was the best of times, it was the worst of times, né? " * 6


def suite_of(folder, protocol, **tasks):
    path = folder / "own.yaml"
    path.write_text(yaml.safe_dump({"suite": "own", "protocol": protocol, "tasks": tasks}), encoding="utf-8")
    return load_suite(str(path))


def classes(**change):
    return {
        "data": "a",
        "columns": ["sentence"],
        "labels": 2,
        "metrics": ["accuracy", "f1", "matthews"],
        **change,
    }


@pytest.fixture
def classifier(tmp_path):
    torch.manual_seed(0)
    tokenizer = load_tokenizer(str(bert()))
    model = load_base(str(bert()), "seq_cls", num_labels=2, tokenizer=tokenizer)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return model, tokenizer, str(tmp_path / "model")


def test_a_classifier(tmp_path, classifier):
    from sklearn.metrics import f1_score, matthews_corrcoef

    model, tokenizer, folder = classifier
    signs(tmp_path / "a.jsonl", 25)
    suite = suite_of(tmp_path, "classifier", a=classes())
    (result,) = run_suite(suite, folder, data_dir=tmp_path, output=tmp_path / "out", batch_size=4)
    labels, predicted, losses = [], [], []
    for n in range(25):
        text = "ab" * (n % 9 + 1) + ("z" if n % 2 else "y")
        with torch.no_grad():
            logits = model(**tokenizer(text, return_tensors="pt")).logits[0]
        labels.append(n % 2)
        predicted.append(int(logits.argmax()))
        losses.append(-logits.log_softmax(-1)[n % 2].item())
    found = result.tasks["a"].metrics
    assert list(found) == ["accuracy", "f1", "matthews"]
    assert found["accuracy"].value == np.mean(np.array(labels) == predicted)
    assert found["f1"].value == pytest.approx(f1_score(labels, predicted))
    assert found["matthews"].value == pytest.approx(matthews_corrcoef(labels, predicted))
    records = Records.read(tmp_path / "out" / "a.parquet")
    order = [int(name.rpartition(":")[2]) - 1 for name in records.column("item")]
    np.testing.assert_allclose(records.column("loss"), np.array(losses)[order], rtol=1e-4)


def test_heads_of_several_adapters_on_one_base(tmp_path):
    from peft import LoraConfig, get_peft_model

    signs(tmp_path / "a.jsonl", 25)
    suite = suite_of(tmp_path, "classifier", a=classes())
    adapters = [str(tmp_path / name) for name in ("x", "y")]
    for seed, adapter in enumerate(adapters):
        torch.manual_seed(seed)
        config = LoraConfig(
            r=2, target_modules=["query"], modules_to_save=["classifier"], task_type="SEQ_CLS"
        )
        model = get_peft_model(load_base(str(bert()), "seq_cls", num_labels=2), config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.normal_()
        model.save_pretrained(adapter)

    def go(output, **options):
        results = run_suite(suite, str(bert()), data_dir=tmp_path, output=output, **options)
        return [result.tasks["a"].metrics["accuracy"].value for result in results]

    together = go(tmp_path / "both", adapters=adapters)
    losses = []
    for adapter in adapters:
        go(tmp_path / "alone" / adapter[-1], adapters=[adapter])
        pair = [Records.read(tmp_path / where / adapter[-1] / "a.parquet") for where in ("both", "alone")]
        shared, own = ({one.item: one.loss for one in records.items} for records in pair)
        assert shared == pytest.approx(own, rel=1e-5)
        losses.append([shared[name] for name in sorted(shared)])
    assert not np.allclose(*losses)
    # the head that the base lacks is drawn anew at every load, and still it is the same base
    assert go(tmp_path / "both", adapters=adapters, resume=True) == together


def test_a_regression(tmp_path):
    torch.manual_seed(0)
    tokenizer = load_tokenizer(str(bert()))
    model = load_base(str(bert()), "regression", tokenizer=tokenizer)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    write_jsonl(tmp_path / "a.jsonl", [{"sentence": "a" * (n + 1), "label": n / 2} for n in range(9)])
    suite = suite_of(tmp_path, "classifier", a=classes(labels=0, metrics=["pearson", "spearman"]))
    (result,) = run_suite(suite, str(tmp_path / "model"), data_dir=tmp_path, output=tmp_path / "out")
    with torch.no_grad():
        values = [model(**tokenizer("a" * (n + 1), return_tensors="pt")).logits.item() for n in range(9)]
    wanted = np.corrcoef(values, np.arange(9) / 2)[0, 1]
    assert result.tasks["a"].metrics["pearson"].value == pytest.approx(wanted, abs=1e-5)
    assert Records.read(tmp_path / "out" / "a.parquet").items[0].correct is None


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"metrics": ["pearson"]}, "does not go with pearson"),
        ({"labels": 0}, "does not go with accuracy"),
        ({"columns": ["sentenc"]}, "did you mean 'sentence'"),
        ({"metrics": ["acuracy"]}, "Input should be 'accuracy'"),
    ],
)
def test_what_is_wrong_with_a_classifier_task(tmp_path, change, fault):
    signs(tmp_path / "a.jsonl", 4)
    (found,) = check(suite_of(tmp_path, "classifier", a=classes(**change)), tmp_path).faults
    assert fault in found


def test_the_rows_are_told_by_their_digest(tmp_path):
    rows = [{"id": str(n), "sentence": "ab"[n % 2], "label": n % 2} for n in range(4)]

    def digest(rows, limit=None):
        write_jsonl(tmp_path / "a.jsonl", rows)
        (task,) = check(suite_of(tmp_path, "classifier", a=classes()), tmp_path, limit).tasks
        return task.rows

    assert digest(rows) == digest(rows, limit=1) == digest(rows[::-1])
    for change in ({"sentence": "c"}, {"label": 1}):
        assert digest([{**rows[0], **change}, *rows[1:]]) != digest(rows)


def test_labels_outside_the_set_and_labels_that_never_occur(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"sentence": "a", "label": label} for label in (0, 2, 0)])
    (fault,) = check(suite_of(tmp_path, "classifier", a=classes()), tmp_path).faults
    assert "a.jsonl:2: label 2 is not in 0..1" in fault
    (task,) = check(suite_of(tmp_path, "classifier", a=classes(labels=3)), tmp_path).tasks
    assert task.notes == ["no item has the label 1"]


def test_one_classifier_does_not_answer_all_of_glue(tmp_path, classifier):
    signs(tmp_path / "a.jsonl", 4)
    suite = suite_of(tmp_path, "classifier", a=classes(), b=classes(labels=3))
    with pytest.raises(ConfigError, match="choose with --only"):
        run_suite(suite, classifier[2], data_dir=tmp_path, output=tmp_path / "out")


@pytest.mark.parametrize(
    ("length", "window", "stride"), [(100, 32, 16), (100, 32, 31), (20, 32, 8), (33, 32, 16)]
)
def test_every_token_is_predicted_once_and_with_context(length, window, stride):
    spans = list(_spans(length, window, stride))
    scored = [token for _, (first, last) in spans for token in range(first, last)]
    assert scored == list(range(1, length))
    assert all(last - begin <= window for begin, (_, last) in spans)
    assert all(first - begin >= window - stride for begin, (first, _) in spans[1:])


def test_perplexity_in_windows(tmp_path):
    (tmp_path / "a.txt").write_text(TEXT, encoding="utf-8")
    model, tokenizer = load_base(str(llama())), load_tokenizer(str(llama()))
    suite = suite_of(tmp_path, "perplexity", a={"data": "a", "window": 64, "stride": 24})
    (result,) = run_suite(suite, str(llama()), data_dir=tmp_path, output=tmp_path / "out", batch_size=3)
    ids = tokenizer(TEXT, return_tensors="pt")["input_ids"][0]
    nats = 0.0
    for token in range(1, len(ids)):
        # the first window that reaches the token
        begin = 0 if token < 64 else 24 * math.ceil((token - 63) / 24)
        with torch.no_grad():
            logits = model(ids[None, begin:token]).logits[0, -1]
        nats -= logits.log_softmax(-1)[ids[token]].item()
    found = result.tasks["a"].metrics
    assert found["perplexity"].n == len(ids) - 1
    assert found["perplexity"].value == pytest.approx(math.exp(nats / (len(ids) - 1)), rel=1e-4)
    assert found["word_perplexity"].value == pytest.approx(math.exp(nats / len(TEXT.split())), rel=1e-3)
    assert found["bits_per_byte"].value == pytest.approx(nats / math.log(2) / len(TEXT.encode()), rel=1e-5)


def test_a_part_of_a_text_says_nothing_per_word(tmp_path):
    (tmp_path / "a.txt").write_text(TEXT, encoding="utf-8")
    suite = suite_of(tmp_path, "perplexity", a={"data": "a", "window": 64})
    (result,) = run_suite(suite, str(llama()), data_dir=tmp_path, output=tmp_path / "out", limit=2)
    assert list(result.tasks["a"].metrics) == ["perplexity"]
    assert result.tasks["a"].metrics["perplexity"].n == 63 + 32


def test_a_text_of_one_token_cannot_be_predicted(tmp_path):
    from copy import deepcopy

    model, tokenizer = load_base(str(llama())), deepcopy(load_tokenizer(str(llama())))
    tokenizer.backend_tokenizer.post_processor = None  # which puts a start mark in front
    (tmp_path / "a.txt").write_text("a", encoding="utf-8")
    (task,) = check(suite_of(tmp_path, "perplexity", a={"data": "a", "window": 64}), tmp_path).tasks
    with pytest.raises(DataError, match="no text has two tokens"):
        task.bind(Subject(model, tokenizer, "small", ""))


def test_windows_that_cannot_be(tmp_path):
    (tmp_path / "a.txt").write_text(TEXT, encoding="utf-8")
    (fault,) = check(
        suite_of(tmp_path, "perplexity", a={"data": "a", "window": 8, "stride": 8}), tmp_path
    ).faults
    assert "tokens would be left out" in fault
    with pytest.raises(ConfigError, match="has 128 positions"):
        run_suite(suite_of(tmp_path, "perplexity", a={"data": "a"}), str(llama()), data_dir=tmp_path,
                  output=tmp_path / "out")  # fmt: skip
