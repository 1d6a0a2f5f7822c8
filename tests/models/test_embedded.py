"""The embedded base model: it loads offline, and its card says what metrics.json says."""

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from modicum.models import embedded


@pytest.fixture(scope="module")
def metrics():
    return json.loads((embedded.path() / "metrics.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def card():
    return (embedded.path() / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def loaded():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(
        embedded.path(), dtype=torch.float32, local_files_only=True
    ).eval()
    return model, AutoTokenizer.from_pretrained(embedded.path(), local_files_only=True)


def test_it_is_small(loaded, metrics):
    model, _ = loaded
    count = sum(p.numel() for p in model.parameters())
    assert count == metrics["parameters"]
    assert 5_000_000 <= count <= 10_000_000
    assert sum(file.stat().st_size for file in embedded.path().iterdir() if file.is_file()) <= 25_000_000


def test_linear_layers_divide_into_groups_of_32(loaded):
    model, _ = loaded
    for module in model.model.modules():
        if isinstance(module, torch.nn.Linear):
            assert module.in_features % 32 == 0
            assert module.out_features % 32 == 0


def test_special_tokens_agree(loaded):
    model, tokenizer = loaded
    for name in ("pad", "bos", "eos"):
        assert getattr(tokenizer, f"{name}_token_id") == getattr(model.config, f"{name}_token_id")
        assert getattr(model.generation_config, f"{name}_token_id") == getattr(tokenizer, f"{name}_token_id")
    assert len(tokenizer) == model.config.vocab_size


def test_any_text_survives_the_tokenizer(loaded):
    _, tokenizer = loaded
    for text in ("Two red hats, please.", "naïve 東京 \n\t 3.14 — ok", " leading and trailing "):
        assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_the_chat_template_marks_the_turns(loaded):
    _, tokenizer = loaded
    messages = [
        {"role": "user", "content": "Say yes."},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "Again."},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<|user|>Say yes.<|assistant|>yes<|eos|><|user|>Again.<|assistant|>"


def test_the_recorded_perplexity_comes_back(loaded, metrics):
    model, tokenizer = loaded
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(metrics["passage"]["text"]).input_ids]])
    with torch.no_grad():
        loss = model(input_ids=ids, labels=ids).loss
    assert loss.exp().item() == pytest.approx(metrics["passage"]["perplexity"], rel=0.01)


def test_the_card_is_written_from_the_measured_numbers(card, metrics):
    render = runpy.run_path(str(Path(__file__).parents[2] / "scripts/embedded_card.py"))["render"]
    assert card == render(metrics)


def test_no_path_of_a_machine_is_recorded():
    # The tokenizer's own file is left out: its vocabulary has entries that look like paths.
    for name in (
        "config.json",
        "generation_config.json",
        "metrics.json",
        "tokenizer_config.json",
        "README.md",
    ):
        text = (embedded.path() / name).read_text(encoding="utf-8")
        assert not re.search(r"(?<![\w.])/(work|home|tmp|root|Users)\b", text), name


def test_the_path_needs_no_torch():
    code = (
        "import sys; from modicum.models import embedded; embedded.path(); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
