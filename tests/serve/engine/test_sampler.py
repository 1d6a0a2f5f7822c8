"""Tokens are drawn from the right distribution, and each row by its own rules."""

from __future__ import annotations

import pytest
import torch

from modicum.serve.engine.sampler import draw


def _draw(scores, temperature=1.0, top_p=1.0, uniform=None, count=None):
    uniform = torch.tensor(uniform, dtype=torch.float64)
    rows = len(uniform)
    return draw(
        torch.as_tensor(scores, dtype=torch.float32).expand(rows, -1),
        torch.full((rows,), temperature),
        torch.full((rows,), top_p),
        uniform,
    ).tolist()


def test_tokens_are_drawn_by_inversion_in_the_order_of_the_vocabulary():
    scores = torch.tensor([0.1, 0.4, 0.0, 0.5]).log()
    assert _draw(scores, uniform=[0.0, 0.0999, 0.1001, 0.4999, 0.5001, 0.999, 1 - 1e-17]) == [
        0,
        0,
        1,
        1,
        3,
        3,
        3,
    ]


def test_a_token_that_is_ruled_out_is_never_drawn():
    scores = torch.tensor([-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf])
    assert set(_draw(scores, uniform=torch.linspace(0, 1, 101)[:-1].tolist())) == {1, 3}
    assert _draw(scores, uniform=[0.0, 1 - 1e-16]) == [1, 3]


@pytest.mark.parametrize(
    ("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (2.0, 1.0), (1.0, 0.7), (0.7, 0.5)]
)
def test_shares_are_those_of_temperature_and_top_p(temperature, top_p):
    scores = torch.randn(50, generator=torch.Generator().manual_seed(1)) * 2
    shares = (scores / temperature).softmax(-1)
    order = shares.argsort(descending=True)
    kept = int((shares[order].cumsum(-1) < top_p).sum()) + 1
    shares[order[kept:]] = 0
    shares /= shares.sum()
    count = 20_000
    drawn = _draw(scores, temperature, top_p, uniform=((torch.arange(count) + 0.5) / count).tolist())
    found = torch.bincount(torch.tensor(drawn), minlength=50) / count
    torch.testing.assert_close(found, shares, atol=2 / count, rtol=0)


def test_the_likeliest_token_always_stays():
    scores = torch.tensor([3.0, 3.0, 1.0])
    assert set(_draw(scores, top_p=1e-9, uniform=[0.0, 0.5, 0.99])) == {0}
    assert set(_draw(scores, temperature=1e-30, uniform=[0.0, 0.4])) == {0}
    assert set(_draw(torch.tensor([0.0, 80.0, 79.0]), temperature=1e-30, uniform=[0.1, 0.9])) == {1}


def test_rows_have_rules_of_their_own_and_company_changes_nothing():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(20, 1000, generator=generator)
    temperatures, top_p = (
        torch.rand(20, generator=generator) + 0.1,
        1 - 0.9 * torch.rand(20, generator=generator),
    )
    top_p[::3] = 1.0
    uniform = torch.rand(20, generator=generator, dtype=torch.float64)
    together = draw(scores, temperatures, top_p, uniform)
    for i in range(20):
        one = slice(i, i + 1)
        assert draw(scores[one], temperatures[one], top_p[one], uniform[one]) == together[i]
