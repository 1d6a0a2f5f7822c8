"""Running suites: what is recorded, continued, refused; generation, adapters in turn, the command."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from tests.cli.adapter_files import run
from tests.evaluate.test_latency import watched
from tests.small_checkpoints import llama, write_jsonl

import modicum
from modicum.errors import ConfigError, DataError
from modicum.evaluate import run_suite as running
from modicum.evaluate.generate import complete, completions
from modicum.evaluate.llm_adapters import Task
from modicum.evaluate.records import Records
from modicum.evaluate.run_suite import run_suite
from modicum.evaluate.suites import load_suite
from modicum.models.loading import load_base, load_tokenizer

PROMPTS = [f"{n}+{'1' * (n % 4 + 1)}" for n in range(7)]


@pytest.fixture(scope="module")
def language():
    return load_base(str(llama())), load_tokenizer(str(llama()))


@pytest.fixture(scope="module")
def said(language):
    """What the model says, one prompt at a time."""
    model, tokenizer = language
    ids = [[1, *tokenizer(f"Q: {prompt}", add_special_tokens=False)["input_ids"]] for prompt in PROMPTS]
    return [
        next(completions(model, tokenizer, [one], max_new_tokens=8, num_beams=3))[0].strip() for one in ids
    ]


@pytest.fixture
def suite(tmp_path, said):
    """Rows whose wanted answer is a character of what the model says, but for two of them."""
    letters = sorted({text[0] for text in said if text} | {"~"})
    rows = [
        {"id": f"t-{n}", "question": prompt, "answer": text[0] if n < 5 else "~", "kind": "ab"[n % 2]}
        for n, (prompt, text) in enumerate(zip(PROMPTS, said, strict=True))
    ]
    write_jsonl(tmp_path / "t.jsonl", rows)
    task = {
        "data": "t", "template": "Q: {question}", "reference": "answer", "extract": "choice",
        "answers": letters, "num_beams": 3, "max_new_tokens": 8, "slices": ["kind"],
    }  # fmt: skip
    values = {"suite": "own", "protocol": "llm-adapters", "tasks": {"t": task, "u": task}}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    return load_suite(str(tmp_path / "own.yaml"))


def go(suite, folder, **options):
    return run_suite(suite, str(llama()), data_dir=folder, output=folder / "out", batch_size=3, **options)


def test_beams_in_batches_equal_one_prompt_at_a_time(language, said):
    model, tokenizer = language
    ids = [[1, *tokenizer(f"Q: {prompt}", add_special_tokens=False)["input_ids"]] for prompt in PROMPTS]
    found = {}
    for batch in completions(model, tokenizer, ids, max_new_tokens=8, num_beams=3, batch_size=4):
        found |= batch
    assert [found[n] for n in range(7)] == said
    assert said != complete(model, tokenizer, ids, max_new_tokens=8)
    direct = model.generate(torch.tensor([ids[0]]), max_new_tokens=8, num_beams=3, do_sample=False)
    assert tokenizer.decode(direct[0, len(ids[0]) :], skip_special_tokens=True).strip() == said[0]


def test_a_cache_is_kept_and_batches_go_by_length():
    model, tokenizer = load_base(str(llama())), load_tokenizer(str(llama()))
    _, seen = watched(model=model)
    lengths = [5, 12, 3, 9, 20, 7, 4]
    prompts = [[1] + [10 + n] * (length - 1) for n, length in enumerate(lengths)]
    complete(model, tokenizer, prompts, max_new_tokens=4, batch_size=3)
    starts = [at for at, (_, _, held, _) in enumerate(seen) if held == 0]
    # the longest come first, and alike ones together
    assert [seen[at][1] for at in starts] == [(3, 20), (3, 7), (1, 3)]
    for begin, end in zip(starts, [*starts[1:], len(seen)], strict=True):
        (rows, width), steps = seen[begin][1], seen[begin + 1 : end]
        assert steps
        assert [(shape, held) for _, shape, held, _ in steps] == [
            ((rows, 1), width + step) for step in range(len(steps))
        ]


def test_what_is_recorded(suite, tmp_path, said):
    (result,) = go(suite, tmp_path)
    assert result.tasks["t"].metrics["accuracy"].value == pytest.approx(5 / 7)
    assert result.tasks["t"].metrics["matched"].value == 1
    assert result.average == pytest.approx(5 / 7)
    records = Records.read(tmp_path / "out" / "t.parquet")
    assert records.complete
    items = {one.item: one for one in records.items}
    assert [items[f"t-{n}"].prediction for n in range(7)] == said
    assert items["t-1"].slices == {"kind": "b", "found": "literal"}
    assert records.header.decoding == {"num_beams": 3, "max_new_tokens": 8}
    assert records.header.created_with == f"modicum {modicum.__version__}"
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["tasks"]["u"]["metrics"]["accuracy"]["n"] == 7


def test_no_answer_is_reported(suite, tmp_path):
    suite.tasks["t"]["answers"] = ["no such", "nor this"]
    rows = [
        {"id": f"t-{n}", "question": prompt, "answer": "no such", "kind": "a"}
        for n, prompt in enumerate(PROMPTS)
    ]
    write_jsonl(tmp_path / "t.jsonl", rows)
    (result,) = go(suite.only(["t"]), tmp_path)
    assert result.tasks["t"].metrics["matched"].value == 0
    assert result.tasks["t"].metrics["accuracy"].value == 0
    assert result.tasks["t"].notes == ["no item has the answer nor this"]
    assert result.average is None
    assert not any(one.matched for one in Records.read(tmp_path / "out" / "t.parquet").items)


def test_an_interrupted_run_is_continued(suite, tmp_path, monkeypatch, said):
    whole = Task.run

    def interrupted(self, subject, done, batch_size):
        for number, items in enumerate(whole(self, subject, done, batch_size)):
            if number == 1 and self.name == "u":
                raise KeyboardInterrupt
            yield items

    with monkeypatch.context() as patched:
        patched.setattr(Task, "run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            go(suite, tmp_path)
    part = Records.read(tmp_path / "out" / "u.parquet")
    assert len(part) == 3
    assert not part.complete
    assert not (tmp_path / "out" / "summary.json").exists()
    marked = [replace(one, prediction="kept") for one in part.items]
    Records(part.header, marked).write(tmp_path / "out" / "u.parquet")
    go(suite, tmp_path, resume=True)
    again = Records.read(tmp_path / "out" / "u.parquet")
    assert again.complete
    assert sum(one.prediction == "kept" for one in again.items) == 3
    others = [one for one in again.items if one.prediction != "kept"]
    assert [one.prediction for one in others] == [said[int(one.item[2:])] for one in others]


#: an evaluation that is killed within its third batch, with what it has saved before
KILLED = """
import os, signal, sys
from pathlib import Path
from modicum.evaluate import run_suite
from modicum.evaluate.suites import load_suite

