"""A LoRA folder that equals the adapter exactly, read by stock PEFT without modicum."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tests import models_for_tests as models
from tests.store.test_files import logits, shaken

import modicum
from modicum.adapters.elastic import Cut, SubNetwork, Switch
from modicum.errors import ConfigError
from modicum.methods.elastic_lora import ElasticLoraConfig
from modicum.store.lora_export import export_lora


def adapter(**options):
    return modicum.LoraXSConfig(**({"r": 4, "alpha": 6.0, "init_weights": False} | options))


CASES = {
    "llama": (models.llama, {}),
    "ranks and alphas": (models.llama, {
        "rank_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 7}, "alpha_pattern": {"v_proj": 1.5},
        "exclude_modules": ["k_proj"],
    }),
    "some layers": (models.llama, {"layers_to_transform": [1], "layers_pattern": "layers"}),
    "regular expression": (models.llama, {"target_modules": r".*\.0\.self_attn\.[qv]_proj"}),
    "diagonal": (models.llama, {"core": "diagonal"}),
    "without sigma": (models.llama, {"use_sigma": False}),
    "random basis": (models.llama, {"basis": "random"}),
    "gpt2": (models.gpt2, {"target_modules": ["c_attn", "c_fc", "c_proj"]}),
    "bert": (models.bert, {"task_type": "SEQ_CLS", "target_modules": ["query", "value", "output.dense"]}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_lora_has_the_same_outputs(case, tmp_path):
    make, options = CASES[case]
    model = shaken(get_peft_model(make(), adapter(**options))).eval()
    written = export_lora(model, tmp_path)
    lora = PeftModel.from_pretrained(make(), tmp_path)
    assert isinstance(lora.peft_config["default"], LoraConfig)
    wanted = logits(model)
    assert (wanted - logits(make())).abs().max() > 0.01
    torch.testing.assert_close(logits(lora), wanted, rtol=1e-5, atol=2e-5)
    state = load_file(tmp_path / "adapter_model.safetensors")
    own = {key: value for key, value in state.items() if ".lora_" in key}
    assert written.values == sum(value.numel() for value in own.values())
    assert written.layers == len(own) // 2
    assert written.bytes == sum(
        (tmp_path / f).stat().st_size for f in ("adapter_model.safetensors", "adapter_config.json")
    )


def test_layers_that_differ_get_their_rank_and_alpha(tmp_path):
    model = get_peft_model(models.llama(), adapter(**CASES["ranks and alphas"][1]))
    assert export_lora(model, tmp_path).ranks == (2, 4, 7)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["r"] == 4
    assert config["lora_alpha"] == 6
    assert config["peft_type"] == "LORA"
    assert config["rank_pattern"] == {
        r"^model\.layers\.0\.self_attn\.q_proj": 2,
        r"^model\.layers\.1\.self_attn\.q_proj": 2,
        r"^model\.layers\.1\.mlp\.down_proj": 7,
    }
    assert set(config["alpha_pattern"].values()) == {1.5}


def test_a_name_that_ends_like_an_adapted_one_is_left_alone(tmp_path):
    class Pair(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.proj = torch.nn.Linear(8, 8)
            self.outer = torch.nn.ModuleDict({"proj": torch.nn.Linear(8, 8)})
            self.config = {"model_type": "custom"}

        def forward(self, x):
            return self.outer["proj"](self.proj(x))

    x = torch.randn(3, 8)
    model = get_peft_model(Pair(), adapter(target_modules="proj")).eval()
    export_lora(model, tmp_path)
    lora = PeftModel.from_pretrained(Pair(), tmp_path)
    torch.testing.assert_close(lora(x), model(x), rtol=1e-5, atol=1e-5)


def test_stock_peft_in_a_process_without_modicum(tmp_path):
    base = models.bert()
    model = shaken(get_peft_model(base, adapter(task_type="SEQ_CLS"))).eval()
    with torch.no_grad():
        wanted = model(input_ids=models.tokens()).logits
    export_lora(model, tmp_path / "lora")
    models.bert().save_pretrained(tmp_path / "base")
    script = f"""
        import json, sys
        import torch
        from peft import PeftModel
        from transformers import AutoModelForSequenceClassification
        base = AutoModelForSequenceClassification.from_pretrained({str(tmp_path / "base")!r})
        model = PeftModel.from_pretrained(base, {str(tmp_path / "lora")!r}).eval()
        with torch.no_grad():
            logits = model(input_ids=torch.tensor({models.tokens().tolist()})).logits
        assert not any(name.split(".")[0] == "modicum" for name in sys.modules)
        print(json.dumps(logits.tolist()))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    got = torch.tensor(json.loads(done.stdout.splitlines()[-1]))
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=2e-5)


