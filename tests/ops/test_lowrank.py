"""Left singular vectors: orthonormal, right, canonical, reproducible; odd shapes and degenerate weights."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modicum.errors import ConfigError
from modicum.ops.lowrank import (
    captured_energy,
    largest_principal_angle,
    left_singular_vectors,
    schedule,
)

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def noise(out, into, seed=0, dtype=torch.float32):
    return torch.randn(out, into, generator=torch.Generator().manual_seed(seed)).to(dtype)


def decaying(out, into, seed=0, power=-0.7):
    g = torch.Generator().manual_seed(seed)
    k = min(out, into)
    left, right = (
        torch.linalg.qr(torch.randn(n, k, generator=g, dtype=torch.float64))[0] for n in (out, into)
    )
    return ((left * (torch.arange(k) + 1.0).double() ** power) @ right.T).float()


def orthonormality(u):
    u = u.double()
    return float((u.T @ u - torch.eye(u.shape[1], dtype=torch.float64)).abs().max())


def assert_sound(found, out, rank):
    assert found.u.shape == (out, rank)
    assert found.u.dtype == torch.float32
    assert found.s.shape == (rank,)
    assert found.s.dtype == torch.float32
    assert bool(torch.isfinite(found.u).all())
    assert bool(torch.isfinite(found.s).all())
    assert orthonormality(found.u) < 1e-6
    assert 0.0 <= found.captured <= 1.0
    peaks = found.u.gather(0, found.u.abs().argmax(0, keepdim=True))
    assert bool((peaks > 0).all())


@settings(deadline=None, max_examples=60)
@given(
    out=st.integers(1, 70),
    into=st.integers(1, 70),
    data=st.data(),
    dtype=st.sampled_from(DTYPES),
    mode=st.sampled_from(["fast", "exact"]),
)
def test_any_shape_rank_and_dtype_gives_orthonormal_columns(out, into, data, dtype, mode):
    rank = data.draw(st.integers(1, min(out, into)))
    true_rank = data.draw(st.integers(0, min(out, into)))
    weight = (noise(out, true_rank, 1) @ noise(true_rank, into, 2) / 8).to(dtype)
    assert_sound(left_singular_vectors(weight, rank, mode=mode), out, rank)


@pytest.mark.parametrize("true_rank", [1, 3, 16, 20])
def test_a_rank_deficient_weight_has_its_own_directions(true_rank):
    weight = noise(600, true_rank, 1) @ noise(true_rank, 500, 2)
    u, s, _ = torch.linalg.svd(weight.double(), full_matrices=False)
    rank = min(true_rank, 16)
    found = left_singular_vectors(weight, rank)
    assert torch.allclose(found.s.double(), s[:rank], rtol=1e-4)
    assert largest_principal_angle(found.u, u[:, :rank]) < 1e-3
    assert found.converged


@settings(deadline=None, max_examples=12)
@given(
    out=st.integers(400, 900),
    into=st.integers(400, 900),
    rank=st.sampled_from([3, 16, 17]),
    lack=st.booleans(),
)
def test_the_krylov_path_gives_orthonormal_columns(out, into, rank, lack):
    inner = 5 if lack else 400
    found = left_singular_vectors(noise(out, inner, 3) @ noise(inner, into, 4), rank)
    assert_sound(found, out, rank)
    if lack and rank > 5:
        assert found.captured > 1 - 1e-5
        assert (found.s[5:] < 1e-5 * found.s[0]).all()


@pytest.mark.parametrize("mode", ["fast", "exact"])
@pytest.mark.parametrize("shape", [(40, 60), (600, 500), (1100, 1200)])
def test_a_zero_weight_has_fixed_directions(shape, mode):
    found = left_singular_vectors(torch.zeros(shape), 4, mode=mode)
    assert_sound(found, shape[0], 4)
    assert found.captured == 1.0
    assert not found.s.any()


def test_completed_directions_do_not_depend_on_rounding_noise():
    weight = noise(500, 3, 1) @ noise(3, 450, 2)
    a = left_singular_vectors(weight, 8)
    b = left_singular_vectors(weight + 1e-7 * noise(500, 450, 3), 8)
    assert float((a.u - b.u).abs().max()) < 1e-4


@pytest.mark.parametrize("shape", [(60, 90), (90, 60), (64, 64)])
@pytest.mark.parametrize("directions", ["top", "middle", "bottom"])
def test_exact_agrees_with_the_full_decomposition(shape, directions):
    weight, rank = decaying(*shape), 6
    u, s, _ = torch.linalg.svd(weight.double(), full_matrices=False)
    first = {"top": 0, "middle": (len(s) - rank) // 2, "bottom": len(s) - rank}[directions]
    found = left_singular_vectors(weight, rank, mode="exact", directions=directions)
    assert torch.allclose(found.s.double(), s[first : first + rank], rtol=1e-4)
    assert float(((u[:, first : first + rank].T @ found.u.double()).abs().diagonal() - 1).abs().max()) < 1e-5
    assert found.converged


@pytest.mark.parametrize("shape", [(1100, 1300), (1300, 1100)])
def test_the_iterated_exact_mode_agrees_with_the_full_decomposition(shape):
    weight = noise(*shape)
    values, vectors = torch.linalg.eigh(weight.double() @ weight.double().T)
    found = left_singular_vectors(weight, 16, mode="exact")
    assert found.converged
    assert found.iterations > 0
    assert torch.allclose(found.s.double(), values.flip(0)[:16].sqrt(), rtol=1e-6)
    truth = vectors.flip(1)[:, :16]
    truth = truth * torch.sign((truth * found.u).sum(0))
    assert float(torch.linalg.vector_norm(found.u - truth, dim=0).max()) < 1e-4


def test_exact_waits_for_directions_far_below_the_largest():
    weight = decaying(1100, 1200, power=-0.9)
    _, vectors = torch.linalg.eigh(weight.double() @ weight.double().T)
    found = left_singular_vectors(weight, 48, mode="exact")
    assert found.iterations > 0
    assert largest_principal_angle(found.u, vectors.flip(1)[:, :48]) < 2e-5


@pytest.mark.parametrize("weight", [noise(700, 800), decaying(800, 700), 1e-25 * noise(700, 800)])
def test_fast_captures_almost_all_that_can_be_captured(weight):
    fast = left_singular_vectors(weight, 16)
    best = left_singular_vectors(weight, 16, mode="exact")
    assert captured_energy(weight, fast.u) > 0.98 * best.captured
    assert fast.captured <= best.captured * (1 + 1e-6)
    assert fast.iterations == schedule(16)[1]


def test_fast_captures_as_much_as_ten_subspace_iterations():
    weight = noise(900, 900, 5)
    torch.manual_seed(0)
    other = torch.svd_lowrank(weight, q=26, niter=10)[0][:, :16]
    assert captured_energy(weight, left_singular_vectors(weight, 16).u) >= captured_energy(weight, other)


def test_the_same_input_gives_the_same_bytes():
    weight = noise(500, 600)
    for mode in ("fast", "exact"):
        first, again = (left_singular_vectors(weight, 9, mode=mode) for _ in range(2))
        assert torch.equal(first.u, again.u)
        assert torch.equal(first.s, again.s)


def test_lower_exact_ranks_are_prefixes():
    weight = decaying(50, 80)
    high = left_singular_vectors(weight, 12, mode="exact")
    low = left_singular_vectors(weight, 5, mode="exact")
    assert torch.allclose(high.u[:, :5], low.u, atol=1e-6)


def test_a_noncontiguous_weight_is_the_same_weight():
    weight = noise(120, 90)
    assert torch.equal(
        left_singular_vectors(weight, 4).u, left_singular_vectors(weight.T.contiguous().T, 4).u
    )


@pytest.mark.parametrize(
    ("weight", "rank", "options", "says"),
    [
        (torch.zeros(4, 5), 5, {}, "between 1 and 4"),
        (torch.zeros(4, 5), 0, {}, "between 1 and 4"),
        (torch.zeros(4), 1, {}, "matrix"),
        (torch.zeros(4, 5), 1, {"directions": "middle"}, "exact"),
        (torch.full((4, 5), math.nan), 1, {}, "NaN"),
        (torch.full((4, 5), math.inf, dtype=torch.float64), 1, {}, "infinite"),
    ],
)
def test_what_cannot_be_is_refused(weight, rank, options, says):
    with pytest.raises(ConfigError, match=says):
        left_singular_vectors(weight, rank, **options)


@pytest.mark.parametrize("angle", [1e-9, 1e-6, 1e-3, 0.7, 0.9, math.pi / 2])
def test_principal_angles_are_accurate_however_small(angle):
    q = torch.linalg.qr(noise(40, 8, 7).double())[0]
    turned = q[:, :3].clone()
    turned[:, 2] = math.cos(angle) * q[:, 2] + math.sin(angle) * q[:, 5]
    assert largest_principal_angle(q[:, :3], turned) == pytest.approx(angle, rel=1e-5)


def test_captured_energy_of_everything_is_one():
    weight = noise(20, 30)
    assert captured_energy(weight, torch.eye(20)) == pytest.approx(1.0, rel=1e-6)
    assert captured_energy(torch.zeros(20, 30), torch.eye(20)) == 1.0
