"""Saving and loading adapters: everything round-trips, everything wrong is refused before it does harm."""

from __future__ import annotations

import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, TaskType, VeraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tests import models_for_tests as models

import modicum
from modicum.errors import BaseMismatchError, ConfigError, CorruptAdapterError
from modicum.store.files import load_adapter, save_adapter, to_record, write_atomically
from modicum.store.record import decode, encode, peek

CONFIGS = {
    "lora_xs": lambda **o: modicum.LoraXSConfig(r=4, init_weights=False, **o),
    "lora_xs diagonal": lambda **o: modicum.LoraXSConfig(r=4, core="diagonal", init_weights=False, **o),
    "lora": lambda **o: LoraConfig(r=4, init_lora_weights=False, **({"target_modules": "all-linear"} | o)),
    "dora": lambda **o: LoraConfig(
        r=4, use_dora=True, init_lora_weights=False, **({"target_modules": "all-linear"} | o)
    ),
    "vera": lambda **o: VeraConfig(
        r=8, save_projection=False, init_weights=False, target_modules=["q_proj", "o_proj"], **o
    ),
}


@torch.no_grad()
def shaken(model):
    """`model` with every trained number moved to a value that bfloat16 holds exactly."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.copy_((torch.randn(parameter.shape, generator=generator) * 0.1).bfloat16())
    return model


@torch.no_grad()
def logits(model):
    return model(input_ids=models.tokens()).logits


@pytest.mark.filterwarnings("ignore:Specified to not")  # VeRA's projections come from its seed
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("kind", ["record", "folder"])
def test_an_adapter_comes_back_exactly(name, kind, tmp_path):
    model = shaken(get_peft_model(models.llama(), CONFIGS[name](), adapter_name="mine")).eval()
    if kind == "record":
        saved = save_adapter(model, tmp_path / "a", adapter_name="mine")
        path = saved.path
        assert path.name == "a.modicum"
        assert path.stat().st_size == saved.bytes
        assert saved.bytes == saved.value_bytes + saved.section_bytes + saved.container_bytes
        assert saved.values == sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert saved.rounding_error == 0.0
        assert saved.digest == peek(path).digest
    else:
        model.save_pretrained(tmp_path)
        path = tmp_path / "mine"
    loaded = load_adapter(models.llama(), path)
    assert isinstance(loaded, PeftModel)
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    assert torch.equal(logits(loaded), logits(model))
    assert not torch.equal(logits(loaded), logits(models.llama()))


def test_our_tensors_are_found_under_the_names_peft_gives_them():
    from peft import get_peft_model_state_dict

    from modicum.store.state import AdapterState

    model = get_peft_model(models.bert(), modicum.LoraXSConfig(r=4, task_type="SEQ_CLS"), adapter_name="mine")
    state = AdapterState.of(model, "mine")
    wanted = get_peft_model_state_dict(model, adapter_name="mine", save_embedding_layers=False)
    assert {state.keys[name]: value.data_ptr() for name, value in state.tensors.items()} == {
        key: value.data_ptr() for key, value in wanted.items()
    }
    assert state.full_names == {"classifier.weight", "classifier.bias"}


def test_a_record_is_small(tmp_path):
    model = get_peft_model(models.llama(), modicum.LoraXSConfig(r=16))
    saved = save_adapter(model, tmp_path / "a.modicum", dtype="float16")
    assert saved.values == 14 * 16 * 16
    assert saved.bytes <= 1.02 * saved.values * 2 + 1024
    assert 0 < saved.rounding_error < 1e-2  # the initial cores of 1e-5 are subnormal in float16


def test_all_options_come_back(tmp_path):
    config = modicum.LoraXSConfig(
        r=4, alpha=3.0, target_modules=["q_proj", "down_proj"], rank_pattern={"down_proj": 2}, dropout=0.25,
        layers_to_transform=[1], layers_pattern="layers", svd_mode="exact", task_type=TaskType.CAUSAL_LM,
    )  # fmt: skip
    model = get_peft_model(models.llama(), config)
    saved = save_adapter(model, tmp_path / "a", recipe_digest="abc", metadata={"who": "me"})
    record = decode(saved.path.read_bytes())
    assert record.recipe_digest == "abc"
    assert record.metadata == {"who": "me"}
    assert record.layout.names == (
        "model.layers.1.mlp.down_proj.R",
        "model.layers.1.self_attn.q_proj.R",
    )
    loaded = load_adapter(models.llama(), saved.path, is_trainable=True).peft_config["default"]
    trained = model.peft_config["default"].to_dict()
    assert {**loaded.to_dict(), "base_model_name_or_path": trained["base_model_name_or_path"]} == trained


def test_a_classification_head_travels_in_its_own_type(tmp_path):
    config = modicum.LoraXSConfig(r=4, task_type="SEQ_CLS")
    model = shaken(get_peft_model(models.bert(), config)).eval()
    with torch.no_grad():
        model.base_model.model.classifier.modules_to_save["default"].bias.add_(1e-6)  # lost in bfloat16
    saved = save_adapter(model, tmp_path / "a")
    assert saved.section_bytes == 3 * 32 * 4 + 16  # three biases of 4 bytes, padded to 16
    loaded = load_adapter(models.bert(seed=0), saved.path)
    assert torch.equal(logits(loaded), logits(model))
    again, _ = to_record(loaded)
    assert again.config["modules_to_save"] == ["classifier", "score"]
    assert encode(again) == saved.path.read_bytes()


def test_a_loaded_adapter_can_be_trained_on_and_joins_others(tmp_path):
    first = shaken(get_peft_model(models.llama(), CONFIGS["lora_xs"]()))
    path = save_adapter(first, tmp_path / "a").path
    model = load_adapter(models.llama(), path, is_trainable=True)
    model(input_ids=models.tokens(), labels=models.tokens()).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 14 * 16
    assert load_adapter(model, path, adapter_name="b") is model
    model.set_adapter("b")
    assert torch.equal(logits(model.eval()), logits(first.eval()))


def test_saving_never_overwrites_unless_told(tmp_path):
    model = get_peft_model(models.llama(), CONFIGS["lora_xs"]())
    path = save_adapter(model, tmp_path / "a").path
    before = path.read_bytes()
    shaken(model)
    with pytest.raises(ConfigError, match="exists already"):
        save_adapter(model, path)
    with pytest.raises(ConfigError, match="exists already"):  # somebody else was faster
        write_atomically(path, b"x")
    assert path.read_bytes() == before
    save_adapter(model, path, overwrite=True)
    assert path.read_bytes() != before
    assert [p.name for p in tmp_path.iterdir()] == ["a.modicum"]


def test_a_write_that_fails_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_atomically(tmp_path / "a.modicum", b"x")
    assert list(tmp_path.iterdir()) == []


def test_numbers_too_large_for_float16_and_broken_numbers_are_refused_on_saving(tmp_path):
    model = get_peft_model(models.llama(), CONFIGS["lora_xs"]())
    core = next(p for p in model.parameters() if p.requires_grad)
    with torch.no_grad():
        core[0, 0] = 1e5
    with pytest.raises(ConfigError, match="bfloat16"):
        save_adapter(model, tmp_path / "a", dtype="float16")
    with torch.no_grad():
        core[0, 0] = float("nan")
    with pytest.raises(CorruptAdapterError, match=r"q_proj\.R"):
        save_adapter(model, tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def untouched(model, before):
    after = {name: (type(module), module.training) for name, module in model.named_modules()}
    return (
        after == before[0]
        and {n: p.requires_grad for n, p in model.named_parameters()} == before[1]
        and all(torch.equal(p, q) for p, q in zip(model.state_dict().values(), before[2], strict=True))
        and hasattr(model, "peft_config") == before[3]
    )


def snapshot(model):
    return (
        {name: (type(module), module.training) for name, module in model.named_modules()},
        {name: p.requires_grad for name, p in model.named_parameters()},
        [value.clone() for value in model.state_dict().values()],
        hasattr(model, "peft_config"),
    )


@pytest.mark.parametrize("name", ["lora_xs", "lora"])
def test_all_faults_of_a_folder_are_listed_and_the_model_stays_as_it_was(name, tmp_path):
    config = CONFIGS[name](modules_to_save=["lm_head"], target_modules=["q_proj", "v_proj"])
    get_peft_model(models.llama(), config).save_pretrained(tmp_path)
    state = load_file(tmp_path / "adapter_model.safetensors")
    keys = sorted(key for key in state if "layers" in key)
    del state[keys[0]]
    state[keys[1]] = torch.zeros(2, 9)
    state[keys[2]] = state[keys[2]] * float("nan")
    state["base_model.model.model.layers.7.stranger"] = torch.zeros(1)
    save_file(state, tmp_path / "adapter_model.safetensors")
    base = models.llama()
    base.train()
    before = snapshot(base)
    with pytest.raises(CorruptAdapterError) as caught:
        load_adapter(base, tmp_path)
    for words in (
        "1 tensors missing: model.layers.0",
        "1 tensors unexpected: model.layers.7.stranger",
        "(2, 9) instead of",
        "1 tensors with NaN",
    ):
        assert words in str(caught.value)
    assert untouched(base, before)
    good = get_peft_model(base, CONFIGS[name]())
    before = snapshot(good)
    active = good.active_adapters
    with pytest.raises(CorruptAdapterError):
        load_adapter(good, tmp_path, adapter_name="other")
    assert untouched(good, before)
    assert good.active_adapters == active
    assert list(good.peft_config) == ["default"]


def test_another_base_model_is_refused_untouched(tmp_path):
    model = get_peft_model(models.llama(), CONFIGS["lora_xs"]())
    path = save_adapter(model, tmp_path / "a").path
    other = models.llama(seed=1)
    before = snapshot(other)
    with pytest.raises(BaseMismatchError):
        load_adapter(other, path)
    assert untouched(other, before)


def test_damage_and_absence_are_told_apart(tmp_path):
    model = get_peft_model(models.llama(), CONFIGS["lora_xs"]())
    path = save_adapter(model, tmp_path / "a").path
    damaged = bytearray(path.read_bytes())
    damaged[-3] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(CorruptAdapterError, match="check sum"):
        load_adapter(models.llama(), path)
    with pytest.raises(ConfigError, match="no adapter at"):
        load_adapter(models.llama(), tmp_path / "absent")
    with pytest.raises(ConfigError, match=r"it needs adapter_config\.json"):
        load_adapter(models.llama(), tmp_path)
    model.save_pretrained(tmp_path / "f")
    (tmp_path / "f" / "adapter_model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(CorruptAdapterError, match="damaged"):
        load_adapter(models.llama(), tmp_path / "f")
    shutil.rmtree(tmp_path / "f")


def test_names_are_checked(tmp_path):
    model = get_peft_model(models.llama(), CONFIGS["lora_xs"]())
    with pytest.raises(ConfigError, match=r"no adapter 'defualt'.*'default'"):
        save_adapter(model, tmp_path / "a", adapter_name="defualt")
    path = save_adapter(model, tmp_path / "a").path
    with pytest.raises(ConfigError, match="already"):
        load_adapter(model, path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"method": "lora_yz"}, "no method 'lora_yz'.*lora_xs"),
        ({"method": "peft:TELEPATHY"}, "upgrade peft"),
        ({"config": {"r": 4, "ranks": 5}}, "ranks"),
    ],
)
def test_what_a_newer_modicum_wrote_is_named(change, words, tmp_path):
    import dataclasses

    record, _ = to_record(get_peft_model(models.llama(), CONFIGS["lora_xs"]()))
    path = tmp_path / "a.modicum"
    path.write_bytes(encode(dataclasses.replace(record, **change)))
    with pytest.raises(ConfigError, match=words):
        load_adapter(models.llama(), path)


@pytest.mark.shared_data
def test_real_weights_give_the_same_story_after_every_way_of_saving(shared_data, tmp_path):
    from modicum.models.loading import load_base, load_tokenizer
    from modicum.store.lora_export import export_lora

    folder = shared_data.parent / "models" / "stories260k"
    if not folder.is_dir():
        pytest.skip(f"no model at {folder}")
    tokenizer = load_tokenizer(str(folder))
    ids = tokenizer("Once upon a time", return_tensors="pt").input_ids

    def story(model):
        out = model.generate(input_ids=ids, max_new_tokens=40, do_sample=False, pad_token_id=0)
        return tokenizer.decode(out[0])

    config = modicum.LoraXSConfig(r=8, alpha=8.0, init_weights=False, task_type="CAUSAL_LM")
    model = shaken(get_peft_model(load_base(str(folder)), config)).eval()
    told = story(model)
    assert told != story(load_base(str(folder)))
    saved = save_adapter(model, tmp_path / "a")
    assert saved.values == 35 * 64
    assert saved.bytes <= 1.02 * saved.values * 2 + 1024
    assert story(load_adapter(load_base(str(folder)), saved.path)) == told
    export_lora(model, tmp_path / "lora")
    assert story(PeftModel.from_pretrained(load_base(str(folder)), tmp_path / "lora").eval()) == told
    assert story(model.merge_and_unload()) == told
