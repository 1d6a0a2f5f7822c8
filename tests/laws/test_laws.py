"""The laws that every method obeys on every base layer."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.laws.cases import METHODS, base_layer, close, fitted, method_id
from torch.nn import functional as F

from modicum.adapters import registry
from modicum.errors import ConfigError

pytestmark = pytest.mark.parametrize("case", METHODS, ids=method_id)

shapes = st.fixed_dictionaries(
    {
        "kind": st.sampled_from(["linear", "conv1d"]),
        "in_features": st.integers(1, 40),
        "out_features": st.integers(1, 40),
        "bias": st.booleans(),
        "dtype": st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
        "seed": st.integers(0, 3),
    }
)
law = settings(max_examples=25, deadline=None, derandomize=True)


def adapted(case, shape, rank_share: float = 0.5, **options):
    """A one-layer model, the same model with an adapter that changes it, its layer, and its inputs."""
    name, variant = case
    base = base_layer(**shape)
    rank = max(1, round(rank_share * min(shape["in_features"], shape["out_features"])))
    config = registry.config_class(name)(
        r=rank, alpha=2 * rank, target_modules=["layer"], **{"init_weights": False, **variant, **options}
    )
    model = peft.get_peft_model(copy.deepcopy(base), config).eval()
    x = torch.randn(5, 3, shape["in_features"], generator=torch.Generator().manual_seed(1)).to(shape["dtype"])
    return base, model, model.base_model.model.layer, x


@law
@given(shape=shapes)
def test_forward_is_base_plus_delta(case, shape):
    shape = fitted(case, shape)
    base, model, layer, x = adapted(case, shape)
    delta = layer.get_delta_weight("default")
    assert delta.shape == (shape["out_features"], shape["in_features"])
    assert delta.dtype == torch.float32
    expected = base(x).float() + F.linear(x.float(), delta)
    close(model(x), expected, shape["dtype"])


@law
@given(shape=shapes)
def test_update_is_zero_at_the_start(case, shape):
    shape = fitted(case, shape)
    _, _, layer, _ = adapted(case, shape, init_weights=True)
    weight = layer.site.weight().float()
    largest = layer.get_delta_weight("default").abs().max()
    # LoRA-XS starts at sigma = 1e-5 on purpose; random bases are not scaled to the weight
    assert largest <= 1e-2 * max(weight.abs().max().item(), 1.0)


@law
@given(shape=shapes)
def test_merged_is_unmerged_and_unmerge_restores_every_bit(case, shape):
    shape = fitted(case, shape)
    base, model, layer, x = adapted(case, shape)
    before = layer.base_layer.weight.detach().clone()
    unmerged = model(x)
    scale = max(unmerged.abs().max().item(), 1e-6)
    model.merge_adapter()
    close(model(x), unmerged, shape["dtype"], scale)
    model.unmerge_adapter()
    assert torch.equal(layer.base_layer.weight, before)
    with model.disable_adapter():
        assert torch.equal(model(x), base(x))
    merged = model.merge_and_unload(safe_merge=True)
    assert type(merged.layer) is type(base.layer)
    close(merged(x), unmerged, shape["dtype"], scale)


@law
@given(shape=shapes)
def test_state_holds_the_trained_numbers_and_nothing_else(case, shape):
    shape = fitted(case, shape)
    name, _ = case
    _, model, _, x = adapted(case, shape)
    state = peft.get_peft_model_state_dict(model)
    config = model.peft_config["default"]
    closed_form = registry.get(name).count(shape["in_features"], shape["out_features"], config.r, config)
    assert sum(value.numel() for value in state.values()) == closed_form
    assert len(state) == registry.get(name).tensors
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == closed_form
    base = base_layer(**shape)
    other = peft.get_peft_model(base, copy.copy(config))
    peft.set_peft_model_state_dict(other, state)
    close(other.eval()(x), model(x), shape["dtype"])


@law
@given(shape=shapes)
def test_gradient_reaches_every_trained_number_and_no_base_weight(case, shape):
    shape = fitted(case, shape)
    _, model, _, x = adapted(case, {**shape, "dtype": torch.float32}, dropout=0.0)
    model.train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    (model(x.float()) * torch.linspace(0.5, 2, shape["out_features"])).square().sum().backward()
    for key, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, key
            assert (parameter.grad != 0).any(), key
        else:
            assert parameter.grad is None, key
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@law
@given(shape=shapes, seed=st.integers(0, 99))
def test_gradient_is_that_of_the_dense_update(case, shape, seed):
    """Autograd through the cheap path equals autograd through the definition of truth."""
    shape = fitted(case, shape)
    _, model, layer, x = adapted(case, {**shape, "dtype": torch.float32}, dropout=0.0)
    model.train()
    target = torch.randn(5, 3, shape["out_features"], generator=torch.Generator().manual_seed(seed))
    x = x.float().requires_grad_()
    trained = [p for p in model.parameters() if p.requires_grad]
    cheap = torch.autograd.grad(((model(x) - target) ** 2).mean(), [x, *trained])
    dense = layer.base_layer(x) + F.linear(x, layer.get_delta_weight("default"))
    truth = torch.autograd.grad(((dense - target) ** 2).mean(), [x, *trained])
    for got, wanted in zip(cheap, truth, strict=True):
        close(got, wanted, torch.float32, 10 * max(wanted.abs().max().item(), 1e-3))


@law
@given(
    shape=shapes,
    rows=st.lists(st.sampled_from(["default", "two", "three", "__base__"]), min_size=1, max_size=7),
)
def test_mixed_batch_is_the_same_rows_one_at_a_time(case, shape, rows):
    shape = fitted(case, shape)
    name, variant = case
    base, model, _, _ = adapted(case, shape, rank_share=1.0)
    full = model.peft_config["default"].r
    for number, adapter in enumerate(["two", "three"]):
        rank = max(1, full // (2 + number))
        model.add_adapter(
            adapter,
            registry.config_class(name)(
                r=rank,
                alpha=3 * rank,
                target_modules=["layer"],
                seed=7 + number,
                **{"init_weights": False, **variant},
            ),
        )
    model.eval()
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(len(rows), 3, shape["in_features"], generator=generator).to(shape["dtype"])
    mixed = model(x, adapter_names=rows)
    scale = mixed.float().abs().max().item() + 1e-6
    for index, adapter in enumerate(rows):
        if adapter == "__base__":
            close(mixed[index : index + 1], base(x[index : index + 1]), shape["dtype"], scale)
        else:
            model.set_adapter(adapter)
            close(mixed[index : index + 1], model(x[index : index + 1]), shape["dtype"], scale)


def test_config_round_trips_and_refuses_unknown_fields(case, tmp_path):
    name, variant = case
    config = registry.config_class(name)(
        r=3, target_modules=["q_proj"], rank_pattern={"v_proj": 2}, **variant
    )
    config.save_pretrained(tmp_path)
    assert peft.PeftConfig.from_pretrained(tmp_path) == config
    with pytest.raises(ConfigError, match="rank_pattern"):
        registry.config_class(name)(rank_patern={"v_proj": 2})
    with pytest.raises(ConfigError, match="at least 1"):
        registry.config_class(name)(r=0)
