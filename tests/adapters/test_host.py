"""Everything PEFT users do with an adapter, done with ours, for every method."""

from __future__ import annotations

import copy
from dataclasses import replace

import jaxtyping
import peft
import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tests.laws.cases import OneLayer
from tests.models_for_tests import SMALL, base_for, bert, gpt2, llama, tokens

from modicum import LoraXSConfig
from modicum.adapters import registry
from modicum.adapters.basis import Basis, BasisCache, BasisSpec, LayerFactors, fingerprint_of
from modicum.errors import (
    BaseMismatchError,
    BasisMismatchError,
    ConfigError,
    CorruptAdapterError,
    InexactMergeError,
    TargetError,
)
from modicum.train.methods import option_names


def config_for(method, **options):
    values = {"r": 4, "alpha": 8, "init_weights": False, **SMALL.get(method, {}), **options}
    return registry.config_class(method)(**values)


@pytest.fixture(params=registry.names())
def method(request):
    return request.param


def logits(model, ids=None, **keywords):
    with torch.no_grad():
        return model(tokens() if ids is None else ids, **keywords).logits


def same(a, b, tolerance=2e-5):
    assert (a - b).abs().max() <= tolerance * b.abs().max()


def test_llama_all_linear_leaves_the_head_alone(method):
    model = get_peft_model(base_for(method, llama()), config_for(method, task_type="CAUSAL_LM"))
    names = model.base_model.targeted_module_names
    assert len(names) == 2 * 7
    assert not any("lm_head" in name for name in names)
    assert (logits(model) - logits(base_for(method, llama()))).abs().max() > 0.01


