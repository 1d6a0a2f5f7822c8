"""Bases: prefixes, dtype independence, cache, files and fingerprints."""

from __future__ import annotations

import math
import multiprocessing
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modicum.adapters.basis import (
    TOLERANCE,
    Basis,
    BasisCache,
    BasisSpec,
    LayerFactors,
    base_fingerprint,
    canonical_size,
    compare,
    ensure_same,
    fingerprint_of,
    layer_factors,
)
from modicum.errors import BasisMismatchError, ConfigError, CorruptAdapterError
from modicum.ops.digest import weight_digest

FAST, EXACT = BasisSpec(), BasisSpec(mode="exact")


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def orthonormal(n, k, seed=0):
    return torch.linalg.qr(noise(n, k, seed=seed).double())[0].float()


def made(layers=3, rank=4, spec=FAST):
    weights = {f"layers.{i}.q": noise(40, 30, seed=i) for i in range(layers)}
    factors = {n: layer_factors(w, rank, spec, name=n, cache=None) for n, w in weights.items()}
    return Basis(factors, spec, {n: weight_digest(w) for n, w in weights.items()}), weights


def same(a, b):
    keys = ("u", "s", "a", "r0")
    pairs = [(getattr(a[n], k), getattr(b[n], k)) for n in a for k in keys]
    return list(a) == list(b) and all(x is y is None or torch.equal(x, y) for x, y in pairs)


@pytest.mark.parametrize(("rank", "size"), [(1, 16), (16, 16), (17, 32), (33, 64), (64, 64), (65, 128)])
def test_canonical_sizes(rank, size):
    assert canonical_size(rank, 4096, 4096) == size
    assert canonical_size(min(rank, 20), 20, 4096) == min(size, 20)


@settings(deadline=None, max_examples=25)
@given(
    out=st.integers(2, 60),
    into=st.integers(2, 60),
    data=st.data(),
    spec=st.sampled_from([FAST, EXACT, BasisSpec("random", seed=3)]),
)
def test_lower_ranks_are_prefixes(out, into, data, spec):
    high = data.draw(st.integers(2, min(out, into)))
    low = data.draw(st.integers(1, high - 1))
    if canonical_size(low, out, into) != canonical_size(high, out, into):
        return
    weight = noise(out, into)
    a, b = (layer_factors(weight, r, spec, name="x", cache=None) for r in (high, low))
    assert torch.equal(a.u[:, :low], b.u)
    assert same({"x": a.first(low)}, {"x": b})


@pytest.mark.parametrize("spec", [FAST, EXACT])
def test_the_basis_belongs_to_the_checkpoint_and_not_to_the_dtype(spec):
    stored = noise(70, 50).to(torch.bfloat16)
    wanted = layer_factors(stored, 8, spec, cache=None)
    for dtype in (torch.float32, torch.float64):
        assert torch.equal(layer_factors(stored.to(dtype), 8, spec, cache=None).u, wanted.u)
    other = noise(70, 50)  # a float32 checkpoint, and the same loaded in bfloat16
    assert torch.equal(
        layer_factors(other, 8, spec, cache=None).u, layer_factors(other.bfloat16(), 8, spec, cache=None).u
    )


def test_random_factors_depend_on_seed_and_name_and_not_on_the_weight():
    spec = BasisSpec("random", seed=1)
    one = layer_factors(noise(30, 20), 6, spec, name="a", cache=None)
    assert torch.equal(one.u, layer_factors(noise(30, 20, seed=9), 6, spec, name="a", cache=None).u)
    for other in (("b", 1), ("a", 2)):
        spec = BasisSpec("random", seed=other[1])
        assert not torch.allclose(layer_factors(noise(30, 20), 6, spec, name=other[0], cache=None).u, one.u)
    assert one.a is not None
    assert one.a.shape == (6, 20)
    for q in (one.u.T @ one.u, one.a @ one.a.T):
        assert torch.allclose(q, torch.eye(6), atol=1e-6)


def test_kaiming_factors_have_the_bounds_of_linear_layers():
    weight, spec = noise(900, 400), BasisSpec("random_kaiming")
    found = layer_factors(weight, 16, spec, name="x", cache=None)
    assert found.a is not None
    assert 0.95 / 4 < float(found.u.abs().max()) <= 1 / 4
    assert 0.95 / 20 < float(found.a.abs().max()) <= 1 / 20
    low = layer_factors(weight, 4, spec, name="x", cache=None)
    cut = Basis({"x": found}, spec).truncated(4)["x"]
    assert torch.allclose(cut.u, low.u)
    assert torch.equal(cut.a, low.a)


def test_what_has_no_basis_is_refused():
    with pytest.raises(ConfigError, match="rank 5"):
        layer_factors(noise(4, 9), 5, FAST, name="narrow")
    with pytest.raises(ConfigError, match="meta"):
        layer_factors(torch.empty(9, 9, device="meta"), 2, FAST)
    with pytest.raises(BasisMismatchError, match="modicum basis add"):
        layer_factors(noise(9, 9), 2, BasisSpec("stored"))
    with pytest.raises(ConfigError, match="did you mean 'svd'"):
        BasisSpec("svdd")