def test_what_cannot_or_need_not_be_exported_says_so(tmp_path, monkeypatch):
    model = get_peft_model(models.llama(), adapter())
    export_lora(model, tmp_path)
    with pytest.raises(ConfigError, match="holds an adapter already"):
        export_lora(model, tmp_path)
    export_lora(model, tmp_path, overwrite=True)
    with pytest.raises(ConfigError, match="no adapter 'other'"):
        export_lora(model, tmp_path / "b", "other")
    plain = get_peft_model(models.llama(), LoraConfig(target_modules="all-linear"))
    with pytest.raises(ConfigError, match="'peft' instead of 'lora'"):
        export_lora(plain, tmp_path / "b")
    monkeypatch.setattr("modicum.methods.lora_xs.LoraXS.lora_factors", lambda _: None)
    with pytest.raises(ConfigError, match="no low-rank update"):
        export_lora(model, tmp_path / "b")
    assert not (tmp_path / "b").exists()


def elastic(method, **options):
    """A two-layer Llama with an elastic adapter of R = 8 and 6, alpha 12, that does something."""
    config = {"elastic_lora": ElasticLoraConfig, "lora_xs": modicum.LoraXSConfig}[method]
    values = {"r": 8, "alpha": 12.0, "rank_pattern": {"v_proj": 6}, "init_weights": False, **options}
    return shaken(get_peft_model(models.llama(), config(**values))).eval()


RANKS = {
    "model.layers.0.self_attn.q_proj": 2,
    "model.layers.1.self_attn.v_proj": 5,
    "model.layers.1.mlp.down_proj": 7,
    **{f"model.layers.0.mlp.{name}_proj": 3 for name in ("gate", "up", "down")},
}


@pytest.mark.parametrize("method", ["elastic_lora", "lora_xs"])
def test_the_active_sub_network_is_exported_with_ranks_and_alphas(method, tmp_path):
    model = elastic(method)
    whole = logits(model)
    Switch(model).activate(SubNetwork(ranks=RANKS, choices={"a": 2}))
    written = export_lora(model, tmp_path)
    assert written.ranks == (2, 3, 5, 6, 7, 8)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (8, 12)
    ranks = {key[1:].replace("\\", ""): value for key, value in config["rank_pattern"].items()}
    alphas = {key[1:].replace("\\", ""): value for key, value in config["alpha_pattern"].items()}
    # alpha · k / R
    full = {"model.layers.0.self_attn.v_proj": 6}
    assert ranks == {**RANKS, **full}
    wanted = {name: 12 * k / (6 if "v_proj" in name else 8) for name, k in RANKS.items()}
    assert alphas == wanted
    lora = PeftModel.from_pretrained(models.llama(), tmp_path)
    wanted = logits(model)
    assert (whole - wanted).abs().max() > 0.01
    assert (logits(lora) - wanted).norm() / wanted.norm() < 1e-6
    # with more digits the difference is that of storing factors in float32, which elastic LoRA's are already
    wanted = logits(model.double())
    error = (logits(lora.double()) - wanted).norm() / wanted.norm()
    assert error < (1e-12 if method == "elastic_lora" else 1e-6)
    state = load_file(tmp_path / "adapter_model.safetensors")
    assert state["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"].shape == (2, 32)


def test_without_the_alphas_the_export_would_be_wrong(tmp_path):
    model = elastic("elastic_lora")
    Switch(model).activate(SubNetwork(ranks=RANKS))
    export_lora(model, tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"alpha_pattern": {}}))
    lora = PeftModel.from_pretrained(models.llama(), tmp_path)
    assert (logits(lora) - logits(model)).abs().max() > 0.01


@pytest.mark.parametrize(
    "chosen",
    [
        SubNetwork(cuts={"model.layers.0.mlp.up_proj": Cut(outputs=((0, 16),))}),
        SubNetwork(widths={"model.layers.0.mlp": 16}),
    ],
    ids=["cuts", "widths alone"],
)
def test_narrower_layers_are_refused(chosen, tmp_path):
    model = elastic("elastic_lora")
    Switch(model).activate(chosen)
    with pytest.raises(ConfigError, match="modicum extract"):
        export_lora(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    Switch(model).activate(None)
    assert export_lora(model, tmp_path / "out").ranks == (6, 8)


def test_a_saved_adapter_exports_what_was_active(tmp_path):
    model = elastic("elastic_lora")
    Switch(model).activate(SubNetwork(ranks=RANKS))
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(models.llama(), tmp_path / "adapter").eval()
    export_lora(loaded, tmp_path / "lora")
    lora = PeftModel.from_pretrained(models.llama(), tmp_path / "lora")
    torch.testing.assert_close(logits(lora), logits(model), rtol=1e-5, atol=1e-5)
