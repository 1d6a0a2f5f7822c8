"""The laws of sub-networks: every elastic method, on every base it takes, at any rank and any part of its layer."""

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
from modicum.adapters.elastic import Cut, SubNetwork, Switch, put_back, take
from modicum.errors import InexactMergeError

ELASTIC = [case for case in METHODS if registry.get(case[0]).elastic]
pytestmark = pytest.mark.parametrize("case", ELASTIC, ids=method_id)
law = settings(max_examples=12, deadline=None, derandomize=True)
exact = {"dtype": torch.float32}

shapes = st.fixed_dictionaries(
    {
        "kind": st.sampled_from(["linear", "conv1d", "low-bit"]),
        "in_features": st.integers(2, 40),
        "out_features": st.integers(2, 40),
        "bias": st.booleans(),
        "dtype": st.sampled_from([torch.float32, torch.bfloat16]),
        "seed": st.integers(0, 3),
    }
)


@st.composite
def cases(draw):
    """A shape, the active rank's share of the largest, and the bounds of what is cut, as shares of the sides."""
    bounds = st.lists(st.floats(0, 1), min_size=2, max_size=6, unique=True)
    sides = {side: draw(st.none() | bounds) for side in ("outputs", "inputs")}
    return draw(shapes), draw(st.floats(0, 1)), sides


def runs(shares, size):
    """Runs of at least one row from sorted shares of `size`; adjoining and overlapping ones are left out."""
    if shares is None:
        return None
    found, end = [], 0
    for first, last in zip(*[iter(sorted(shares))] * 2, strict=False):
        start = max(end, int(first * (size - 1)))
        stop = max(start + 1, int(last * size))
        if stop <= size:
            found.append((start, stop))
            end = stop + 1
    return tuple(found) or ((0, 1),)