def test_save_and_load_in_every_way(method, tmp_path):
    base = base_for(method, llama())
    base.save_pretrained(tmp_path / "base")
    base = type(base).from_pretrained(tmp_path / "base")
    model = get_peft_model(base, config_for(method, task_type="CAUSAL_LM"))
    wanted = logits(model.eval())
    model.save_pretrained(tmp_path / "adapter")
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert card.count("`import modicum` before") == 1

    fresh = type(base).from_pretrained(tmp_path / "base")
    same(logits(PeftModel.from_pretrained(fresh, tmp_path / "adapter")), wanted)
    fresh = type(base).from_pretrained(tmp_path / "base")
    quick = PeftModel.from_pretrained(fresh, tmp_path / "adapter", low_cpu_mem_usage=True)
    same(logits(quick), wanted)
    same(logits(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")), wanted)
    # without PeftModel, through Transformers alone
    native = type(base).from_pretrained(tmp_path / "base")
    native.load_adapter(str(tmp_path / "adapter"))
    same(logits(native), wanted)


def test_several_adapters_switch_disable_delete(method):
    base = base_for(method, llama())
    plain = logits(base)
    model = get_peft_model(base, config_for(method)).eval()
    first = logits(model)
    model.add_adapter("second", config_for(method, seed=1))
    model.set_adapter("second")
    second = logits(model)
    assert (first - second).abs().max() > 0.01
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)
    model.set_adapter("default")
    same(logits(model), first)
    model.set_adapter("second")
    model.delete_adapter("default")
    same(logits(model), second)
    assert not any(".default." in key for key in model.state_dict())


def test_two_active_adapters_add_up(method):
    model = get_peft_model(base_for(method, llama()), config_for(method)).eval()
    model.add_adapter("second", config_for(method, seed=1))
    model.base_model.set_adapter(["default", "second"])
    wanted = logits(model)
    if registry.get(method).on_grid:
        # each is held within the grid, their sum is not
        with pytest.raises(InexactMergeError, match="beyond the grid"):
            model.merge_adapter()
        assert torch.equal(logits(model), wanted)
        return
    merged = model.merge_and_unload(safe_merge=True)
    same(logits(merged), wanted)


def test_merge_and_unload_on_linear_and_conv1d(method):
    on_grid = registry.get(method).on_grid  # which no Conv1D can be
    for base in (base_for(method, llama()), *([] if on_grid else [gpt2()])):
        model = get_peft_model(base, config_for(method)).eval()
        wanted = logits(model)
        merged = model.merge_and_unload(safe_merge=True)
        same(logits(merged), wanted)
        assert not any("modicum" in key for key in merged.state_dict())


def test_patterns_layers_and_exclusions(method):
    model = get_peft_model(
        base_for(method, llama()),
        config_for(
            method,
            target_modules=["q_proj", "v_proj", "down_proj"],
            rank_pattern={"v_proj": 2},
            alpha_pattern={"down_proj": 1.0},
            layers_to_transform=[1],
            exclude_modules=["q_proj"],
        ),
    )
    assert model.base_model.targeted_module_names == [
        "model.layers.1.self_attn.v_proj",
        "model.layers.1.mlp.down_proj",
    ]
    layer = model.base_model.model.model.layers[1]
    assert layer.self_attn.v_proj.adapters["default"].rank == 2
    assert layer.mlp.down_proj.adapters["default"].scaling == pytest.approx(1 / 4)


def test_classifier_head_is_trained_and_saved(method, tmp_path):
    base = base_for(method, bert())
    model = get_peft_model(base, config_for(method, task_type="SEQ_CLS", target_modules=["query", "value"]))
    head = model.base_model.model.classifier.modules_to_save["default"]
    assert head.weight.requires_grad
    torch.nn.init.normal_(head.weight)
    wanted = logits(model.eval())
    model.save_pretrained(tmp_path)
    same(logits(PeftModel.from_pretrained(base_for(method, bert()), tmp_path)), wanted)


def test_mixed_batch_equals_one_adapter_at_a_time(method):
    model = get_peft_model(base_for(method, llama()), config_for(method)).eval()
    model.add_adapter("two", config_for(method, seed=1, r=2))
    model.add_adapter("three", config_for(method, seed=2, target_modules=["q_proj"]))
    rows = ["two", "__base__", "default", "three", "two"]
    ids = tokens(rows=5)
    mixed = logits(model, ids, adapter_names=rows)
    for index, name in enumerate(rows):
        if name == "__base__":
            with model.disable_adapter():
                alone = logits(model, ids[index : index + 1])
        else:
            model.set_adapter(name)
            alone = logits(model, ids[index : index + 1])
        same(mixed[index : index + 1], alone)


def test_mixed_batch_in_generate_with_beams(method):
    model = get_peft_model(base_for(method, llama()), config_for(method)).eval()
    model.add_adapter("two", config_for(method, seed=1))
    ids, rows = tokens(rows=3), ["two", "default", "__base__"]
    options = {
        "max_new_tokens": 4,
        "do_sample": False,
        "num_beams": 2,
        "attention_mask": torch.ones_like(ids),
    }
    mixed = model.generate(input_ids=ids, adapter_names=rows, **options)
    model.set_adapter("two")
    alone = model.generate(
        input_ids=ids[:1], **{**options, "attention_mask": torch.ones(1, 7, dtype=torch.long)}
    )
    width = min(mixed.shape[1], alone.shape[1])
    assert torch.equal(mixed[0, :width], alone[0, :width])


def test_adapter_names_are_never_ignored(method):
    model = get_peft_model(base_for(method, llama()), config_for(method)).eval()
    with pytest.raises(ConfigError, match="did you mean 'default'"):
        logits(model, adapter_names=["defualt"] * 3)
    with pytest.raises(ConfigError, match="one name per row"):
        logits(model, adapter_names=["default"] * 2)
    model.merge_adapter()
    with pytest.raises(ConfigError, match="unmerge"):
        logits(model, adapter_names=["default"] * 3)
    model.unmerge_adapter()
    model.train()
    with pytest.raises(ConfigError, match="eval"):
        model(tokens(), adapter_names=["default"] * 3)


def test_targets_that_cannot_be_adapted_are_refused_together(method):
    base = base_for(method, llama())
    before = [name for name, _ in base.named_modules()]
    misfit, said = {"r": 24}, ["rank is larger"]
    if "pool" in option_names(method):
        misfit = {"pool": 7}
        said = ["pool = 7 does not divide its 32 inputs (sizes that do: 1, 2, 4, 8, 16, 32)"]
    if "repeat" in option_names(method):
        misfit["repeat"] = 5
        said.append("repeat = 5 does not divide its 16 outputs (sizes that do: 1, 2, 4, 8, 16)")
    with pytest.raises(TargetError) as caught:
        get_peft_model(
            base, config_for(method, target_modules=["embed_tokens", "q_porj", "v_proj"], **misfit)
        )
    message = str(caught.value)
    assert "embed_tokens (Embedding) cannot be adapted" in message
    assert "'q_porj' matches no layer (did you mean 'q_proj'" in message
    assert all(part in message for part in said), message
    assert [name for name, _ in base.named_modules()] == before


def test_reduced_precision_base_keeps_float32_cores(method):
    for dtype in (torch.bfloat16, torch.float16):
        model = get_peft_model(base_for(method, llama(dtype)), config_for(method, alpha=4)).eval()
        trained = [p for p in model.parameters() if p.requires_grad]
        assert all(p.dtype == torch.float32 for p in trained)
        assert logits(model).dtype == dtype
        unmerged = logits(model).float()
        merged = logits(model.merge_and_unload()).float()
        assert (merged - unmerged).abs().max() <= 0.05 * unmerged.abs().max()


def test_autocast(method):
    model = get_peft_model(base_for(method, llama()), config_for(method)).train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(tokens(), labels=tokens()).loss
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad)
    full = model(tokens(), labels=tokens()).loss
    assert abs(loss.item() - full.item()) < 0.05 * full.item()


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_no_gradient(method, reentrant):
    def gradients(checkpointing):
        base = base_for(method, llama())
        model = get_peft_model(base, config_for(method)).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model(tokens(), labels=tokens()).loss.backward()
        return [p.grad for p in model.parameters() if p.requires_grad]

    for plain, checkpointed in zip(gradients(False), gradients(True), strict=True):
        same(checkpointed, plain, 1e-4)


