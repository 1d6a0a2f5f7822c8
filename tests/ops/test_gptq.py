"""GPTQ against the published algorithm in float64; its loss, its masks, its order, awkward Hessians."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modicum.errors import ConfigError
from modicum.ops.affine import PRUNED, Grid, decode, encode, fit_grid, middle, spread
from modicum.ops.gptq import Hessian, gptq


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs(rows, columns, seed=1):
    """Correlated inputs of very different sizes."""
    mixed = noise(rows, columns, seed=seed) @ (
        torch.eye(columns) + 0.6 * noise(columns, columns, seed=2) / columns**0.5
    )
    return mixed * (1 + 3 * noise(columns, seed=3).abs())


def hessian_of(x):
    h = Hessian(x.shape[1])
    h.add(x)
    return h.matrix()


def published(weight, hessian, bits, block, *, damping=0.01, mask=None, order=None, **fitting):
    """Column by column as in the paper (inverse Hessian, its Cholesky factor, errors pushed at once), float64.

    The grid of a block is fitted in float32 as everywhere.
    """
    w, h = weight.double().clone(), hessian.double().clone()
    columns = range(w.shape[1]) if order is None else order.tolist()
    dead = h.diagonal() == 0
    mean = h.diagonal().mean()
    h.diagonal()[dead] = mean
    h += damping * mean * torch.eye(len(h), dtype=h.dtype)
    index = torch.tensor(list(columns))
    factor = torch.linalg.cholesky(torch.linalg.inv(h[index][:, index]), upper=True)
    (_, p), mid = block, middle(bits)
    if mask is not None:
        w = w * mask
    grid = fit_grid(weight if mask is None else weight * mask, bits, block, **fitting)
    codes, loss, w = torch.zeros_like(weight), 0.0, w[:, index]
    kept = None if mask is None else mask[:, index]
    for step, column in enumerate(columns):
        at = column // p
        if order is None and column % p == 0:
            part = w[:, column : column + p]
            part = part if kept is None else part * kept[:, column : column + p]
            new = fit_grid(part.float(), bits, block, **fitting)
            grid.scales[:, at] = new.scales[:, 0]
            if grid.offsets is not None:
                grid.offsets[:, at] = new.offsets[:, 0]
        s = grid.scales[:, at].double().repeat_interleave(block[0])
        o = 0.0 if grid.offsets is None else grid.offsets[:, at].double().repeat_interleave(block[0])
        steps = ((w[:, step] - o) / s).round().clamp(-mid, mid - 1)
        if kept is not None:
            steps = torch.where(kept[:, step], steps, -o / s + torch.zeros_like(s))
        codes[:, column] = (steps + mid).float()
        error = (w[:, step] - (steps * s + o)) / factor[step, step]
        w[:, step:] -= error.unsqueeze(1) * factor[step, step:]
        loss += float(error.square().sum())
    return codes, grid, loss


def relative_loss(weight, codes, grid, bits, block, x):
    error = (weight - decode(codes, grid, bits, block)) @ x.T
    return float(error.norm() / (weight @ x.T).norm())


def assert_like_published(got, want, weight, bits, block, hessian):
    codes, grid, loss = want
    # a value half way between two codes may fall either way in float32, and then its followers may too
    same = (got.codes.float() == codes).float().mean()
    assert same > 0.97, f"{same:.3f} of the codes"
    assert got.loss == pytest.approx(loss, rel=0.02)
    a, b = (decode(c, g, bits, block) for c, g in ((got.codes, got.grid), (codes.to(torch.uint8), grid)))
    losses = [float(((weight - v) @ hessian @ (weight - v).T).trace()) for v in (a, b)]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


@pytest.mark.parametrize("zero_point", ["float", "integer", "none"])
@pytest.mark.parametrize(
    ("bits", "block"), [(4, (1, 32)), (3, (1, 48)), (2, (8, 4)), (8, (2, 96)), (4, (8, 1))]
)
def test_codes_are_those_of_the_published_algorithm(bits, block, zero_point):
    weight, x = noise(24, 96), inputs(400, 96)
    h = hessian_of(x)
    got = gptq(weight, h, bits, block, zero_point=zero_point, blocksize=40)
    assert_like_published(
        got, published(weight, h, bits, block, zero_point=zero_point), weight, bits, block, h
    )


@pytest.mark.parametrize("block", [(1, 32), (8, 4)])
def test_act_order_keeps_the_columns_and_blocks_in_place(block):
    weight, x = noise(24, 96), inputs(400, 96)
    h = hessian_of(x)
    got = gptq(weight, h, 3, block, act_order=True, blocksize=40)
    order = h.diagonal().argsort(descending=True, stable=True)
    assert_like_published(got, published(weight, h, 3, block, order=order), weight, 3, block, h)
    fixed = fit_grid(weight, 3, block)
    assert torch.equal(got.grid.scales, fixed.scales)
    assert torch.equal(got.grid.offsets, fixed.offsets)


@pytest.mark.parametrize("blocksize", [1, 7, 32, 64, 1000])
def test_the_size_of_the_panels_is_no_part_of_the_result(blocksize):
    weight, h = noise(16, 96), hessian_of(inputs(300, 96))
    for block in ((1, 8), (1, 48), (4, 96)):
        want, got = (gptq(weight, h, 4, block, blocksize=size) for size in (96, blocksize))
        assert (want.codes == got.codes).float().mean() > 0.98
        assert got.loss == pytest.approx(want.loss, rel=0.02)


@settings(deadline=None, max_examples=30)
@given(
    blocks=st.integers(1, 5),
    p=st.sampled_from([1, 4, 13, 32, 70]),
    bits=st.sampled_from([2, 3, 4, 8]),
    clip=st.sampled_from(["minmax", "mse"]),
    act_order=st.booleans(),
    seed=st.integers(0, 9),
)
def test_never_worse_on_the_inputs_than_rounding(blocks, p, bits, clip, act_order, seed):
    weight = noise(96, blocks * p, seed=seed)
    x = inputs(3 * blocks * p + 8, blocks * p, seed=seed + 10)
    h = hessian_of(x)
    got = gptq(weight, h, bits, (1, p), clip=clip, act_order=act_order)
    grid = fit_grid(weight, bits, (1, p), clip=clip)
    rounded = relative_loss(weight, encode(weight, grid, bits, (1, p)), grid, bits, (1, p), x)
    # greedy, so true of many rows together, not of each
    assert relative_loss(weight, *got[:2], bits, (1, p), x) <= 1.03 * rounded + 1e-6
    assert got.codes.dtype == torch.uint8
    assert int(got.codes.max()) < 2**bits


def test_clearly_better_than_rounding_on_real_sizes():
    # inputs of a real layer lie near a plane of fewer dimensions
    weight, x = (
        noise(64, 256),
        noise(1024, 64, seed=1) @ noise(64, 256, seed=2) + 2 * noise(1024, 256, seed=3),
    )
    got = gptq(weight, hessian_of(x), 3, (1, 64))
    grid = fit_grid(weight, 3, (1, 64))
    rounded = relative_loss(weight, encode(weight, grid, 3, (1, 64)), grid, 3, (1, 64), x)
    assert relative_loss(weight, *got[:2], 3, (1, 64), x) < 0.7 * rounded


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("zero_point", ["integer", "none"])
@pytest.mark.parametrize("block", [(1, 32), (8, 4)])
def test_pruned_weights_stay_exactly_zero(block, zero_point, act_order):
    weight, x = noise(24, 96), inputs(400, 96)
    mask = weight.abs() > weight.abs().median()
    options = {"zero_point": zero_point, "act_order": act_order}
    h = hessian_of(x)
    got = gptq(weight, h, 4, block, mask=mask, **options)
    values = decode(got.codes, got.grid, 4, block)
    assert torch.equal(values[~mask], torch.zeros(int((~mask).sum())))
    assert (values[mask] != 0).float().mean() > 0.5
    # without the mask the feedback fills some of them again
    free = gptq(weight * mask, h, 4, block, **options)
    assert bool((decode(free.codes, free.grid, 4, block)[~mask] != 0).any())
    # and the pruning itself is made up for
    pruned = weight * mask
    grid = fit_grid(pruned, 4, block, zero_point=zero_point)
    rounded = encode(pruned, grid, 4, block)
    assert relative_loss(pruned, got.codes, got.grid, 4, block, x) < relative_loss(
        pruned, rounded, grid, 4, block, x
    )
    order = h.diagonal().argsort(descending=True, stable=True) if act_order else None
    want = published(weight, h, 4, block, mask=mask, order=order, zero_point=zero_point)
    assert_like_published(got, want, pruned, 4, block, h)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("block", [(1, 32), (8, 4)])
def test_residuals_are_what_rounding_took_from_the_corrected_weights(block, masked, act_order):
    weight, x = noise(24, 96), inputs(400, 96)
    mask = weight.abs() > weight.abs().median() if masked else None
    options = {"zero_point": "integer", "act_order": act_order, "mask": mask}
    h = hessian_of(x)
    got = gptq(weight, h, 4, block, keep_residuals=True, **options)
    plain = gptq(weight, h, 4, block, **options)
    assert plain.residuals is None
    assert torch.equal(got.codes, plain.codes)
    kept = torch.ones_like(weight, dtype=torch.bool) if mask is None else mask
    assert torch.equal(got.residuals == PRUNED, ~kept)
    # ŵ_i was rounded from w_i + Σ_{j<i} Δ_j R_ji / R_ii, with Δ = W − Ŵ in the order of the columns
    order = h.diagonal().argsort(descending=True, stable=True) if act_order else torch.arange(96)
    turned = order.flip(0)
    damped = h + 0.01 * h.diagonal().mean() * torch.eye(96)
    factor = torch.linalg.cholesky(damped[turned][:, turned].double()).flip(0, 1)
    feedback = (factor / factor.diagonal()).triu(1)
    values = decode(got.codes, got.grid, 4, block).double()
    pruned = (weight * kept).double()
    error = (pruned - values)[:, order]
    target = torch.empty_like(error)
    target[:, :] = pruned[:, order] + error @ feedback
    left = (target - values[:, order]) / spread(got.grid.scales.double(), block)[:, order]
    wanted = (256 * left).round().clamp(-127, 127)
    found = got.residuals[:, order].double()
    assert (found - wanted)[kept[:, order]].abs().max() <= 1
    assert found[kept[:, order]].abs().mean() > 30


@pytest.mark.parametrize(
    "options", [{"zero_point": "float"}, {"zero_point": "integer", "offset_dtype": torch.bfloat16}]
)
def test_a_mask_needs_zero_on_the_grid(options):
    with pytest.raises(ConfigError, match="needs 0 on the grid"):
        gptq(noise(4, 8), torch.eye(8), 4, (1, 8), mask=torch.ones(4, 8, dtype=torch.bool), **options)


def test_columns_without_input_are_rounded_to_nearest():
    weight, x = noise(16, 64), inputs(200, 64)
    x[:, [3, 40]] = 0
    got = gptq(weight, hessian_of(x), 4, (1, 64), act_order=True)
    nearest = encode(weight, got.grid, 4, (1, 64))
    assert torch.equal(got.codes[:, [3, 40]], nearest[:, [3, 40]])
    nothing = gptq(weight, torch.zeros(64, 64), 4, (1, 16))
    grid = fit_grid(weight, 4, (1, 16))
    assert torch.equal(nothing.codes, encode(weight, grid, 4, (1, 16)))
    assert torch.equal(nothing.grid.scales, grid.scales)


def test_a_singular_hessian_is_damped_until_it_has_a_factor():
    weight, x = noise(16, 64), inputs(5, 64)
    x[:, 1] = x[:, 0]
    got = gptq(weight, hessian_of(x), 4, (1, 32), damping=0.0)
    assert bool(torch.isfinite(decode(got.codes, got.grid, 4, (1, 32))).all())
    grid = fit_grid(weight, 4, (1, 32))
    rounded = relative_loss(weight, encode(weight, grid, 4, (1, 32)), grid, 4, (1, 32), x)
    assert relative_loss(weight, *got[:2], 4, (1, 32), x) < 0.5 * rounded


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_hessian_that_is_not_finite_is_refused(value):
    h = torch.eye(8)
    h[2, 2] = value
    with pytest.raises(ConfigError, match="NaN or infinite"):
        gptq(noise(4, 8), h, 4, (1, 8))
    indefinite = torch.eye(8)
    indefinite[0, 1] = indefinite[1, 0] = 1e12
    with pytest.raises(ConfigError, match="no Cholesky factor"):
        gptq(noise(4, 8), indefinite, 4, (1, 8))


def test_number_types_of_the_grid_and_threads_are_left_alone():
    weight, h = noise(8, 32).to(torch.bfloat16), hessian_of(inputs(99, 32))
    before = h.clone()
    got = gptq(weight, h, 4, (1, 16), scale_dtype=torch.float16, offset_dtype=torch.bfloat16)
    assert (got.grid.scales.dtype, got.grid.offsets.dtype) == (torch.float16, torch.bfloat16)
    assert got.grid.scales.shape == (8, 2)
    assert torch.equal(h, before)
    assert isinstance(got.grid, Grid)
    assert torch.get_num_threads() == 1


@pytest.mark.parametrize("columns", [5, 1024, 1500])
def test_a_hessian_is_the_mean_of_outer_products(columns):
    x = noise(60, columns)
    h = Hessian(columns)
    for part in x.view(3, 4, 5, columns):
        h.add(part.to(torch.bfloat16))
    assert h.rows == 60
    kept = x.to(torch.bfloat16).double()
    torch.testing.assert_close(h.matrix().double(), 2 * kept.T @ kept / 60, rtol=1e-5, atol=1e-5)
    assert torch.equal(h.matrix(), h.matrix().T)
    assert not Hessian(3).matrix().any()
