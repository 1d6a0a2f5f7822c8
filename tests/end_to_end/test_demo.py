"""The demo, cut to a few steps: real processes, real files, four forms of one adapter that agree."""

from __future__ import annotations

import pytest

from modicum.errors import ModicumError
from modicum.store.files import load_adapter
from modicum.train import demo


@pytest.mark.slow
def test_demo(tmp_path):
    from modicum.models.loading import load_base

    told = []
    result = demo.run_demo(tmp_path, methods=[demo.CHECKED], quick=True, tell=told.append)
    (method,) = result.methods
    assert method.method == "lora_xs"
    assert method.values == 42 * 32 * 32
    assert method.steps == 3
    assert method.bytes_bfloat16 <= 1.02 * method.values * 2 + 1024 < method.bytes_float32
    assert method.after["n"] == 8
    assert method.after["low"] <= method.after["value"] <= method.after["high"]
    assert method.start_bytes
    assert method.peak_bytes >= method.start_bytes
    assert [form.form for form in result.forms] == list(demo.FORMS)
    assert result.same
    for form in result.forms:
        assert form.same_texts == form.rows == 8
        assert form.max_logit_difference < 1e-3
    assert result.forms[0].max_logit_difference == result.forms[1].max_logit_difference == 0.0
    assert set(result.example) == {"prompt", "wanted", "before", "after"}
    assert len(told) == 3
    ada, bob = result.served
    assert (ada.model, bob.model) == ("demo/lora_xs", "base")
    assert ada.as_offline
    assert bob.as_offline
    assert ada.answer != bob.answer
    assert result.right
    assert [str(one) for one in result.stored] == ["demo/lora_xs@1"]
    loaded = load_adapter(load_base("embedded", dtype="float32"), tmp_path / "lora_xs" / "adapter.modicum")
    assert loaded.peft_config["default"].r == 32


def test_a_step_that_fails_says_why(tmp_path):
    recipe = demo.demo_recipe("lora_xs", quick=True).with_values(output=str(tmp_path))
    with pytest.raises(ModicumError, match=r"'reload' of the demo failed: .*no adapter\.modicum"):
        demo._work("reload", tmp_path, recipe=recipe)