@pytest.mark.slow
def test_compile_has_no_graph_break(method, monkeypatch):
    # what checks shapes in these tests is nothing to compile, and how often other tests compiled the same code counts
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    model = get_peft_model(base_for(method, llama()), config_for(method)).eval()
    wanted = logits(model)
    torch.compiler.reset()
    compiled = torch.compile(model.base_model.model, fullgraph=True, backend="aot_eager")
    same(compiled(tokens(), use_cache=False).logits.detach(), wanted)


def test_compiled_without_a_graph_break_where_no_gradient_is_wanted(method, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    base = base_for(method, OneLayer(torch.nn.Linear(32, 48)))
    model = get_peft_model(base, config_for(method, target_modules=["layer"])).eval()
    torch.compiler.reset()
    compiled, x = torch.compile(model, fullgraph=True, backend="eager"), torch.randn(1, 32)
    with torch.no_grad():
        same(compiled(x), model(x))


# --- traps ---------------------------------------------------------------------------------------------


def test_loading_while_another_adapter_is_merged_uses_the_unmerged_weight(tmp_path):
    base = llama()
    model = get_peft_model(base, config_for("lora_xs")).eval()
    wanted = logits(model)
    model.save_pretrained(tmp_path)
    other = get_peft_model(
        llama(), config_for("lora_xs", seed=5, target_modules=["q_proj", "up_proj"])
    ).eval()
    other.merge_adapter()
    with pytest.warns(UserWarning, match="Unmerging"):
        other.load_adapter(tmp_path, "late")
    other.set_adapter("late")
    same(logits(other.eval()), wanted)


def test_the_basis_is_shared_and_never_rounded_or_copied_per_adapter():
    model = get_peft_model(llama(torch.bfloat16), config_for("lora_xs"))
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    before = layer.adapters["default"].basis.ut.data_ptr()
    for number in range(3):
        model.add_adapter(f"n{number}", config_for("lora_xs", seed=number, r=1 + number))
    assert {adapter.basis.ut.data_ptr() for adapter in layer.adapters.values()} == {before}
    assert layer.adapters["n0"].basis.ut.dtype == torch.float32
    assert not any("bases" in key for key in model.state_dict())


def test_a_wider_adapter_added_later_leaves_the_first_as_it_was():
    model = get_peft_model(llama(), config_for("lora_xs", r=2)).eval()
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    narrow, wanted = layer.adapters["default"].basis.ut[:2].clone(), logits(model)
    model.add_adapter("wide", config_for("lora_xs", r=12))
    assert torch.equal(layer.adapters["default"].basis.ut[:2], narrow)
    same(logits(model), wanted)


def test_another_base_model_is_refused(tmp_path):
    model = get_peft_model(llama(), config_for("lora_xs"))
    model.save_pretrained(tmp_path)
    other = llama(seed=1)
    before = [name for name, _ in other.named_modules()]
    with pytest.raises(BaseMismatchError, match="another base model"):
        PeftModel.from_pretrained(other, tmp_path)
    assert [name for name, _ in other.named_modules()] == before


def test_one_changed_weight_is_another_base_model(tmp_path):
    get_peft_model(llama(), config_for("lora_xs")).save_pretrained(tmp_path)
    other = llama()
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight[3, 5] += 0.1
    with pytest.raises(BaseMismatchError):
        PeftModel.from_pretrained(other, tmp_path)


def test_float32_and_bfloat16_are_the_same_base(tmp_path):
    model = get_peft_model(llama(), config_for("lora_xs"))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(torch.bfloat16), tmp_path)
    full = model.base_model.model.model.layers[0].mlp.up_proj.adapters["default"].basis.ut
    half = loaded.base_model.model.model.layers[0].mlp.up_proj.adapters["default"].basis.ut
    assert torch.equal(full, half)


