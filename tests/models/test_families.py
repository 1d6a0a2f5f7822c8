"""Widths of real architectures: whatever units are left out has no part in the model any more."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import get_peft_model
from tests.models_for_tests import VOCABULARY, bert, llama, tokens
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from modicum.adapters.elastic import Cut, SubNetwork, Switch
from modicum.errors import ConfigError
from modicum.methods.elastic_lora import ElasticLoraConfig
from modicum.models.families import Port, family, widths

_SMALL = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.3,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
#: model type -> options that differ from the small ones
DECODERS = {
    "llama": {},
    "mistral": {},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "gemma": {"head_dim": 8},
    "gemma2": {"head_dim": 16, "query_pre_attn_scalar": 16},
    "gemma3_text": {"head_dim": 16, "query_pre_attn_scalar": 16},
    "smollm3": {},
    "granite": {},
    "olmo": {},
    "olmo2": {},
    "olmo3": {},
    "phi3": {},
    "phi": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "gpt2": {"n_inner": 48},
}


def decoder(kind: str, seed: int = 0, **options: object) -> Any:
    """A two-layer decoder of this model type, hidden 32, every parameter random."""
    torch.manual_seed(seed)
    config = CONFIG_MAPPING[kind](**(_SMALL | DECODERS[kind] | options))
    model = AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():  # biases start at zero, which would hide mistakes
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("kind", DECODERS)
def test_a_cut_width_is_the_model_whose_consumers_do_not_see_the_other_units(kind: str) -> None:
    model = decoder(kind)
    chosen = {width.name: max(1, width.units * (2 + width.block) // 4) for width in widths(model)}
    assert chosen
    whole = {width.name: width for width in widths(model)}
    adapted = get_peft_model(model, ElasticLoraConfig(r=2, target_modules="all-linear"))
    assert {width.name: width for width in widths(adapted)} == whole, "names of the model itself"
    ids = tokens()
    with torch.no_grad():
        before = adapted(ids).logits
        cuts = {
            layer: cut for name, units in chosen.items() for layer, cut in whole[name].cuts(units).items()
        }
        Switch(adapted).activate(SubNetwork(cuts=cuts, widths=chosen))
        cut = adapted(ids).logits
        Switch(adapted).activate(None)
        for name, units in chosen.items():
            for port in whole[name].inputs:
                base = model.get_submodule(port.layer).get_base_layer()
                columns = base.weight if base.__class__.__name__ == "Conv1D" else base.weight.T
                columns[port.runs(units)[0][1] :] = 0
        expected = adapted(ids).logits
    torch.testing.assert_close(cut, expected, atol=2e-4, rtol=1e-4)
    assert (cut - before).abs().max() > 0.01, "the units that are left out matter in this model"


def test_widths_of_a_classifier_and_of_a_model_without_head() -> None:
    names = [width.name for width in widths(bert())]
    assert names[:2] == ["bert.encoder.layer.0.heads", "bert.encoder.layer.0.mlp"]
    assert [width.name for width in widths(bert().bert)] == [name.removeprefix("bert.") for name in names]
    assert widths(llama().model)[0].name == "layers.0.heads"


def test_widths_need_no_weights() -> None:
    with torch.device("meta"):
        bare = decoder("llama")
    assert widths(bare) == widths(llama())


def test_fused_layers_have_one_run_in_each_part() -> None:
    heads, mlp = widths(decoder("phi3"))[:2]
    assert (heads.units, heads.size, heads.cuts_outputs) == (2, 2, False)
    assert heads.outputs[0].runs(1) == ((0, 16), (32, 40), (48, 56))
    assert mlp.outputs[0].runs(5) == ((0, 5), (48, 53))
    assert heads.cuts(1) == {"model.layers.0.self_attn.o_proj": Cut(inputs=((0, 16),))}
    assert widths(decoder("gpt2"))[0].outputs[0] == Port(
        "transformer.h.0.attn.c_attn", ((0, 8), (32, 8), (64, 8))
    )


def test_full_width_cuts_nothing_and_impossible_ones_are_refused() -> None:
    width = widths(llama())[1]
    assert width.cuts(48) == {}
    for units in (0, 49):
        with pytest.raises(ConfigError, match=r"model\.layers\.0\.mlp has 1 to 48 units"):
            width.cuts(units)


def test_norms_over_all_heads_keep_them_together() -> None:
    assert {width.kind for width in widths(decoder("olmo2"))} == {"mlp"}
    assert {width.kind for width in widths(decoder("qwen3"))} == {"heads", "mlp"}


def test_unknown_families_are_refused_by_name() -> None:
    model = llama()
    assert family(model) == "llama"
    object.__setattr__(model.config, "model_type", "mamba")
    with pytest.raises(ConfigError, match=r"'mamba'.*gpt2.*llama"):
        widths(model)