run_suite._SAVE_EVERY = 0.0
done = 0

def advance(items):
    global done
    done += items
    if done > 6:
        os.kill(os.getpid(), signal.SIGKILL)

folder = Path(sys.argv[1])
suite = load_suite(str(folder / "own.yaml")).only(["t"])
run_suite.run_suite(suite, sys.argv[2], data_dir=folder, output=folder / "out", batch_size=3, advance=advance)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system cannot kill so")
def test_a_run_that_is_killed_is_continued(suite, tmp_path, said):
    ended = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path), str(llama())],
        check=False,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    part = Records.read(tmp_path / "out" / "t.parquet")
    assert len(part) == 6
    assert not (tmp_path / "out" / "summary.json").exists()
    marked = [replace(one, prediction="kept") for one in part.items]
    Records(part.header, marked).write(tmp_path / "out" / "t.parquet")
    (result,) = go(suite.only(["t"]), tmp_path, resume=True)
    assert result.tasks["t"].items == 7
    again = Records.read(tmp_path / "out" / "t.parquet")
    assert again.complete
    assert sum(one.prediction == "kept" for one in again.items) == 6
    (other,) = [one for one in again.items if one.prediction != "kept"]
    assert other.prediction == said[int(other.item[2:])]
    assert result.tasks["t"].metrics["accuracy"].value == pytest.approx(5 / 7)


def test_a_limit_is_raised_later(suite, tmp_path):
    go(suite, tmp_path, limit=2)
    (result,) = go(suite, tmp_path, limit=5, resume=True)
    assert result.tasks["t"].items == 5
    with pytest.raises(DataError, match="does not have"):
        go(suite, tmp_path, limit=3, resume=True)


def test_results_are_never_mixed(suite, tmp_path):
    go(suite, tmp_path, limit=2)
    before = (tmp_path / "out" / "t.parquet").read_bytes()
    with pytest.raises(ConfigError, match="continue them with --resume"):
        go(suite, tmp_path, limit=2)
    with pytest.raises(DataError, match=r"never mixed.*t.parquet has protocol 'llm-adapters'"):
        go(replace(suite, protocol="perplexity", tasks={"v": {"data": "t", "column": "question"}}), tmp_path,
           resume=True)  # fmt: skip
    suite.tasks["t"]["template"] = "{question}"
    with pytest.raises(DataError, match="template differs"):
        go(suite, tmp_path, limit=2, resume=True)
    assert (tmp_path / "out" / "t.parquet").read_bytes() == before