def damage(path, change):
    state = load_file(path)
    change(state)
    save_file(state, path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state[next(iter(state))].fill_(float("nan")), "NaN"),
        (lambda state: state.pop(next(iter(state))), "missing"),
        (lambda state: state.update({next(iter(state)): torch.zeros(3, 3)}), "wrong shapes"),
    ],
    ids=["nan", "missing", "shape"],
)
def test_damaged_numbers_are_refused(tmp_path, change, message):
    get_peft_model(llama(), config_for("lora_xs")).save_pretrained(tmp_path)
    damage(tmp_path / "adapter_model.safetensors", change)
    with pytest.raises(CorruptAdapterError, match=message):
        PeftModel.from_pretrained(llama(), tmp_path)


def test_truncated_file_is_refused(tmp_path):
    get_peft_model(llama(), config_for("lora_xs")).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(Exception, match=r"incomplete|buffer|Error"):
        PeftModel.from_pretrained(llama(), tmp_path)


def test_a_config_can_be_used_for_two_models():
    config = config_for("lora_xs")
    get_peft_model(llama(), config)
    assert config.base_fingerprint is None
    get_peft_model(llama(seed=1), config)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings:UserWarning")
def test_merging_into_a_tied_head_is_refused():
    model = get_peft_model(llama(tied=True), config_for("lora_xs", target_modules=["q_proj", "lm_head"]))
    with pytest.raises(InexactMergeError, match="tie_word_embeddings"):
        model.merge_and_unload()


def test_nan_is_never_merged():
    model = get_peft_model(llama(), config_for("lora_xs"))
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    before = layer.base_layer.weight.clone()
    with torch.no_grad():
        layer.adapters["default"].R[0, 0] = float("nan")
    with pytest.raises(CorruptAdapterError):
        layer.merge()
    assert torch.equal(layer.base_layer.weight, before)


def test_copies_share_nothing():
    model = get_peft_model(llama(), config_for("lora_xs")).eval()
    twin = copy.deepcopy(model)
    wanted = logits(model)
    twin.merge_adapter()
    same(logits(model), wanted, 1e-6)
    same(logits(twin), wanted)


def test_import_order_does_not_matter_to_the_config(tmp_path):
    LoraXSConfig(r=3).save_pretrained(tmp_path)
    assert isinstance(peft.PeftConfig.from_pretrained(tmp_path), LoraXSConfig)


def test_a_model_without_weights_gets_its_basis_when_they_come():
    with torch.device("meta"):
        base = llama()
    model = get_peft_model(base, config_for("lora_xs", init_weights=True))
    full = llama()
    model.base_model.model.to_empty(device="cpu")
    for name, module in model.base_model.model.named_modules():
        if name.endswith("base_layer"):
            module.load_state_dict(full.get_submodule(name.removesuffix(".base_layer")).state_dict())
    model.base_model.fill_bases()
    wanted = get_peft_model(full, config_for("lora_xs", init_weights=True))
    for ours, theirs in zip(model.modules(), wanted.modules(), strict=True):
        if type(ours).__name__ == "LayerBasis":
            assert torch.equal(ours.ut, theirs.ut)


def test_random_bases_of_two_ranks_do_not_disturb_each_other():
    for kind in ("random", "random_kaiming"):
        model = get_peft_model(llama(), config_for("lora_xs", r=2, basis=kind)).eval()
        wanted = logits(model)
        model.add_adapter("wide", config_for("lora_xs", r=12, basis=kind))
        same(logits(model), wanted)


