"""Small random models of real architectures, built from configurations alone."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

VOCABULARY = 67


#: options of methods whose defaults are for wider models than these
SMALL = {"qa_lora": {"pool": 16}, "qa_blora": {"pool": 16}}


def base_for(method: str, model):
    """`model` as the method needs it: quantized to 8 bits in place where the method trains codes."""
    from modicum import AffineConfig
    from modicum.adapters import registry
    from modicum.quant.huggingface import AffineQuantizer, quantize_linears

    if method in registry.names() and registry.get(method).on_grid:
        heads = ["lm_head", "classifier"]
        config = AffineConfig(
            bits=8, group_size=16, zero_point="integer", residuals=True, modules_to_not_convert=heads
        )
        quantize_linears(model, config)
        model.hf_quantizer = AffineQuantizer(config)
    return model


def llama(dtype: torch.dtype = torch.float32, *, tied: bool = False, seed: int = 0) -> LlamaForCausalLM:
    """A two-layer Llama with grouped-query attention, hidden 32."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def gpt2(seed: int = 0) -> GPT2LMHeadModel:
    """A two-layer GPT-2 (transposed Conv1D weights, biases), hidden 32."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=64, n_embd=32, n_layer=2, n_head=4, initializer_range=0.3,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = GPT2LMHeadModel(config).eval()
    for name, parameter in model.named_parameters():  # biases start at zero, which would hide mistakes
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def bert(num_labels: int = 3, seed: int = 0) -> BertForSequenceClassification:
    """A two-layer BERT classifier with biases, hidden 32."""
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=64, num_labels=num_labels, initializer_range=0.3,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = BertForSequenceClassification(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    return model


#: model types of encoders whose widths are known
ENCODERS = ("bert", "roberta", "xlm-roberta", "electra")


def encoder(kind: str, seed: int = 0) -> Any:
    """A two-layer classifier of this model type with random biases, hidden 32."""
    if kind == "bert":
        return bert(seed=seed)
    torch.manual_seed(seed)
    config = CONFIG_MAPPING[kind](
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=64, num_labels=3, initializer_range=0.3, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0, **({"embedding_size": 16} if kind == "electra" else {}),
    )  # fmt: skip
    model = AutoModelForSequenceClassification.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def tokens(rows: int = 3, length: int = 7, seed: int = 0) -> torch.Tensor:
    """Random token ids (rows, length), none of them special."""
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))
