"""Smaller models as Transformers loads them: stock classes where one fits, ours where no layer is like the other."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests.models.test_families import DECODERS, decoder
from tests.models_for_tests import ENCODERS, bert, encoder, llama, tokens
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertForPreTraining,
)

from modicum.errors import ConfigError
from modicum.models.families import family, widths
from modicum.models.subnetwork import is_ours, narrow, smaller_class

if TYPE_CHECKING:
    from pathlib import Path


def units(model: Any, *, uniform: bool) -> dict[str, int]:
    """Three quarters of the channels and all heads but one group; the second layer differs unless `uniform`."""
    return {
        w.name: (w.units * 3 // 4 if w.kind == "mlp" else w.units - 1) + (w.block if not uniform else 0)
        for w in widths(model)
    }


def saved(model: Any, left: dict[str, int], folder: Path) -> tuple[Any, Any]:
    """The class that `folder` was written for, and the model cut in memory."""
    small_class, config = smaller_class(model, left)
    cut = copy.deepcopy(model)
    narrow(cut, left)
    with torch.device("meta"):
        empty = small_class(config).to(model.dtype)
    empty.save_pretrained(folder, state_dict=cut.state_dict())
    return small_class, cut


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=tokens()).logits


@pytest.mark.parametrize("uniform", [True, False], ids=["uniform", "per layer"])
@pytest.mark.parametrize("kind", [*DECODERS, *ENCODERS])
def test_the_saved_model_is_the_cut_one(kind: str, uniform: bool, tmp_path: Path) -> None:
    model = encoder(kind) if kind in ENCODERS else decoder(kind)
    left = units(model, uniform=uniform)
    small_class, cut = saved(model, left, tmp_path)
    auto = AutoModelForSequenceClassification if kind in ENCODERS else AutoModelForCausalLM
    small, info = auto.from_pretrained(tmp_path, output_loading_info=True)
    assert type(small) is small_class
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert torch.equal(logits(small), logits(cut)), "the same kernels on the same shapes"
    assert {w.name: w.units for w in widths(small)} == left
    assert family(small) == family(model)
    # heads that do not fill hidden_size have no place in these configurations
    assert is_ours(small_class) == (not uniform or kind in {"gpt2", "opt", *ENCODERS})


def test_a_llama_of_which_heads_are_gone_is_written_as_a_mistral(tmp_path: Path) -> None:
    model = decoder("llama", num_key_value_heads=4)
    left = {w.name: 3 if w.kind == "heads" else 40 for w in widths(model)}
    small_class, cut = saved(model, left, tmp_path)
    assert small_class.__name__ == "MistralForCausalLM"
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["num_attention_heads"], config["head_dim"], config["sliding_window"]) == (3, 8, None)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(cut))
    biased = decoder("llama", num_key_value_heads=4, attention_bias=True)
    assert is_ours(smaller_class(biased, left)[0]), "Mistral has no biases"


@pytest.mark.parametrize("kind", DECODERS)
def test_per_layer_models_generate_with_a_cache(kind: str, tmp_path: Path) -> None:
    model = decoder(kind)
    _, cut = saved(model, units(model, uniform=False), tmp_path)
    small: Any = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert is_ours(type(small))
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    whole = cut.generate(tokens(2, 5), use_cache=False, **options)
    assert whole.shape[1] > 6
    found = small.generate(tokens(2, 5), return_dict_in_generate=True, **options)
    assert torch.equal(found.sequences, whole)
    # keys and values of the heads that are left, layer by layer
    left = [w.units for w in widths(small) if w.kind == "heads"]
    kept = [layer.keys.shape[1] for layer in found.past_key_values.layers]
    assert kept == (left or [small.config.num_key_value_heads] * 2)


def test_per_layer_models_work_like_others(tmp_path: Path) -> None:
    model = llama()
    _, cut = saved(model, units(model, uniform=False), tmp_path / "a")
    small: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    whole = cut.generate(tokens(2, 5), use_cache=False, **options)
    assert torch.equal(small.generate(tokens(2, 5), **options), whole)
    assert torch.equal(small.generate(tokens(2, 5), cache_implementation="static", **options), whole)

    small.save_pretrained(tmp_path / "b")
    again: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "b", dtype=torch.bfloat16)
    assert again.config.mlp_channels == [36, 37]
    assert again.config.key_value_heads == [1, 2]
    assert again.dtype == torch.bfloat16
    torch.testing.assert_close(logits(again).float(), logits(cut), rtol=0.1, atol=0.5)
    assert AutoModel.from_pretrained(tmp_path / "b").layers[0].mlp.up_proj.out_features == 36
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path / "b", num_labels=3)
    assert logits(classifier).shape == (3, 3)
    assert AutoModelForCausalLM.from_config(small.config).num_parameters() == small.num_parameters()


def test_training_goes_through_checkpointing_and_adapters(tmp_path: Path) -> None:
    model = llama()
    saved(model, units(model, uniform=False), tmp_path)
    grads = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        small: Any = AutoModelForCausalLM.from_pretrained(tmp_path)
        adapted = get_peft_model(small, LoraConfig(r=2, target_modules="all-linear"))
        if checkpointing:
            small.gradient_checkpointing_enable()
            small.enable_input_require_grads()
        adapted.train()(input_ids=tokens(), labels=tokens()).loss.backward()
        grads.append([p.grad.clone() for p in adapted.parameters() if p.requires_grad])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*grads, strict=True))


def test_a_smaller_model_can_be_made_smaller_again(tmp_path: Path) -> None:
    model = decoder("phi3")
    saved(model, units(model, uniform=False), tmp_path / "a")
    small: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    left = {w.name: 1 if w.kind == "heads" else 20 for w in widths(small)}
    small_class, cut = saved(small, left, tmp_path / "b")
    assert small_class.__name__ == "Phi3ForCausalLM", "uniform again"
    narrow(model, left)
    assert torch.equal(logits(cut), logits(model))
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "b")), logits(model))


def test_widths_that_are_not_there_and_classes_we_do_not_make_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"no width 'model\.layers\.0\.mpl' \(did you mean"):
        smaller_class(llama(), {"model.layers.0.mpl": 3})
    with pytest.raises(ConfigError, match="1 to 48 units, not 0"):
        narrow(llama(), {"model.layers.0.mlp": 0})
    with pytest.raises(ConfigError, match="a BertForPreTraining cannot be made smaller"):
        smaller_class(BertForPreTraining(bert().config), {})


def _in_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_our_classes_need_modicum_and_stock_ones_do_not(tmp_path: Path) -> None:
    model = llama()
    saved(model, units(model, uniform=False), tmp_path / "ours")
    saved(model, units(model, uniform=True), tmp_path / "stock")
    load = "from transformers import AutoModelForCausalLM as A, AutoConfig; A.from_pretrained({!r})"
    ours, stock = load.format(str(tmp_path / "ours")), load.format(str(tmp_path / "stock"))
    alone = _in_python(
        f"{stock}\nimport sys\nassert 'modicum' not in sys.modules\n"
        f"try:\n    {ours}\nexcept ValueError as error:\n    assert 'model type `modicum_llama`' in str(error)\n"
        f"else:\n    raise SystemExit(2)\nimport modicum\n{ours}"
    )
    assert alone.returncode == 0, alone.stderr


def test_knowing_our_model_types_imports_no_model() -> None:
    code = (
        "import modicum, sys; assert 'torch' not in sys.modules; from transformers import CONFIG_MAPPING as known; "
        "assert 'modicum_llama' in known; "
        "assert not [m for m in sys.modules if m.startswith('transformers.models.llama')]"
    )
    done = _in_python(code)
    assert done.returncode == 0, done.stderr


def test_the_configuration_alone_can_be_read(tmp_path: Path) -> None:
    model = llama()
    saved(model, units(model, uniform=False), tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert (config.model_type, config.mlp_channels, config.hidden_size) == ("modicum_llama", [36, 37], 32)
