"""Evaluation: batches and padding change nothing, generation equals one prompt at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tests.small_checkpoints import bert, llama, signs, sums, write_jsonl

from modicum.data.files import load_rows
from modicum.data.options import DataOptions
from modicum.data.prepare import encode
from modicum.errors import ConfigError, DataError
from modicum.evaluate.generate import complete
from modicum.evaluate.load import data_options, load_for_evaluation
from modicum.evaluate.run import evaluate
from modicum.models.loading import load_base, load_tokenizer


@pytest.fixture(scope="module")
def language():
    return load_base(str(llama())), load_tokenizer(str(llama()))


def rows_of(path, tokenizer, task="causal_lm", **options):
    return encode(load_rows(str(path)), DataOptions(**options), tokenizer, task, 2)


def test_language_metrics_equal_a_direct_computation(tmp_path, language):
    model, tokenizer = language
    data = rows_of(sums(tmp_path / "a.jsonl", 9), tokenizer)
    total, count = 0.0, 0
    for index in range(len(data)):
        ids, labels = (torch.tensor([data[index][key]]) for key in ("input_ids", "labels"))
        number = int((labels[:, 1:] != -100).sum())
        with torch.no_grad():
            total += model(input_ids=ids, labels=labels).loss.item() * number
        count += number
    for batch_size in (1, 4, 16):
        found = evaluate(model, tokenizer, data, batch_size=batch_size, resamples=20, exact_match=False)
        assert found.metrics["loss"].value == pytest.approx(total / count, rel=1e-5)
        assert found.metrics["loss"].n == count
        assert found.metrics["perplexity"].value == pytest.approx(np.exp(total / count), rel=1e-4)
        assert found.metrics["loss"].low <= found.metrics["loss"].value <= found.metrics["loss"].high


def test_batched_generation_equals_one_prompt_at_a_time(language):
    model, tokenizer = language
    prompts = [[1, *([10 + n] * (n % 6 + 1))] for n in range(9)]
    together = complete(model, tokenizer, prompts, max_new_tokens=6, batch_size=4)
    alone = [complete(model, tokenizer, [prompt], max_new_tokens=6)[0] for prompt in prompts]
    assert together == alone
    assert any(together)


def test_exact_match_counts_equal_completions(tmp_path, language):
    model, tokenizer = language
    prompts = [f"{n}+{n}=" for n in range(6)]
    ids = [[1, *tokenizer(prompt, add_special_tokens=False)["input_ids"]] for prompt in prompts]
    said = complete(model, tokenizer, ids, max_new_tokens=3)
    wanted = [text if n < 4 else text + "!" for n, text in enumerate(said)]
    path = write_jsonl(
        tmp_path / "a.jsonl", [{"prompt": p, "completion": w} for p, w in zip(prompts, wanted, strict=True)]
    )
    data = rows_of(path, tokenizer)
    # one row of padding must not change what is said, nor may the order of rows
    found = evaluate(model, tokenizer, data, batch_size=4, resamples=5, max_new_tokens=3)
    assert found.metrics["exact_match"].value == pytest.approx(4 / 6)
    assert found.metrics["exact_match"].method == "wilson"
    assert found.predictions == said


def test_exact_match_needs_prompts(tmp_path, language):
    model, tokenizer = language
    data = rows_of(write_jsonl(tmp_path / "a.jsonl", [{"text": "abc"}]), tokenizer)
    assert "exact_match" not in evaluate(model, tokenizer, data, resamples=5).metrics
    with pytest.raises(ConfigError, match="exact match needs rows of prompt and completion"):
        evaluate(model, tokenizer, data, exact_match=True)


@pytest.mark.parametrize("task", ["seq_cls", "regression"])
def test_labelled_rows(tmp_path, task):
    tokenizer = load_tokenizer(str(bert()))
    torch.manual_seed(0)
    model = load_base(str(bert()), task, num_labels=2, tokenizer=tokenizer)
    data = rows_of(signs(tmp_path / "a.jsonl", 20), tokenizer, task)
    found = evaluate(model, tokenizer, data, task, batch_size=6, resamples=20)
    one = evaluate(model, tokenizer, data, task, batch_size=1, resamples=20)
    assert found.predictions == pytest.approx(one.predictions, abs=1e-5)
    first = "accuracy" if task == "seq_cls" else "pearson"
    assert found.metrics[first].n == 20
    if task == "seq_cls":
        assert found.metrics["accuracy"].value == np.mean(np.array(found.predictions) == data.targets)


def test_progress_counts_every_row(tmp_path, language):
    model, tokenizer = language
    seen = []
    data = rows_of(sums(tmp_path / "a.jsonl", 7), tokenizer)
    evaluate(model, tokenizer, data, batch_size=3, resamples=2, advance=seen.append)
    assert sum(seen) == 14


def test_options_of_the_eval_verb():
    assert data_options(["max_length=64", "data.prompt_column=q"]).max_length == 64
    with pytest.raises(ConfigError) as caught:
        data_options(["max_lenght=64", "packing=perhaps"])
    assert "did you mean 'max_length'" in str(caught.value)
    assert "packing" in str(caught.value)
    with pytest.raises(ConfigError, match="write name=value"):
        data_options(["max_length"])
    with pytest.raises(ConfigError, match="did you mean 'seq_cls'"):
        load_for_evaluation("embedded", "x.jsonl", task="seqcls")


def test_no_rows_are_an_error(language):
    from modicum.data.encoded import Encoded

    with pytest.raises(DataError, match="no rows to evaluate on"):
        evaluate(*language, Encoded([]))
