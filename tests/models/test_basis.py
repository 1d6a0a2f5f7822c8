"""The basis of a model: the same from memory and from disk, resumable; bases from gradients."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from tests.models_for_tests import bert, gpt2, llama, tokens

from modicum import LoraXSConfig
from modicum.adapters.basis import Basis, BasisCache, BasisSpec, layer_factors
from modicum.errors import ConfigError, DataError, TargetError
from modicum.models.basis import build_basis, gradient_basis


def batches(count=3):
    made = []
    for seed in range(count):
        ids = tokens(seed=seed)
        made.append({"input_ids": ids, "labels": ids})
    return made


@pytest.mark.parametrize("make", [llama, gpt2, bert])
def test_a_folder_and_a_loaded_model_have_the_same_basis(tmp_path, make):
    model = make()
    model.save_pretrained(tmp_path)
    loaded = build_basis(model, "all-linear", 4, cache=None)
    streamed = build_basis(tmp_path, "all-linear", 4, cache=None)
    assert list(loaded) == list(streamed)
    assert loaded.fingerprint() == streamed.fingerprint()
    assert loaded.base_fingerprint == streamed.base_fingerprint
    assert all(report.same_weight for report in streamed.verify({n: weight(model, n) for n in loaded}))


def weight(model, name):
    module = model.get_submodule(name)
    return module.weight if isinstance(module, torch.nn.Linear) else module.weight.T


def test_a_model_in_bfloat16_has_the_basis_of_the_one_in_float32():
    a, b = (
        build_basis(llama(), "all-linear", 4, cache=None),
        build_basis(llama(torch.bfloat16), "all-linear", 4, cache=None),
    )
    assert a.fingerprint() == b.fingerprint()
    assert a.base_fingerprint == b.base_fingerprint


def test_a_configuration_gives_targets_ranks_and_kind():
    config = LoraXSConfig(
        r=4, target_modules=["q_proj", "up_proj"], rank_pattern={"up_proj": 2}, layers_to_transform=[1]
    )
    basis = build_basis(llama(), config, cache=None)
    assert {name: layer.u.shape[1] for name, layer in basis.items()} == {
        "model.layers.1.self_attn.q_proj": 4,
        "model.layers.1.mlp.up_proj": 2,
    }
    assert basis.spec == config.basis_spec()


def test_progress_names_every_layer_and_a_second_run_reads_the_cache(tmp_path, monkeypatch):
    cache, seen = BasisCache(tmp_path), []

    def progress(steps, note=""):
        seen.append((steps, note))
        if len(seen) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_basis(llama(), ["q_proj", "k_proj"], 4, cache=cache, progress=progress)
    assert cache.info().entries == 3
    computed = []

    def counted(*args, **kwargs):
        computed.append(1)
        return original(*args, **kwargs)

    from modicum.adapters import basis as module

    original = module.left_singular_vectors
    monkeypatch.setattr(module, "left_singular_vectors", counted)
    build_basis(llama(), ["q_proj", "k_proj"], 4, cache=cache, progress=progress)
    assert len(computed) == 1
    assert {steps for steps, _ in seen} == {1}
    assert seen[0][1] == "model.layers.0.self_attn.q_proj"


def test_ranks_that_do_not_fit_are_all_named():
    with pytest.raises(ConfigError, match=r"layers\.0\.self_attn\.k_proj.*layers\.1\.self_attn\.k_proj"):
        build_basis(llama(), ["k_proj"], 20)
    with pytest.raises(ConfigError, match="needs a rank"):
        build_basis(llama(), ["k_proj"])
    with pytest.raises(TargetError, match="did you mean"):
        build_basis(llama(), ["q_prj"], 4)


def mean_gradient(model, name):
    model.zero_grad()
    for batch in batches():
        (model(**batch).loss / len(batches())).backward()
    gradient = model.get_submodule(name).weight.grad
    return gradient if isinstance(model.get_submodule(name), torch.nn.Linear) else gradient.T


@pytest.mark.parametrize(
    ("make", "name"), [(llama, "model.layers.0.mlp.up_proj"), (gpt2, "transformer.h.1.attn.c_attn")]
)
@pytest.mark.parametrize("update", ["sign", "gradient"])
def test_the_core_starts_as_the_best_part_of_the_first_step(make, name, update):
    target, lr, rank = name.rpartition(".")[2], 0.01, 5
    basis = gradient_basis(make(), batches(), [target], rank, lr=lr, update=update, mode="exact")
    gradient = mean_gradient(make(), name)
    step = -lr * (gradient.sign() if update == "sign" else gradient)
    u, s, vt = torch.linalg.svd(step, full_matrices=False)
    best = (u[:, :rank] * s[:rank]) @ vt[:rank]
    layer = basis[name]
    start = (layer.u * layer.r0) @ layer.a
    assert torch.allclose(start, best, atol=1e-4 * float(best.abs().max()))
    assert torch.allclose(layer.u.T @ layer.u, torch.eye(rank), atol=1e-5)
    assert torch.allclose(layer.a @ layer.a.T, torch.eye(rank), atol=1e-5)
    assert basis.spec == BasisSpec("stored")
    BasisCache().add(basis)
    config = LoraXSConfig(
        r=rank, alpha=3 * rank, target_modules=[target], basis="stored", basis_fingerprint=basis.fingerprint()
    )
    adapted = get_peft_model(make(), config).base_model.model.get_submodule(name)
    assert torch.allclose(adapted.get_delta_weight("default"), best, atol=1e-4 * float(best.abs().max()))


def test_layers_in_groups_give_the_same_basis_and_the_model_is_left_alone(tmp_path):
    model = llama()
    model.lm_head.weight.requires_grad_(requires_grad=False)
    model.train()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    whole = gradient_basis(model, batches(), "all-linear", 4)
    parts = gradient_basis(model, batches(), "all-linear", 4, layers_at_once=3)
    assert list(whole) == list(parts)
    for name in whole:
        assert torch.allclose(whole[name].u, parts[name].u, atol=1e-5)
    assert model.training
    assert not model.lm_head.weight.requires_grad
    assert model.model.embed_tokens.weight.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    whole.save(tmp_path / "g.safetensors")
    cache = BasisCache(tmp_path / "cache")
    cache.add(Basis.load(tmp_path / "g.safetensors"))
    assert cache.get(whole.fingerprint()) is not None


def test_steps_bound_the_batches_used():
    one = gradient_basis(llama(), batches(1), ["q_proj"], 2)
    assert one.fingerprint() == gradient_basis(llama(), batches(3), ["q_proj"], 2, steps=1).fingerprint()


def test_gradients_need_batches_with_labels():
    with pytest.raises(DataError, match="at least one batch"):
        gradient_basis(llama(), [], ["q_proj"], 2)
    with pytest.raises(DataError, match="labels"):
        gradient_basis(llama(), [{"input_ids": tokens()}], ["q_proj"], 2)


def test_the_number_of_threads_is_left_as_it_was():
    torch.set_num_threads(2)
    try:
        layer_factors(torch.randn(20, 20), 3, BasisSpec(), cache=None)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
