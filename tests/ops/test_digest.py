"""Digests tell weights apart and survive dtype, layout and chunking; sketches feel a single turned column."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modicum.ops import digest
from modicum.ops.digest import SKETCH_SIZE, sketch, weight_digest


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def columns(n, k, seed=0):
    return torch.linalg.qr(noise(n, k, seed=seed).double())[0]


def test_a_digest_belongs_to_the_checkpoint_and_not_to_the_dtype():
    stored = noise(33, 17).to(torch.bfloat16)
    found = {weight_digest(stored.to(dtype)) for dtype in (torch.bfloat16, torch.float32, torch.float64)}
    assert len(found) == 1
    assert len(found.pop()) == 32


def test_the_digest_is_stable():
    # part of the formats: adapters and cache files name weights by it
    assert weight_digest(torch.arange(6.0).reshape(2, 3)) == "dd54e28ece5ac149269427afaabe0bad"


def test_memory_layout_does_not_matter(monkeypatch):
    weight = noise(40, 24)
    want = weight_digest(weight)
    assert weight_digest(weight.T.contiguous().T) == want
    assert weight_digest(noise(40, 48).copy_(torch.cat([weight, weight], 1))[:, :24]) == want
    monkeypatch.setattr(digest, "_CHUNK", 100)
    assert weight_digest(weight) == want


def test_shape_values_and_nothing_else_make_the_digest():
    weight = noise(6, 8)
    assert weight_digest(weight) != weight_digest(weight.reshape(8, 6))
    changed = weight.clone()
    changed[3, 5] *= 1.01
    assert weight_digest(weight) != weight_digest(changed)
    assert weight_digest(torch.zeros(2, 2)) == weight_digest(-torch.zeros(2, 2))
    assert weight_digest(torch.zeros(0, 3)) != weight_digest(torch.zeros(0, 4))


@settings(deadline=None, max_examples=40)
@given(n=st.integers(1, 60), data=st.data(), name=st.text(max_size=12))
def test_the_sketch_of_a_sum_of_columns_is_the_sum(n, data, name):
    k = data.draw(st.integers(1, n))
    u = columns(n, k)
    whole = sketch(name, u)
    assert whole.shape == (SKETCH_SIZE,)
    assert whole.dtype == torch.float64
    first = data.draw(st.integers(0, k))
    rest = torch.cat([torch.zeros(n, first).double(), u[:, first:]], 1)
    assert torch.allclose(sketch(name, u[:, :first]) + sketch(name, rest), whole, atol=1e-9)


def test_any_turned_column_moves_the_sketch():
    for n, k in ((64, 16), (768, 32), (2048, 4), (5, 5)):
        u = columns(n, k)
        before = sketch("layer", u)
        for column in range(k):
            turned = u.clone()
            turned[:, column] *= -1
            moved = float((sketch("layer", turned) - before).square().mean().sqrt())
            assert 1.0 < moved < 4.0


def test_a_column_with_one_entry_moves_it_by_exactly_two():
    u = torch.eye(50).double()[:, :3]
    turned = u * torch.tensor([1.0, -1.0, 1.0])
    assert torch.allclose((sketch("x", turned) - sketch("x", u)).abs(), torch.full((16,), 2.0).double())


def test_swapped_columns_and_other_names_have_other_sketches():
    u = columns(64, 4)
    assert float((sketch("a", u) - sketch("b", u)).abs().max()) > 0.1
    assert float((sketch("a", u) - sketch("a", u[:, [1, 0, 2, 3]])).abs().max()) > 0.1


def test_projections_are_portable():
    u = torch.eye(3).double()
    assert sketch("layer", u).tolist() == [
        3.0,
        -3.0,
        -1.0,
        1.0,
        -3.0,
        -1.0,
        -1.0,
        -3.0,
        3.0,
        1.0,
        -1.0,
        3.0,
        1.0,
        1.0,
        -3.0,
        -1.0,
    ]