@pytest.fixture
def adapters(tmp_path):
    """A LoRA and a LoRA-XS adapter that change what the model says."""
    found = []
    targets = ["q_proj", "v_proj"]
    for name, config in (
        ("a", LoraConfig(r=2, target_modules=targets, init_lora_weights=False)),
        ("b", modicum.LoraXSConfig(r=4, target_modules=targets)),
    ):
        torch.manual_seed(3)
        model = get_peft_model(load_base(str(llama())), config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.normal_(std=0.8)
        model.save_pretrained(tmp_path / name)
        found.append(str(tmp_path / name))
    return found


def test_several_adapters_on_one_base(suite, tmp_path, adapters, monkeypatch):
    loaded = []

    def counted(*arguments, **options):
        loaded.append(arguments[0])
        return load_base(*arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(running, "load_base", counted)
        results = go(suite.only(["t"]), tmp_path, adapters=adapters)
    assert loaded == [str(llama())]
    texts = []
    for adapter, result in zip(adapters, results, strict=True):
        assert result.adapter.startswith(f"{adapter}@")
        alone = tmp_path / f"alone-{adapter[-1]}"
        run_suite(suite.only(["t"]), str(llama()), data_dir=tmp_path, output=alone, adapters=[adapter])
        shared = Records.read(tmp_path / "out" / adapter[-1] / "t.parquet")
        texts.append({one.item: one.prediction for one in shared.items})
        one = Records.read(alone / "t.parquet")
        assert texts[-1] == {item.item: item.prediction for item in one.items}
        assert shared.header.base_fingerprint == one.header.base_fingerprint
    assert texts[0] != texts[1]


def test_an_adapter_trained_anew_is_another(suite, tmp_path, adapters):
    go(suite.only(["t"]), tmp_path, adapters=adapters[:1])
    file = tmp_path / "a" / "adapter_config.json"
    file.write_text(file.read_text() + " ")
    with pytest.raises(DataError, match="never mixed"):
        go(suite.only(["t"]), tmp_path, adapters=adapters[:1], resume=True)
    with pytest.raises(ConfigError, match="told apart"):
        go(suite, tmp_path, adapters=[adapters[0], adapters[0]])


def test_prompts_beyond_the_positions_are_noted(suite, tmp_path):
    suite.tasks["t"]["max_new_tokens"] = 123
    suite.tasks["t"]["num_beams"] = 1
    (result,) = go(suite.only(["t"]), tmp_path, limit=1)
    assert result.tasks["t"].notes == [f"up to 1 items run past the 128 positions of {llama()}"]


def test_the_command(suite, tmp_path, capsys):
    words = ["eval", "--suite", tmp_path / "own.yaml", "--data-dir", tmp_path]
    valid = run(capsys, *words, "--validate", "--json")
    assert valid.code == 0, valid.out
    assert valid.json["tasks"][0] == {"task": "t", "items": 7, "notes": []}
    assert not (tmp_path / "out").exists()
    more = ["--model", llama(), "--only", "t", "--limit", 3, "--output", tmp_path / "out"]
    done = run(capsys, *words, *more, "--json")
    assert done.code == 0, done.out
    assert done.json["results"][0]["tasks"]["t"]["items"] == 3
    shown = run(capsys, *words, *more[:-1], tmp_path / "other")
    for part in ("own under llm-adapters, at most 3 items a task", "accuracy", "matched", "wilson"):
        assert part in shown.out


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        (["--suite", "math", "--data", "x"], "leave out --data"),
        (["--resume", "--model", "m", "--data", "d"], "go with --suite"),
        (["--adapter", "a", "--adapter", "b", "--model", "m", "--data", "d"], "on suites only"),
        (["--data", "d"], "--model: it must be given"),
        (["--suite", "math", "--protocol", "lm-eval", "--model", "m"], "--output: it must be given"),
        (["--suite", "glue", "--data-dir", "none", "--validate"], "cola: no data none/glue/cola/dev"),
    ],
)
def test_words_that_do_not_go_together(capsys, words, fault):
    refused = run(capsys, "eval", *words)
    assert refused.code != 0
    assert fault in refused.err