def adapted(case, drawn, **options):
    """The base, the model at the drawn rank, its layer, inputs, and what is cut."""
    (name, variant), (shape, share, sides) = case, drawn
    shape = fitted(case, shape)
    if shape["kind"] == "low-bit":  # groups of 8 inputs
        shape = {**shape, "in_features": -(-shape["in_features"] // 8) * 8}
    base = base_layer(**shape)
    largest = max(1, round(0.8 * min(shape["in_features"], shape["out_features"])))
    config = registry.config_class(name)(
        r=largest,
        alpha=3 * largest,
        target_modules=["layer"],
        **{"init_weights": False, **variant, **options},
    )
    model = peft.get_peft_model(copy.deepcopy(base), config).eval()
    cut = Cut(runs(sides["outputs"], shape["out_features"]), runs(sides["inputs"], shape["in_features"]))
    rank = 1 + int(share * (largest - 1))
    Switch(model).activate(SubNetwork({"layer": rank}))
    x = torch.randn(5, 3, shape["in_features"], generator=torch.Generator().manual_seed(1)).to(shape["dtype"])
    return base, model, model.base_model.model.layer, x, cut


def small_update(case, layer):
    """The update of the first k directions, written down once more and independently."""
    adapter = layer.adapters["default"]
    k, scaling = adapter.active_rank, 3.0
    if case[0] == "lora_xs":
        core = adapter.R[:k].diag() if adapter.diagonal else adapter.R[:k, :k]
        basis, w = adapter.basis, layer.site.weight().float()
        u = basis.ut.T[:, :k].float()
        a = u.T @ w if basis.a is None or not basis.explicit_input else basis.a[:k].float()
        return scaling * u @ core.float() @ (a if adapter.use_sigma else a / basis.sigma[:k, None].float())
    product = scaling * adapter.B[:, :k].float() @ adapter.A[:k].float()
    if case[0] == "sparse_peft":
        return product * (layer.site.weight() != 0)
    return product


@law
@given(drawn=cases())
def test_the_update_is_that_of_the_first_directions_at_the_scaling_of_all(case, drawn):
    base, model, layer, x, _ = adapted(case, drawn)
    delta = layer.get_delta_weight("default")
    close(model(x), base(x).float() + F.linear(x.float(), delta), x.dtype)
    if registry.get(case[0]).on_grid:
        # a sum in another order may lie on the other side of a rounding border, but not twice
        assert (delta != of_a_small_adapter(case, base, layer)).sum() <= 1
    else:
        close(delta, small_update(case, layer), torch.float32, 10 * max(delta.abs().max().item(), 1e-3))


def of_a_small_adapter(case, base, layer):
    """The update of an adapter of the active rank, its factors copied prefixes, at the same scaling."""
    big = layer.adapters["default"]
    config = registry.config_class(case[0])(
        r=big.active_rank, alpha=3 * big.active_rank, target_modules=["layer"], **case[1]
    )
    small = peft.get_peft_model(copy.deepcopy(base), config).base_model.model.layer
    factors = small.adapters["default"]
    with torch.no_grad():
        factors.A.copy_(big.A[: big.active_rank])
        factors.B.copy_(big.B[:, : big.active_rank])
    return small.get_delta_weight("default")


@law
@given(drawn=cases())
def test_merged_is_unmerged(case, drawn):
    _, model, layer, x, _ = adapted(case, drawn)
    before = model(x)
    if not layer.site.format.mergeable and not registry.get(case[0]).on_grid:
        with pytest.raises(InexactMergeError):
            model.merge_adapter()
        return
    model.merge_adapter()
    close(model(x), before, x.dtype)
    model.unmerge_adapter()
    assert torch.equal(model(x), before)


@law
@given(drawn=cases())
def test_what_runs_cut_refuses_to_merge(case, drawn):
    _, model, _, x, cut = adapted(case, drawn)
    if cut == Cut():
        return
    Switch(model).activate(SubNetwork({}, {"layer": cut}))
    before = model(x)
    with pytest.raises(InexactMergeError, match="narrower"):
        model.merge_adapter()
    assert torch.equal(model(x), before)


@law
@given(drawn=cases())
def test_a_cut_layer_gives_a_part_of_its_outputs_from_a_part_of_its_inputs(case, drawn):
    _, model, layer, x, cut = adapted(case, drawn)
    some = take(x, cut.inputs, -1)
    whole = model(put_back(some, cut.inputs, x.shape[-1]))
    ranks = {"layer": layer.adapters["default"].active_rank}
    Switch(model).activate(SubNetwork(ranks, {"layer": cut}))
    scale = max(whole.abs().max().item(), 1e-6)
    for given_inputs in (x, some):
        found = model(given_inputs)
        close(found, take(whole, cut.outputs, -1), x.dtype, scale)
    with model.disable_adapter():
        assert model(x).shape[-1] == layer.out_features


@law
@given(drawn=cases(), train=st.booleans())
def test_the_gradient_reaches_the_prefix_and_nothing_else(case, drawn, train):
    shape, share, sides = drawn
    _, model, layer, x, cut = adapted(case, ({**shape, **exact}, share, sides), dropout=0.0)
    k = layer.adapters["default"].active_rank
    model.train(train)
    Switch(model).activate(SubNetwork({"layer": k}, {"layer": cut}))
    weights = torch.linspace(0.5, 2, sum(b - a for a, b in cut.outputs or ((0, layer.out_features),)))
    (model(x) * weights).square().sum().backward()
    for key, parameter in model.named_parameters():
        if not parameter.requires_grad:
            assert parameter.grad is None, key
            continue
        inside = torch.zeros_like(parameter, dtype=torch.bool)
        leaf = key.rpartition(".")[2]
        if leaf == "A":
            inside[:k] = (
                put_back(take(torch.ones(1, parameter.shape[1]), cut.inputs, 1), cut.inputs, x.shape[-1])[0]
                > 0
            )
        elif leaf == "B":
            rows = (
                put_back(take(torch.ones(1, len(parameter)), cut.outputs, 1), cut.outputs, len(parameter))[0]
                > 0
            )
            inside[:, :k] = rows[:, None]
        else:
            inside[(slice(k),) * parameter.ndim] = True
        assert parameter.grad is not None, key
        assert (parameter.grad[~inside] == 0).all(), key
        # no number of LoRA-XS is of no use for all inputs; a masked or rounded-off one may be
        if case[0] in ("elastic_lora", "lora_xs"):
            assert (parameter.grad[inside] != 0).any(), key


@law
@given(drawn=cases())
def test_the_state_holds_all_that_was_trained(case, drawn):
    _, model, layer, x, cut = adapted(case, drawn)
    whole = {name: value.clone() for name, value in peft.get_peft_model_state_dict(model).items()}
    Switch(model).activate(SubNetwork({"layer": 1}, {"layer": cut}))
    state = peft.get_peft_model_state_dict(model)
    config = model.peft_config["default"]
    count = registry.get(case[0]).count(layer.in_features, layer.out_features, config.r, config)
    assert sum(value.numel() for value in state.values()) == count
    assert all(torch.equal(state[name], value) for name, value in whole.items())
    other = peft.get_peft_model(
        base_layer(
            **{**fitted(case, drawn[0]), "in_features": x.shape[-1], "out_features": layer.out_features}
        ),
        copy.copy(config),
    ).eval()
    peft.set_peft_model_state_dict(other, state)
    # the configuration says which sub-network is active
    assert other.base_model.model.layer.adapters["default"].active_rank == 1
    close(other(x), model(x), x.dtype)


@law
@given(
    drawn=cases(),
    share=st.floats(0, 1),
    rows=st.lists(st.sampled_from(["default", "two", "__base__"]), min_size=1, max_size=6),
)
def test_a_mixed_batch_runs_every_adapter_at_its_own_rank(case, drawn, share, rows):
    base, model, layer, _, _ = adapted(case, drawn)
    config = copy.copy(model.peft_config["default"])
    config.seed, config.sub_network = 7, None
    model.add_adapter("two", config)
    model.eval()
    rank = 1 + int(share * (config.r - 1))
    Switch(model, "two").activate(SubNetwork({"layer": rank}))
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(len(rows), 3, layer.in_features, generator=generator).to(drawn[0]["dtype"])
    mixed = model(x, adapter_names=rows)
    scale = max(mixed.float().abs().max().item(), 1e-6)
    for index, adapter in enumerate(rows):
        row = x[index : index + 1]
        if adapter == "__base__":
            close(mixed[index : index + 1], base(row), x.dtype, scale)
        else:
            model.set_adapter(adapter)
            close(mixed[index : index + 1], model(row), x.dtype, scale)
