"""Bases in a store: found by fingerprint, also by adapters that use a part; what makes the one that is missing."""

from __future__ import annotations

import pytest
import torch
from tests import models_for_tests as models
from tests.store.small_records import record

from modicum.adapters.basis import Basis, BasisSpec
from modicum.errors import BasisMismatchError, ConfigError, CorruptAdapterError
from modicum.models.basis import build_basis
from modicum.store import (
    Filter,
    Store,
    basis_of,
    basis_state,
    export_archive,
    import_archive,
    missing_bases,
    put_basis,
)
from modicum.store.bases import from_record, to_record
from modicum.store.record import build


@pytest.fixture(scope="module")
def basis():
    return build_basis(models.llama(), ["q_proj", "v_proj"], 4, cache=None)


@pytest.fixture
def store(tmp_path):
    with Store(tmp_path / "store", create=True) as made:
        yield made


@pytest.fixture
def file(basis, tmp_path):
    basis.save(tmp_path / "basis.safetensors")
    return tmp_path / "basis.safetensors"


def adapter(basis, **config):
    """A LoRA-XS record in this basis."""
    cores = {f"{name}.R": torch.eye(layer.u.shape[1]).numpy() for name, layer in basis.items()}
    return build("lora_xs", cores, basis_fingerprint=basis.fingerprint(), config=config)


def test_a_basis_is_stored_once_and_comes_back(store, basis, file, tmp_path):
    first = put_basis(store, file)
    assert put_basis(store, file) == first
    assert (first.name.partition("-")[0], first.method) == ("basis/svd", "basis")
    back = basis_of(store, first.name)
    assert back.fingerprint() == basis.fingerprint()
    assert (back.spec, dict(back.digests)) == (basis.spec, dict(basis.digests))
    assert all(torch.equal(back[name].u, basis[name].u) for name in basis)
    back.save(tmp_path / "again.safetensors")
    assert Basis.load(tmp_path / "again.safetensors").base_fingerprint == basis.base_fingerprint
    assert store.verify().ok


def test_records_find_it_by_fingerprint(store, basis, file):
    store.put("ada", adapter(basis))
    part = basis.part({"model.layers.1.self_attn.v_proj": 2})
    store.put("part", adapter(part))
    store.put("plain", record(0, basis_fingerprint=None))
    assert basis_state(store, "plain") is None
    assert basis_state(store, "ada").stored is None
    with pytest.raises(BasisMismatchError, match=r"is not in the store\. modicum basis build"):
        basis_of(store, "ada")
    name = str(put_basis(store, file))
    assert basis_state(store, "ada").stored == basis_state(store, "part").stored == name
    assert basis_state(store, name) is None
    assert basis_of(store, "part").fingerprint() == basis.fingerprint()
    with pytest.raises(BasisMismatchError, match="needs no basis"):
        basis_of(store, "plain")


def test_another_basis_of_the_same_kind_does_not_serve(store, basis, file):
    torch.manual_seed(1)
    put_basis(store, file)
    other = build_basis(models.gpt2(), ["c_attn"], 4, cache=None)
    store.put("ada", adapter(other))
    assert basis_state(store, "ada").stored is None
    turned = Basis({n: type(f)(-f.u, f.s, f.a, f.r0) for n, f in basis.items()}, basis.spec, basis.digests)
    store.put("bob", adapter(turned))
    assert basis_state(store, "bob").stored is None


def test_missing_ones_are_listed_with_what_makes_them(store, basis, file):
    part = basis.part({"model.layers.1.self_attn.v_proj": 2})
    for seed in range(3):
        store.put("ada", adapter(basis, base_model_name_or_path="my model", alpha=seed + 2))
    store.put("part", adapter(part))
    found = {one.example: one for one in missing_bases(store)}
    assert found.keys() == {"ada@1", "part@1"}
    assert found["ada@1"].versions == 3
    assert found["ada@1"].command == (
        "modicum basis build 'my model' --rank 4 --mode fast --targets q_proj --targets v_proj --output "
        "basis.safetensors && modicum store put-basis basis.safetensors"
    )
    put_basis(store, file)
    assert missing_bases(store) == []


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (BasisSpec("svd", "bottom", "exact"), "--mode exact --directions bottom"),
        (BasisSpec("random", seed=3), "--kind random --seed 3"),
        (BasisSpec("random_kaiming"), "--kind random_kaiming --seed 0"),
        (BasisSpec("stored"), "Nothing rebuilds it"),
    ],
)
def test_every_kind_says_what_makes_it(store, spec, words, basis):
    store.put("ada", adapter(Basis(basis.layers, spec)))
    assert words in basis_state(store, "ada").command


def test_bases_travel_like_adapters(store, basis, file, tmp_path):
    put_basis(store, file)
    export_archive(store, tmp_path / "a", Filter(method="basis"))
    with Store(tmp_path / "other", create=True) as other:
        other.put("ada", adapter(basis))
        import_archive(other, tmp_path / "a")
        assert basis_state(other, "ada").stored is not None


def test_what_is_no_basis(store, tmp_path):
    with pytest.raises(ConfigError, match="no basis file"):
        put_basis(store, tmp_path / "x")
    (tmp_path / "x").write_bytes(b"no")
    with pytest.raises(CorruptAdapterError):
        put_basis(store, tmp_path / "x")
    with pytest.raises(CorruptAdapterError, match="is no basis"):
        from_record(record(0))


def test_what_is_no_fingerprint_names_no_basis(store, basis):
    store.put("odd", record(0, basis_fingerprint="svd-top-fast-v1:!!"))
    store.put("list", record(0))
    store.put("basis/x", to_record(basis))
    assert basis_state(store, "odd").stored is None
    assert basis_state(store, "list") is None
    assert [one.example for one in missing_bases(store)] == ["odd@1"]
