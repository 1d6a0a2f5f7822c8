"""The product of pooled adapters against the formula written out, in every shape of its kernels."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from modicum.adapters.pooled import _Product
from modicum.quant import native

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


def written_out(x, base, scaling, pool, repeat, *factors):
    rows = x.unflatten(-1, (-1, pool)).mean(-1)
    for factor in factors:
        rows = rows @ factor.T
    return base + scaling * rows.repeat_interleave(repeat, -1)


def tensors(pool, repeat, dtype, *, count=2, batch=(2, 3)):
    generator = torch.Generator().manual_seed(pool + 10 * repeat)
    few, out = 6, 10
    widths = [few, 4, out][:: 1 if count == 2 else 2]
    shapes = [(*batch, few * pool), (*batch, out * repeat), *zip(widths[1:], widths[:-1], strict=True)]
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


@pytest.fixture(params=["the library", "without"], autouse=True)
def way(request, monkeypatch):
    """Sums and copies of neighbours by the library, and by products with ones where there is none."""
    if request.param == "without":
        monkeypatch.setattr(native, "_library", lambda: (None, "not wanted here"))
    elif not native.available():
        pytest.skip(f"no library: {native.why_not()}")


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize(("pool", "repeat"), [(1, 1), (2, 2), (1, 3), (4, 1), (3, 8), (32, 5)])
def test_value_and_gradients(pool, repeat, count, dtype):
    x, base, *factors = tensors(pool, repeat, dtype, count=count)
    y = _Product.apply(x, base, 0.75, pool, repeat, *factors)
    grad = torch.randn_like(y)
    found = torch.autograd.grad(y, (x, base, *factors), grad)
    exact = [t.detach().double().requires_grad_() for t in (x, base, *factors)]
    wanted = written_out(*exact[:2], 0.75, pool, repeat, *exact[2:])
    gradients = torch.autograd.grad(wanted, exact, grad.double())
    for one, other in zip((y, *found), (wanted, *gradients), strict=True):
        assert one.dtype == dtype
        assert one.shape == other.shape
        assert (one - other).abs().max() <= TOLERANCE[dtype] * other.abs().max()


def test_nothing_the_size_of_the_input_is_kept():
    x, base, *factors = tensors(2, 2, torch.float32, batch=(50,))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        _Product.apply(x, base, 1.0, 2, 2, *factors)
    large = [t for t in kept if t.shape[0] == x.shape[0]]
    assert [t.shape[1] for t in large] == [x.shape[1] // 2, 4]


def test_inputs_and_gradients_in_other_layouts():
    x, base, *factors = tensors(2, 2, torch.bfloat16, batch=(3, 4))
    turned = x.detach().transpose(0, 1)
    y = _Product.apply(turned, base.detach().transpose(0, 1), 1.0, 2, 2, *factors)
    straight = _Product.apply(turned.contiguous(), base.transpose(0, 1).contiguous(), 1.0, 2, 2, *factors)
    assert torch.equal(y, straight)
    for one, other in zip(
        torch.autograd.grad(y.sum(), factors), torch.autograd.grad(straight.sum(), factors), strict=True
    ):
        assert torch.equal(one, other)


def test_compiled_and_checkpointed():
    x, base, *factors = tensors(2, 2, torch.float32)

    torch.compiler.reset()  # how often other tests compiled the same code counts

    def call(x):
        return _Product.apply(x, base, 0.5, 2, 2, *factors)

    def gradients(run):
        y = run(x)
        return y, *torch.autograd.grad(y.square().sum(), (x, *factors))

    wanted = gradients(call)
    for run in (
        lambda x: checkpoint(call, x, use_reentrant=False),
        torch.compile(call, fullgraph=True, backend="aot_eager"),
    ):
        for one, other in zip(gradients(run), wanted, strict=True):
            assert torch.allclose(one, other, rtol=1e-5, atol=1e-5)


def test_second_derivatives_are_refused():
    x, base, *factors = tensors(2, 2, torch.float32)
    (grad,) = torch.autograd.grad(
        _Product.apply(x, base, 1.0, 2, 2, *factors).square().sum(), x, create_graph=True
    )
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