def test_an_added_basis_replaces_a_computed_one(tmp_path, monkeypatch):
    """An adapter trained in a basis that this machine computes differently works once the basis is added."""
    monkeypatch.setenv("MODICUM_CACHE", str(tmp_path / "cache"))
    model = get_peft_model(llama(), config_for("lora_xs", target_modules=["q_proj"])).eval()
    layers = {}
    for name, module in model.base_model.model.named_modules():
        if name.endswith("q_proj"):
            basis = module.adapters["default"].basis
            basis.ut = -basis.ut  # the other machine chose the other sign
            layers[name] = LayerFactors(basis.ut[:4].T.contiguous())
    wanted = logits(model)
    theirs = Basis(layers, model.peft_config["default"].basis_spec())
    model.peft_config["default"].basis_fingerprint = theirs.fingerprint()
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(BasisMismatchError, match="modicum basis add"):
        PeftModel.from_pretrained(llama(), tmp_path / "adapter")
    BasisCache().add(theirs)
    same(logits(PeftModel.from_pretrained(llama(), tmp_path / "adapter")), wanted)


def test_a_stored_basis_is_found_by_its_fingerprint(tmp_path, monkeypatch):
    monkeypatch.setenv("MODICUM_CACHE", str(tmp_path / "cache"))
    torch.manual_seed(3)
    names = [f"model.layers.{index}.self_attn.q_proj" for index in range(2)]
    layers = {
        name: LayerFactors(torch.randn(32, 4), None, torch.randn(4, 32), torch.rand(4)) for name in names
    }
    theirs = Basis(layers, BasisSpec("stored"))
    options = {"basis": "stored", "basis_fingerprint": theirs.fingerprint(), "target_modules": ["q_proj"]}
    with pytest.raises(BasisMismatchError, match="modicum basis add"):
        get_peft_model(llama(), LoraXSConfig(r=4, alpha=8, **options))
    other_input = {name: replace(layer, a=layer.a.flip(0)) for name, layer in layers.items()}
    BasisCache().add(Basis(other_input, BasisSpec("stored")))
    with pytest.raises(BasisMismatchError, match="modicum basis add"):
        get_peft_model(llama(), LoraXSConfig(r=4, alpha=8, **options))
    BasisCache().add(theirs)
    model = get_peft_model(llama(), LoraXSConfig(r=4, alpha=8, **options))
    delta = model.base_model.model.get_submodule(names[0]).get_delta_weight("default")
    first = layers[names[0]]
    torch.testing.assert_close(delta, first.u @ torch.diag(first.r0) @ first.a)
    with pytest.raises(ConfigError, match="basis_fingerprint"):
        LoraXSConfig(basis="stored")


def test_a_sign_that_another_machine_chose_differently_is_turned_back(tmp_path):
    """Two all but equal largest entries: the sign rule may fall either way, the fingerprint tells which."""

    def base():
        model = llama()
        torch.manual_seed(1)
        u = torch.randn(32, 32)
        u[:, 0] = torch.linspace(-1, 1, 32)  # the largest entries tie
        u, _ = torch.linalg.qr(u)
        v, _ = torch.linalg.qr(torch.randn(32, 32))
        sigma = torch.tensor([100.0, *torch.linspace(3, 0.1, 31)])
        with torch.no_grad():
            for layer in model.model.layers:
                layer.self_attn.q_proj.weight.copy_(u @ torch.diag(sigma) @ v.T)
        return model

    model = get_peft_model(base(), config_for("lora_xs", target_modules=["q_proj"])).eval()
    layer = model.base_model.model.model.layers[1].self_attn.q_proj
    basis = layer.adapters["default"].basis
    basis.ut[0] *= -1
    wanted = logits(model)
    config = model.peft_config["default"]
    items = [
        (name, module.adapters["default"].basis.ut[:4].T)
        for name, module in model.base_model.model.named_modules()
        if name.endswith("q_proj")
    ]
    config.basis_fingerprint = fingerprint_of(items, config.basis_spec())
    model.save_pretrained(tmp_path)
    same(logits(PeftModel.from_pretrained(base(), tmp_path)), wanted)
    basis.ut[1] *= -1  # no tie: this cannot be another machine's choice
    config.basis_fingerprint = fingerprint_of(items, config.basis_spec())
    model.save_pretrained(tmp_path)
    with pytest.raises(BasisMismatchError):
        PeftModel.from_pretrained(base(), tmp_path)