# ---- cache


def test_a_second_call_reads_the_cache(tmp_path, monkeypatch):
    cache, weight = BasisCache(tmp_path), noise(40, 30)
    first = layer_factors(weight, 4, FAST, cache=cache)
    assert cache.info().entries == 1
    monkeypatch.setattr("modicum.adapters.basis.left_singular_vectors", None)
    again = layer_factors(weight.bfloat16(), 7, FAST, cache=cache)
    assert torch.equal(again.u[:, :4], first.u)
    assert cache.clear().entries == 1
    assert cache.info() == (str(tmp_path), 0, 0)


def test_the_default_cache_is_where_the_environment_says(tmp_path, monkeypatch):
    monkeypatch.setenv("MODICUM_CACHE", str(tmp_path))
    layer_factors(noise(9, 9), 2, FAST)
    assert len(list((tmp_path / "basis").glob("*/*.safetensors"))) == 1


@pytest.mark.parametrize("damage", ["truncate", "flip", "empty", "other"])
def test_a_damaged_entry_is_replaced(tmp_path, damage):
    cache, weight = BasisCache(tmp_path), noise(40, 30)
    wanted = layer_factors(weight, 4, FAST, cache=cache)
    (file,) = tmp_path.glob("*/*.safetensors")
    whole = file.read_bytes()
    flipped = bytearray(whole)
    flipped[-9] ^= 64
    file.write_bytes(
        {"truncate": whole[:-100], "flip": bytes(flipped), "empty": b"", "other": b"x" * 500}[damage]
    )
    assert torch.equal(layer_factors(weight, 4, FAST, cache=cache).u, wanted.u)
    replaced = cache.load(file.stem)
    assert replaced is not None
    assert torch.equal(replaced["u"][:, :4], wanted.u)


def test_an_unwritable_folder_warns_once_and_goes_on(tmp_path):
    (tmp_path / "file").write_text("in the way")
    cache = BasisCache(tmp_path / "file" / "below")
    with pytest.warns(RuntimeWarning, match="MODICUM_CACHE"):
        layer_factors(noise(9, 9), 2, FAST, cache=cache)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer_factors(noise(9, 8), 2, FAST, cache=cache)


