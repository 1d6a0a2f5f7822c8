"""Loading models and tokenizers, and what is said when there are none."""

from __future__ import annotations

import pytest
from tests.small_checkpoints import bert, llama

from modicum.errors import ConfigError
from modicum.models.loading import load_base, load_tokenizer, resolve


def test_tasks_choose_the_head():
    assert type(load_base(str(llama()))).__name__ == "LlamaForCausalLM"
    model = load_base(
        str(llama()),
        "seq_cls",
        num_labels=3,
        label_names=["a", "b", "c"],
        tokenizer=load_tokenizer(str(llama())),
    )
    assert model.score.out_features == 3
    assert model.config.id2label == {0: "a", 1: "b", 2: "c"}
    assert model.config.pad_token_id == 0
    assert load_base(str(bert()), "regression").config.num_labels == 1


def test_without_a_gpu_automatic_is_float32(tmp_path):
    import torch

    load_base(str(llama()), dtype="bfloat16").save_pretrained(tmp_path)
    wanted = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    assert load_base(str(tmp_path)).dtype == wanted
    assert load_base(str(tmp_path), dtype="bfloat16").dtype == torch.bfloat16


def test_embedded_is_a_model():
    assert load_base("embedded").config.vocab_size >= len(load_tokenizer("embedded"))


def test_a_missing_model_names_the_nearest(monkeypatch):
    with pytest.raises(ConfigError, match=r"no model .*did you mean 'llama'"):
        load_base(str(llama().with_name("lama")))
    with pytest.raises(ConfigError, match=r"holds no model: it has no config.json; models inside: .*llama"):
        resolve(str(llama().parent))
    with pytest.raises(ConfigError, match=r"did you mean 'embedded'.*HF_HUB_OFFLINE"):
        load_base("embeded")


def test_a_checkpoint_for_another_task_is_refused():
    with pytest.raises(ConfigError, match=r"no complete checkpoint for causal_lm|no model"):
        load_base(str(bert()))


def test_a_tokenizer_without_pad_token_pads_with_the_end_mark(tmp_path):
    tokenizer = load_tokenizer(str(llama()))
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text((llama() / "config.json").read_text())
    assert load_tokenizer(str(tmp_path)).pad_token == "</s>"
