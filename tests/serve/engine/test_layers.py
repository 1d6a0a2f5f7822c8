"""The law of served layers: every row as its adapter alone gives it offline, whatever else is in the batch."""

from __future__ import annotations

import copy
import stat

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from tests.laws.cases import METHODS, base_layer, close, fitted, method_id
from tests.models_for_tests import gpt2, llama, tokens
from tests.serve.engine.adapters_for_tests import offline, record_of
from torch.nn import functional as F

from modicum.adapters import registry
from modicum.quant.native import build
from modicum.serve.engine import native
from modicum.serve.engine.families import LANES
from modicum.serve.engine.interface import AdapterUnavailableError
from modicum.serve.engine.layers import ServedLinear
from modicum.serve.engine.slots import Slots
from modicum.store.record import build as build_record

#: methods whose updates are of low rank
SERVED = [case for case in METHODS if case[0] not in ("qa_hira", "sparse_peft", "qa_sparse_peft")]
SERVED.append(("peft:LORA", {}))

shapes = st.fixed_dictionaries(
    {
        "kind": st.sampled_from(["linear", "conv1d", "low-bit"]),
        "in_features": st.integers(1, 40),
        "out_features": st.integers(1, 90),
        "bias": st.booleans(),
        "dtype": st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
        "seed": st.integers(0, 3),
    }
)


def test_every_method_with_factors_is_served():
    """A new method is served, or its name stands above."""
    assert {name for name, _ in SERVED} - {"peft:LORA"} | {"qa_hira", "sparse_peft", "qa_sparse_peft"} == set(
        registry.names()
    )


def mixed(base, records, order, lengths, x):
    """The output of served layers for rows of several lengths, one after the other."""
    served = copy.deepcopy(base)
    slots = Slots(served, records.__getitem__, slots=8, max_rank=128)
    leases = [None if name is None else slots.acquire(name) for name in order]
    assert slots.step(leases, lengths) == []
    with torch.no_grad():
        found = served(x)
    slots.end_step()
    slots.remove()
    return found


