"""Affine grids: bounds of the error, grids that hold zero, packing and unpacking, awkward blocks."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modicum.ops.affine import (
    BITS,
    PRUNED,
    Grid,
    blocks_of,
    decode,
    encode,
    fit_grid,
    left_over,
    middle,
    pack,
    packed_width,
    residuals,
    spread,
    unpack,
    zero_points,
)

BLOCKS = ((1, 8), (1, 32), (8, 4), (2, 1), (4, 16))
F32 = {"scale_dtype": torch.float32, "offset_dtype": torch.float32}

weights = st.builds(
    lambda q, p, m, n, seed, size, shift: (
        torch.randn(q * m, p * n, generator=torch.Generator().manual_seed(seed)) * size + shift,
        (q, p),
    ),
    q=st.sampled_from([1, 2, 8]),
    p=st.sampled_from([1, 4, 13, 32]),
    m=st.integers(1, 4),
    n=st.integers(1, 4),
    seed=st.integers(0, 99),
    size=st.sampled_from([1e-6, 0.02, 1.0, 300.0]),
    shift=st.sampled_from([0.0, 0.5, -40.0]),
)
bits_of = st.sampled_from(BITS)
zero_point_of = st.sampled_from(["float", "integer", "none"])


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@given(
    bits=bits_of,
    out=st.integers(1, 9),
    columns=st.integers(1, 70),
    seed=st.integers(0, 99),
)
def test_unpacking_is_the_inverse_of_packing(bits, out, columns, seed):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (out, columns), generator=generator, dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (out, packed_width(columns, bits))
    assert torch.equal(unpack(packed, bits, columns), codes)


def test_masks_are_packed_by_the_bit():
    mask = noise(5, 37) > 0
    packed = pack(mask.to(torch.uint8), 1)
    assert packed.shape == (5, packed_width(37, 1)) == (5, 5)
    assert torch.equal(unpack(packed, 1, 37).bool(), mask)


@settings(deadline=None)
@given(weight=weights, bits=bits_of, zero_point=zero_point_of)
def test_value_and_residual_round_to_the_same_code_again(weight, bits, zero_point):
    weight, block = weight
    # clipped, so that some weights lie beyond the grid
    grid = fit_grid(weight, bits, block, zero_point=zero_point, clip="mse")
    codes = encode(weight, grid, bits, block)
    kept = weight > weight.median()
    left = left_over(weight, codes, grid, bits, block)
    found = residuals(left.clone(), kept)
    assert torch.equal(found == PRUNED, ~kept)
    again = (codes.float() + found.float() / 256).round()
    assert torch.equal(again[kept], codes.float()[kept])
    near = kept & (left.abs() <= 127 / 256)
    assert ((found / 256 - left)[near].abs() <= 0.5 / 256 + 1e-5).all()


@pytest.mark.parametrize("bits", BITS)
def test_a_packed_row_has_no_spare_bits(bits):
    assert packed_width(128, bits) * 8 == 128 * bits


@settings(deadline=None)
@given(weight=weights, bits=bits_of, zero_point=zero_point_of)
def test_the_error_is_at_most_half_a_step(weight, bits, zero_point):
    w, block = weight
    grid = fit_grid(w, bits, block, zero_point=zero_point, **F32)
    codes = encode(w, grid, bits, block)
    assert codes.dtype == torch.uint8
    assert int(codes.max()) < 2**bits
    error = (decode(codes, grid, bits, block) - w).abs()
    step = spread(grid.scales, block)
    # an end of the range can lie outside by the half step that a rounded zero moved the grid, or that a symmetric
    # grid has one code less on one side
    bound = {"float": 0.5, "integer": 1.0, "none": 1.0}[zero_point]
    slack = 1e-5 * (w.abs().max() + step)
    assert bool((error <= bound * step + slack).all())
    inside = (codes > 0) & (codes < 2**bits - 1)
    assert bool((error <= 0.5 * step + slack)[inside].all())


@settings(deadline=None)
@given(weight=weights, bits=bits_of, zero_point=zero_point_of)
def test_the_least_squares_grid_is_never_worse(weight, bits, zero_point):
    w, block = weight
    errors = []
    for clip in ("minmax", "mse"):
        grid = fit_grid(w, bits, block, zero_point=zero_point, clip=clip, **F32)
        error = decode(encode(w, grid, bits, block), grid, bits, block) - w
        errors.append(blocks_of(error.double(), block).square().sum(-1))
    noise_floor = 1e-9 * blocks_of(w.double(), block).square().sum(-1)
    assert bool((errors[1] <= errors[0] * (1 + 1e-4) + noise_floor).all())


def test_the_least_squares_grid_heeds_the_importance_of_inputs():
    w, importance = noise(16, 64), noise(64, seed=1).square() ** 2
    weighed = []
    for chosen in (None, importance):
        grid = fit_grid(w, 3, (1, 64), clip="mse", importance=chosen)
        error = decode(encode(w, grid, 3, (1, 64)), grid, 3, (1, 64)) - w
        weighed.append(float((error.square() * importance).sum()))
    assert weighed[1] < weighed[0]


@settings(deadline=None)
@given(weight=weights, bits=bits_of, data=st.data())
def test_grids_that_hold_zero_hold_it_exactly(weight, bits, data):
    w, block = weight
    zero_point = data.draw(st.sampled_from(["integer", "none"]))
    clip = data.draw(st.sampled_from(["minmax", "mse"]))
    grid = fit_grid(w, bits, block, zero_point=zero_point, clip=clip)
    zero = zero_points(grid, bits)
    assert torch.equal(zero, zero.round())
    assert bool(((zero >= 0) & (zero < 2**bits)).all())
    pruned = encode(torch.zeros_like(w), grid, bits, block)
    assert torch.equal(decode(pruned, grid, bits, block), torch.zeros_like(w))


def test_a_symmetric_grid_has_no_offsets_and_its_zero_in_the_middle():
    w = noise(8, 32)
    grid = fit_grid(w, 4, (1, 8), zero_point="none")
    assert grid.offsets is None
    assert torch.equal(zero_points(grid, 4), torch.full((8, 4), 8.0))
    top = blocks_of(w, (1, 8)).abs().amax(-1)
    torch.testing.assert_close(grid.scales.float() * 7.5, top, rtol=1e-2, atol=0)


@pytest.mark.parametrize("clip", ["minmax", "mse"])
@pytest.mark.parametrize("zero_point", ["float", "integer", "none"])
@pytest.mark.parametrize("value", [0.0, 0.3, -2.0, 1e-30])
def test_constant_blocks(value, zero_point, clip):
    w = torch.full((4, 16), value)
    grid = fit_grid(w, 4, (2, 8), zero_point=zero_point, clip=clip)
    got = decode(encode(w, grid, 4, (2, 8)), grid, 4, (2, 8))
    assert bool(torch.isfinite(got).all())
    # a grid on bfloat16 steps with its zero fixed ends within half a step of 2⁻⁸ and half a code
    limit = 0.0 if zero_point == "float" and value == 0 else max(abs(value) * 0.08, 1e-9)
    assert float((got - w).abs().max()) <= limit


@given(weight=weights)
def test_blocks_and_spread_agree(weight):
    w, (q, p) = weight
    blocks = blocks_of(w, (q, p))
    assert blocks.shape == (w.shape[0] // q, w.shape[1] // p, q * p)
    largest = spread(blocks.amax(-1), (q, p))
    assert largest.shape == w.shape
    assert bool((w <= largest).all())
    assert torch.equal(blocks[0, 0].view(q, p), w[:q, :p])


@pytest.mark.parametrize("block", BLOCKS)
def test_the_grid_has_the_types_it_is_stored_in(block):
    w = noise(16, 64).to(torch.float16)
    grid = fit_grid(w, 4, block, scale_dtype=torch.float16, offset_dtype=torch.bfloat16)
    assert grid.scales.dtype == torch.float16
    assert grid.offsets.dtype == torch.bfloat16
    assert grid.scales.shape == (16 // block[0], 64 // block[1])
    assert decode(encode(w, grid, 4, block), grid, 4, block).dtype == torch.float32


@given(bits=bits_of, delta=st.floats(-2, 2, width=32))
def test_a_constant_update_is_a_shift_of_the_offset(bits, delta):
    w = noise(4, 32)
    grid = fit_grid(w, bits, (1, 32))
    codes = encode(w, grid, bits, (1, 32))
    moved = Grid(grid.scales, grid.offsets + delta)
    got = decode(codes, moved, bits, (1, 32)) - decode(codes, grid, bits, (1, 32))
    torch.testing.assert_close(got, torch.full_like(got, delta), rtol=0, atol=2e-6 * (1 + abs(delta) + 4))


@pytest.mark.parametrize("bits", BITS)
def test_zero_points_are_where_the_grid_crosses_zero(bits):
    grid = fit_grid(noise(4, 32), bits, (1, 8))
    value = grid.scales.float() * (zero_points(grid, bits) - middle(bits)) + grid.offsets
    assert math.isclose(float(value.abs().max()), 0.0, abs_tol=1e-5)
