"""Small low-bit models whose exports are tested: every number of bits, grid and kind of merged update."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from modicum.models.loading import load_base, load_tokenizer
from modicum.quant.affine import AffineLinear, fold
from modicum.quant.huggingface import quantized_linear
from modicum.quant.spec import AffineSpec

VOCABULARY = 320
KINDS: dict[str, Any] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.3,
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One model: how it is quantized, and the block of an update that was merged into it."""

    bits: int = 4
    block: tuple[int, int] = (1, 32)
    zero_point: str = "float"
    update: tuple[int, int] | None = None
    head: bool = False
    kind: str = "llama"
    options: dict[str, Any] = field(default_factory=dict)

    def model(self) -> Any:
        """A two-layer model with grouped-query attention, hidden 64; its norms and biases do something."""
        torch.manual_seed(0)
        config_type, model_type = KINDS[self.kind]
        model = model_type(config_type(**(SIZES | self.options)))
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.data += torch.randn(parameter.shape) * 0.2
        for name, linear in list(model.named_modules()):
            if isinstance(linear, torch.nn.Linear) and (self.head or name != "lm_head"):
                model.set_submodule(name, self.layer(linear))
        return model.eval().requires_grad_(requires_grad=False)

    def layer(self, linear: torch.nn.Linear) -> AffineLinear:
        """The layer in low bits, with the update merged."""
        spec = AffineSpec(self.bits, self.block, self.zero_point, offset_dtype="float32")
        layer = quantized_linear(linear, spec)
        if self.update:
            rows, columns = self.update
            values = torch.randn(layer.out_features // rows, layer.in_features // columns)
            fold(layer, values * 0.02 * linear.weight.std().item(), self.update)
        return layer


TIED_WITH_BIASES = {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}
CASES = {
    "4 bits": Case(),
    "4 bits, group 64": Case(block=(1, 64), options={"intermediate_size": 128}),
    "4 bits, group 48": Case(block=(1, 48), options={"hidden_size": 96, "head_dim": 24}),
    "4 bits, group 26": Case(
        block=(1, 26), options={"hidden_size": 104, "intermediate_size": 104, "head_dim": 26}
    ),
    "3 bits": Case(3, (1, 16)),
    "2 bits": Case(2),
    "8 bits": Case(8),
    "symmetric, tied, biases": Case(zero_point="none", options=TIED_WITH_BIASES),
    "symmetric 8 bits": Case(8, zero_point="none"),
    "integer zero-points, head too": Case(zero_point="integer", head=True),
    "tiles": Case(block=(8, 4)),
    "update on groups": Case(update=(1, 32)),
    "update on tiles": Case(update=(8, 4)),
    "mistral": Case(kind="mistral", options={"head_dim": 32}),
    "qwen2": Case(kind="qwen2"),
    "qwen3": Case(kind="qwen3", options={"head_dim": 32}),
    "llama3 positions": Case(
        options={
            "rope_parameters": {
                "rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
            }
        }
    ),
}  # fmt: skip


def low_bit(model: Any) -> dict[str, AffineLinear]:
    """The quantized layers by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, AffineLinear)}


@functools.cache
def tokenizer() -> Any:
    """A byte-level tokenizer of `VOCABULARY` tokens."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 4,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    inner.train_from_iterator(
        ["the cat and the hat sat on the mat", "there and then, the cat thanks them"] * 3, trainer
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


@functools.cache
def embedded() -> tuple[Any, Any]:
    """The embedded model with 4 bits a weight in groups of 32, and its tokenizer."""
    model = load_base("embedded", dtype="float32")
    for name, linear in list(model.named_modules()):
        if isinstance(linear, torch.nn.Linear) and name != "lm_head":
            model.set_submodule(name, Case().layer(linear))
    return model.requires_grad_(requires_grad=False), load_tokenizer("embedded")


@dataclass(frozen=True)
class Batch:
    """Two rows of tokens, the second padded on the left."""

    ids: np.ndarray
    mask: np.ndarray
    positions: np.ndarray

    @property
    def real(self) -> np.ndarray:
        return self.mask.astype(bool)


def batch(length: int = 9, padded: int = 3) -> Batch:
    """Random tokens."""
    ids = np.random.default_rng(0).integers(3, VOCABULARY, (2, length))
    mask = np.ones((2, length), np.int64)
    mask[1, :padded] = 0
    return Batch(ids, mask, np.maximum(mask.cumsum(1) - 1, 0))


@torch.no_grad()
def logits(model: Any, given: Batch) -> np.ndarray:
    """What our own model says, (rows, tokens, vocabulary)."""
    values = (torch.from_numpy(array) for array in (given.ids, given.mask, given.positions))
    names = ("input_ids", "attention_mask", "position_ids")
    return model(**dict(zip(names, values, strict=True))).logits.float().numpy()


def relative(found: np.ndarray, wanted: np.ndarray) -> float:
    """‖found − wanted‖ / ‖wanted‖."""
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))