def shaped(case, shape):
    """The drawn shape, as method and base format need it."""
    shape = (
        {**shape, "in_features": 8, "out_features": 8}
        if min(shape["in_features"], shape["out_features"]) < 2
        else shape
    )
    shape = fitted(case, shape) if case[0] != "peft:LORA" else shape
    if shape["kind"] == "low-bit":
        # without a bias, PEFT finds no parameter whose type it could follow
        shape = {**shape, "in_features": -(-shape["in_features"] // 8) * 8, "bias": True}
    return shape


@pytest.mark.parametrize("case", SERVED, ids=method_id)
@settings(max_examples=6, deadline=None, derandomize=True, phases=[Phase.generate])
@given(shape=shapes)
def test_rows_are_what_they_are_alone(case, shape):
    name, variant = case
    shape = shaped(case, shape)
    base = base_layer(**shape)
    most = min(shape["in_features"], shape["out_features"])
    ranks = {"one@1": max(1, most // 2), "two@1": 1, "wide@1": min(most, 20)}
    alpha = "lora_alpha" if name == "peft:LORA" else "alpha"
    records = {
        version: record_of(
            base, name, r=rank, target_modules=["layer"], seed=i, **{alpha: 2 * rank}, **variant
        )
        for i, (version, rank) in enumerate(ranks.items())
    }
    records["core@1"] = record_of(base, "lora_xs", r=max(1, most // 3), target_modules=["layer"], seed=9)
    records["lora@1"] = record_of(base, "peft:LORA", r=2, target_modules=["layer"], seed=8)
    order = ["one@1", None, "two@1", "core@1", "lora@1", "wide@1", "one@1"]
    lengths = [3, 2, 1, 5, 1, 4, 6]
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, sum(lengths), shape["in_features"], generator=generator).to(shape["dtype"])
    found = mixed(base, records, order, lengths, x)
    start = 0
    for version, length in zip(order, lengths, strict=True):
        part = slice(start, start + length)
        with torch.no_grad():
            wanted = offline(base, records[version] if version else None)(x[:, part])
        # few rows of a quantized layer may take another kernel than many
        close(found[:, part], wanted, shape["dtype"], max(wanted.float().abs().max().item(), 1.0))
        start += length


@pytest.fixture(scope="session")
def plain_compiler(tmp_path_factory):
    """A compiler that knows nothing of this processor."""
    try:
        compiler = build.find_compiler()
    except build.NotBuiltError as error:
        pytest.skip(str(error))
    plain = tmp_path_factory.mktemp("compiler") / "plain"
    plain.write_text(f'#!/bin/bash\nexec {compiler} "${{@/-march=native/-O2}}"\n')
    plain.chmod(plain.stat().st_mode | stat.S_IEXEC)
    return plain


@pytest.fixture(params=["library", "library without this processor's instructions", "torch"])
def arithmetic(request, monkeypatch, plain_compiler):
    """Each of the ways that adapters are computed in."""
    if request.param == "torch":
        monkeypatch.setenv("MODICUM_NATIVE", "0")
    elif request.param != "library":
        monkeypatch.setenv("CXX", str(plain_compiler))
    native._loaded.cache_clear()
    assert native.available() == (request.param != "torch")
    yield
    monkeypatch.undo()
    native._loaded.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes", [(70, 33), (130, 66), (24, 200)], ids=str)
def test_all_ways_of_computing_agree_with_the_dense_update(arithmetic, dtype, sizes):
    """Ranks that do not fill registers, rows that do not fill blocks, odd sizes, several adapters of each kind."""
    out, inner = sizes
    base = base_layer("linear", inner, out, dtype, bias=True, seed=0)
    wide = min(sizes)
    records = {
        "a@1": record_of(base, "lora_xs", r=16, target_modules=["layer"], seed=1),
        "b@1": record_of(base, "lora_xs", r=16, target_modules=["layer"], seed=2),
        "c@1": record_of(base, "lora_xs", r=wide // 2 + 1, target_modules=["layer"], seed=3, alpha=3.0),
        "g@1": record_of(base, "lora_xs", r=wide * 9 // 10, target_modules=["layer"], seed=7),
        "d@1": record_of(base, "lora_xs", r=7, core="diagonal", target_modules=["layer"], seed=4),
        "e@1": record_of(base, "peft:LORA", r=5, target_modules=["layer"], use_rslora=True),
        "f@1": record_of(base, "elastic_lora", r=wide, target_modules=["layer"], seed=6),
    }
    order = ["a@1", "f@1", None, "b@1", "g@1", "c@1", "a@1", "e@1", "d@1", "e@1"]
    lengths = [17, 3, 5, 1, 2, 70, 4, 2, 9, 1]
    x = torch.randn(1, sum(lengths), inner, generator=torch.Generator().manual_seed(0)).to(dtype)
    found = mixed(base, records, order, lengths, x)
    start = 0
    for version, length in zip(order, lengths, strict=True):
        part = slice(start, start + length)
        wanted = base(x[:, part]).float()
        if version is not None:
            layer = offline(base.float(), records[version]).base_model.model.layer
            delta = next(iter(layer.adapters.values())).delta_weight() if hasattr(layer, "adapters") else None
            delta = layer.get_delta_weight("default") if delta is None else delta
            wanted = wanted + x[:, part].float() @ delta.detach().T
            base.to(dtype)
        else:
            assert torch.equal(found[:, part], base(x)[:, part])
        close(found[:, part], wanted, dtype)
        start += length


def test_broken_numbers_of_one_adapter_reach_no_other_row(arithmetic):
    base = llama()
    records = {f"a{i}@1": record_of(base, "lora_xs", r=8, seed=i) for i in range(3)}
    served = copy.deepcopy(base)
    slots = Slots(served, records.__getitem__, slots=4, max_rank=16)
    leases = [slots.acquire(f"a{i}@1") for i in range(3)]
    ids = tokens(3, 5)
    slots.step(leases, [5] * 3)
    with torch.no_grad():
        whole = served(ids).logits
        # as if an update made of its numbers had overflowed
        slots._slots[leases[1].slot].row.values.fill_(float("nan"))
        slots.step(leases, [5] * 3)
        slots._batch.set(slots._batch._parts, 15)
        broken = served(ids).logits
    assert broken[1].isnan().any()
    assert torch.equal(broken[[0, 2]], whole[[0, 2]])


@pytest.mark.parametrize("make", [llama, gpt2], ids=["llama", "gpt2"])
def test_greedy_tokens_of_a_mixed_batch_are_those_of_each_alone(make):
    """Distinct ranks, methods and bases of the same model, token for token."""
    base = make()
    records = {
        "xs@1": record_of(base, "lora_xs", r=16, alpha=8.0),
        "xs@2": record_of(base, "lora_xs", r=4, alpha=2.0, seed=1),
        "random@1": record_of(base, "lora_xs", r=8, basis="random", seed=2),
        "lora@1": record_of(
            base, "peft:LORA", r=3, lora_alpha=1, target_modules=["q_proj", "down_proj", "c_fc"]
        ),
        "bara@1": record_of(base, "q_bara", r=2, seed=3),
    }
    order = ["xs@1", None, "lora@1", "xs@2", "bara@1", "random@1", "xs@1"]
    served = copy.deepcopy(base)
    slots = Slots(served, records.__getitem__, slots=8, max_rank=64)
    leases = [None if name is None else slots.acquire(name) for name in order]
    ids = tokens(len(order), 4)
    for _ in range(8):
        slots.step(leases, [ids.shape[1]] * len(order))
        with torch.no_grad():
            ids = torch.cat([ids, served(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
        slots.end_step()
    assert len({tuple(row.tolist()) for row in ids[:, 4:]}) > 2
    for place, name in enumerate(order):
        alone = offline(base, records[name] if name else None)
        row = tokens(len(order), 4)[place : place + 1]
        for _ in range(8):
            with torch.no_grad():
                row = torch.cat([row, alone(row, use_cache=False).logits[:, -1:].argmax(-1)], 1)
        assert torch.equal(ids[place], row[0]), name


def test_without_adapters_in_the_step_the_base_model_runs_bit_for_bit():
    base = llama()
    served = copy.deepcopy(base)
    record = record_of(base, "lora_xs", r=8)
    slots = Slots(served, lambda _: record, slots=2, max_rank=16)
    lease = slots.acquire("a@1")
    assert sum(isinstance(module, ServedLinear) for module in served.modules()) == 14
    ids = tokens(2, 5)
    with torch.no_grad():
        wanted = base(ids).logits
        slots.step([lease, None], [5, 5])
        assert not torch.equal(served(ids).logits[0], wanted[0])
        slots.end_step()
        assert torch.equal(served(ids).logits, wanted)
        slots.step([None, None], [5, 5])
        assert torch.equal(served(ids).logits, wanted)
        slots.end_step()
    assert served.model.layers[0].mlp.up_proj.in_features == 32
    slots.remove()
    assert [type(m) for m in served.modules()] == [type(m) for m in base.modules()]


def test_a_layer_that_sees_other_tokens_than_the_step_refuses():
    base = llama()
    record = record_of(base, "lora_xs", r=8)
    slots = Slots(base, lambda _: record, slots=2, max_rank=16)
    slots.step([slots.acquire("a@1")], [4])
    with pytest.raises(RuntimeError, match="step of 4 tokens"), torch.no_grad():
        base(tokens(1, 5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16", "int8"])
def test_a_row_of_the_pool_holds_the_cores_transposed_and_scaled(arithmetic, stored, dtype):
    base = llama().to(dtype)
    record = record_of(base, "lora_xs", dtype=stored, r=5, alpha=20)
    slots = Slots(base, lambda _: record, slots=1, max_rank=16)
    slots.acquire("a@1")
    held, packing = slots._by_version["a@1"], slots._directions.packing
    for name, core in record.tensors():
        rank, offset, _ = held.family.places[slots._loader.names.index(name.removesuffix(".R"))]
        row = held.row.values[offset : offset + packing.outer_size(rank, LANES)]
        wanted = F.pad(torch.from_numpy(4 * core.T), (0, LANES - 5)).to(dtype)
        assert torch.equal(packing.outer_of(row, rank, LANES), wanted)


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
@pytest.mark.parametrize("number", [3e38, -3e38])
def test_numbers_that_are_too_large_once_they_are_scaled_are_refused(arithmetic, stored, number):
    base = llama()
    record = record_of(base, "lora_xs", r=4, alpha=16)
    tensors = {name: value.copy() for name, value in record.tensors()}
    next(reversed(tensors.values()))[-1, -1] = number
    about = {name: getattr(record, name) for name in ("config", "base_fingerprint", "basis_fingerprint")}
    large = build_record("lora_xs", tensors, stored, **about)
    slots = Slots(base, {"a@1": record, "a@2": large}.__getitem__, slots=1, max_rank=16)
    slots.release(slots.acquire("a@1"))
    with pytest.raises(AdapterUnavailableError, match="values too large"):
        slots.acquire("a@2")
    assert [one.version for one in slots.residents()] == ["a@1"]
