"""Small saved models with tokenizers of their own, and small data files; no network, no shared folder."""

from __future__ import annotations

import functools
import json
import os
import tempfile
from pathlib import Path
from typing import Any

CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}"
    "</s>{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
CHAT_WITHOUT_MARKS = CHAT.replace("{% generation %}", "").replace("{% endgeneration %}", "")


@functools.cache
def _root() -> Path:
    return Path(tempfile.mkdtemp(prefix="checkpoints-", dir=os.environ["MODICUM_CACHE"]))


@functools.cache
def tokenizer(chat: str | None = None, *, sep: bool = False) -> Any:
    """One token per character: `<pad>` 0, `<s>` 1 (put in front of a text), `</s>` 2, `<sep>` 3."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>", "<sep>", "<unk>"]
    characters = [chr(code) for code in range(32, 127)] + ["\n"]
    vocabulary = {token: index for index, token in enumerate([*special, *characters])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    core.decoder = decoders.Fuse()
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <sep> $B", special_tokens=[("<s>", 1), ("<sep>", 3)]
    )
    marks = {"sep_token": "<sep>"} if sep else {}
    result = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        **marks,
    )
    result.chat_template = chat
    return result


@functools.cache
def llama(*, dropout: float = 0.0) -> Path:
    """The folder of a two-layer Llama, hidden 32."""
    from transformers import LlamaConfig, LlamaForCausalLM, set_seed

    set_seed(0)
    config = LlamaConfig(
        vocab_size=101, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        attention_dropout=dropout, initializer_range=0.2,
    )  # fmt: skip
    return _saved(LlamaForCausalLM(config), "llama" if not dropout else "llama-dropout")


@functools.cache
def bert() -> Path:
    """The folder of a two-layer BERT without dropout, hidden 32."""
    from transformers import BertConfig, BertModel, set_seed

    set_seed(0)
    config = BertConfig(
        vocab_size=101, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=128, pad_token_id=0, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        initializer_range=0.2,
    )  # fmt: skip
    return _saved(BertModel(config), "bert")


def _saved(model: Any, name: str) -> Path:
    folder = _root() / name
    model.save_pretrained(folder)
    tokenizer(sep=name == "bert").save_pretrained(folder)
    return folder


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    """`rows` as JSON lines at `path`."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def sums(path: Path, count: int, first: int = 0) -> Path:
    """Prompts such as `3+4=` with their completion."""
    numbers = range(first, first + count)
    return write_jsonl(
        path, [{"prompt": f"{n % 7}+{n % 5}=", "completion": f"{n % 7 + n % 5}"} for n in numbers]
    )


def signs(path: Path, count: int, first: int = 0) -> Path:
    """Sentences whose label is whether they hold the letter z, of many lengths."""
    rows = []
    for n in range(first, first + count):
        label = n % 2
        rows.append({"sentence": "ab" * (n % 9 + 1) + ("z" if label else "y"), "label": label})
    return write_jsonl(path, rows)


def recipe_values(folder: Path, task: str = "causal_lm", **train: Any) -> dict[str, Any]:
    """A recipe that trains in about a second, with data files in `folder`."""
    make = sums if task == "causal_lm" else signs
    return {
        "model": {"name_or_path": str(llama() if task == "causal_lm" else bert()), "task": task},
        "data": {
            "train": str(make(folder / "train.jsonl", 24)),
            "validation": str(make(folder / "validation.jsonl", 8, 100)),
            "max_length": 64,
        },
        "method": {"name": "lora", "r": 2},
        "train": {
            "max_steps": 6,
            "batch_size": 4,
            "eval_steps": 3,
            "learning_rate": 5e-3,
            "report_to": "none",
            **train,
        },
        "output": str(folder / "run"),
    }
