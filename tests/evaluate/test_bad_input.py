"""What is wrong with a suite's data or odd about its answers is said, under every protocol."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import yaml
from tests.small_checkpoints import bert, llama, write_jsonl

from modicum.errors import ConfigError
from modicum.evaluate.protocols import check
from modicum.evaluate.records import Records
from modicum.evaluate.run_suite import checked, run_suite
from modicum.evaluate.suites import load_suite
from modicum.models.loading import load_base, load_tokenizer

CHOICE = {
    "template": "Q: {question} {hint}",
    "reference": "answer",
    "extract": "choice",
    "answers": ["a", "b"],
}
CLASSES = {"columns": ["premise", "hypothesis"], "label": "gold", "labels": 2, "metrics": ["accuracy"]}


def suite_of(folder, protocol, **tasks):
    path = folder / f"{protocol}.yaml"
    values = {name: {"data": "rows", **task} for name, task in tasks.items()}
    path.write_text(yaml.safe_dump({"suite": "own", "protocol": protocol, "tasks": values}), encoding="utf-8")
    return load_suite(str(path))


def faults_of(folder, protocol, rows, **tasks):
    write_jsonl(folder / "rows.jsonl", rows)
    return check(suite_of(folder, protocol, **tasks), folder).faults


@pytest.mark.parametrize(
    ("protocol", "name", "task", "columns"),
    [
        ("llm-adapters", "t", CHOICE, ("question", "hint", "answer")),
        ("classifier", "t", CLASSES, ("premise", "hypothesis", "gold")),
        ("perplexity", "t", {}, ("text",)),
        ("lm-eval", "mmlu", {}, ("subject", "question", "choices", "label")),
        ("lm-eval", "gsm8k", {}, ("question", "answer")),
    ],
)
def test_all_missing_columns_are_named_at_once(tmp_path, protocol, name, task, columns):
    (fault,) = faults_of(tmp_path, protocol, [{"id": "1", "other": "x"}], **{name: task})
    for column in columns:
        assert f"'{column}'" in fault
    assert "it has id, other" in fault


@pytest.mark.parametrize(
    ("protocol", "name", "task", "rows", "parts"),
    [
        ("llm-adapters", "t", CHOICE,
         [{"question": "", "hint": 3, "answer": "a"}, {"question": "q", "hint": "h", "answer": "c"}],
         ["rows.jsonl:1: column 'question' is empty", "rows.jsonl:1: column 'hint' holds 3",
          "rows.jsonl:2: answer = 'c' is none of a, b"]),
        ("classifier", "t", CLASSES,
         [{"premise": "p", "hypothesis": "h", "gold": 2}, {"premise": "p", "hypothesis": "h", "gold": "yes"},
          {"premise": "p", "hypothesis": "h", "gold": 0.5}],
         ["rows.jsonl:1: label 2 is not in 0..1", "rows.jsonl:2: label 'yes'", "rows.jsonl:3: label 0.5"]),
        ("classifier", "t", {**CLASSES, "labels": 0, "metrics": ["pearson"]},
         [{"premise": "p", "hypothesis": "h", "gold": "high"}], ["label 'high' is not a number"]),
        ("perplexity", "t", {}, [{"text": ""}, {"text": None}],
         ["rows.jsonl:1: column 'text' is empty", "rows.jsonl:2: column 'text' holds None"]),
        ("lm-eval", "winogrande", {},
         [{"question": "no blank", "choices": ["x", "y", "z"], "label": 3},
          {"question": 1, "choices": "x", "label": 0}],
         ["rows.jsonl:1: column 'question' holds no '_'; 3 choices, must be 2; label = 3 must be an index",
          "rows.jsonl:2: column 'question' holds no text"]),
        ("lm-eval", "mmlu", {}, [{"subject": "s", "question": "q", "choices": ["x"] * 5, "label": True}],
         ["5 choices, must be 4; label = True"]),
        ("lm-eval", "arc_easy", {}, [{"question": "q", "choices": ["x"], "label": 0}], ["1 choices, must be 2 to 8"]),
        ("lm-eval", "gsm8k", {"num_fewshot": 0}, [{"question": "q", "answer": "it is 4"}],
         ["'answer' holds no '####'"]),
    ],
)  # fmt: skip
def test_all_rows_that_cannot_be_used_are_named_at_once(tmp_path, protocol, name, task, rows, parts):
    (fault,) = faults_of(tmp_path, protocol, rows, **{name: task})
    for part in parts:
        assert part in fault


def test_the_faults_of_all_tasks_at_once(tmp_path):
    write_jsonl(tmp_path / "rows.jsonl", [{"question": "q", "hint": "h", "answer": "c"}])
    suite = suite_of(tmp_path, "llm-adapters", one=CHOICE, two={**CHOICE, "data": "nowhere"})
    with pytest.raises(ConfigError, match=r"one: 1 of 1 rows.*two: no data .*nowhere"):
        checked(suite, tmp_path)


@pytest.mark.parametrize(
    ("protocol", "name", "task", "rows", "note"),
    [
        ("llm-adapters", "t", CHOICE, [{"question": "q", "hint": "h", "answer": "a"}], "no item has the answer b"),
        ("classifier", "t", {**CLASSES, "labels": 3}, [{"premise": "p", "hypothesis": "h", "gold": 1}],
         "no item has the label 0, 2"),
        ("lm-eval", "arc_easy", {}, [{"question": "q", "choices": ["x", "y", "z"], "label": 1}],
         "no item has the label 0, 2"),
    ],
)  # fmt: skip
def test_a_label_that_never_occurs_is_noted(tmp_path, protocol, name, task, rows, note):
    write_jsonl(tmp_path / "rows.jsonl", rows)
    (found,) = check(suite_of(tmp_path, protocol, **{name: task}), tmp_path).tasks
    assert found.notes == [note]


def classifier(folder, labels, bias):
    """A classifier that always gives the class with the largest `bias`."""
    model = load_base(str(bert()), "regression" if labels == 1 else "seq_cls", num_labels=labels)
    with torch.no_grad():
        model.classifier.weight.zero_()
        model.classifier.bias.copy_(torch.tensor(bias))
    model.save_pretrained(folder)
    load_tokenizer(str(bert())).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("bias", "labels", "metrics", "remarks"),
    [
        ([1.0, 0.0], [0, 0, 0], ["f1", "matthews"],
         ["matthews is undefined and counted as 0: every prediction is 0 and every reference is 0",
          "f1 of 1 is undefined and counted as 0: nowhere wanted or predicted"]),
        ([1.0, 0.0], [0, 1, 0], ["f1", "matthews", "accuracy"],
         ["matthews is undefined and counted as 0: every prediction is 0"]),
        ([0.0, 1.0, 0.0], [1, 0, 1], ["f1"], ["f1 of 2 is undefined and counted as 0: nowhere wanted or predicted"]),
        ([0.5], [1.5, 2.0, 0.5], ["pearson", "spearman"],
         ["pearson is undefined and counted as 0: every prediction is 0.5",
          "spearman is undefined and counted as 0: every prediction is 0.5"]),
    ],
)  # fmt: skip
def test_undefined_metrics_are_said_to_be_so(tmp_path, bias, labels, metrics, remarks):
    write_jsonl(
        tmp_path / "rows.jsonl", [{"text": "abc"[: n + 1], "label": label} for n, label in enumerate(labels)]
    )
    classes = 0 if len(bias) == 1 else len(bias)
    suite = suite_of(tmp_path, "classifier", t={"columns": ["text"], "labels": classes, "metrics": metrics})
    model = classifier(tmp_path / "model", len(bias), bias)
    (result,) = run_suite(suite, model, data_dir=tmp_path, output=tmp_path / "out")
    found = result.tasks["t"]
    never = [label for label in range(classes) if label not in labels]
    assert found.notes[bool(never) :] == remarks
    assert all(np.isfinite(measure.value) for measure in found.metrics.values())


@pytest.fixture
def mute(tmp_path):
    """A model that ends every answer at once."""
    model = load_base(str(llama()))
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight[:, 0] = 9.0
        model.lm_head.weight.zero_()
        model.lm_head.weight[2, 0] = 1.0
    model.config.max_position_embeddings = 300
    model.save_pretrained(tmp_path / "mute")
    load_tokenizer(str(llama())).save_pretrained(tmp_path / "mute")
    return str(tmp_path / "mute")


@pytest.mark.parametrize(
    ("protocol", "name", "task"),
    [
        ("llm-adapters", "t", {**CHOICE, "num_beams": 2}),
        ("llm-adapters", "t", {**CHOICE, "extract": "number", "answers": [], "reference": "final"}),
        ("llm-adapters", "t", {**CHOICE, "extract": "math", "answers": [], "reference": "final"}),
        ("lm-eval", "gsm8k", {"num_fewshot": 0}),
    ],
)
def test_empty_answers_are_counted_apart(tmp_path, mute, protocol, name, task):
    rows = [{"question": "q", "hint": f"{n}", "answer": "a", "final": "1"} for n in range(3)]
    if protocol == "lm-eval":
        rows = [{**row, "answer": "#### 1"} for row in rows]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    suite = suite_of(tmp_path, protocol, **{name: task})
    (result,) = run_suite(suite, mute, data_dir=tmp_path, output=tmp_path / "out")
    metrics = result.tasks[name].metrics
    assert metrics["empty"].value == 1
    assert metrics["matched"].value == 0
    main = next(iter(metrics.values()))
    assert main.value == 0
    assert not any(one.matched for one in Records.read(tmp_path / "out" / f"{name}.parquet").items)


def test_an_extractor_of_ones_own_finds_nothing_or_gives_no_text(tmp_path):
    (tmp_path / "own.py").write_text(
        "def nothing(text, row):\n    return None\n\n\ndef number(text, row):\n    return 1\n"
    )
    write_jsonl(tmp_path / "rows.jsonl", [{"question": "q", "hint": "h", "answer": "a"}])
    task = {**CHOICE, "answers": [], "max_new_tokens": 3}

    def go(name):
        suite = suite_of(tmp_path, "llm-adapters", t={**task, "extract": f"own.py:{name}"})
        (result,) = run_suite(suite, str(llama()), data_dir=tmp_path, output=tmp_path / name)
        return result.tasks["t"].metrics

    found = go("nothing")
    assert (found["matched"].value, found["empty"].value, found["accuracy"].value) == (0, 0, 0)
    with pytest.raises(ConfigError, match=r"own\.py:number gave 1; it must return text, or None"):
        go("number")


def test_an_answer_ends_at_a_stop_word(tmp_path):
    write_jsonl(tmp_path / "rows.jsonl", [{"question": "q", "hint": "h", "answer": "a"}])
    suite = suite_of(tmp_path, "llm-adapters", t={**CHOICE, "max_new_tokens": 6})
    run_suite(suite, str(llama()), data_dir=tmp_path, output=tmp_path / "whole")
    (whole,) = Records.read(tmp_path / "whole" / "t.parquet").items
    assert len(whole.prediction) > 3
    suite.tasks["t"]["stop"] = ["no such", whole.prediction[3]]
    run_suite(suite, str(llama()), data_dir=tmp_path, output=tmp_path / "cut")
    records = Records.read(tmp_path / "cut" / "t.parquet")
    assert records.items[0].prediction == whole.prediction.split(whole.prediction[3])[0].strip()
    assert records.header.decoding["stop"] == ["no such", whole.prediction[3]]


@pytest.mark.shared_data
def test_boolq_of_the_library_is_refused_without_its_passages(tmp_path, shared_data):
    suite = suite_of(tmp_path, "lm-eval", boolq={"data": "commonsense/boolq/validation"})
    with pytest.raises(ConfigError, match=r"lacks the column 'passage' for the library's task boolq"):
        checked(suite, shared_data)
    assert "passage" in load_suite("commonsense", "lm-eval").about


MNLI = [
    {"id": f"m-{n}", "premise": f"p{n}", "hypothesis": "h" * (n % 4 + 1), "label": n % 3} for n in range(6)
]


def test_both_development_sets_of_mnli(tmp_path):
    (tmp_path / "glue" / "mnli").mkdir(parents=True)
    write_jsonl(tmp_path / "glue" / "mnli" / "dev_matched.jsonl", MNLI)
    suite = load_suite("mnli")
    with pytest.raises(
        ConfigError, match=r"mnli_mismatched: no data .*did you mean 'dev_matched'.*holds dev_matched"
    ):
        checked(suite, tmp_path)
    named = [{**row, "label": ("entailment", "neutral", "contradiction")[row["label"]]} for row in MNLI[::-1]]
    write_jsonl(tmp_path / "glue" / "mnli" / "dev_mismatched.jsonl", named)
    model = classifier(tmp_path / "model", 3, [0.0, 0.0, 1.0])
    (result,) = run_suite(suite, model, data_dir=tmp_path, output=tmp_path / "out")
    assert {name: task.metrics["accuracy"].value for name, task in result.tasks.items()} == {
        "mnli_matched": pytest.approx(1 / 3),
        "mnli_mismatched": pytest.approx(1 / 3),
    }
    unknown = [{**MNLI[0], "label": "entailmnt"}, {**MNLI[1], "label": "-"}]
    write_jsonl(tmp_path / "glue" / "mnli" / "dev_mismatched.jsonl", unknown)
    with pytest.raises(ConfigError, match=r"1: label 'entailmnt' \(did you mean 'entailment'.*2: label '-'"):
        checked(suite, tmp_path)
