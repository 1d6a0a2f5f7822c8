"""A small base model with a tokenizer on disk, adapters for it, and a way to run a verb."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests import models_for_tests as models

import modicum
from modicum.cli import main
from modicum.store.files import save_adapter

if TYPE_CHECKING:
    from pathlib import Path


@dataclass
class Outcome:
    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        return json.loads(self.out)


def run(capsys: Any, *words: Any) -> Outcome:
    """What `modicum WORDS` does: exit code and output."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in words])
    shown = capsys.readouterr()
    return Outcome(int(stop.value.code or 0), shown.out, shown.err)


def tokenizer() -> Any:
    """One token per word w0 … w63, for the vocabulary of the test models."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(models.VOCABULARY - 3))]
    inner = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="w0"))
    inner.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", unk_token="w0"
    )


def trained(model: Any, config: Any = None, size: float = 0.3) -> Any:
    """`model` with an adapter that does something."""
    model = get_peft_model(model, config or modicum.LoraXSConfig(r=4, alpha=6.0)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_((torch.randn(parameter.shape, generator=generator) * size).bfloat16())
    return model


@dataclass
class Files:
    folder: Path
    base: Path
    record: Path
    peft: Path
    lora: Path
    text: Path
    #: logits of the adapted model on `models.tokens()`
    wanted: torch.Tensor


def make_files(folder: Path) -> Files:
    """A base model with a tokenizer, the same LoRA-XS adapter as record and folder, a LoRA, and a text."""
    base = folder / "base"
    models.llama().save_pretrained(base)
    tokenizer().save_pretrained(base)
    model = trained(models.llama())
    record = save_adapter(model, folder / "adapter.modicum", metadata={"who": "me"}, recipe_digest="abc").path
    model.save_pretrained(folder / "peft")
    trained(models.llama(), LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(folder / "lora")
    text = folder / "text.txt"
    text.write_text("w1 w5 w9 w2 w7\n\nw3 w3 w8 w20 w40 w11 w60\n")
    with torch.no_grad():
        wanted = model(input_ids=models.tokens()).logits
    return Files(folder, base, record, folder / "peft", folder / "lora", text, wanted)
