"""The projective maths against Eq. 2-4 evaluated literally in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ippro_tp.estimators.projective import SCORE_LIMIT, embed, pro_excess, pro_score, tan_angle


def sums(filters, grad):
    norm = filters.norm(dim=1)
    return norm, (filters * grad).sum(1), grad.norm(dim=1)


def random_case(seed, channels=32, n=9, scale=0.1):
    g = torch.Generator().manual_seed(seed)
    f = torch.randn(channels, n, generator=g, dtype=torch.float64)
    grad = scale * torch.randn(channels, n, generator=g, dtype=torch.float64)
    return f, grad, scale * torch.randn(channels, generator=g, dtype=torch.float64)


@given(st.integers(0, 10_000), st.floats(1e-4, 1e3))
@settings(max_examples=60, deadline=None)
def test_excess_is_tan_squared_minus_one(seed, lam):
    f, grad, d = random_case(seed)
    expected = pro_score(f, grad, d, lam) ** 2 - 1
    torch.testing.assert_close(pro_excess(*sums(f, grad), d, lam), expected, rtol=1e-6, atol=1e-9)


@given(st.integers(0, 10_000), st.floats(1e-6, 1e6))
@settings(max_examples=30, deadline=None)
def test_every_filter_is_embedded_at_45_degrees(seed, scale):
    f = random_case(seed)[0] * scale
    torch.testing.assert_close(tan_angle(embed(f)), torch.ones(32, dtype=torch.float64))


def test_tiny_steps_rank_in_float32_as_in_float64():
    f, grad, d = random_case(3, channels=256)
    exact = pro_excess(*sums(f, grad), d, 1e-8).argsort()
    single = pro_excess(*(x.float() for x in (*sums(f, grad), d)), 1e-8)
    assert single.dtype == torch.float32
    # Neighbours whose exact values differ by less than float32 resolves may swap; nothing else.
    assert (single.argsort() == exact).float().mean() > 0.97
    literal = pro_score(f.float(), grad.float(), d.float(), 1e-8)
    assert literal.unique().numel() < 8, "the literal formula was expected to lose its digits here"


def test_zero_step_is_the_limit_of_small_steps():
    f, grad, d = random_case(5)
    limit = pro_excess(*sums(f, grad), d, 0.0)
    torch.testing.assert_close(pro_excess(*sums(f, grad), d, 1e-9) / 2e-9, limit, rtol=1e-5, atol=1e-8)
    norm, dot, _ = sums(f, grad)
    torch.testing.assert_close(limit, (norm * d - dot) / norm**2)


@pytest.mark.parametrize("lam", [0.0, 1e-8, 1.0, 1e3])
def test_dead_filters_come_first_and_nothing_is_nan(lam):
    f, grad, d = random_case(7, scale=1e-3)
    f[4], grad[5], d[6] = 0.0, 0.0, 0.0
    f[7], grad[7], d[7] = 0.0, 0.0, 0.0
    scores = pro_excess(*sums(f, grad), d, lam)
    assert scores.isfinite().all()
    assert set(scores.argsort()[:2].tolist()) == {4, 7}


def test_denominator_through_zero_is_finite_and_large():
    f, grad = torch.ones(1, 4), torch.zeros(1, 4)
    scores = pro_excess(*sums(f, grad), torch.tensor([4.0]), 0.5)  # |F| - lam d = 2 - 0.5 * 4 = 0
    assert scores.item() == pytest.approx(SCORE_LIMIT)
    assert (scores * 2048).isfinite().all()