def test_a_full_disk_leaves_no_partial_file(tmp_path, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("modicum.adapters.basis_cache.os.fsync", full)
    with pytest.warns(RuntimeWarning, match="No space left"):
        layer_factors(noise(9, 9), 2, FAST, cache=BasisCache(tmp_path))
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def _fill(folder, barrier):
    torch.set_num_threads(1)
    barrier.wait(timeout=60)
    for seed in range(12):
        layer_factors(noise(20, 20, seed=seed), 4, FAST, cache=BasisCache(folder))


def test_two_processes_share_a_cache(tmp_path):
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(2)
    workers = [context.Process(target=_fill, args=(tmp_path, barrier)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(90)
        assert worker.exitcode == 0
    cache = BasisCache(tmp_path)
    assert cache.info().entries == 12
    assert not list(tmp_path.rglob("*.part"))
    assert all(cache.load(path.stem) for path in tmp_path.glob("*/*.safetensors"))


def test_an_added_basis_is_found_by_its_fingerprint(tmp_path):
    cache, (basis, _) = BasisCache(tmp_path), made()
    cache.add(basis)
    found = cache.get(basis.fingerprint())
    assert found is not None
    assert same(found, basis)
    assert cache.get(made(spec=EXACT)[0].fingerprint()) is None
    ranks = {"layers.0.q": 2, "layers.2.q": 3}
    part = cache.get(basis.part(ranks).fingerprint(), ranks)
    assert part is not None
    assert {name: layer.u.shape[1] for name, layer in part.items()} == ranks


# ---- files


def test_a_basis_survives_its_file(tmp_path):
    basis, _ = made()
    factors = LayerFactors(orthonormal(9, 3), None, noise(3, 7), noise(3))
    for one in (basis, Basis({"a.b": factors}, BasisSpec("stored"))):
        one.save(tmp_path / "b.safetensors")
        read = Basis.load(tmp_path / "b.safetensors")
        assert same(read, one)
        assert (read.spec, read.digests, read.fingerprint()) == (one.spec, one.digests, one.fingerprint())


def test_a_damaged_file_is_refused_with_advice(tmp_path):
    basis, _ = made()
    file = tmp_path / "b.safetensors"
    basis.save(file)
    whole = file.read_bytes()
    for content in (whole[:-20], whole[:40], b"", whole[:-4] + b"\0\0\xc0\x7f", b"no such thing" * 40):
        file.write_bytes(content)
        with pytest.raises(CorruptAdapterError, match="modicum basis build"):
            Basis.load(file)
    with pytest.raises(FileNotFoundError):
        Basis.load(tmp_path / "absent.safetensors")


def test_numbers_that_are_not_finite_are_refused(tmp_path):
    u = orthonormal(9, 3)
    u[2, 1] = math.nan
    Basis({"x": LayerFactors(u)}, FAST).save(tmp_path / "b.safetensors")
    with pytest.raises(CorruptAdapterError, match=r"NaN or infinite values in x\.u"):
        Basis.load(tmp_path / "b.safetensors")


def test_factors_of_different_sizes_are_refused(tmp_path):
    Basis({"x": LayerFactors(orthonormal(9, 3), torch.ones(2))}, FAST).save(tmp_path / "b.safetensors")
    with pytest.raises(CorruptAdapterError, match="shapes"):
        Basis.load(tmp_path / "b.safetensors")


def test_verify_tells_the_right_base_from_a_wrong_one():
    basis, weights = made(spec=EXACT)
    for report in basis.verify(iter(weights.items())):
        assert report.orthonormality < 1e-6
        assert report.relative == pytest.approx(1.0, abs=1e-5)
        assert report.same_weight is True
    wrong = {name: noise(40, 30, seed=77) for name in weights}
    for report in basis.verify(wrong):
        assert report.relative is not None
        assert report.relative < 0.9
        assert report.same_weight is False
    with pytest.raises(BasisMismatchError, match="another base model"):
        basis.verify({"layers.0.q": noise(41, 30)})


def test_a_part_that_is_not_there_is_named():
    basis, _ = made()
    with pytest.raises(BasisMismatchError, match=r"absent.*layers\.1\.q"):
        basis.part({"absent": 2, "layers.1.q": 5})


# ---- fingerprints


@settings(deadline=None, max_examples=20)
@given(layers=st.integers(1, 40), k=st.integers(1, 12), data=st.data())
def test_any_single_turned_column_is_refused_and_rounding_is_not(layers, k, data):
    us = {f"l{i}": orthonormal(24, k, seed=i) for i in range(layers)}
    before = fingerprint_of(us.items(), FAST)
    columns = layers * k
    rounded = {n: u + 1e-4 * noise(24, k, seed=99 + i) / 24**0.5 for i, (n, u) in enumerate(us.items())}
    ensure_same(before, fingerprint_of(rounded.items(), FAST), columns)
    name = data.draw(st.sampled_from(sorted(us)))
    turned = us[name].clone()
    turned[:, data.draw(st.integers(0, k - 1))] *= -1
    after = fingerprint_of({**us, name: turned}.items(), FAST)
    with pytest.raises(BasisMismatchError, match="modicum basis"):
        ensure_same(before, after, columns)


def test_one_turned_column_among_a_hundred_thousand_is_refused():
    us = {f"l{i}": orthonormal(8, 4, seed=i) for i in range(40)}
    turned = dict(us)
    turned["l7"] = us["l7"] * torch.tensor([1.0, 1.0, -1.0, 1.0])
    a, b = (fingerprint_of(x.items(), FAST) for x in (us, turned))
    assert compare(a, b, 100_000) > TOLERANCE


def test_the_order_of_layers_does_not_matter_and_their_names_do():
    us = [(f"l{i}", orthonormal(16, 3, seed=i)) for i in range(4)]
    assert fingerprint_of(us, FAST) == fingerprint_of(reversed(us), FAST)
    renamed = [(f"m{i}", u) for i, (_, u) in enumerate(us)]
    assert compare(fingerprint_of(us, FAST), fingerprint_of(renamed, FAST), 12) > TOLERANCE


def test_prefixes_have_the_fingerprint_of_the_truncated_basis():
    basis, _ = made()
    assert basis.fingerprint(2) == basis.truncated(2).fingerprint()
    items = [(name, layer.u) for name, layer in basis.items()]
    assert fingerprint_of(items, FAST, 2) == basis.fingerprint(2)


def test_other_kinds_are_infinitely_far():
    (fast, _), (exact, _) = made(), made(spec=EXACT)
    assert compare(fast.fingerprint(), exact.fingerprint(), 12) == math.inf
    with pytest.raises(BasisMismatchError, match="--mode exact"):
        ensure_same(exact.fingerprint(), fast.fingerprint(), 12)
    with pytest.raises(BasisMismatchError, match="modicum basis add"):
        ensure_same("stored-v1:" + fast.fingerprint().partition(":")[2], fast.fingerprint(), 12)
    with pytest.raises(BasisMismatchError, match="no basis fingerprint"):
        compare("garbage", fast.fingerprint(), 12)


def test_a_base_fingerprint_names_every_weight():
    digests = {"a": "1", "b": "2"}
    assert base_fingerprint(digests) == base_fingerprint({"b": "2", "a": "1"})
    assert base_fingerprint(digests) != base_fingerprint({"a": "2", "b": "1"})
    assert len(base_fingerprint(digests)) == 32
