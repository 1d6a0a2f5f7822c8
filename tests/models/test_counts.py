"""The closed forms of the baselines against what PEFT really trains and saves."""

from __future__ import annotations

import peft
import pytest
from peft import get_peft_model
from tests.models_for_tests import bert, gpt2, llama

from modicum.errors import ConfigError
from modicum.models.architecture import linear_shapes
from modicum.models.counts import BASELINES, TINY_LORA_U, baseline

CONFIGS = {
    "lora": lambda r, t: peft.LoraConfig(r=r, target_modules=t),
    "dora": lambda r, t: peft.LoraConfig(r=r, target_modules=t, use_dora=True),
    "vera": lambda r, t: peft.VeraConfig(r=r, target_modules=t),
    "tiny_lora": lambda r, t: peft.TinyLoraConfig(r=r, target_modules=t),
    "psoft": lambda r, t: peft.PsoftConfig(r=r, target_modules=t),
}
MODELS = {
    "llama": (llama, ["q_proj", "v_proj", "down_proj"]),
    "gpt2": (gpt2, ["c_attn"]),
    "bert": (bert, ["query", "value", "output.dense"]),
}


def test_every_baseline_is_compared():
    assert set(CONFIGS) == set(BASELINES)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning")
@pytest.mark.parametrize("rank", [1, 4, 8])
@pytest.mark.parametrize(
    ("method", "kind"),
    # PEFT's PSOFT refuses GPT-2's transposed layers
    [(method, kind) for method in BASELINES for kind in MODELS if (method, kind) != ("psoft", "gpt2")],
)
def test_trained_numbers_equal_peft(method, kind, rank):
    make, targets = MODELS[kind]
    base = make()
    shapes = linear_shapes(base, targets)
    model = get_peft_model(base, CONFIGS[method](rank, targets))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert baseline(method).trained(shapes, rank) == trained


@pytest.mark.parametrize("method", BASELINES)
def test_saved_numbers_equal_peft(method, tmp_path):
    make, targets = MODELS["llama"]
    base = make()
    shapes = linear_shapes(base, targets)
    get_peft_model(base, CONFIGS[method](4, targets)).save_pretrained(tmp_path)
    from safetensors.torch import load_file

    saved = sum(tensor.numel() for tensor in load_file(tmp_path / "adapter_model.safetensors").values())
    form = baseline(method)
    assert form.trained(shapes, 4) + form.frozen(shapes, 4) == saved


def test_tiny_lora_vector_has_pefts_length():
    assert peft.TinyLoraConfig().u == TINY_LORA_U


def test_unknown_baseline_names_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'dora' or 'lora'"):
        baseline("doora")


def test_counts_are_integers_for_mixed_shapes():
    shapes = {"a": (3, 5), "b": (7, 2)}
    assert [BASELINES[n].trained(shapes, 2) for n in BASELINES] == [34, 44, 14, 2 * TINY_LORA_U, 10]
